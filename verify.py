"""Every byte of a data directory against its manifest, for when opening it is not proof enough."""

import hashlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from config import UserError
from manifests import Shard, read_manifest
from shards import OpenFile, check_shard
from tqdm_bars import PreparationBar

BLOCK_BYTES = 1 << 22
# More would wait for the disk.
THREADS = min(8, os.cpu_count() or 1)


def verify_data(directory: str | Path, quiet: bool = False) -> str:
    """Read every shard whole, compare its sha256 with the manifest's, and check its tokens.

    Returns a sentence that says what was checked. Raises UserError naming the first damaged file,
    in the manifest's order, and its kind of damage. Memory does not grow with the shards.
    """
    directory = Path(directory)
    manifest = read_manifest(directory)
    shards, stopped = manifest.shards, threading.Event()
    total = sum(shard.tokens for shard in shards)

    def verify(shard: Shard) -> None:
        _verify_shard(directory, shard, manifest.vocab_size, stopped)

    with (
        ThreadPoolExecutor(THREADS) as pool,
        PreparationBar("verifying", total, disable=quiet) as bar,
    ):
        try:
            for shard, _ in zip(shards, pool.map(verify, shards), strict=True):
                bar.update(shard.tokens)
        finally:
            # After a failure or Ctrl-C the shards still in hand need not be read to their ends.
            stopped.set()
    known = sum(shard.sha256 is not None for shard in shards)
    digests = f"the digests of {known} are right" if known else "their digests are unknown"
    unfinished = "" if manifest.complete else ", and the preparation is not finished"
    return (
        f"{directory} is intact: {len(shards)} shards with {total:,} tokens, all below "
        f"{manifest.vocab_size:,}; {digests}{unfinished}."
    )


def _verify_shard(directory: Path, shard: Shard, vocab_size: int, stopped: threading.Event) -> None:
    path, offset = directory / shard.file, check_shard(directory, shard)
    file, size = OpenFile(str(path)), offset + 2 * shard.tokens
    block = np.empty(BLOCK_BYTES, dtype=np.uint8)
    header = block[:offset]
    file.read_into(header.data, 0)
    digest, largest = hashlib.sha256(header), 0
    for start in range(offset, size, BLOCK_BYTES):
        if stopped.is_set():
            return
        part = block[: size - start]
        file.read_into(part.data, start)
        digest.update(part)
        largest = max(largest, int(part.view("<u2").max()))
    if shard.sha256 is not None and digest.hexdigest() != shard.sha256:
        raise UserError(
            f"{path} is damaged: its sha256 is not the manifest's; restore it or prepare the data "
            "again."
        )
    if largest >= vocab_size:
        raise UserError(
            f"{path} holds token {largest}, past its vocabulary of {vocab_size}; it is damaged or "
            "was made with another tokenizer."
        )
