"""Runs that go on with another number of processes have the losses of one that never did."""

import itertools
import os
import random
import re
import shutil
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from tests.torture.common import (
    Outcome,
    attempt,
    finish,
    processes_in,
    require,
    start,
    succeed,
    wait_for,
)
from tests.torture.runs import DATA, RESUME, RUN, command, last_step, make_data, metrics

KINDS = tuple(
    itertools.product(("sequential", "shuffle_windows", "shuffle_documents"), ("adamw", "muon"))
)
# 12 windows an update come out even for 1, 2 and 3 processes.
SETTINGS = {"updates": 50, "tokens_per_update": 12 * 32, "val_interval": 5, "n_embd": 64}
TOLERANCE = 1e-4


def run(
    seed: int, kills: int, directory: Path, kinds: tuple[tuple[str, str], ...] = KINDS
) -> tuple[str, Outcome]:
    """Make a run of each kind over 2, 1 and 3 processes; returns the summary and the outcome."""
    outcome, differences = Outcome(), [0.0]
    for number, (order, optimizer) in enumerate(kinds):
        settings = SETTINGS | {"order": order, "optimizer": optimizer, "checkpoint_interval": 20}

        def trial(rng: random.Random, folder: Path, seen: Counter[str]) -> None:
            straight = folder / "straight"
            make_data(straight / DATA)
            succeed(straight, *command(**settings, micro_batch=12))  # noqa: B023
            differences.append(move(rng, folder, seen, settings, straight))  # noqa: B023

        attempt(outcome, seed, directory, number, f"{order}, {optimizer}", trial)
    return summary(outcome.seen, max(differences), kinds), outcome


def summary(seen: Counter[str], difference: float, kinds: tuple[tuple[str, str], ...]) -> str:
    """Return what was tried, and what was compared, in a sentence."""
    return (
        f"{len(kinds)} runs ({seen['stops by a signal']} stops by a signal to one process) over 2, "
        f"then 1, then 3 processes: all {SETTINGS['updates']} training losses and all validation "
        f"losses within {TOLERANCE:g} of the undisturbed run's, the largest difference "
        f"{difference:.1e}"
    )


def move(
    rng: random.Random, folder: Path, seen: Counter[str], settings: dict[str, Any], straight: Path
) -> float:
    """Make one run with 2, 1 and 3 processes; returns its largest difference from `straight`."""
    shutil.copytree(straight / DATA, folder / DATA)
    stages = (
        (2, [*command(**settings, micro_batch=3)], rng.randint(15, 25)),
        (1, [*RESUME, "--train.micro-batch", "4"], rng.randint(32, 36)),
        (3, [*RESUME, "--train.micro-batch", "2"], None),
    )
    for processes, options, stop in stages:
        if stop is None:
            succeed(folder, *options, processes=processes)
        else:
            stop_after(folder, options, processes, stop)
            seen["stops by a signal"] += 1
    return largest_difference(folder / RUN, straight / RUN)


def stop_after(folder: Path, options: list[str], processes: int, step: int) -> None:
    """Start or resume a run, send SIGTERM to its last process after `step`, and see it stop."""
    process = start(folder, *options, processes=processes)
    wait_for(lambda: process.poll() is not None or last_step(folder) >= step, f"update {step}")
    require(process.poll() is None, "the run was over, or failed, before it could be stopped")
    os.kill(last_rank(folder, process.pid, processes), signal.SIGTERM)
    result = finish(process, folder)
    found = re.search(r"stopped after update (\d+)", result.stdout)
    require(result.returncode == 0 and found is not None, f"no stop: {result.stderr[-800:]}")
    require(step <= int(found[1]) < SETTINGS["updates"], f"stopped after update {found[1]}")


def last_rank(folder: Path, launcher: int, processes: int) -> int:
    """Return the process id of a run's last rank."""
    if processes == 1:
        return launcher
    wanted = f"RANK={processes - 1}".encode()
    for directory in processes_in(folder):
        if wanted in (directory / "environ").read_bytes().split(b"\0"):
            return int(directory.name)
    raise AssertionError(f"no rank {processes - 1}")


def largest_difference(run: Path, straight: Path) -> float:
    """Return the largest difference between two runs' losses; raises Difference if it is large."""
    ours, theirs = (
        {(line["kind"], line["step"]): line["loss"] for line in metrics(each)}
        for each in (run, straight)
    )
    require(list(ours) == list(theirs), f"other lines: {sorted(ours.keys() ^ theirs.keys())}")
    trained = sum(kind == "train" for kind, _ in theirs)
    require(trained == SETTINGS["updates"], f"{trained} training losses")
    name = max(theirs, key=lambda name: abs(ours[name] - theirs[name]))
    difference = abs(ours[name] - theirs[name])
    require(difference <= TOLERANCE, f"the losses of {name} differ by {difference:.2e}")
    return difference
