"""Preparations that are killed at random moments, and repeated, end with the same bytes."""

import gzip
import itertools
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np

from tests.torture.common import (
    Outcome,
    attempt,
    check_nothing_hidden,
    check_same_files,
    contents,
    kill_at_random,
    processes_in,
    start,
    succeed,
    wait_for,
)

OUT, SHARD_TOKENS = "shards", 600_000
LIMITS = ("--min-document-tokens", "40", "--max-document-tokens", "512")
KINDS = tuple(itertools.product((1, 2, 3), ((), LIMITS)))
KILLS, WRITING, ALONE = "kills", "in the middle of a file", "of the first process alone"
STOPS = "stops by SIGTERM"


def run(seed: int, kills: int, directory: Path) -> tuple[str, Outcome]:
    """Kill preparations until there were so many kills; returns the summary and the outcome."""
    outcome, straights = Outcome(), {}
    corpus = make_corpus(directory / "corpus", seed)
    for number in itertools.count():
        workers, limits = KINDS[number % len(KINDS)]
        if limits not in straights:
            straights[limits] = straight(directory / f"straight_{len(limits)}", corpus, limits)
        wanted, seconds = straights[limits]

        def trial(rng: random.Random, folder: Path, seen: Counter[str]) -> None:
            options = command(corpus, workers, limits)  # noqa: B023 - called in this round
            kill_and_repeat(rng, folder, seen, options, wanted, seconds)  # noqa: B023

        name = f"{workers} worker(s){', documents cut' if limits else ''}"
        attempt(outcome, seed, directory, number, name, trial)
        if outcome.seen[KILLS] >= kills or len(outcome.failures) > 2:
            break
    tried = sorted({workers for workers, _ in KINDS[: number + 1]})
    shards = {len(files) - 1 for files, _ in straights.values()}
    return summary(outcome.seen, tried, shards), outcome


def summary(seen: Counter[str], workers: list[int], shards: set[int]) -> str:
    """Return what was tried, and what was compared, in a sentence."""
    several, files = _either(workers), _either(sorted(shards))
    return (
        f"{seen[KILLS]} kills ({seen[WRITING]} {WRITING}, {seen[ALONE]} {ALONE}) and {seen[STOPS]} "
        f"{STOPS} with {several} workers: all {files} shards and the manifest byte for byte those "
        "of the undisturbed preparation, no worker left alive, no stray files"
    )


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def command(corpus: Path, workers: int, limits: tuple[str, ...] = (), out: str = OUT) -> list[str]:
    """Return the command that prepares the corpus, in the folder of a trial."""
    options = ["--shard-tokens", str(SHARD_TOKENS), "--workers", str(workers), *limits]
    return ["load_fineweb.py", "--source", str(corpus), "--out", out, *options]


def straight(folder: Path, corpus: Path, limits: tuple[str, ...]) -> tuple[dict[str, bytes], float]:
    """Prepare with one worker, undisturbed; returns the files and how long it took."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    begun = time.monotonic()
    succeed(folder, *command(corpus, 1, limits))
    return contents(folder / OUT), time.monotonic() - begun


def kill_and_repeat(
    rng: random.Random,
    folder: Path,
    seen: Counter[str],
    options: list[str],
    wanted: dict[str, bytes],
    seconds: float,
) -> None:
    """Kill a preparation one to three times, repeat it to its end, and compare its files.

    The kill is of all its processes, or only of the first, whose workers have to notice; or it is
    a SIGTERM, after which it has to end by itself and leave nothing hidden.
    """
    for _ in range(rng.randint(1, 3)):
        left = _writes(folder)
        process = start(folder, *options)
        writing = (lambda: _writes(folder)) if rng.random() < 0.5 else None
        alone = rng.random() < 0.5
        number = rng.choice([signal.SIGKILL] * 3 + [signal.SIGTERM])
        if not kill_at_random(process, rng, seconds, writing, number):
            break
        if number == signal.SIGKILL and not alone:
            _kill_group(process.pid)
        wait_for(lambda: not processes_in(folder), "the workers' end", seconds=20)
        # What a kill left, only the next one to get so far removes.
        if process.returncode > 0 and not left:
            check_nothing_hidden(folder)
        if number == signal.SIGKILL:
            seen.update({KILLS: 1, WRITING: int(_writes(folder)), ALONE: int(alone)})
        else:
            seen[STOPS] += 1
    succeed(folder, *options)
    check_same_files(contents(folder / OUT), wanted)
    check_nothing_hidden(folder)


def _writes(folder: Path) -> bool:
    """Say whether a file is being written, or was when the process was killed."""
    return any((folder / OUT).glob(".*.tmp"))


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        # It had no workers, or they are gone already.
        return


# --- The documents ---


def make_corpus(directory: Path, seed: int) -> Path:
    """Write several thousand documents in all kinds of files, some empty, some not UTF-8."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "notes").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number in range(2):
        lines = _lines(_documents(rng, 1500))
        (directory / f"lines_{number}.jsonl").write_bytes(lines)
    with gzip.open(directory / "packed.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(_lines(_documents(rng, 500)))
    for number in range(2):
        _write_parquet(directory / f"rows_{number}.parquet", _documents(rng, 1500))
    for number, text in enumerate(_documents(rng, 200)):
        content = text.encode() if number % 20 else b"\xff\xfe not UTF-8"
        (directory / "notes" / f"{number:03d}.txt").write_bytes(content)
    return directory


def _documents(rng: np.random.Generator, count: int) -> list[str]:
    """Return documents of random words, 3 kB on average; every fifteenth is empty."""
    letters = np.array([*"abcdefghijklmnopqrstuvwxyz"])
    made = ["".join(rng.choice(letters, size=rng.integers(1, 9))) for _ in range(2000)]
    words = [*made, "naïve", "δέλτα", "猫", "🙂", "1,234.5", "\n\n", "don't"]
    documents = []
    for number in range(count):
        size = 0 if number % 15 == 0 else int(rng.exponential(550)) + 1
        documents.append(" ".join(words[i] for i in rng.integers(len(words), size=size).tolist()))
    return documents


def _lines(documents: list[str]) -> bytes:
    lines = [json.dumps({"text": text}).encode() for text in documents]
    # One line, its number drawn by nobody, is not UTF-8.
    lines[len(lines) // 3] = b'{"text": "\xff\xfe"}'
    return b"\n".join(lines) + b"\n"


def _write_parquet(path: Path, documents: list[str]) -> None:
    import pyarrow
    from pyarrow import parquet

    texts = [text or None for text in documents]
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=600)
