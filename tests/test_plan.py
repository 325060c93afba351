"""The plan of a run: its golden numbers, the estimate of memory against counts, and the command."""

import contextlib
import itertools
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import main
import plan
import recipes
from bench.memory import counted, estimated
from config import Config, UserError, replace
from counts import flops_per_token, parameter_count
from hardware import GPUS, find_gpu
from memory import Where, largest_micro_batch, memory, optimizer_state, padded_parameters
from modern import build_model
from optim import build_optimizers
from tests.conftest import ROOT
from tests.tiny import fields, make_data, script, tiny_config

SMALL = {
    "model.n_layer": 4,
    "model.n_head": 4,
    "model.n_embd": 64,
    "model.block_size": 128,
    "model.vocab_size": 1000,
    "train.tokens_per_update": 16 * 128,
    "train.micro_batch": 16,
    "train.dtype": "bfloat16",
}


def small(recipe: str, **changes: object) -> Config:
    return replace(recipes.build(recipe, "nano"), SMALL | changes)


def test_golden_numbers_of_the_flagship():
    config = plan.with_updates(recipes.build("gpt2"), None)
    assert parameter_count(config.model) == 124_439_808
    assert padded_parameters(config.model) == 124_439_808 + 47 * 768
    assert config.train.updates == 18_849
    assert plan.tokens_of(config) == 9_882_304_512 == 18_849 * 524_288
    assert plan.flops_of(config) == pytest.approx(8.45e18, rel=0.001)
    # Weights and two averages, 4 bytes each.
    assert plan.checkpoint_bytes(config) == 12 * 124_439_808
    # One hour of eight GPUs at 40% of 989 TFLOP/s does 1.14e19 operations.
    h100 = next(gpu for gpu in GPUS if gpu.name == "H100")
    assert plan.hours(config, h100, 8, 0.4) == pytest.approx(8.45e18 / 1.139e19, rel=0.002)
    assert plan.hours(config, h100, 4, 0.2) == 4 * plan.hours(config, h100, 8, 0.4)


@pytest.mark.parametrize(
    ("recipe", "size"),
    [*itertools.product(("gpt2", "modern"), recipes.SIZES), ("gpt2-swiglu", "nano")],
)
def test_model_flops_agree_with_pytorchs_counter(recipe, size, monkeypatch):
    """On the meta device, where attention is made of plain products, forward and backward.

    Both count attention as if it were not causal. The counter has the padded rows of the head,
    which add 0.1%, and no norms, biases or other sums, which our formula has as parameters.
    """
    # Neither knows this device.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())
    config = recipes.build(recipe, size).model
    with torch.device("meta"):
        model = build_model(config)
        idx = torch.zeros(1, config.block_size, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    counts = counter.get_total_flops() / config.block_size
    assert counts == pytest.approx(flops_per_token(config), rel=0.02)


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("gpt2", {}),
        ("gpt2", {"train.dtype": "float32"}),
        ("gpt2", {"train.gradient_checkpointing": True}),
        ("gpt2", {"train.micro_batch": 8}),
        ("gpt2", {"model.dropout": 0.1}),
        ("gpt2", {"model.document_mask": True}),
        ("gpt2", {"model.norm": "rmsnorm", "model.activation": "relu2"}),
        ("gpt2", {"model.vocab_size": 30_000, "train.tokens_per_update": 2048}),
        ("gpt2", {"model.n_embd": 256, "train.tokens_per_update": 128, "train.micro_batch": 1}),
        ("gpt2-swiglu", {}),
        ("modern", {}),
        ("modern", {"train.dtype": "float32"}),
        ("modern", {"train.gradient_checkpointing": True}),
        ("modern", {"model.n_embd": 256, "train.tokens_per_update": 128, "train.micro_batch": 1}),
        ("modern-untied", {"train.micro_batch": 4}),
    ],
)
def test_estimated_memory_is_within_15_percent_of_the_tensors_alive(recipe, changes):
    config = small(recipe, **changes)
    assert estimated(config) == pytest.approx(counted(config, fake=False), rel=0.15)


