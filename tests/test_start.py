"""--init: a run that begins with another model's weights."""

from pathlib import Path

import pytest
import torch

import main
import start
from checkpoint import checkpoint_path
from command_line import parse
from config import ModelConfig, UserError, changed_identity, identity_digest, replace
from main import Arguments
from model import GPT
from sample import load
from tests.test_train import assert_same_tensors, metrics, run_training, weights
from tests.tiny import ALPHABET, make_data, tiny_config
from tokenizer import CharTokenizer, gpt2_tokenizer

# What main.py is given for a tiny run.
TINY = (
    *("--train.updates", "4", "--train.tokens-per-update", "64", "--train.val-tokens", "1024"),
    *("--train.sample-tokens", "0", "--train.dtype", "float32", "--train.device", "cpu"),
    *("--train.eval-interval", "0"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def source(data, tmp_path_factory) -> Path:
    return run_training(tiny_config(data, tmp_path_factory.mktemp("source")))


def config_of(*args: str):
    typed = [*args, *TINY]
    return main.new_config(typed, parse(Arguments, typed, Arguments()))


def test_a_run_begins_where_its_source_ended(data, source, tmp_path):
    config = config_of("--init", str(source), "--data", str(data))
    config = main.complete_config(replace(config, {"train.runs_dir": str(tmp_path)}))
    run = run_training(replace(config, {"train.micro_batch": 1}))
    before, after = (metrics(path, "val") for path in (source, run))
    assert after[0]["loss"] == pytest.approx(before[-1]["loss"], abs=1e-6)
    assert config.name == f"gpt2-124m-from-{source.name}"


def test_it_is_resumed_from_its_own_checkpoint_and_is_another_run(data, source, tmp_path):
    config = tiny_config(data, tmp_path, updates=8)
    config = replace(config, {"init": str(source)})
    straight = run_training(replace(config, {"name": "straight"}))
    broken = replace(config, {"name": "broken"})
    run_training(replace(broken, {"train.stop_at": 4}))
    run_training(broken, checkpoint_path(tmp_path / "broken", 4))
    assert_same_tensors(weights(straight, 8), weights(tmp_path / "broken", 8))
    plain = replace(config, {"init": ""})
    assert identity_digest(plain) != identity_digest(config)
    assert changed_identity(plain, config) == [f"init  -> {source}"]


def test_the_shape_is_the_sources_and_dropout_is_free(source):
    config = config_of("--init", str(source), "--model.dropout", "0.1", "--model.block-size", "16")
    assert (config.model.n_layer, config.model.n_embd, config.model.vocab_size) == (2, 32, 30)
    assert (config.model.dropout, config.model.block_size) == (0.1, 16)


def test_a_shorter_context_takes_the_first_positions(data, source, tmp_path):
    config = replace(tiny_config(data, tmp_path, block_size=16), {"init": str(source)})
    model, theirs = GPT(config.model), load(str(source))[0].state_dict()
    start.load_start(config, model)
    assert torch.equal(model.wpe.weight, theirs["wpe.weight"][:16])
    assert torch.equal(model.h[0].attn.c_attn.weight, theirs["h.0.attn.c_attn.weight"])


def test_the_size_is_that_of_the_shape_where_there_is_one(monkeypatch):
    shape = ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=64)
    found = GPT(shape), gpt2_tokenizer(), False
    monkeypatch.setattr(start, "load", lambda *_: found)
    config = config_of("--init", "gpt2")
    # The batch and the rate of that size come with it.
    assert (config.size, config.model.n_embd, config.optim.lr) == (
        "nano",
        128,
        pytest.approx(5e-3 / 3),
    )
    assert config_of("--init", "gpt2", "--size", "350m").size == "350m"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["modern"], "The recipe modern has model.architecture modern, but .* has gpt2"),
        (["gpt2-rope"], "positions rotary, but .* has learned"),
        (["--model.n-layer", "3"], "model.n_layer 3 does not fit .*, which has 2"),
        (["--model.block-size", "64"], "model.block_size 64 does not fit .*, which has 32"),
        (["--model.no-bias"], "model.bias False does not fit"),
    ],
)
def test_another_shape_is_refused(source, words, sentence):
    with pytest.raises(UserError, match=sentence):
        config_of(*words, "--init", str(source))


def test_data_of_another_vocabulary_is_refused(data, source, tmp_path):
    characters = CharTokenizer(ALPHABET + "!")
    more = make_data(tmp_path / "more", tokenizer=characters)
    config = config_of("--init", str(source), "--data", str(more))
    with pytest.raises(UserError, match=r"a vocabulary of 31 ids, but .* one of 30"):
        main.complete_config(config)
    assert start.check_data(replace(config, {"data": str(data)})) is None
    # As many characters, but others.
    mixed = CharTokenizer("".join(reversed(ALPHABET)))
    mixed = make_data(tmp_path / "mixed", tokenizer=mixed)
    with pytest.raises(UserError, match=r"30 ids of the tokenizer .*, others"):
        start.check_data(replace(config, {"data": str(mixed)}))


def test_a_source_that_is_not_there_is_one_sentence():
    with pytest.raises(UserError, match="nowhere"):
        config_of("--init", "nowhere")
