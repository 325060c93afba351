"""Runs whose processes are killed under torchrun --max-restarts end like one nothing disturbed."""

import itertools
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import checkpoint
from tests.nodes import end, node_options, rank_of, start_node, workers
from tests.torture.common import (
    PATIENCE,
    Difference,
    Outcome,
    attempt,
    processes_in,
    require,
)
from tests.torture.runs import DATA, RUN, check_same_run, command, make_data, straight
from tests.torture.training import BEFORE, EARLY, ELSEWHERE, INSIDE, place, writes_checkpoint

KINDS = (
    {"order": "sequential", "optimizer": "adamw", "dropout": 0.0},
    {"order": "shuffle_documents", "optimizer": "muon", "dropout": 0.1},
)
# Two processes of one torchrun, and two torchruns that meet in either way.
LAUNCHES = ("standalone", "c10d", "static")
SETTINGS = {"updates": 80, "checkpoint_interval": 2, "keep_checkpoints": 2}
# More than any run is to suffer: torchrun must not give up.
MAX_RESTARTS = 8


def run(seed: int, kills: int, directory: Path) -> tuple[str, Outcome]:
    """Kill processes of runs until there were a third of `kills`; returns summary and outcome."""
    outcome, straights = Outcome(), {}
    for number in itertools.count():
        kind, launch = number % len(KINDS), LAUNCHES[number % len(LAUNCHES)]
        if kind not in straights:
            straights[kind] = straight(directory / f"straight_{kind}", 2, **SETTINGS, **KINDS[kind])
        folder, seconds = straights[kind]

        def trial(rng: random.Random, own: Path, seen: Counter[str]) -> None:
            kill_and_wait(rng, own, seen, KINDS[kind], launch, folder, seconds)  # noqa: B023

        name = f"{launch}, {', '.join(str(value) for value in KINDS[kind].values())}"
        attempt(outcome, seed, directory, number, name, trial)
        done = sum(outcome.seen[where] for where in (BEFORE, EARLY, INSIDE, ELSEWHERE))
        if done >= max(kills // 3, 1) or len(outcome.failures) > 2:
            break
    return summary(outcome.seen, number + 1), outcome


def summary(seen: Counter[str], runs: int) -> str:
    """Return what was tried, and what was compared, in a sentence."""
    kills = sum(seen[where] for where in (BEFORE, EARLY, INSIDE, ELSEWHERE))
    return (
        f"{runs} runs of two processes on one or two nodes, {kills} kills ({seen['of rank 0']} of "
        f"rank 0, {seen['of rank 1']} of rank 1; {seen[INSIDE]} {INSIDE}, {seen[EARLY]} {EARLY}, "
        f"{seen[BEFORE]} {BEFORE}), each restarted by torchrun alone: all weights, optimizer "
        "states, metrics and samples bitwise those of the undisturbed run, no stray files"
    )


def kill_and_wait(
    rng: random.Random,
    folder: Path,
    seen: Counter[str],
    kind: dict[str, object],
    launch: str,
    undisturbed: Path,
    seconds: float,
) -> None:
    """Kill one or two processes of a run, wait for the end torchrun brings it to, and compare."""
    make_data(folder / DATA)
    nodes = start(folder, launch, command(**SETTINGS, **kind))
    try:
        killed: list[int] = []
        for _ in range(rng.randint(1, 2)):
            pid = kill(rng, folder, nodes, killed, seconds, seen)
            if pid is None:
                break
            killed.append(pid)
        for node in nodes:
            status = _wait(node)
            require(status == 0, f"torchrun ended with {status}: {node.errors.read_text()[-1500:]}")
    finally:
        end(*nodes)
    require(not processes_in(folder), "a process outlived torchrun")
    check_same_run(folder, undisturbed)


def start(folder: Path, launch: str, words: list[str]) -> list[subprocess.Popen]:
    """Start the torchrun of each node."""
    restarts = f"--max-restarts={MAX_RESTARTS}"
    if launch == "standalone":
        return [start_node(["--standalone", "--nproc_per_node=2", restarts], words, folder)]
    options = node_options(launch)
    return [start_node([*each, "--nproc_per_node=1", restarts], words, folder) for each in options]


def kill(
    rng: random.Random,
    folder: Path,
    nodes: list[subprocess.Popen],
    killed: list[int],
    seconds: float,
    seen: Counter[str],
) -> int | None:
    """Kill one process of a run at a random moment; returns its id, or None if the run was over.

    The moment is one while processes start, one inside a checkpoint write, or any other after the
    first checkpoint.
    """
    rank, aim = rng.randrange(2), rng.choice(("start", "write", "any"))
    if not _until(nodes, lambda: _process(nodes, rank, killed)):
        return None
    if aim == "start":
        _until(nodes, lambda: False, rng.uniform(0, seconds / 2))
    else:
        before = _steps(folder)
        _until(nodes, lambda: _steps(folder) - before)
        pause = rng.uniform(0, 1)
        _until(nodes, lambda: False, pause)
        if aim == "write":
            _until(nodes, lambda: writes_checkpoint(folder))
    pid = _process(nodes, rank, killed)
    if pid is None:
        return None
    os.kill(pid, signal.SIGKILL)
    seen[place(folder)] += 1
    seen[f"of rank {rank}"] += 1
    return pid


def _steps(folder: Path) -> set[Path]:
    return set(checkpoint.all_checkpoints(folder / RUN))


def _until(
    nodes: list[subprocess.Popen], condition: Callable[[], object], seconds: float = PATIENCE
) -> object:
    """Wait until `condition()` holds, for some seconds, or until the run is over; returns it."""
    deadline = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < deadline:
        if any(node.poll() is not None for node in nodes):
            return None
        time.sleep(0.001)
    return found


def _process(nodes: list[subprocess.Popen], rank: int, killed: list[int]) -> int | None:
    """Return the id of a rank's present process, which is none of those that were killed."""
    for node in nodes:
        for pid in workers(node.pid):
            if pid not in killed and rank_of(pid) == rank:
                return pid
    return None


def _wait(node: subprocess.Popen) -> int:
    try:
        return node.wait(PATIENCE * 3)
    except subprocess.TimeoutExpired:
        raise Difference(f"a node did not end within {PATIENCE * 3} s") from None
