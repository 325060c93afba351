"""Disks that fill up: one sentence, nothing earlier harmed, and once there is room it goes on."""

import contextlib
import functools
import os
import random
import signal
import subprocess
from collections import Counter
from pathlib import Path

from tests.corpora import mount
from tests.faults import common, kills
from tests.faults.common import RESUME, RUN, Outcome, succeed
from tests.tiny import start, wait_for
from training import checkpoint

SETTINGS = {"steps": 60, "checkpoint_interval": 20, "val_interval": 20}
PAGE = 4096
# What a disk is left with when it fills up: nothing, or a little.
LEAVE = {"a checkpoint": 8 * PAGE, "a metric line": 0, "the start": PAGE, "a shard": 100 * PAGE}


def run(seed: int, _: int, directory: Path, kinds: tuple[str, ...] = tuple(LEAVE)) -> Outcome:
    """Fill disks during each kind of write."""

    def trial(kind: str, rng: random.Random, folder: Path, seen: Counter[str]) -> None:
        (during_shard if kind == "a shard" else during_run)(kind, folder)
        seen[f"full during {kind}"] += 1

    kinds = kinds if can_mount() else ()
    return common.each(seed, directory, {kind: functools.partial(trial, kind) for kind in kinds})


def can_mount() -> bool:
    """Say whether this process may mount a tmpfs, which needs root or `unshare -rm`."""
    return subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


@contextlib.contextmanager
def disk_of(folder: Path, name: str, megabytes: int):
    """Mount a tmpfs in the folder of a trial while the block lasts."""
    (folder / name).mkdir()
    mount("-t", "tmpfs", "-o", f"size={megabytes}m,mode=755", "tmpfs", str(folder / name))
    try:
        yield folder / name
    finally:
        common.kill_all(folder)
        subprocess.run(["umount", "--lazy", str(folder / name)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Fill a disk but for `leave` bytes with a file; returns that."""
    with open(disk / "ballast", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(PAGE)):
            pass
    os.truncate(file.name, os.path.getsize(file.name) - leave)
    return Path(file.name)


def end_full(process: subprocess.Popen, disk: Path, kind: str, naming: str) -> Path:
    """Fill the disk of a process, which has to end well; returns what fills it."""
    # It stands still until the disk is full, so that it cannot come first.
    process.send_signal(signal.SIGSTOP)
    ballast = fill(disk, LEAVE[kind])
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=100)
    common.check_sentence(process.returncode, errors, naming)
    common.check_nothing_left(disk)
    return ballast


def during_run(kind: str, folder: Path) -> None:
    """Fill the disk of a run, see it end well, make room, and see it go on."""
    words, first = common.command(**SETTINGS), folder / RUN / "checkpoints" / "step_000020"
    wanted, _ = common.straight(folder / "straight", **SETTINGS)
    common.make_data(folder)
    with disk_of(folder, "runs", 4) as disk:
        process = start(*words, cwd=folder)
        wait_for(lambda: kind == "the start" or process.poll() is not None or first.exists())
        naming = "No space left" if kind == "the start" else RUN.name
        ballast = end_full(process, disk, kind, naming)
        kept = checkpoint.all_checkpoints(folder / RUN)
        assert [checkpoint.newest(folder / RUN)] == (kept[-1:] or [None])
        ballast.unlink()
        succeed(folder, *(RESUME if (folder / RUN).exists() else words))
        common.check_same_run(folder, wanted)


def during_shard(kind: str, folder: Path) -> None:
    """Fill the disk of a preparation, see it end well, make room, and see it go on."""
    corpus = kills.make_corpus(folder / "corpus")
    succeed(folder, *kills.prepare(corpus, 1))
    with disk_of(folder, "disk", 48) as disk:
        words, shards = kills.prepare(corpus, 2, "disk/shards"), disk / "shards"
        process = start(*words, cwd=folder)
        wait_for(lambda: process.poll() is not None or any(shards.glob("*.npy")))
        end_full(process, disk, kind, "disk/shards").unlink()
        succeed(folder, *words)
        common.check_same_files(common.contents(shards), common.contents(folder / "shards"))
