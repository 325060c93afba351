"""Runs that are killed at random moments, and resumed, end like one that nothing disturbed."""

import itertools
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import checkpoint
from tests.torture.common import (
    Outcome,
    attempt,
    kill_at_random,
    processes_in,
    require,
    start,
    succeed,
)
from tests.torture.runs import DATA, RESUME, RUN, check_same_run, command, make_data, straight

KINDS = (
    {"order": "sequential", "optimizer": "adamw", "dropout": 0.0},
    {"order": "shuffle_windows", "optimizer": "muon", "dropout": 0.1},
    {"order": "shuffle_documents", "optimizer": "adamw", "dropout": 0.1},
    {"order": "sequential", "optimizer": "muon", "dropout": 0.0},
    {"order": "shuffle_windows", "optimizer": "adamw", "dropout": 0.0},
    {"order": "shuffle_documents", "optimizer": "muon", "dropout": 0.1},
)
BEFORE = "before the run directory"
INSIDE, EARLY = "inside a checkpoint write", "before the first checkpoint"
ELSEWHERE = "elsewhere"
AT_ONCE = 2


def run(seed: int, kills: int, directory: Path) -> tuple[str, Outcome]:
    """Kill runs until there were so many kills; returns the summary and the outcome."""
    outcome, straights = Outcome(), {}

    def make(number: int) -> None:
        kind = number % len(KINDS)
        folder, seconds = straights[kind]
        name = ", ".join(f"{value}" for value in KINDS[kind].values())

        def trial(rng: random.Random, own: Path, seen: Counter[str]) -> None:
            kill_and_resume(rng, own, seen, kind, folder, seconds)

        attempt(outcome, seed, directory, number, name, trial)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for first in itertools.count(0, AT_ONCE):
            numbers = range(first, first + AT_ONCE)
            # Two at a time, like the trials, so that they take as long.
            kinds = [n % len(KINDS) for n in numbers if n % len(KINDS) not in straights]
            made = pool.map(
                lambda kind: straight(directory / f"straight_{kind}", **KINDS[kind]), kinds
            )
            straights |= dict(zip(kinds, made, strict=True))
            list(pool.map(make, numbers))
            if outcome.seen.total() >= kills or len(outcome.failures) > 2:
                break
    return summary(outcome.seen), outcome


def summary(seen: Counter[str]) -> str:
    """Return what was tried, and what was compared, in a sentence."""
    return (
        f"{seen.total()} kills ({seen[INSIDE]} {INSIDE}, {seen[EARLY]} {EARLY}, {seen[BEFORE]} "
        f"{BEFORE}): all weights, optimizer states, metrics and samples bitwise those of the "
        "undisturbed run, every checkpoint in sight complete, no stray files"
    )


def kill_and_resume(
    rng: random.Random,
    folder: Path,
    seen: Counter[str],
    kind: int,
    undisturbed: Path,
    seconds: float,
) -> None:
    """Kill a run one to three times, resume it to its end, and compare it."""
    make_data(folder / DATA)

    def go_on() -> list[str]:
        begun = (folder / RUN).exists()
        return [*RESUME] if begun else [*command(**KINDS[kind]), "--auto-resume"]

    for _ in range(rng.randint(1, 3)):
        process = start(folder, *go_on())
        aimed = rng.random() < 0.5
        writing = (lambda: writes_checkpoint(folder)) if aimed else None
        if not kill_at_random(process, rng, seconds, writing):
            break
        seen[place(folder)] += 1
        require(not processes_in(folder), "a process outlived the one that was killed")
        for path in checkpoint.all_checkpoints(folder / RUN):
            checkpoint.verify(path)
    succeed(folder, *go_on())
    check_same_run(folder, undisturbed)


def writes_checkpoint(folder: Path) -> bool:
    """Say whether a checkpoint is being written, or was when the process was killed."""
    return any((folder / RUN / "checkpoints").glob(".step_*.tmp"))


def place(folder: Path) -> str:
    """Return where in its work a kill found a run."""
    if not (folder / RUN).exists():
        return BEFORE
    if writes_checkpoint(folder):
        return INSIDE
    return ELSEWHERE if checkpoint.all_checkpoints(folder / RUN) else EARLY
