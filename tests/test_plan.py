"""The plan of a run: its golden numbers, against counts of what is built, and the command."""

import contextlib
import itertools
import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import main
import recipes
from config import UserError, replace
from modern import build_model
from tests.tiny import make_data, script
from training.optim import build_optimizers
from training.setup import plan, state_bytes


def test_golden_numbers_of_the_flagship():
    text = plan(recipes.build("gpt2"), price=2.0)
    assert "124,439,808 parameters: 12 layers, 12 heads, width 768" in text
    assert "18,849 of 524,288 tokens, 9,882,304,512 in all; 64 sequences" in text
    assert "8.45e+18 FLOP: 0.855 GFLOP a token" in text
    # Weights and two averages, 4 bytes each; a checkpoint has no padding.
    assert "weights 498 MB, gradients 498 MB, optimizer 996 MB" in text
    assert "19.76 GB for as many tokens of data; 4 checkpoints of 1.49 GB" in text
    # One hour of eight GPUs at 40% of 989 TFLOP/s does 1.14e19 operations.
    assert re.search(r"H100 +989 TFLOP/s bfloat16 +80 GB +45 minutes +costs 11.8\d", text)
    slower = plan(recipes.build("gpt2"), gpus=1, mfu=0.1)
    assert re.search(r"A100 80 GB +312 TFLOP/s bfloat16 +80 GB +75.2 hours", slower)


@pytest.mark.parametrize(
    ("recipe", "size"),
    [*itertools.product(("gpt2", "modern"), ("nano", "d8", "124m")), ("gpt2-swiglu", "nano")],
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
        # Through plain logits: the counter does not know what the chunked loss adds up in place.
        model(idx)[0].sum().backward()
    counts = counter.get_total_flops() / config.block_size
    assert counts == pytest.approx(config.flops_per_token, rel=0.02)


@pytest.mark.parametrize("recipe", ["gpt2", "quickstart", "modern", "modern-untied", "gpt2-swiglu"])
def test_state_is_what_the_model_and_its_optimizers_hold(recipe):
    sizes = {"n_layer": 4, "n_head": 4, "n_embd": 64, "block_size": 128, "vocab_size": 1000}
    config = replace(recipes.build(recipe, "nano"), {f"model.{k}": v for k, v in sizes.items()})
    model = build_model(config.model)
    optimizers = build_optimizers(model, config.optim, torch.float32)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    held = sum(t.nbytes for state in states for t in state.values() if t.dim() > 0)
    weights, state = state_bytes(config)
    assert sum(parameter.nbytes for parameter in model.parameters()) == weights
    # value_mix, of one number, has its averages as vectors of one.
    assert held == pytest.approx(state, rel=1e-3)


def test_the_data_decides_if_it_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = make_data(tmp_path / "tiny")
    config = recipes.build("gpt2", "nano")
    few = {"model.block_size": 32, "train.batch_tokens": 256, "train.epochs": 2.0}
    text = plan(replace(config, {"data": str(data), **few}))
    assert "vocabulary 30" in text and " training tokens" in text
    with pytest.raises(UserError, match="depends on the data 'fineweb-edu', which is not here"):
        plan(replace(config, few))
    assert "5 of 256 tokens" in plan(replace(config, {**few, "train.steps": 5}))


@pytest.mark.parametrize("wrong", [{"gpus": 0}, {"mfu": 0.0}, {"mfu": 1.5}, {"price": -1.0}])
def test_assumptions_that_cannot_be(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        plan(recipes.build("gpt2"), **wrong)
    with pytest.raises(UserError, match="3 processes cannot share a step of 512 sequences"):
        plan(recipes.build("gpt2"), gpus=3)


def test_from_the_command_line(tmp_path):
    result = script("main.py", "gpt2-rope", "--plan", "--train.steps", 10, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("plan      gpt2-rope at size 124m; nothing has been started\n")
    assert "10 of 524,288 tokens" in result.stdout and not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="--gpus and --price are for a plan"):
        main.resolve(["--gpus", "8"])
