"""How fast sequences of ten billion tokens are read, how soon, and in how much memory.

    python -m bench.loader [--steps N] [--repeats N] [--tokens N] [--shard-tokens N]

The shards have the published sizes of FineWeb-Edu's sample, but are sparse where nothing is read,
so they need little disk. For each order, and in a fresh process each time: milliseconds from
opening the data to the first batch, without the imports; the process's peak memory beyond the
imports, after reading all steps through the background thread; and tokens a second, reading them
again, now from the page cache. The reference is the ordinary loop: memory maps, one sequence
after the other, and for both shuffles a stored permutation of all sequences.
"""

import bisect
import contextlib
import itertools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.processes import in_fresh_process, peak, reset_peak
from bench.record import report
from config import Config, replace
from corpus.shards import Manifest, Shard, npy_header, write_manifest
from corpus.tokenizer import GPT2Tokenizer
from fineweb import FineWebEdu, load_batch, permutation, prefetch, subseed
from training.distributed import DistInfo
from utils import parse, run_script

LENGTH, SEQUENCES = 1024, 512
ORDERS = ("none", "documents", "sequences")


@dataclass(frozen=True)
class Arguments:
    """Measure the reader of token shards."""

    tokens: int = 9_982_590_278
    """Tokens in all shards, the first one of which is for validation."""
    shard_tokens: int = 100_000_000
    """Tokens in a shard."""
    steps: int = 600
    """Steps of 512 sequences of 1,024 that are read."""
    repeats: int = 3
    """Measurements of each, taken in turn; their medians are compared."""
    directory: Path | None = None
    """Where the shards are made, and deleted again; the system's temporary directory by default."""


def main() -> None:
    """Print one JSON line for each order and figure."""
    arguments = parse(Arguments)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        make_data(Path(directory), arguments)
        for order in ORDERS:
            ours, plain = [], []
            for _ in range(arguments.repeats):
                ours.append(in_fresh_process(measure, directory, order, arguments.steps))
                plain.append(in_fresh_process(measure_plainly, directory, order, arguments.steps))
            for i, (figure, unit) in enumerate(
                (("first batch", "ms"), ("memory", "MB"), ("reading", "tokens/s"))
            ):
                values, references = [row[i] for row in ours], [row[i] for row in plain]
                report(f"loader, {order}, {figure}", unit, values, references)


Figures = tuple[float, float, float]


def measure(directory: str, order: str, steps: int) -> Figures:
    """Return ms to the first batch, MB of memory and tokens/s of this project's reader."""
    config = replace(Config(), {"train.shuffle": order})
    info = DistInfo(0, 0, 1, torch.device("cpu"))
    before, start = reset_peak(), time.perf_counter()
    data = FineWebEdu(directory, "train", LENGTH)
    steps = min(steps, len(data) // SEQUENCES)
    with contextlib.closing(prefetch(data, config, info, 1, steps)) as batches:
        next(batches)
        first = time.perf_counter() - start
        for _ in batches:
            pass
    memory, start = peak() - before, time.perf_counter()
    for step in range(1, steps + 1):
        load_batch(data, config, step, 0, 1)
    seconds = time.perf_counter() - start
    return 1e3 * first, memory / 1e6, steps * SEQUENCES * LENGTH / seconds


def measure_plainly(directory: str, order: str, steps: int) -> Figures:
    """Return the same figures of the ordinary loop."""
    before, start = reset_peak(), time.perf_counter()
    maps = [np.load(file, mmap_mode="r") for file in sorted(Path(directory).glob("*_train_0*.npy"))]
    ends = list(itertools.accumulate(len(tokens) for tokens in maps))
    order_of = np.arange((ends[-1] - 1) // LENGTH)
    if order != "none":
        order_of = np.random.default_rng(0).permutation(order_of)
    steps = min(steps, len(order_of) // SEQUENCES)

    def sequence(index: int) -> np.ndarray:
        begin = index * LENGTH
        shard = bisect.bisect_right(ends, begin)
        begin -= ends[shard - 1] if shard else 0
        tokens = maps[shard][begin : begin + LENGTH + 1]
        if len(tokens) <= LENGTH:
            tokens = np.concatenate([tokens, maps[shard + 1][: LENGTH + 1 - len(tokens)]])
        return tokens

    def batch(step: int) -> torch.Tensor:
        indices = order_of[step * SEQUENCES : (step + 1) * SEQUENCES].tolist()
        return torch.from_numpy(np.stack([sequence(i) for i in indices]).astype(np.int64))

    batch(0)
    first = time.perf_counter() - start
    for step in range(1, steps):
        batch(step)
    memory, start = peak() - before, time.perf_counter()
    for step in range(steps):
        batch(step)
    seconds = time.perf_counter() - start
    return 1e3 * first, memory / 1e6, steps * SEQUENCES * LENGTH / seconds


def make_data(directory: Path, arguments: Arguments) -> None:
    """Make the shards and their sealed manifest."""
    full, rest = divmod(arguments.tokens, arguments.shard_tokens)
    sizes = [arguments.shard_tokens] * full + [rest] * (rest > 0)
    count, seed = len(sizes) - 1, Config().train.seed
    wanted = -(-arguments.steps * SEQUENCES * LENGTH // arguments.shard_tokens) + 1
    # Those that the document order reads first have tokens and documents; the rest are holes.
    written = permutation(np.arange(count), count, subseed(seed, 0), 0)[:wanted] + 1
    shards = []
    for number, size in enumerate(sizes):
        split = "train" if number else "val"
        path = directory / f"bench_{split}_{number:06d}.npy"
        write_shard(path, size, number, hole=number not in written)
        shards.append(Shard(path.name, split, size))
    manifest = Manifest(
        name="bench",
        tokenizer=GPT2Tokenizer.name,
        vocab_size=GPT2Tokenizer.vocab_size,
        eot=GPT2Tokenizer.eot,
        source={"kind": "benchmark"},
        shards=tuple(shards),
        complete=True,
    )
    write_manifest(directory, manifest)


def write_shard(path: Path, size: int, seed: int, hole: bool) -> None:
    """Write a shard, or only its header and size."""
    rng = np.random.default_rng(seed)
    # About one document in a thousand tokens.
    places = np.cumsum(np.concatenate([[0], rng.integers(1, 2000, size // 900 + 2)]))
    places = places[places < size]
    with open(path, "wb") as file:
        file.write(npy_header(size))
        if not hole:
            tokens = rng.integers(0, GPT2Tokenizer.eot, size, dtype=np.uint16)
            tokens[places] = GPT2Tokenizer.eot
            tokens.tofile(file)
        file.truncate(128 + 2 * size)


if __name__ == "__main__":
    run_script(main)
