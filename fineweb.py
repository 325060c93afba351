"""Sequences of token shards, their order, and the batch of any step for any rank.

    python fineweb.py data/fineweb-edu        describes a data directory

Sequence i of a split is tokens [i*T, i*T + T + 1): T inputs, and T targets one further on. Step k
of an epoch takes sequences order[(k-1)*G : k*G], G = batch_tokens / T, where train.shuffle says
    none        the sequences as they lie in the shards
    documents   the same after the shards, and the documents in each, have changed places
    sequences   one permutation of all sequences
The places are drawn anew every epoch, and computed, not stored: memory does not grow with the data.
"""

import functools
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.utils.data import Dataset

from config import Config, UserError
from corpus.shards import BLOCK_BYTES, TokenShards, check_ids, find_data
from loss import IGNORE_INDEX
from utils import parse, printable, run_script


class FineWebEdu(Dataset):
    """Map-style dataset over the sequences of one split; works with any DataLoader or trainer."""

    def __init__(self, directory: str | Path, split: str = "train", block_size: int = 1024):
        """Open a split; raises UserError when it is damaged or holds no whole sequence."""
        self.shards, self.block_size = TokenShards(directory, split), block_size
        if len(self) < 1:
            few = f"has {len(self.shards)} tokens, less than one sequence of {block_size}"
            remedy = "lower --model.block-size or prepare more data."
            raise UserError(f"The {split} split of {directory} {few}; {remedy}")

    def __len__(self) -> int:
        return (len(self.shards) - 1) // self.block_size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of sequence `index`, int64 (T,) each."""
        tokens = self.sequences([range(len(self))[index]])[0]  # IndexError past the end
        return tokens[:-1], tokens[1:]

    def sequences(self, indices: Any, seed: int | None = None, epoch: int = 0) -> Tensor:
        """Return sequences, int64 (n, T + 1): as they lie, or with a seed in document order."""
        indices, length, parts = np.asarray(indices, dtype=np.int64), self.block_size, []
        if seed is None:
            return torch.from_numpy(self.shards.read(indices * length, length + 1).astype(np.int64))
        # Neighbours are read at once: the last token of one is the first of the next.
        for run in np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1):
            tokens = self._read_documents(run[0] * length, (run[-1] + 1) * length + 1, seed, epoch)
            parts.append(np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length])
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def _read_documents(self, start: int, stop: int, seed: int, epoch: int) -> np.ndarray:
        """Return tokens [start, stop) of the epoch's re-ordered stream, uint16."""
        lengths, parts = np.diff(self.shards.bounds), []
        order = permutation(np.arange(len(lengths)), len(lengths), subseed(seed, 0), epoch)
        for i, first, last in _overlaps(lengths[order], start, stop):
            tokens = self.shards.shard(int(order[i]))
            begins, sizes = _shuffled(self.shards, int(order[i]), seed, epoch)
            for j, skip, end in _overlaps(sizes, first, last):
                parts.append(tokens[begins[j] + skip : begins[j] + end])
        return check_ids(np.concatenate(parts), self.shards.vocab_size, self.shards.directory)


@functools.lru_cache(maxsize=2)  # a batch may lie across two shards
def _shuffled(shards: TokenShards, shard: int, seed: int, epoch: int) -> tuple[np.ndarray, ...]:
    """Return where the documents of a shard begin, in the epoch's order, and their lengths."""
    begins = document_starts(shards, shard)
    order = permutation(np.arange(len(begins)), len(begins), subseed(seed, shard + 1), epoch)
    return begins[order], np.diff(begins, append=shards.shards[shard].tokens)[order]


def document_starts(shards: TokenShards, shard: int) -> np.ndarray:
    """Scan a shard for where documents begin, int64; the rest of an earlier one counts as one."""
    tokens, eot = shards.shard(shard), shards.manifest.eot
    blocks = range(0, len(tokens), BLOCK_BYTES)
    found = [i + np.flatnonzero(tokens[i : i + BLOCK_BYTES] == eot) for i in blocks]
    return np.unique(np.concatenate([np.arange(min(len(tokens), 1)), *found]))


