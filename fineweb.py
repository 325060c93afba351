"""Shards -> windows -> the batch of an update, for any rank and world size.

orders.py says which windows an update reads; ranks and micro-batches are slices of those, so the
same update reads the same text on one GPU or on sixty-four.
"""

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from config import Config, UserError
from cross_entropy import IGNORED
from distributed import World
from documents import DocumentOrder
from orders import epoch_and_update, update_windows
from rows import PaddedRows
from shards import TokenStream


class FineWebEdu(Dataset):
    """Map-style data set over the windows of one split; works with any DataLoader or trainer."""

    def __init__(
        self,
        directory: str | Path,
        split: str = "train",
        block_size: int = 1024,
        rows: str = "packed",
    ):
        """Open a data directory, its windows as train.rows says.

        Raises UserError when it is damaged or holds no whole window.
        """
        self.stream = TokenStream(directory, split)
        self.block_size = block_size
        self.padded = PaddedRows(self.stream, block_size) if rows == "padded" else None
        self._documents: DocumentOrder | None = None
        if len(self) < 1:
            raise UserError(
                f"The {split} split of {directory} has {len(self.stream)} tokens, less than one "
                f"window of {block_size}; lower --model.block-size or prepare more data."
            )

    def __len__(self) -> int:
        if self.padded is not None:
            return len(self.padded)
        return (len(self.stream) - 1) // self.block_size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of window `index`, int64 (T,) each."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        inputs, targets = inputs_and_targets(self.windows(np.array([index % len(self)])))
        return inputs[0], targets[0]

    def windows(self, indices: np.ndarray) -> Tensor:
        """Return windows as int64 (len(indices), T + 1), inputs and targets in one.

        Padding is IGNORED.
        """
        if self.padded is not None:
            tokens, held = self.padded.read(indices)
            return torch.from_numpy(np.where(held, tokens, IGNORED))
        starts = np.asarray(indices, dtype=np.int64) * self.block_size
        return torch.from_numpy(self.stream.windows(starts, self.block_size + 1).astype(np.int64))

    def documents(self, seed: int, quiet: bool = True) -> DocumentOrder:
        """Return the document order that is drawn from `seed`, opened when first asked for."""
        if self._documents is None or self._documents.seed != seed:
            self._documents = DocumentOrder(self.stream, seed, quiet)
        return self._documents


def inputs_and_targets(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return what goes into the model and what it should say, (B, T) each, of windows (B, T + 1).

    In the inputs, padding is some token, which nothing that counts can see.
    """
    return windows[:, :-1].clamp(min=0), windows[:, 1:]


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
                windows = read_update(data, config, step, world)
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


def read_update(data: FineWebEdu, config: Config, step: int, world: World) -> Tensor:
    """Return this rank's windows of update `step`, int64 (G / world size, T + 1), on the CPU."""
    indices, length = rank_windows(config, step, len(data), world), data.block_size
    if config.train.order == "shuffle_windows" or data.padded is not None:
        return data.windows(indices)
    # Neighbours, of which one's last token is the next one's first: one read brings them all.
    start, count = int(indices[0]) * length, len(indices) * length + 1
    if config.train.order == "shuffle_documents":
        epoch, _ = epoch_and_update(config, step, len(data))
        tokens = data.documents(config.train.seed, quiet=not world.is_main).read(
            epoch, start, count
        )
    else:
        tokens = data.stream.read(start, count)
    overlapping = np.lib.stride_tricks.sliding_window_view(tokens, length + 1)[::length]
    return torch.from_numpy(overlapping.astype(np.int64))


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
