"""Configs: JSON and back, checks, divisibility, what a resumed run may change."""

import contextlib
import dataclasses
import json
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import config as c
import main
import recipes
from config import Config, UserError, from_json, replace, to_json
from utils import parse


@given(
    st.integers(1, 64),
    st.floats(1e-6, 1.0),
    st.sampled_from(["adamw", "muon"]),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.text(st.characters(exclude_categories=["Cs"]))).map(tuple),
)
def test_json_round_trip(layers, lr, optimizer, name, tasks):
    changes = {
        "train.eval_tasks": tasks,
        "model.n_layer": layers,
        "optim.lr": lr,
        "optim.optimizer": optimizer,
        "name": name,
    }
    config = replace(Config(), changes)
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": {"n_layers": 3}}, "does not know: model.n_layers"),
        ({"rows": "packed"}, "does not know: rows"),
        ({"model": {"n_layer": "three"}}, "Expected `int`, got `str` - at `$.model.n_layer`"),
        ({"train": {"shuffle": "random"}}, "Invalid enum value 'random' - at `$.train.shuffle`"),
        ({"train": {"seed": True}}, "Expected `int`, got `bool` - at `$.train.seed`"),
        ({"train": {"eval_tasks": ["lambada", 3]}}, "`$.train.eval_tasks[1]`"),
        ({"train": {"eval_interval": -1}}, "Expected `int` >= 0 - at `$.train.eval_interval`"),
        ({"model": 3}, "Expected `object`, got `int` - at `$.model`"),
        ({"model": {"n_head": 7}}, "must be a multiple of model.n_head 7"),
    ],
)
def test_a_config_that_does_not_fit_is_one_sentence(change, sentence):
    raw = dataclasses.asdict(Config())
    for key, value in change.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=re.escape(sentence)):
        from_json(json.dumps(raw), "here")
    for text in ("{", "[" * 100_000, "\udcff", '{"name": "\\udcff"}'):
        with pytest.raises(UserError, match=r"^here: "):
            from_json(text, "here")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train.log_interval": 0}, "train.log_interval cannot be 0: expected `int` >= 1"),
        ({"train.seed": 10**23}, "train.seed cannot be 1"),
        ({"optim.lr": math.nan}, "optim.lr cannot be nan"),
        ({"train.epochs": 1e300}, "train.epochs cannot be 1e+300"),
        ({"train.timeout": math.inf}, "train.timeout cannot be inf"),
        ({"train.trackers": ("mlflow",)}, "train.trackers cannot be ('mlflow',)"),
        ({"model.attention_dropout": 1.0}, "model.attention_dropout cannot be 1.0"),
        ({"model.vocab_size": 65_537}, "model.vocab_size cannot be 65537"),
        ({"model.pos_emb": "rope", "model.n_head": 768}, "even head size, not 1"),
        ({"model.architecture": "modern"}, "add --model.no-bias"),
        (
            {"model.logit_softcap": 15.0},
            "model.logit_softcap can only be set with --model.architecture",
        ),
        ({"model.tie_embeddings": False}, "model.tie_embeddings can only be set with"),
        ({"train.batch_tokens": 524_000}, "as 523264 and 524288 are"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(changes, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        replace(Config(), changes)


def test_changes_are_applied_together():
    changes = {"model.architecture": "modern", "model.bias": False, "model.qk_norm": True}
    changes |= {"model.block_size": 100, "train.batch_tokens": 1000, "name": "x"}
    config = replace(Config(), changes)
    assert (config.sequences_per_step, config.model.bias, config.name) == (10, False, "x")
    assert c.flatten(config)["model.qk_norm"] is True and len(c.flatten(config)) == len(
        c.flatten(Config())
    )


def test_accumulation_is_exact_or_refused():
    config = recipes.build("gpt2")  # 512 sequences a step
    assert replace(config, {"train.micro_batch_size": 64}).accumulation_steps(8) == 1
    assert replace(config, {"train.micro_batch_size": 64}).accumulation_steps(1) == 8
    with pytest.raises(
        UserError, match=r"3 processes cannot share a step of 512 .* valid are 1, 2, 4, 8, 16"
    ):
        config.sequences_per_rank(3)
    with pytest.raises(
        UserError, match=r"micro_batch_size 48 does not divide .* 64 sequences; valid are 1, 2, 4"
    ):
        replace(config, {"train.micro_batch_size": 48}).accumulation_steps(8)


def test_divisors():
    for number in (1, 2, 12, 16, 97, 2**20 * 3):
        assert c.divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_length_of_a_run():
    sequences = 9_650_967
    flagship = recipes.build("gpt2")
    assert flagship.total_steps(sequences) == 18_849
    assert replace(flagship, {"train.epochs": 2.0}).total_steps(sequences) == 37_698
    assert replace(flagship, {"train.steps": 5}).total_steps(sequences) == 5
    with pytest.raises(UserError, match="less than a step of 512"):
        flagship.total_steps(100)


def test_a_resumed_run_may_change_how_it_is_computed_but_not_what():
    config = Config()
    free = {"train.micro_batch_size": 2, "train.dtype": "float32", "train.device": "cpu"}
    free |= {"train.eval_interval": 10, "train.eval_tasks": ("lambada",), "train.stop_at_step": 3}
    free |= {"train.runs_dir": "x", "train.parallel": "fsdp", "name": "y"}
    assert c.changed_fields(config, replace(config, free)) == []
    fixed = {"model.n_layer": 2, "optim.lr": 1.0, "train.seed": 7, "init_from": "z"}
    assert c.changed_fields(config, replace(config, fixed)) == [
        "model.n_layer 12 -> 2",
        "optim.lr 0.0006 -> 1.0",
        "train.seed 1337 -> 7",
        "init_from  -> z",
    ]


def test_gpt2_in_numbers():
    model = Config().model
    assert (model.num_params, model.padded_vocab_size, model.head_size) == (124_439_808, 50_304, 64)
    assert model.flops_per_token == pytest.approx(0.86e9, rel=0.01)
    assert replace(Config(), {"model.activation": "swiglu"}).model.mlp_width == 2048


# No lone surrogates: msgspec refuses them by their place in the text.
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted(c.flatten(Config())))


@given(st.text() | JSON.map(json.dumps))
def test_whatever_a_config_file_holds_a_mistake_is_one_sentence(text):
    with contextlib.suppress(UserError):
        from_json(text)


@given(FIELDS, JSON)
def test_any_value_in_any_field_is_taken_whole_or_refused_by_name(name, value):
    raw = json.loads(to_json(Config()))
    group, _, leaf = name.rpartition(".")
    (raw[group] if group else raw)[leaf] = value
    try:
        config = from_json(json.dumps(raw))
    except UserError as error:
        assert "\n" not in str(error)
        assert leaf in str(error) or "malformed" in str(error), "NaN and Infinity are no JSON"
    else:
        taken = c.flatten(config)[name]
        assert (list(taken) if isinstance(taken, tuple) else taken) == value
        assert from_json(to_json(config)) == config


def test_every_field_says_what_it_is_in_help(capsys, monkeypatch):
    """Beside the field or under it, each has a sentence that tyro finds."""
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        parse(main.Args, ["--help"])
    shown = capsys.readouterr().out
    for name in c.flatten(Config()):
        if "." in name:
            option = f"--{name.replace('_', '-')}"
            said = re.search(rf"{option}[ ,][^│]*?\s{{2,}}([A-Za-z][^│]+) \(default:", shown)
            assert said, option