def _overlaps(lengths: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield which part [first, last) of piece i lies in [start, stop) of all pieces end to end."""
    ends = np.cumsum(lengths)
    i = int(np.searchsorted(ends, start, side="right"))
    while start < stop:
        begin, end = int(ends[i] - lengths[i]), int(ends[i])
        yield i, start - begin, min(stop, end) - begin
        start, i = end, i + 1


def permutation(positions: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Return where `positions` go in a pseudo-random permutation of range(count), int64.

    A Feistel network over pairs (left, right) with left < a, right < b and a * b just above count
    (Black and Rogaway 2002); the few that land past the end walk on until they land inside.
    """
    a = math.isqrt(max(count - 1, 0)) + 1  # the square root, rounded up
    b = -(-count // a)
    places = np.array(positions, dtype=np.uint64)
    outside = np.ones(len(places), dtype=bool)
    while outside.any():
        places[outside] = _feistel(places[outside], a, b, seed, epoch)
        outside = places >= count
    return places.astype(np.int64)


def _feistel(places: np.ndarray, a: int, b: int, seed: int, epoch: int) -> np.ndarray:
    left, right = places // np.uint64(b), places % np.uint64(b)
    key = _mix(_mix(np.array([seed % 2**64], np.uint64)) + np.uint64(epoch))
    # Four rounds make a good permutation (Luby and Rackoff 1988); eight leave no doubt.
    for _ in range(4):
        key = _mix(key)
        left = (left + _mix(right ^ key) % np.uint64(a)) % np.uint64(a)
        key = _mix(key)
        right = (right + _mix(left ^ key) % np.uint64(b)) % np.uint64(b)
    return left * np.uint64(b) + right


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 values so that each output bit depends on every input bit (SplitMix64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)  # overflows on purpose, as the products do
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def subseed(seed: int, number: int) -> int:
    """Return a seed of its own for thing `number` of those that are drawn from `seed`."""
    return int(_mix(_mix(np.array([seed % 2**64], np.uint64)) ^ np.uint64(number))[0])


def epoch_of(config: Config, step: int, n_sequences: int) -> int:
    """Return the epoch of a step, from 0; sequences that fill no step are left out of each."""
    return (step - 1) // (n_sequences // config.sequences_per_step)


def sequence_indices(config: Config, step: int, n_sequences: int) -> np.ndarray:
    """Return the G sequences of a step (1 is the first), int64; in document order, its numbers."""
    epoch, k = divmod(step - 1, n_sequences // config.sequences_per_step)
    positions = k * config.sequences_per_step + np.arange(config.sequences_per_step)
    if config.train.shuffle != "sequences":
        return positions
    return permutation(positions, n_sequences, config.train.seed, epoch)


@dataclass(frozen=True)
class Batch:
    """A rank's share of a step: tokens int64 (n, T + 1) and, on the CPU, which sequences (n,)."""

    step: int
    tokens: Tensor
    indices: Tensor
    inputs = property(lambda self: self.tokens[:, :-1])  # (n, T)
    targets = property(lambda self: self.tokens[:, 1:])  # (n, T), the next tokens

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; from pinned memory the copy overlaps computing."""
        return Batch(self.step, self.tokens.to(device, non_blocking=True), self.indices)


def load_batch(data: FineWebEdu, config: Config, step: int, rank: int, world_size: int) -> Batch:
    """Return a rank's contiguous slice of a step's sequences, on the CPU."""
    share = config.sequences_per_rank(world_size)
    indices = sequence_indices(config, step, len(data))[rank * share : (rank + 1) * share]
    seed = config.train.seed if config.train.shuffle == "documents" else None
    tokens = data.sequences(indices, seed, epoch_of(config, step, len(data)))
    return Batch(step, tokens, torch.from_numpy(indices))


def prefetch(data: FineWebEdu, config: Config, info: Any, first: int, last: int) -> Iterator[Batch]:
    """Yield a rank's batches of steps first..last on its device, read ahead; to be closed."""

    def load(step: int) -> Batch:
        batch = load_batch(data, config, step, info.rank, info.world_size)
        pinned = batch.tokens.pin_memory() if info.device.type == "cuda" else batch.tokens
        return Batch(step, pinned, batch.indices)

    pool = ThreadPoolExecutor(max_workers=1)
    try:
        ahead = [pool.submit(load, step) for step in range(first, min(first + 2, last + 1))]
        for step in range(first, last + 1):
            batch = ahead.pop(0).result()  # raises what reading has raised
            if step + 2 <= last:
                ahead.append(pool.submit(load, step + 2))
            yield batch.to(info.device)
    finally:
        pool.shutdown(cancel_futures=True)


def validation_batches(
    data: FineWebEdu, config: Config, rank: int, world_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a rank's validation batches (inputs, targets), int64 (micro_batch_size, T), on the CPU.

    The first val_tokens tokens, each once; all ranks have as many batches, some IGNORE_INDEX.
    """
    size, length = config.train.micro_batch_size, data.block_size
    count = min(max(config.train.val_tokens // length, 1), len(data))
    for start in range(rank * size, count + rank * size, world_size * size):
        inputs = torch.zeros(size, length, dtype=torch.int64)
        targets = torch.full((size, length), IGNORE_INDEX)
        if start < count:
            tokens = data.sequences(np.arange(start, min(start + size, count)))
            inputs[: len(tokens)], targets[: len(tokens)] = tokens[:, :-1], tokens[:, 1:]
        yield inputs, targets


@dataclass(frozen=True)
class Arguments:
    """Describe a data directory: splits, documents, tokenizer, source, and how its text begins."""

    data: tyro.conf.Positional[str]
    """Directory of token shards, or its name under data/."""


def main() -> None:
    """Print what the directory on the command line holds."""
    directory = find_data(parse(Arguments).data)
    for split in ("val", "train"):
        shards = TokenShards(directory, split)
        first = f"the first with {len(document_starts(shards, 0)):,} documents"
        print(f"{split}: {len(shards):,} tokens in {len(shards.shards):,} shards, {first}")
    print(f"tokenizer: {shards.manifest.tokenizer}, {shards.vocab_size:,} ids")
    print("source:", ", ".join(printable(f"{k} {v}") for k, v in shards.manifest.source.items()))
    text = shards.tokenizer.decode(shards.read([0], min(200, len(shards)))[0])
    print(*map(printable, text.splitlines()), sep="\n")


if __name__ == "__main__":
    run_script(main)
