"""The recipes: what differs between them, how large they are, and each from shards to scores."""

import inspect
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import logs
import recipes
import sample
from benchmark import Task
from config import Config, flatten, replace
from counts import parameter_count
from distributed import World
from evaluation import evaluate
from fineweb import FineWebEdu
from likelihood import encode_request
from modern import build_model
from packing import plan
from scoring import Scorer
from tests.test_scoring import plain
from tests.tiny import ALPHABET, CHARACTERS, make_data, tiny_config
from train import train

ALONE = World(0, 1, torch.device("cpu"))
ORDERS = ["sequential", "shuffle_documents", "shuffle_windows"]

# Each of the seed's experiments, and where it differs from the one before, at 124m.
EXPERIMENTS = {
    "gpt2-periodicity-fix": {"train.order": "shuffle_documents"},
    "gpt2-lr-inc": {"optim.lr": 1.8e-3, "optim.warmup": 285 / 19073},
    "gpt2-global-datafix": {"train.order": "shuffle_windows"},
    "gpt2-rope": {"model.positions": "rotary"},
    "gpt2-swiglu": {"model.activation": "swiglu"},
}


def differences(one: Config, other: Config) -> dict:
    """Return the fields of `other` that are not those of `one`, but for the recipe's name."""
    before, after = flatten(one), flatten(other)
    return {name: after[name] for name in after if name != "recipe" and before[name] != after[name]}


def test_the_first_experiment_has_gpt3s_rates():
    config = recipes.build("gpt2-baseline", "124m")
    found = differences(Config(), config)
    assert {name: found[name] for name in found if not name.startswith("train.")} == {
        "optim.warmup": 715 / 19073
    }
    assert (config.optim.lr, config.optim.schedule, config.optim.final_lr) == (6e-4, "cosine", 0.1)
    assert (config.train.order, config.model.positions) == ("sequential", "learned")
    # Of the seed's 19,073 updates, and of the 18,849 there are.
    assert [round(config.optim.warmup * total) for total in (19_073, 18_849)] == [715, 707]


@pytest.mark.parametrize("size", recipes.SIZES)
def test_each_experiment_differs_from_the_one_before_as_the_seeds_did(size):
    names = ["gpt2-baseline", *EXPERIMENTS]
    base = recipes.build(names[0], size).optim.lr
    for before, name in zip(names, EXPERIMENTS, strict=False):
        found = differences(recipes.build(before, size), recipes.build(name, size))
        expected = dict(EXPERIMENTS[name])
        if "optim.lr" in expected:
            expected["optim.lr"] = pytest.approx(3 * base)
        assert found == expected
    assert recipes.build("gpt2-lr-inc", "124m").optim.lr == pytest.approx(1.8e-3)


@pytest.mark.parametrize("size", recipes.SIZES)
def test_gpt3_settings_have_twice_the_context_and_four_epochs(size):
    rope, config = recipes.build("gpt2-rope", size), recipes.build("gpt3-settings", size)
    assert differences(rope, config) == {
        "model.block_size": 2 * rope.model.block_size,
        "train.tokens": 4 * rope.train.tokens,
    }
    assert recipes.build("gpt3-settings", "124m").model.block_size == 2048


@pytest.mark.parametrize("size", recipes.SIZES)
def test_a_longer_context_takes_no_more_memory(size):
    table, config = recipes.SIZES[size], recipes.build("gpt3-settings", size)
    micro_batch = recipes.fit_micro_batch(config, 1).train.micro_batch
    assert micro_batch * config.model.block_size <= table.max_micro_batch * table.block_size


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_a_docstring_says_command_cost_and_expected_result(recipe):
    text = inspect.getdoc(recipes.RECIPES[recipe])
    found = {name: re.search(rf"(?m)^{name}: (\S.*)", text) for name in ("Cost", "Expected")}
    assert all(found.values()), found
    command = re.search(r"(?m)^Command: `(.*?)`", text)[1]
    assert re.search(r"main\.py(.*)", command)[1].split()[:1] == (
        [] if recipe == "gpt2" else [recipe]
    )


@pytest.mark.parametrize("recipe", recipes.RECIPES)
@pytest.mark.parametrize("size", ["nano", "124m"])
def test_parameters_are_counted_as_they_are_built(recipe, size):
    config = recipes.build(recipe, size).model
    with torch.device("meta"):
        model = build_model(config)
    in_memory = sum(parameter.numel() for parameter in model.parameters())
    heads = 1 if config.tied else 2
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd * heads
    assert in_memory - padding == parameter_count(config)
    # What modern is made of is for experiments to say; tests/test_modern.py has its counts.
    if config.architecture == "gpt2":
        golden = {"nano": (7_259_008, 7_226_240), "124m": (124_439_808, 123_653_376)}[size]
        swiglu = {"nano": 7_231_040, "124m": 123_665_664}[size]
        expected = golden[config.positions == "rotary"]
        assert parameter_count(config) == (swiglu if recipe == "gpt2-swiglu" else expected)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


