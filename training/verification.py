"""Every byte of the training data, read in a background thread while the run begins."""

import hashlib
import threading
from pathlib import Path

import numpy as np

from config import UserError
from corpus.shards import AGAIN, BLOCK_BYTES, Shard, check_ids, open_shard, read_manifest
from tqdm_bars import PreparationBar


class Verification:
    """Reads every byte of a data directory in a background thread: digests and token ids."""

    def __init__(self, directory: str | Path):
        """Begin; raises UserError when the manifest cannot be read."""
        self.directory, self.manifest = Path(directory), read_manifest(Path(directory))
        self._read, self._error, self._stopped = 0, None, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the UserError that has been found, if any."""
        if self._error is not None:
            raise self._error

    def wait(self, quiet: bool = True) -> str:
        """Wait for the last byte, and return what was checked in a sentence."""
        shards, total = self.manifest.shards, sum(s.tokens for s in self.manifest.shards)
        with PreparationBar("verifying", total, disable=quiet) as bar:
            while self._thread.is_alive():
                self._thread.join(0.1)
                bar.update(self._read // 2 - bar.n)
        self.check()
        known = sum(shard.sha256 is not None for shard in shards)
        found = f"{self.directory} is intact: {len(shards)} shards with {total:,} tokens, all below"
        return f"{found} {self.manifest.vocab_size:,}; the digests of {known} are right."

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for shard in self.manifest.shards:
                self._verify(shard)
        except Exception as error:  # belongs to whoever checks
            self._error = error

    def _verify(self, shard: Shard) -> None:
        path = self.directory / shard.file
        offset = open_shard(path, shard.tokens).offset
        block = np.empty(BLOCK_BYTES, np.uint8)
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read(offset))
            while not self._stopped.is_set() and (count := file.readinto(block)):
                digest.update(block[:count])
                check_ids(block[: count & ~1].view("<u2"), self.manifest.vocab_size, path)
                self._read += count
        if shard.sha256 not in (None, digest.hexdigest()) and not self._stopped.is_set():
            raise UserError(f"{path} is damaged: its sha256 is not the manifest's; {AGAIN}")
