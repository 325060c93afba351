"""Disks that fill up: one sentence, nothing earlier harmed, and once there is room it goes on.

The disk is a tmpfs of a few megabytes, and what fills it a file that is removed again.
"""

import contextlib
import functools
import hashlib
import http.server
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checkpoint
from download import download
from logs import SAMPLES
from tests.torture import preparation
from tests.torture.common import (
    Outcome,
    attempt,
    check_nothing_hidden,
    check_refusal,
    check_same_files,
    contents,
    finish,
    kill_all,
    refusal,
    require,
    start,
    succeed,
    wait_for,
)
from tests.torture.runs import DATA, RESUME, RUN, check_same_run, command, last_step, make_data

PAGE = 4096
# Of one byte, which no sample has.
PADDING = b"\t"
SETTINGS = {"updates": 60, "checkpoint_interval": 20, "val_interval": 20}
# Too few metric lines for another page of them.
FEW_LINES = {"log_interval": 20}
ADVICE = re.compile(r"[Mm]ake room|is room|put the file|same command|--resume")
SKIPPED = (
    "skipped, since it mounts small disks, which needs root; try "
    "`unshare -rm python -m tests.torture --parts disk`"
)
KINDS = ("a checkpoint", "a metric line", "samples", "the start", "a shard", "a download")


def run(
    seed: int, kills: int, directory: Path, kinds: tuple[str, ...] = KINDS, rounds: int = 3
) -> tuple[str, Outcome]:
    """Fill disks during each kind of write, `rounds` times; returns the summary and outcome."""
    outcome, number = Outcome(), 0
    if not can_mount():
        return SKIPPED, outcome
    trials = {
        "a checkpoint": functools.partial(during_run, "a checkpoint", SETTINGS),
        "a metric line": functools.partial(during_run, "a metric line", SETTINGS),
        "samples": functools.partial(during_run, "samples", SETTINGS | FEW_LINES),
        "the start": functools.partial(during_run, "the start", SETTINGS),
        "a shard": during_shard,
        "a download": during_download,
    }
    for kind in kinds:
        for _ in range(rounds):
            attempt(outcome, seed, directory, number, f"full during {kind}", trials[kind])
            number += 1
    return summary(outcome.seen), outcome


def summary(seen: Counter[str]) -> str:
    """Return what was tried, and what came of it, in a sentence."""
    during = ", ".join(f"{seen[kind]} during {kind}" for kind in KINDS if seen[kind])
    return (
        f"{seen.total()} full disks ({during}): each one sentence that says what to do, nothing "
        "earlier harmed, no temporary files; with room again, the same weights, shards and files"
    )


# --- Disks ---


def can_mount() -> bool:
    """Say whether this process may mount a tmpfs."""
    with tempfile.TemporaryDirectory() as directory:
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", directory]
        try:
            if subprocess.run(command, capture_output=True).returncode:
                return False
        except FileNotFoundError:
            return False
        subprocess.run(["umount", directory], check=True)
        return True