def small(recipe: str, data: Path, runs: Path) -> Config:
    """Return a recipe with two layers of width 32, six updates, and an epoch of about four."""
    config = recipes.build(recipe, "nano")
    changes = {
        "data": str(data),
        "name": "tiny",
        **{"model.n_layer": 2, "model.n_head": 2, "model.n_embd": 32},
        # The recipe's own context, but shorter.
        "model.block_size": config.model.block_size // 16,
        "model.vocab_size": len(ALPHABET) + 1,
        **{"train.updates": 6, "train.tokens_per_update": 2048, "train.micro_batch": 16},
        **{"train.val_tokens": 1024, "train.val_interval": 0, "train.checkpoint_interval": 0},
        **{"train.keep_checkpoints": 9, "train.sample_tokens": 4, "train.eval_interval": 0},
        **{"train.dtype": "float32", "train.device": "cpu", "train.runs_dir": str(runs)},
    }
    return replace(config, changes)


def run_training(config: Config, resumed: Path | None = None) -> Path:
    run = Path(config.train.runs_dir) / config.name
    if resumed is None:
        logs.create_run(run, config)
    train(config, run, ALONE, resumed)
    return run


def lines(run: Path, kind: str, *keys: str) -> list[tuple]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in keys) for line in found if line["kind"] == kind]


def assert_same_end(run: Path, straight: Path, step: int) -> None:
    """Bit for bit the same weights, optimizer state, losses and rates."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(checkpoint.checkpoint_path(r, step) / name) for r in (straight, run))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    keys = ("step", "tokens", "loss", "lr", "grad_norm")
    assert lines(run, "train", *keys) == lines(straight, "train", *keys)


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_each_recipe_trains_resumes_reloads_samples_and_evaluates(recipe, data, tmp_path):
    config = small(recipe, data, tmp_path / "straight")
    straight = run_training(config)
    # An epoch ends between the interruption and the end.
    windows = FineWebEdu(data, "train", config.model.block_size)
    assert 3 < len(windows) // (2048 // config.model.block_size) < 6
    losses = [loss for (loss,) in lines(straight, "train", "loss")]
    assert losses[-1] < losses[0]
    changes = {"train.runs_dir": str(tmp_path / "resumed")}
    run = run_training(replace(config, {**changes, "train.stop_at": 3}))
    run_training(replace(config, changes), checkpoint.newest(run))
    assert_same_end(run, straight, 6)
    assert lines(run, "val", "step", "loss")[-1] == lines(straight, "val", "step", "loss")[-1]
    # Stored without the rows that only fill up memory.
    stored = load_file(checkpoint.newest(run) / "model.safetensors")
    heads = {name: len(stored[name]) for name in ("wte.weight", "lm_head.weight") if name in stored}
    assert set(heads.values()) == {len(ALPHABET) + 1} and len(heads) == 2 - config.model.tied
    assert "## Step 6" in (run / "samples.md").read_text()
    model, tokenizer, begins_with_eot = sample.load(str(run))
    assert tokenizer.vocab_size == len(ALPHABET) + 1 and begins_with_eot
    _assert_validation_loss(model, data, lines(run, "val", "loss")[-1][0])
    (text,) = sample.generate_text(str(run), ["the cat"], max_tokens=5)
    assert len(text) <= 5 and set(text) <= set(ALPHABET)
    _assert_evaluates(model)


@torch.no_grad()
def _assert_validation_loss(model, data: Path, expected: float) -> None:
    length = model.config.block_size
    windows = FineWebEdu(data, "val", length).windows(np.arange(1024 // length))
    logits, _ = model.eval()(windows[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def _assert_evaluates(model) -> None:
    endings = ["a mat.", "again", "home the cat sat and ran"]
    requests = [encode_request(CHARACTERS, f"the {n} ", endings) for n in ("cat", "mat", "dog on")]
    task = Task(
        *("tiny", "made up", Path("nowhere"), False, [0, 1, 2], requests),
        judge=lambda answer, scores: {
            "acc": float(scores.logprobs.argmax() == answer),
            "logprobs": scores.logprobs,
        },
        summarize=lambda facts: {"acc": float(np.mean([fact["acc"] for fact in facts]))},
        headline="acc",
    )
    length, vocab_size = model.config.block_size, model.config.vocab_size
    layout = plan(requests, length, 4 * length, vocab_size)
    result = evaluate(Scorer(model, ALONE, torch.float32), task, layout)
    expected = [plain(model, request, length).logprobs for request in requests]
    for fact, logprobs in zip(result.facts, expected, strict=True):
        np.testing.assert_allclose(fact["logprobs"], logprobs, rtol=0, atol=1e-4)
    right = [logprobs.argmax() == answer for answer, logprobs in enumerate(expected)]
    assert result.metrics == {"acc": np.mean(right)}


@pytest.mark.parametrize("order", ORDERS)
def test_resuming_at_the_end_of_an_epoch_is_exact_in_every_order(data, tmp_path, order):
    """The first update after it is the first of a new epoch, whose order is drawn anew."""
    updates = len(FineWebEdu(data, "train", 32)) // 64
    changes = {"tokens_per_update": 2048, "checkpoint_interval": 0, "sample_tokens": 0}
    config = tiny_config(data, tmp_path / "a", order=order, updates=updates + 2, **changes)
    straight = run_training(config)
    assert [path.name for path in checkpoint.all_checkpoints(straight)] == [
        f"step_{step:06d}" for step in (updates, updates + 2)
    ]
    run = shutil.copytree(straight, tmp_path / "b" / "tiny")
    shutil.rmtree(checkpoint.checkpoint_path(run, updates + 2))
    changes = {"train.runs_dir": str(tmp_path / "b")}
    run_training(replace(config, changes), checkpoint.newest(run))
    assert_same_end(run, straight, updates + 2)
    assert len(lines(run, "train", "step")) == updates + 2
