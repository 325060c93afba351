"""The recipes: what differs between them, how large they are, and each trained and resumed."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import recipes
import sample
from config import Config, UserError, flatten, replace
from fineweb import FineWebEdu
from modern import build_model
from tests.runs import assert_same_end, column, go_on, metrics, run_training
from tests.tiny import ALPHABET, make_data
from training import checkpoint
from training.setup import with_micro_batch

# Each of the seed's experiments, and where it differs from the one before, at 124m.
EXPERIMENTS = {
    "gpt2-periodicity-fix": {"train.shuffle": "documents"},
    "gpt2-lr-inc": {"optim.lr": 1.8e-3, "optim.warmup_frac": 285 / 19073},
    "gpt2-global-datafix": {"train.shuffle": "sequences"},
    "gpt2-rope": {"model.pos_emb": "rope"},
    "gpt2-swiglu": {"model.activation": "swiglu"},
}


def differences(one: Config, other: Config) -> dict:
    """Return the fields of `other` that are not those of `one`, but for the recipe's name."""
    before, after = flatten(one), flatten(other)
    return {name: after[name] for name in after if name != "recipe" and before[name] != after[name]}


@pytest.mark.parametrize("recipe", recipes.RECIPES)
@pytest.mark.parametrize("size", recipes.SIZES)
def test_every_recipe_runs_at_every_size(recipe, size):
    config = recipes.build(recipe, size)
    assert (config.recipe, config.size) == (recipe, size)
    assert with_micro_batch(config, 2).accumulation_steps(2) >= 1


def test_the_flagship_has_the_settings_it_is_known_by():
    config = recipes.build("gpt2")
    assert config.size == "124m" and config.data == "fineweb-edu"
    assert config.optim.lr == pytest.approx(2e-3)
    assert round(config.optim.warmup_frac * 18_849) == 750
    assert (config.optim.weight_decay, config.optim.final_lr_frac) == (0.1, 0.1)
    assert config.train.shuffle == "sequences"
    assert config.train.tokens // config.train.batch_tokens == 18_849
    assert (config.train.eval_interval, config.train.eval_tasks) == (250, ("hellaswag",))
    assert recipes.build("gpt2", "nano").train.eval_interval == 0


@pytest.mark.parametrize("depth", [2, 3, 4, 6, 8])
def test_sizes_by_depth(depth):
    config = recipes.build("gpt2-baseline", f"d{depth}")
    model, nano = config.model, recipes.build("gpt2-baseline", "nano")
    assert (model.n_layer, model.n_embd, model.head_size, model.block_size) == (
        *(depth, 64 * depth),
        *(64, 256),
    )
    assert config.optim.lr == pytest.approx(nano.optim.lr * nano.model.n_embd / model.n_embd)
    # 20 tokens for each parameter of the matrices in the blocks.
    assert config.train.tokens == 20 * 12 * depth * model.n_embd**2
    assert config.train.eval_interval == 0 and config.train.val_interval > 0


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UserError, match="no recipe 'quikstart'; did you mean quickstart"):
        recipes.build("quikstart")
    with pytest.raises(UserError, match="no size '125m'; did you mean 124m"):
        recipes.build("gpt2", "125m")


def test_the_first_experiment_has_gpt3s_rates():
    config = recipes.build("gpt2-baseline", "124m")
    found = differences(Config(), config)
    assert {name: found[name] for name in found if not name.startswith("train.")} == {
        "optim.warmup_frac": 715 / 19073
    }
    assert (config.optim.lr, config.optim.schedule) == (6e-4, "cosine")
    assert (config.train.shuffle, config.model.pos_emb) == ("none", "learned")
    # Of the seed's 19,073 steps, and of the 18,849 there are.
    assert [round(config.optim.warmup_frac * total) for total in (19_073, 18_849)] == [715, 707]


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
    rope, config = recipes.build("gpt2-rope", size), recipes.build("gpt3-settings", size)
    assert differences(rope, config) == {
        "model.block_size": 2 * rope.model.block_size,
        "train.tokens": 4 * rope.train.tokens,
    }


