"""Micro-batches that are halved until they fit, blocks computed twice, kernels by measurement."""

import json
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import attention
import logs
import micro_batch
from attention import attention_by, choose_attention
from config import UserError, replace
from distributed import World
from micro_batch import choose_micro_batch, largest_that_fits
from model import GPT
from tests.tiny import make_data, tiny_config
from train import train
from trainer import begin

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


def losses(config, tries=False):
    run = Path(config.train.runs_dir) / config.name
    logs.create_run(run, config)
    train(config, run, ALONE, None, tries)
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    environment = json.loads((run / "environment.json").read_text())
    return [line["loss"] for line in found if line["kind"] == "train"], environment


def fits_only(limit, monkeypatch):
    """Let the model run out of memory with more than `limit` windows that need gradients."""
    forward = GPT.forward

    def small(self, idx, targets=None):
        if torch.is_grad_enabled() and len(idx) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")
        return forward(self, idx, targets)

    monkeypatch.setattr(GPT, "forward", small)


def test_a_micro_batch_that_does_not_fit_is_halved_and_the_run_is_the_same(
    data, tmp_path, monkeypatch, capsys
):
    given, _ = losses(tiny_config(data, tmp_path / "given", micro_batch=2))
    fits_only(3, monkeypatch)
    found, environment = losses(tiny_config(data, tmp_path / "found", micro_batch=8), tries=True)
    assert found == given
    assert environment["micro_batch"] == 2 and environment["accumulation"] == 4
    said = capsys.readouterr().out
    assert "a micro-batch of 8 does not fit: going on with 4" in said
    assert "a micro-batch of 4 does not fit: going on with 2" in said


def test_a_given_micro_batch_is_not_touched(data, tmp_path, monkeypatch):
    fits_only(3, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        losses(tiny_config(data, tmp_path, micro_batch=8))


def test_not_even_one_window(data, tmp_path, monkeypatch):
    fits_only(0, monkeypatch)
    config = tiny_config(data, tmp_path, micro_batch=2)
    with pytest.raises(UserError, match="Not even one window fits"):
        largest_that_fits(config, GPT(config.model), True, ALONE)


def test_other_errors_are_not_taken_for_want_of_memory(data, tmp_path, monkeypatch):
    def broken(self, idx, targets=None):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(GPT, "forward", broken)
    config = tiny_config(data, tmp_path, micro_batch=2)
    with pytest.raises(RuntimeError, match="a mistake"):
        largest_that_fits(config, GPT(config.model), True, ALONE)


def test_a_gpu_gets_what_its_memory_should_hold(data, tmp_path, monkeypatch):
    config = replace(tiny_config(data, tmp_path), {"train.micro_batch": None})
    gpu = World(0, 1, torch.device("cuda"))
    monkeypatch.setattr(micro_batch, "pick_dtype", lambda name, device: torch.bfloat16)
    for free, windows in ((10**12, 8), (0, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        assert choose_micro_batch(config, gpu).train.micro_batch == windows
    assert choose_micro_batch(replace(config, {"train.micro_batch": 2}), gpu).train.micro_batch == 2


@pytest.mark.parametrize(
    "changes", [{}, {"dropout": 0.1}, {"architecture": "modern", "bias": False}]
)
def test_gradient_checkpointing_changes_nothing(data, tmp_path, changes):
    plain, _ = losses(tiny_config(data, tmp_path / "plain", **changes))
    changes = changes | {"gradient_checkpointing": True}
    again, _ = losses(tiny_config(data, tmp_path / "again", **changes))
    assert again == plain


def test_gradient_checkpointing_computes_blocks_twice(data, tmp_path, monkeypatch):
    config = tiny_config(data, tmp_path, gradient_checkpointing=True)
    run = tmp_path / config.name
    logs.create_run(run, config)
    trainer, _ = begin(config, run, ALONE, None, threading.Event())
    calls = []
    trainer.model.h[0].register_forward_pre_hook(lambda *_: calls.append(1))
    idx = torch.zeros(1, 8, dtype=torch.long)
    trainer.model(idx, idx)[1].backward()
    with torch.no_grad():
        trainer.model(idx, idx)
    trainer.bar.close()
    assert len(calls) == 3


def test_attention_is_the_same_by_any_kernel_that_is_here(data, tmp_path):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 16, 8).unbind()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for name in ("auto", "math", "flash"):
        with attention_by(name):
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(found, expected)


def test_the_fastest_kernel_is_taken_and_missing_ones_are_refused(data, tmp_path, monkeypatch):
    config = tiny_config(data, tmp_path)
    assert choose_attention(config, ALONE, torch.float32) == "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu, seconds = (
        World(0, 1, torch.device("cuda")),
        {"cudnn": None, "flash": 2.0, "efficient": 1.0},
    )
    monkeypatch.setattr(attention, "time_attention", lambda name, *_, **__: seconds.get(name))
    assert choose_attention(config, gpu, torch.bfloat16) == "efficient"
    seconds.clear()
    assert choose_attention(config, gpu, torch.bfloat16) == "math"
    monkeypatch.undo()
    with pytest.raises(UserError, match="Attention by fa3 cannot be had here"):
        choose_attention(replace(config, {"train.attention": "fa3"}), ALONE, torch.float32)
    asked = replace(config, {"train.attention": "math"})
    assert choose_attention(asked, ALONE, torch.float32) == "math"


def test_a_kernel_can_be_asked_for_in_a_run(data, tmp_path):
    found, environment = losses(tiny_config(data, tmp_path / "math", attention="math"))
    plain, _ = losses(tiny_config(data, tmp_path / "auto"))
    assert environment["attention"] == "math"
    assert found == pytest.approx(plain, abs=1e-4)
