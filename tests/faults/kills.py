"""What is killed at random moments, and resumed or repeated, ends like what nothing disturbed."""

import functools
import gzip
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
from pyarrow import parquet

from tests.faults import common
from tests.faults.common import RUN, Outcome, kill_at_random, succeed
from tests.nodes import end, rank_of, start_node, workers
from tests.tiny import start, wait_for
from training import checkpoint

KINDS = (
    {"shuffle": "none", "optimizer": "adamw", "dropout": 0.0},
    {"shuffle": "sequences", "optimizer": "muon", "dropout": 0.1},
    {"shuffle": "documents", "optimizer": "adamw", "dropout": 0.1},
)
TORCHRUN = ["--standalone", "--nproc_per_node=2", "--max-restarts=8"]


def training(seed: int, kills: int, directory: Path) -> Outcome:
    """Kill runs, each up to three times; resume and compare."""

    @functools.cache
    def straight(kind: int) -> tuple[Path, float]:
        return common.straight(directory / f"straight_{kind}", **KINDS[kind])

    def trial(rng: random.Random, folder: Path, seen: Counter[str]) -> None:
        kind = rng.randrange(len(KINDS))
        (wanted, seconds), run = straight(kind), folder / RUN
        words = [*common.command(**KINDS[kind]), "--auto-resume"]
        common.make_data(folder)

        def is_saving() -> bool:
            return any((run / "checkpoints").glob(".*"))

        for _ in range(rng.randint(1, 3)):
            aimed = is_saving if rng.random() < 0.5 else None
            if not kill_at_random(start(*words, cwd=folder), rng, seconds, aimed):
                break
            seen.update({"kills": 1, "inside a checkpoint write": int(is_saving())})
            wait_for(lambda: not common.processes_in(folder))
            # What is in sight is complete.
            assert [checkpoint.newest(run)] == (checkpoint.all_checkpoints(run)[-1:] or [None])
        succeed(folder, *words)
        common.check_same_run(folder, wanted)

    return common.repeat(seed, kills, directory, trial)


def restarts(seed: int, kills: int, directory: Path) -> Outcome:
    """Kill processes of a torchrun, which starts them again alone."""
    settings = {"steps": 80, **KINDS[2]}
    wanted, seconds = common.straight(directory / "straight", 2, **settings)

    def trial(rng: random.Random, folder: Path, seen: Counter[str]) -> None:
        common.make_data(folder)
        node = start_node(TORCHRUN, common.command(**settings), folder)
        try:
            for _ in range(rng.randint(1, 2)):
                time.sleep(rng.uniform(0, seconds))
                ranks, rank = {rank_of(pid): pid for pid in workers(node.pid)}, rng.randrange(2)
                if rank in ranks:
                    os.kill(ranks[rank], signal.SIGKILL)
                    seen.update({"kills": 1, f"of rank {rank}": 1})
            assert node.wait(600) == 0, f"torchrun: {node.errors.read_text()[-1500:]}"
        finally:
            end(node)
        common.check_same_run(folder, wanted)

    return common.repeat(seed, max(kills // 3, 1), directory, trial)


def preparation(seed: int, kills: int, directory: Path) -> Outcome:
    """Kill preparations, or stop them by SIGTERM; repeat them and compare their files."""
    corpus = make_corpus(directory / "corpus")
    begun = time.monotonic()
    succeed(directory, *prepare(corpus, 1))
    wanted, seconds = common.contents(directory / "shards"), time.monotonic() - begun

    def trial(rng: random.Random, folder: Path, seen: Counter[str]) -> None:
        words, shards = prepare(corpus, rng.randint(1, 3)), folder / "shards"

        def is_writing() -> bool:
            return any(shards.glob(".*.tmp"))

        for _ in range(rng.randint(1, 3)):
            aimed = is_writing if rng.random() < 0.5 else None
            number = rng.choice([signal.SIGKILL] * 3 + [signal.SIGTERM])
            if not kill_at_random(start(*words, cwd=folder), rng, seconds, aimed, number):
                break
            seen.update({"kills": 1, "in the middle of a file": int(is_writing())})
        succeed(folder, *words)
        common.check_same_files(common.contents(shards), wanted)
        common.check_nothing_left(shards)

    return common.repeat(seed, kills, directory, trial)


def prepare(corpus: Path, workers: int, out: str = "shards") -> list[object]:
    """Return the command that prepares the corpus, in the folder of a trial."""
    options = ["--shard-tokens", 600_000, "--workers", workers, "--max-document-tokens", 512]
    return ["load_fineweb.py", "--source", corpus, "--out", out, *options]


def make_corpus(directory: Path) -> Path:
    """Write several thousand documents in all kinds of files, some empty, some not UTF-8."""
    directory.mkdir(parents=True)
    rng, words = np.random.default_rng(0), [*"abcdefghij", "naïve", "δέλτα", "猫", "🙂", "\n\n"]
    for i in range(3):
        sizes = [int(rng.exponential(550)) + 1 if i % 15 else 0 for i in range(2000)]
        texts = [" ".join(words[k] for k in rng.integers(len(words), size=n)) for n in sizes]
        lines = b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)
        (directory / f"lines_{i}.jsonl").write_bytes(lines + b'{"text": "\xff\xfe"}\n')
        (directory / f"packed_{i}.jsonl.gz").write_bytes(gzip.compress(lines, 1))
        table = pyarrow.table({"text": [text or None for text in texts]})
        parquet.write_table(table, directory / f"rows_{i}.parquet", row_group_size=600)
        (directory / f"note_{i}.txt").write_bytes(texts[1].encode() + b"\xff" * (i == 2))
    return directory