def test_the_micro_batch_is_what_is_worth_computing_and_divides():
    flagship = recipes.build("gpt2")
    sizes = [with_micro_batch(flagship, n).train.micro_batch_size for n in (1, 8, 64, 512)]
    assert sizes == [16, 16, 8, 1]
    on_gpu = [with_micro_batch(flagship, n, "cuda").train.micro_batch_size for n in (1, 8, 64)]
    assert on_gpu == [64, 64, 8]
    # A longer context takes no more memory.
    longer = recipes.build("gpt3-settings")
    assert with_micro_batch(longer, 1, "cuda").train.micro_batch_size == 32
    nano = recipes.build("shakespeare-char")
    assert with_micro_batch(nano, 1).train.micro_batch_size == 32
    given = replace(flagship, {"train.micro_batch_size": 256})
    assert with_micro_batch(given, 2, "cuda") == given
    with pytest.raises(UserError, match="does not divide"):
        with_micro_batch(given, 4)


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_a_docstring_says_command_cost_and_expected_result(recipe):
    text = inspect.getdoc(recipes.RECIPES[recipe])
    assert re.search(r"Cost: \S", text) and re.search(r"Expected: \S", text)
    command = re.search(r"(?m)^Command: `(.*?)`", text)[1]
    assert re.search(r"main\.py(.*)", command)[1].split()[:1] == (
        [] if recipe == "gpt2" else [recipe]
    )


@pytest.mark.parametrize("recipe", recipes.RECIPES)
@pytest.mark.parametrize("size", ["nano", "d3", "124m"])
def test_parameters_are_counted_as_they_are_built(recipe, size):
    config = recipes.build(recipe, size).model
    with torch.device("meta"):
        model = build_model(config)
    in_memory = sum(parameter.numel() for parameter in model.parameters())
    heads = 1 if config.tie_embeddings else 2
    padding = (config.padded_vocab_size - config.vocab_size) * config.n_embd * heads
    assert in_memory - padding == config.num_params
    # What modern is made of is for experiments to say; tests/test_modern.py has its counts.
    if config.architecture == "gpt2" and size != "d3":
        golden = {"nano": (7_259_008, 7_226_240), "124m": (124_439_808, 123_653_376)}[size]
        swiglu = {"nano": 7_231_040, "124m": 123_665_664}[size]
        expected = golden[config.pos_emb == "rope"]
        assert config.num_params == (swiglu if recipe == "gpt2-swiglu" else expected)


@pytest.mark.parametrize(
    ("device", "gpu"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("Tesla V100-SXM2-16GB", "V100 16 GB"),
        ("Tesla V100-PCIE-32GB", "V100 32 GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("Tesla T4", "T4"),
        ("NVIDIA GB200", None),
        ("NVIDIA T400 4GB", None),
    ],
)
def test_gpus_are_found_by_the_names_their_drivers_give_them(device, gpu):
    found = recipes.find_gpu(device)
    assert (found and found.name) == gpu


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


def small(recipe: str, data: Path, runs: Path) -> Config:
    """Return a recipe with two layers of width 32, six steps, and an epoch of about four."""
    config = recipes.build(recipe, "nano")
    changes = {
        "data": str(data),
        "name": "tiny",
        **{"model.n_layer": 2, "model.n_head": 2, "model.n_embd": 32},
        # The recipe's own context, but shorter.
        "model.block_size": config.model.block_size // 16,
        "model.vocab_size": len(ALPHABET) + 1,
        **{"train.steps": 6, "train.batch_tokens": 2048, "train.micro_batch_size": 16},
        **{"train.val_tokens": 1024, "train.val_interval": 0, "train.checkpoint_interval": 0},
        **{"train.keep_checkpoints": 9, "train.sample_tokens": 4, "train.eval_interval": 0},
        **{"train.dtype": "float32", "train.device": "cpu", "train.runs_dir": str(runs)},
    }
    return replace(config, changes)


@pytest.mark.parametrize("recipe", recipes.RECIPES)
def test_each_recipe_trains_resumes_reloads_and_samples(recipe, data, tmp_path):
    config = small(recipe, data, tmp_path / "straight")
    straight = run_training(config)
    # An epoch ends between the interruption and the end.
    sequences = FineWebEdu(data, "train", config.model.block_size)
    assert 3 < len(sequences) // config.sequences_per_step < 6
    losses = [loss for (loss,) in column(straight, "train", "loss")]
    assert losses[-1] < losses[0]
    changes = {"train.runs_dir": str(tmp_path / "resumed")}
    run = run_training(replace(config, {**changes, "train.stop_at_step": 3}))
    go_on(replace(config, changes))
    assert_same_end(run, straight, 6)
    assert metrics(run, "val", times=False)[-1] == metrics(straight, "val", times=False)[-1]
    # Stored without the rows that only fill up memory.
    stored = load_file(checkpoint.newest(run) / "model.safetensors")
    heads = {name: len(stored[name]) for name in ("wte.weight", "lm_head.weight") if name in stored}
    assert set(heads.values()) == {len(ALPHABET) + 1}
    assert len(heads) == 2 - config.model.tie_embeddings
    assert "## Step 6" in (run / "samples.md").read_text()
    (text,) = sample.generate_text(str(run), ["the cat"], max_tokens=5)
    assert len(text) <= 5 and set(text) <= set(ALPHABET)
