"""The one definition of the on-disk token format: its reader (its writer is in writer.py).

A data directory holds 1-D little-endian uint16 `.npy` files, each document being <|endoftext|>
followed by its tokens, documents running on across file boundaries, and beside them
`manifest.json`, which says what they are (manifests.py).
"""

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from config import UserError
from manifests import Shard, read_header, read_manifest, sampled_digest
from tokenizer import Tokenizer, load_tokenizer

# Files that a reader keeps open; a few hundred are what a process may have on some systems.
OPEN_FILES = 128


class OpenFile:
    """A file that any number of threads read at any place; it closes with its last user.

    Reads are calls to the system, never a memory map: of a map that is truncated or whose disk
    fails, the process dies by SIGBUS without a word, and its pages count as the process's memory.
    A place is part of the call, so processes forked from this one disturb nothing either.
    """

    def __init__(self, path: str):
        """Open `path`; raises UserError when that fails."""
        self.path, self._descriptor = path, None
        # Elsewhere, as on Windows, NumPy opens the file for each read.
        if hasattr(os, "preadv"):
            try:
                self._descriptor = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise _unreadable(path, error) from error

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer`, of bytes, from byte `offset` on; raises UserError when that fails."""
        while len(buffer) > 0:
            try:
                count = self._read_some(buffer, offset)
            except OSError as error:
                raise _unreadable(self.path, error) from error
            if count == 0:
                raise UserError(f"{self.path} was truncated while in use; restore it.")
            # One call reads two gigabytes at most.
            buffer, offset = buffer[count:], offset + count

    def _read_some(self, buffer: memoryview, offset: int) -> int:
        if self._descriptor is not None:
            return os.preadv(self._descriptor, [buffer], offset)
        found = np.fromfile(self.path, np.uint8, len(buffer), offset=offset)
        buffer[: len(found)] = found.data
        return len(found)

    def __reduce__(self):
        # A copy, in this process or another, opens the file for itself.
        return OpenFile, (self.path,)

    def __del__(self):
        if self._descriptor is not None:
            os.close(self._descriptor)


def _unreadable(path: str, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror}); restore it or check its disk.")


class TokenStream:
    """The tokens of one split as one long sequence, read from its files where they are asked for.

    Any number of threads, and processes forked from this one, may read from the same stream.
    """

    def __init__(self, directory: str | Path, split: str):
        """Open a split; raises UserError for a missing, truncated, exchanged or mislabelled file.

        What is looked at of each file is its header, its size and its sampled digest.
        """
        self.directory, self.split = Path(directory), split
        self.manifest = read_manifest(self.directory)
        if not self.manifest.complete:
            raise UserError(
                f"{directory} is not finished; run the same `python load_fineweb.py` command again."
            )
        self.shards = [shard for shard in self.manifest.shards if shard.split == split]
        if not self.shards:
            raise UserError(
                f"{directory} holds no {split} shards; prepare it with `python load_fineweb.py`."
            )
        self.vocab_size = self.manifest.vocab_size
        self._paths = [str(self.directory / shard.file) for shard in self.shards]
        self._offsets = [check_shard(self.directory, shard) for shard in self.shards]
        # The number of tokens before each file, and at last of all.
        self.bounds = np.cumsum([0, *(shard.tokens for shard in self.shards)])
        self._open = functools.lru_cache(maxsize=OPEN_FILES)(OpenFile)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getstate__(self) -> dict[str, Any]:
        # Open files belong to this process; another one opens them again.
        return {name: value for name, value in self.__dict__.items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open = functools.lru_cache(maxsize=OPEN_FILES)(OpenFile)

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        self._open.cache_clear()

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer whose ids these are."""
        return load_tokenizer(self.manifest.tokenizer, self.manifest.alphabet)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens [start, start + count), uint16 of shape (count,)."""
        return self.read_pieces(np.array([start]), np.array([count]))

    def windows(self, starts: np.ndarray, count: int) -> np.ndarray:
        """Return `count` tokens from each start, uint16 of shape (len(starts), count)."""
        starts = np.asarray(starts, dtype=np.int64)
        return self.read_pieces(starts, np.full(len(starts), count)).reshape(len(starts), count)

    def read_pieces(self, starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return counts[i] tokens from each starts[i] on, one piece after the other, uint16.

        Raises UserError when a file can no longer be read or a token is past the vocabulary.
        """
        outside = (starts < 0) | (counts < 0) | (starts + counts > len(self))
        if outside.any():
            first = int(np.argmax(outside))
            raise IndexError(f"{counts[first]} tokens from {starts[first]} on, of {len(self)}")
        tokens = np.empty(int(counts.sum()), dtype="<u2")
        self._fill(tokens.view(np.uint8).data, starts, counts)
        if len(tokens) and tokens.max() >= self.vocab_size:
            raise UserError(
                f"{self.directory} holds token {tokens.max()}, past its vocabulary of "
                f"{self.vocab_size}; it is damaged or was made with another tokenizer."
            )
        return tokens

    def _fill(self, buffer: memoryview, starts: np.ndarray, counts: np.ndarray) -> None:
        """Read each piece into its place, file by file where it crosses a boundary."""
        files = np.searchsorted(self.bounds, starts, side="right") - 1
        at, bounds = 0, self.bounds.tolist()
        for file, start, count in zip(
            files.tolist(), starts.tolist(), counts.tolist(), strict=True
        ):
            while count > 0:
                here = min(count, bounds[file + 1] - start)
                place = self._offsets[file] + 2 * (start - bounds[file])
                self._open(self._paths[file]).read_into(buffer[at : at + 2 * here], place)
                at, start, count, file = at + 2 * here, start + here, count - here, file + 1


def check_shard(directory: Path, shard: Shard) -> int:
    """Check a shard's header, size and sampled digest and return the byte where its tokens begin.

    Raises UserError naming the file and what is wrong with it.
    """
    path = directory / shard.file
    found, offset = read_header(path)
    if found != shard.tokens:
        raise UserError(
            f"{path} holds {found} tokens where its manifest says {shard.tokens}; "
            "restore it or prepare the data again."
        )
    missing = offset + 2 * shard.tokens - path.stat().st_size
    if missing:
        raise UserError(
            f"{path} is {'truncated' if missing > 0 else 'padded'}: it should hold {shard.tokens} "
            f"tokens and has {abs(missing)} bytes too {'few' if missing > 0 else 'many'}; "
            "restore it or prepare the data again."
        )
    if shard.sampled_sha256 is not None and sampled_digest(path) != shard.sampled_sha256:
        raise UserError(
            f"{path} is not what was prepared (its digest differs): it is damaged or another file "
            "was put in its place; restore it or prepare the data again."
        )
    return offset
