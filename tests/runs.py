"""Training in this process, and what a run left behind."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from config import Config
from train import train
from training import checkpoint
from training.distributed import DistInfo
from training.logger import create_run

# What a clock decides.
TIMES = {"seconds", "tokens_per_second", "mfu"}
TENSORS = ("model.safetensors", "optimizer.safetensors")


def alone(config: Config) -> DistInfo:
    """Return this process without others, on the device of the config."""
    return DistInfo(0, 0, 1, torch.device(config.train.device))


def run_training(config: Config, resume_from: Path | None = None) -> Path:
    """Train, from scratch or from a checkpoint; returns the run's directory."""
    run = Path(config.train.runs_dir) / config.name
    if resume_from is None:
        create_run(run, config)
    train(config, run, alone(config), resume_from)
    return run


def go_on(config: Config) -> tuple[int, bool]:
    """Train from the newest checkpoint, where there is one; returns what `train` does."""
    run = Path(config.train.runs_dir) / config.name
    if not run.exists():
        create_run(run, config)
    return train(config, run, alone(config), checkpoint.newest(run))


def metrics(run: Path, *kinds: str, times: bool = True) -> list[dict[str, Any]]:
    """Return a run's metric lines, of some kinds or of all, with or without times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if not kinds or line["kind"] in kinds]
    return [{k: v for k, v in line.items() if times or k not in TIMES} for line in lines]


def column(run: Path, kind: str, *keys: str) -> list[tuple]:
    """Return some values of each metric line of a kind."""
    return [tuple(line[key] for key in keys) for line in metrics(run, kind)]


def last_step(run: Path) -> int:
    """Return the step of the last metric line written so far by a run that may be going on."""
    path = run / "metrics.jsonl"
    steps = re.findall(r'"step": (\d+)', path.read_text()) if path.exists() else []
    return int(steps[-1]) if steps else 0


def steps(run: Path) -> list[int]:
    """Return the steps of the checkpoints."""
    return [checkpoint.step_of(path) for path in checkpoint.all_checkpoints(run)]


def tensors(run: Path, step: int, name: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """Return the tensors of a file of the checkpoint of `step`."""
    return load_file(checkpoint.checkpoint_path(run, step) / name)


def assert_same_end(run: Path, straight: Path, step: int) -> None:
    """Bit for bit the same weights, optimizer state and lines; stops may have validated besides."""
    for name in TENSORS:
        a, b = tensors(run, step, name), tensors(straight, step, name)
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
    found, wanted = (metrics(each, "train", "val", times=False) for each in (run, straight))
    assert [line for line in found if line["kind"] == "train"] == [
        line for line in wanted if line["kind"] == "train"
    ]
    assert [line for line in wanted if line not in found] == []
    assert len({(line["kind"], line["step"]) for line in found}) == len(found)