@contextlib.contextmanager
def small_disk(folder: Path, name: str, megabytes: int) -> Iterator[Path]:
    """Mount a tmpfs in the folder of a trial, while the block lasts."""
    disk = folder / name
    disk.mkdir()
    options = ["-o", f"size={megabytes}m,mode=755"]
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        kill_all(folder)
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """Fill a disk but for `leave` bytes, whole pages, with a file; returns that."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(PAGE))
    os.truncate(ballast, max(ballast.stat().st_size - leave, 0) // PAGE * PAGE)
    return ballast


def check_advice(result: subprocess.CompletedProcess, naming: str) -> None:
    """Raise Difference unless a script ended with one sentence that says what to do."""
    check_refusal(result, naming)
    require(ADVICE.search(result.stderr) is not None, f"no advice: {result.stderr[-400:]}")


# --- What they fill up during ---


def during_run(
    kind: str, settings: dict[str, Any], rng: random.Random, folder: Path, seen: Counter[str]
) -> None:
    """Fill the disk of a run, see it end well, make room, and see it go on."""
    straight, begin = folder / "straight", command(**settings)
    # In an epoch of 82 updates no checkpoint falls between those of the interval.
    make_data(straight / DATA, shards=8)
    succeed(straight, *begin)
    shutil.copytree(straight / DATA, folder / DATA)
    with small_disk(folder, RUN.parent.name, megabytes=4) as disk:
        ballast, result = _run_until_full(kind, rng, folder, disk, begin)
        check_advice(
            result, {"a checkpoint": "checkpoint", "samples": "samples.md"}.get(kind, "runs/")
        )
        check_nothing_hidden(disk)
        checkpoints = checkpoint.all_checkpoints(folder / RUN)
        require(len(checkpoints) == (kind != "the start"), f"checkpoints: {checkpoints}")
        for path in checkpoints:
            checkpoint.verify(path)
        ballast.unlink()
        shorten_samples(folder / RUN / SAMPLES)
        succeed(folder, *(RESUME if (folder / RUN).exists() else begin))
        check_same_run(folder, straight)
    seen[kind] += 1


def _run_until_full(
    kind: str, rng: random.Random, folder: Path, disk: Path, begin: list[str]
) -> tuple[Path, subprocess.CompletedProcess]:
    """Start a run, and fill its disk at the right moment; returns what fills it, and its end."""
    if kind == "the start":
        # Enough for none, one or two of the first files.
        ballast = fill(disk, rng.randrange(3) * PAGE)
        return ballast, finish(start(folder, *begin), folder)
    process = start(folder, *begin)
    first = checkpoint.checkpoint_path(folder / RUN, SETTINGS["checkpoint_interval"])
    wait_for(lambda: process.poll() is not None or first.exists(), "a checkpoint")
    size = sum(path.stat().st_size for path in first.iterdir())
    # The metric lines up to the next checkpoint take less than four pages.
    leave = rng.randrange(4 * PAGE, size - PAGE) if kind == "a checkpoint" else 0
    # It stands still until the disk is full, so that it cannot come first.
    process.send_signal(signal.SIGSTOP)
    if kind == "samples":
        lengthen_samples(folder / RUN / SAMPLES, rng)
    ballast = fill(disk, leave)
    process.send_signal(signal.SIGCONT)
    require(last_step(folder) < 2 * SETTINGS["checkpoint_interval"], "the disk was full too late")
    return ballast, finish(process, folder)


def lengthen_samples(path: Path, rng: random.Random) -> None:
    """Add lines up to shortly before the end of a page, so that the next sample needs another."""
    left = rng.randint(1, 60)
    with open(path, "ab") as file:
        file.write(PADDING * ((-path.stat().st_size - left) % PAGE))


def shorten_samples(path: Path) -> None:
    """Take out what `lengthen_samples` added."""
    if path.exists():
        path.write_bytes(path.read_bytes().replace(PADDING, b""))


def during_shard(rng: random.Random, folder: Path, seen: Counter[str]) -> None:
    """Fill the disk of a preparation, see it end well, make room, and see it go on."""
    corpus = preparation.make_corpus(folder / "corpus", seed=0)
    wanted, _ = preparation.straight(folder / "straight", corpus, ())
    workers = rng.randint(1, 3)
    with small_disk(folder, "disk", megabytes=48) as disk:
        options = preparation.command(corpus, workers, out="disk/shards")
        process, out = start(folder, *options), disk / "shards"
        enough = rng.randint(1, 4)
        wait_for(lambda: process.poll() is not None or _shards(out) >= enough, "some shards")
        process.send_signal(signal.SIGSTOP)
        ballast = fill(disk, rng.randrange(4 * PAGE, 2 * preparation.SHARD_TOKENS))
        process.send_signal(signal.SIGCONT)
        check_advice(finish(process, folder), "disk/shards")
        check_nothing_hidden(disk)
        there = {name: content for name, content in contents(out).items() if name in wanted}
        there.pop("manifest.json")
        require(len(there) >= enough, f"only {len(there)} shards are left")
        check_same_files(there, {name: wanted[name] for name in there})
        ballast.unlink()
        succeed(folder, *options)
        check_same_files(contents(out), wanted)
        check_nothing_hidden(disk)
    seen["a shard"] += 1


def _shards(out: Path) -> int:
    return sum(1 for _ in out.glob("*.npy"))


def during_download(rng: random.Random, folder: Path, seen: Counter[str]) -> None:
    """Fill the disk that a file is fetched to, make room, and fetch it."""
    content = rng.randbytes(3 << 20)
    digest = hashlib.sha256(content).hexdigest()
    (folder / "web").mkdir()
    (folder / "web" / "file").write_bytes(content)
    with small_disk(folder, "disk", megabytes=4) as disk, _server(folder / "web") as address:
        ballast, path = fill(disk, rng.randrange(len(content))), disk / "file"

        def fetch() -> Path:
            return download(f"{address}/file", path, digest, len(content), quiet=True)

        sentence = refusal(fetch) or "no error"
        require(f"{address}/file" in sentence and str(path) in sentence, sentence)
        require(ADVICE.search(sentence) is not None, f"no advice: {sentence}")
        require([*disk.iterdir()] == [ballast], f"left behind: {[*disk.iterdir()]}")
        ballast.unlink()
        require(fetch() == path and path.read_bytes() == content, "another file was fetched")
        require([*disk.iterdir()] == [path], f"left behind: {[*disk.iterdir()]}")
    seen["a download"] += 1


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def _server(directory: Path) -> Iterator[str]:
    """Serve a directory on this machine while the block lasts; yields its address."""
    handler: Callable[..., Any] = functools.partial(_Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
