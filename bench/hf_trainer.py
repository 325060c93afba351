"""The same run by transformers.Trainer and Accelerate, and beside it our own.

    python -m bench.hf_trainer [--size nano] [--data pydocs] [--steps 100] [--compare]
    torchrun --standalone --nproc_per_node=8 -m bench.hf_trainer --size 124m
    accelerate launch --config_file bench/accelerate_zero1.yaml -m bench.hf_trainer --size 124m

The settings are those of a reproduction with Hugging Face's tools: AdamW with Trainer's defaults
but a weight decay of 0.1 and the rate of the size (6e-4 at 124M), a warm-up of 700 steps (of
18,849, and as large a part of other lengths), linear decay to zero, gradients clipped at norm 1,
bfloat16; its 64 sequences on each of eight GPUs are the 524,288 tokens of a step at 124M.

`hf_peer.py` trains; runs/NAME is left as by main.py, so `python results.py NAME-ours NAME` lays the
curves over each other, and runs/NAME/hf is the model for sample.py, evaluate.py and lm_eval. With
`--compare`, both loops run in turn, each in a process of its own: tokens a second, without
validation and the first steps, and the largest difference of the first 50 training losses.
"""

import contextlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import recipes
from bench.processes import in_fresh_process
from bench.record import report, result
from config import Config, UserError, divisors, replace
from main import complete_config
from metrics import Run, points, read_run

# Steps before the clock starts, where there are that many; and losses that are compared.
WARM_UP = 5
COMPARED = 50


@dataclass(frozen=True)
class Options:
    """Train GPT-2 with transformers.Trainer, from the weights and the data of our own run."""

    size: str = "nano"
    """How big, as in recipes.py."""
    data: str = "pydocs"
    """Directory of token shards, or its name under data/."""
    steps: int | None = None
    """Number of optimizer steps; by default the size's token budget."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Arithmetic of matrix products, over float32 weights."""
    seed: int = 1337
    """Seed of the initial weights and the data order."""
    name: str = ""
    """Name of the run directory; hf-trainer and the size by default. Ours is NAME-ours."""
    runs_dir: str = "runs"
    """Directory that holds the run directories."""
    device: Literal["cpu", "cuda", "auto"] = "auto"
    """Where to compute."""
    compare: bool = False
    """Train with our own loop, too, and print what differs as JSON lines."""
    repeats: int = 1
    """Measurements of each in a comparison; their medians are compared, the first are kept."""


def main() -> None:
    """Train as the command line says."""
    options = parse(Options)
    for package in ("transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{package} is not installed; `pip install {package}` brings it.")
    if options.compare and _environ("WORLD_SIZE", 1) > 1:
        raise UserError("--compare is for one process; leave out torchrun.")
    config = complete_config(config_of(options))
    share = config.sequences_per_rank(_environ("WORLD_SIZE", 1))
    limit = recipes.micro_batch_limit(config)
    fitting = max(count for count in divisors(share) if count <= limit)
    config = replace(config, {"train.micro_batch_size": fitting})
    check_new(config, *(("", "-ours") if options.compare else ("",)))
    if options.compare:
        compare(config, options.repeats)
    else:
        theirs(config)


def _environ(name: str, default: int) -> int:
    return int(os.environ.get(name, default))


def config_of(options: Options) -> Config:
    """Return the config of both runs, without what only the data can tell.

    Raises UserError when there is no such size.
    """
    changes = {
        "data": options.data,
        "name": options.name or f"hf-trainer-{options.size}",
        "optim.schedule": "linear",
        "optim.warmup_frac": 700 / 18_849,
        "optim.final_lr_frac": 0.0,
        # Trainer's own.
        "optim.beta2": 0.999,
        "train.shuffle": "sequences",
        "train.steps": options.steps,
        "train.eval_interval": 0,
        "train.checkpoint_interval": 0,
        "train.sample_tokens": 0,
        "train.dtype": options.dtype,
        "train.device": options.device,
        "train.seed": options.seed,
        "train.runs_dir": options.runs_dir,
    }
    return replace(recipes.build("gpt2-baseline", options.size), changes)


def check_new(config: Config, *endings: str) -> None:
    """Raise UserError if a run of the config's name, with one of the endings, exists."""
    for ending in endings:
        run = Path(config.train.runs_dir) / f"{config.name}{ending}"
        # The other processes may look when the first has made it.
        if _environ("RANK", 0) == 0 and run.exists():
            raise UserError(f"The run {run} exists; choose another --name.")


def theirs(config: Config) -> None:
    """Train with Trainer, on this process and those torchrun or accelerate started."""
    from bench.hf_peer import train_with_trainer

    # What this prints is for a person; standard output is for results.
    with contextlib.redirect_stdout(sys.stderr):
        train_with_trainer(config)


def ours(config: Config) -> None:
    """Train with our own loop, on this process."""
    from bench.processes import alone
    from train import train
    from training.logger import create_run

    run = Path(config.train.runs_dir) / config.name
    with contextlib.redirect_stdout(sys.stderr):
        create_run(run, config)
        train(config, run, alone(config.train.device))


def compare(config: Config, repeats: int) -> None:
    """Train with both loops in turn, and print the JSON lines."""
    loops: dict[str, Callable[[Config], None]] = {"-ours": ours, "": theirs}
    speeds: dict[str, list[float]] = {ending: [] for ending in loops}
    with tempfile.TemporaryDirectory() as directory:
        for i in range(repeats):
            place = config.train.runs_dir if i == 0 else f"{directory}/{i}"
            for ending, loop in loops.items():
                named = {"name": f"{config.name}{ending}", "train.runs_dir": place}
                in_fresh_process(loop, replace(config, named))
                run = read_run(Path(place) / f"{config.name}{ending}")
                speeds[ending].append(speed(run))
    first, second = (
        read_run(Path(config.train.runs_dir) / f"{config.name}{ending}") for ending in loops
    )
    title = f"hf trainer, {config.size}, {config.train.dtype}"
    device = config.train.device
    report(f"{title}, speed of ours", "tokens/s", speeds["-ours"], speeds[""], device)
    largest = largest_difference(first, second)
    name = f"{title}, largest difference of the first {COMPARED} losses"
    print(json.dumps(result(name, "nats", largest, device=device)), flush=True)


def speed(run: Run) -> float:
    """Return a run's tokens per second of training after its first steps."""
    lines = [line for line in run.metrics if line["kind"] == "train"]
    begin, end = lines[min(WARM_UP, len(lines) // 2)], lines[-1]
    return (end["tokens"] - begin["tokens"]) / (end["seconds"] - begin["seconds"])


def largest_difference(first: Run, second: Run) -> float:
    """Return the largest difference of two runs' first training losses, in nats."""
    losses = (points(run, "train", "loss").values[:COMPARED] for run in (first, second))
    return float(abs(next(losses) - next(losses)).max())


if __name__ == "__main__":
    # Not at the top: spawned processes import this module again, and have no command line.
    from utils import parse, run_script

    run_script(main)