@pytest.mark.parametrize("recipe", ["gpt2", "quickstart", "modern", "modern-untied"])
def test_optimizer_state_is_what_the_optimizers_hold(recipe):
    config = small(recipe)
    model = build_model(config.model)
    optimizers = build_optimizers(model, config.optim, torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    held = sum(t.nbytes for state in states for t in state.values() if t.dim() > 0)
    # value_mix, of one number, has its averages as vectors of one.
    assert held == pytest.approx(optimizer_state(config), rel=1e-3)


def test_what_saves_memory_saves_it():
    config = recipes.build("gpt2", "774m")
    one, eight = (memory(config, 4, Where(processes=n)) for n in (1, 8))
    assert eight == one, "DDP has the whole model on every device"
    shared = memory(replace(config, {"train.parallel": "fsdp"}), 4, Where(processes=8))
    assert shared.optimizer == one.optimizer / 8 and shared.total < 0.75 * one.total
    lean = memory(replace(config, {"train.gradient_checkpointing": True}), 4, Where())
    assert lean.activations < 0.5 * one.activations and lean.optimizer == one.optimizer
    full = memory(config, 4, Where(dtype="float32"))
    assert full.total > one.total and full.copies == 0


def test_gradients_wait_for_the_next_micro_batch():
    config = recipes.build("gpt2", "124m")
    whole = replace(config, {"train.tokens_per_update": 16 * 1024})
    several, alone = memory(config, 16, Where()), memory(whole, 16, Where())
    assert several.gradients == several.weights and alone.gradients == 0
    # In its buckets, DDP keeps them from one update to the next.
    both = replace(config, {"train.tokens_per_update": 32 * 1024})
    assert memory(both, 16, Where(processes=2)).gradients == several.gradients


def test_largest_micro_batch_fits_divides_and_leaves_no_larger_one():
    config, where = recipes.build("gpt2", "124m"), Where(processes=8)
    for room in (6e9, 16e9, 40e9):
        batch = largest_micro_batch(config, where, room)
        assert 64 % batch == 0 and memory(config, batch, where).total <= room
        assert batch == 64 or memory(config, 2 * batch, where).total > room
    assert largest_micro_batch(config, where, 1e9) is None
    with pytest.raises(UserError, match="valid process counts"):
        largest_micro_batch(config, Where(processes=7), 1e12)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("Tesla T4", "T4"),
        ("Tesla V100-SXM2-16GB", "V100 16 GB"),
        ("Tesla V100-SXM2-32GB", "V100 32 GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
    ],
)
def test_devices_are_known_by_their_drivers_names(device, name):
    assert find_gpu(device).name == name


def test_unknown_devices_are_not_guessed():
    assert find_gpu("NVIDIA GeForce GTX 1080") is None


def test_plan_without_data_makes_nothing_and_needs_no_torch(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import main\n"
        "sys.argv = ['main.py', '--plan', '--price', '2.5']\n"
        "main.main(); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for words in (
        "124,439,808 parameters",
        "fineweb-edu is not here; the tokens are the recipe's budget",
        "18,849 updates of 524,288 tokens, 9,882,304,512 in all",
        "8.45e+18 FLOP",
        "which is an assumption",
        "cost at 2.5",
        "19.76 GB",
    ):
        assert words in result.stdout
    assert not list(tmp_path.iterdir())


def test_plan_reads_the_data_and_stored_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = make_data(tmp_path / "tiny")
    # The same arguments that train a run, and then name one that exists.
    words = [
        "--data",
        str(data),
        "--name",
        "run",
        *fields(tiny_config(data, tmp_path / "elsewhere")),
    ]
    before = plan_of([*words, "--plan"])
    assert "12 updates of 256 tokens, 3,072 in all" in before and "is not here" not in before
    assert "vocabulary of 30 padded to 128" in before and "cost" not in before
    assert script("main.py", *words, cwd=tmp_path).returncode == 0
    assert plan_of([*words, "--plan"]) == before
    where = ["--train.runs-dir", str(tmp_path / "elsewhere")]
    assert "12 updates of 256 tokens" in plan_of(["--resume", "run", *where, "--plan"])


def test_plan_is_not_for_torchrun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="without torchrun"):
        main.resolve(["--plan"])


def plan_of(words: list[str]) -> str:
    return main.planned(words, main.parse(main.Arguments, words, main.Arguments()))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--plan --price -1", "--price -1 must not be negative"),
        ("--plan --mfu 3", "--mfu 3 is a fraction"),
        ("--plan --mfu 0", "--mfu 0 is a fraction"),
        ("--plan --gpus 0", "--gpus 0 must be at least 1"),
        ("--plan --gpus 7", "valid process counts are 1, 2, 4"),
        ("--plan --train.epochs 2", "give --train.tokens or --train.updates"),
        ("--plan --price nan", "--price nan"),
        ("--price 2", "add --plan"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py", *words.split()])
    with pytest.raises(UserError) as caught:
        main.main()
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
