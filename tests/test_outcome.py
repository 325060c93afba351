"""Losses that are read one update late change nothing but when they are read."""

import json
import math

import pytest
import torch

import checkpoint
import logs
import outcome
import train as train_module
import trainer as trainer_module
from checkpoint import WEIGHTS
from config import UserError
from distributed import World
from model import GPT
from tests.tiny import make_data, tiny_config
from train import train

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


def trained(data, runs_dir, monkeypatch, behind, **changes):
    config = tiny_config(data, runs_dir, **changes)
    run = runs_dir / config.name
    logs.create_run(run, config)
    monkeypatch.setattr(trainer_module, "updates_behind", lambda device, dtype: behind)
    return run, lambda: train(config, run, ALONE)


def lines(run):
    timed = ("seconds", "tokens_per_second", "mfu")
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in timed} for line in found]


@pytest.mark.parametrize("log_interval", [1, 3])
def test_late_losses_are_the_same_losses(data, tmp_path, monkeypatch, log_interval):
    got = []
    for behind in (0, 1, 3):
        run, go = trained(
            data, tmp_path / f"{behind}", monkeypatch, behind, log_interval=log_interval
        )
        assert go() == (12, True)
        weights = [(path / WEIGHTS).read_bytes() for path in checkpoint.all_checkpoints(run)]
        got.append((lines(run), weights))
    assert got[0] == got[1] == got[2]


@pytest.mark.parametrize("behind", [0, 1])
def test_a_late_nan_reaches_no_checkpoint(data, tmp_path, monkeypatch, behind):
    """Update 8 is bad, and a checkpoint is due after it; the one of 4 is the newest."""
    run, go = trained(data, tmp_path, monkeypatch, behind, micro_batch=8)
    forward, calls = GPT.forward, []

    def planted(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        calls.extend([self] * self.training)
        return logits, loss * math.nan if len(calls) == 8 else loss

    monkeypatch.setattr(GPT, "forward", planted)
    with pytest.raises(UserError, match="Update 8 has a loss of nan"):
        go()
    assert checkpoint.newest(run).name == "step_000004"
    assert [line["step"] for line in lines(run) if line["kind"] == "train"][-1] == 7


def test_a_late_request_to_stop_is_heard(data, tmp_path, monkeypatch):
    run, go = trained(data, tmp_path, monkeypatch, 1, checkpoint_interval=0)
    update = train_module.update

    def asked_in_5(trainer, windows, step):
        if step == 5:
            trainer.asked.set()
        update(trainer, windows, step)

    monkeypatch.setattr(train_module, "update", asked_in_5)
    step, complete = go()
    assert not complete and step in (5, 6)
    assert checkpoint.newest(run).name == f"step_{step:06d}"
    assert lines(run)[-1]["step"] == step


def test_only_a_gpu_is_read_late():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert outcome.updates_behind(cuda, torch.bfloat16) == 1
    assert outcome.updates_behind(cuda, torch.float16) == 0
    assert outcome.updates_behind(cpu, torch.bfloat16) == 0
