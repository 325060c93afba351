"""Shards -> windows -> the batch of an update, for any rank and world size.

Window i of a split is tokens [i*T, i*T + T + 1): T inputs and the T targets one further on. Update
k of an epoch takes windows order[(k-1)*G : k*G], where G = tokens_per_update / T; ranks and
micro-batches are slices of those, so the same update reads the same text on one GPU or on
sixty-four.
"""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from config import Config, UserError, windows_per_update
from distributed import World
from model import IGNORED
from shards import TokenStream


class FineWebEdu(Dataset):
    """Map-style data set over the windows of one split; works with any DataLoader or trainer."""

    def __init__(self, directory: str | Path, split: str = "train", block_size: int = 1024):
        """Open a data directory; raises UserError when it is damaged or holds no whole window."""
        self.stream = TokenStream(directory, split)
        self.block_size = block_size
        if len(self) < 1:
            raise UserError(
                f"The {split} split of {directory} has {len(self.stream)} tokens, less than one "
                f"window of {block_size}; lower --model.block-size or prepare more data."
            )

    def __len__(self) -> int:
        return (len(self.stream) - 1) // self.block_size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of window `index`, int64 (T,) each."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        window = self.windows(np.array([index % len(self)]))[0]
        return window[:-1], window[1:]

    def windows(self, indices: np.ndarray) -> Tensor:
        """Return windows as int64 (len(indices), T + 1), inputs and targets in one."""
        starts = np.asarray(indices, dtype=np.int64) * self.block_size
        return torch.from_numpy(self.stream.windows(starts, self.block_size + 1).astype(np.int64))


def update_windows(config: Config, step: int, windows: int) -> np.ndarray:
    """Return the G windows of update `step` (1 is the first), int64, of `windows` in an epoch."""
    size = windows_per_update(config)
    epoch, update = divmod(step - 1, windows // size)
    positions = np.arange(update * size, (update + 1) * size)
    if config.train.order == "sequential":
        return positions
    return permute(positions, windows, config.train.seed, epoch)


def permute(positions: np.ndarray, count: int, seed: int, epoch: int) -> np.ndarray:
    """Return where `positions` go in a pseudo-random permutation of range(count), int64.

    The permutation is computed, not stored: a Feistel network over pairs (left, right) with
    left < a, right < b and a * b just above `count` (Black and Rogaway 2002); the few positions
    that land past the end walk on until they land inside. So any update of ten trillion tokens is
    found at once, without memory, and alike on every machine and NumPy version.
    """
    a = int(np.ceil(np.sqrt(count)))
    b = -(-count // a)
    places = np.asarray(positions, dtype=np.uint64)
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
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def training_batches(
    data: FineWebEdu, config: Config, world: World, first: int, last: int
) -> Iterator[Tensor]:
    """Yield this rank's windows of updates first..last, int64 (G / world size, T + 1) on its
    device.

    A background thread reads ahead, into pinned memory on CUDA, so that copying overlaps computing.
    """
    pin = world.device.type == "cuda"
    ahead: queue.Queue[Tensor | BaseException] = queue.Queue(maxsize=2)
    stopped = threading.Event()

    def put(item: Tensor | BaseException) -> None:
        while not stopped.is_set():
            try:
                ahead.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def read() -> None:
        try:
            for step in range(first, last + 1):
                windows = data.windows(rank_windows(config, step, len(data), world))
                put(windows.pin_memory() if pin else windows)
                if stopped.is_set():
                    return
        except BaseException as error:
            # Whatever goes wrong belongs to whoever waits for the batch.
            put(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        for _ in range(first, last + 1):
            item = ahead.get()
            if isinstance(item, BaseException):
                raise item
            yield item.to(world.device, non_blocking=pin)
    finally:
        stopped.set()
        reader.join()


def rank_windows(config: Config, step: int, windows: int, world: World) -> np.ndarray:
    """Return this rank's slice of the windows of update `step`."""
    indices = update_windows(config, step, windows)
    share = len(indices) // world.size
    return indices[world.rank * share : (world.rank + 1) * share]


def validation_batches(
    data: FineWebEdu, config: Config, world: World
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's validation batches (inputs, targets), int64 (micro_batch, T), on the CPU.

    The same first `val_tokens` tokens every time and in every run. Every batch has the same shape:
    the last one is filled up with rows whose targets are IGNORED, so nothing is dropped or
    repeated.
    """
    size, length = config.train.micro_batch, config.model.block_size
    count = validation_windows(data, config)
    for start in range(world.rank * size, count, world.size * size):
        windows = data.windows(np.arange(start, min(start + size, count)))
        inputs = torch.zeros(size, length, dtype=torch.int64)
        targets = torch.full((size, length), IGNORED)
        inputs[: len(windows)], targets[: len(windows)] = windows[:, :-1], windows[:, 1:]
        yield inputs, targets


def validation_windows(data: FineWebEdu, config: Config) -> int:
    """Return how many windows a validation reads."""
    return min(max(config.train.val_tokens // config.model.block_size, 1), len(data))


def validation_batch_count(data: FineWebEdu, config: Config, world: World) -> int:
    """Return how many of the validation's batches are this rank's."""
    batches = -(-validation_windows(data, config) // config.train.micro_batch)
    return len(range(world.rank, batches, world.size))
