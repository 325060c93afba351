"""The one definition of the on-disk token format: writer and reader of shards.

A data directory holds 1-D little-endian uint16 `.npy` files, each document being <|endoftext|>
followed by its tokens, documents running on across file boundaries, and beside them
`manifest.json`, which says what they are (manifests.py).
"""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from config import UserError
from files import write_atomically
from manifests import Manifest, Shard, npy_header, read_header, read_manifest, write_manifest
from tokenizer import Tokenizer, load_tokenizer


class ShardWriter:
    """Cuts a stream of tokenized documents into shards and keeps the manifest up to date.

    The first shard becomes the validation split once a second one has begun. A corpus that ends
    before is instead split by document: those with the smallest hashes, up to `val_tokens` tokens,
    are held out.
    """

    def __init__(self, directory: Path, manifest: Manifest, tokenizer: Tokenizer):
        """Continue the directory that `manifest` describes, after its last complete shard."""
        self.directory, self.manifest = directory, manifest
        self._token_bytes = tokenizer.token_bytes().astype(np.uint8)  # at most 128 bytes
        self._eot = tokenizer.eot
        self._buffer = np.empty(manifest.shard_tokens, dtype="<u2")
        self._filled = 0
        self._hashes: list[int] = []
        self._reached = manifest.shards[-1].reached if manifest.shards else (0, 0)

    def add(self, tokens: np.ndarray, hashes: list[int], chunk: int) -> None:
        """Append the documents of source chunk number `chunk` (uint16, each beginning with
        end-of-text).

        `hashes` holds one integer a document, drawn from its text. Tokens of the chunk that earlier
        shards already hold are skipped.
        """
        if chunk < self._reached[0]:
            return
        position = self._reached[1] if chunk == self._reached[0] else 0
        if not self.manifest.shards:
            self._hashes.extend(hashes)
        while position < len(tokens):
            if self._filled == len(self._buffer):
                self._flush()
            count = min(len(tokens) - position, len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + count] = tokens[position : position + count]
            self._filled += count
            position += count
            self._reached = (chunk, position)

    def finish(self) -> Manifest:
        """Write what is left and mark the directory complete; returns its manifest."""
        if self.manifest.shards:
            if self._filled:
                self._flush()
        elif self._filled:
            self._split_by_document()
        else:
            raise UserError("The source holds no text, so there is nothing to write.")
        self.manifest = dataclasses.replace(self.manifest, complete=True)
        write_manifest(self.directory, self.manifest)
        return self.manifest

    def _flush(self) -> None:
        self._write("train" if self.manifest.shards else "val", self._buffer[: self._filled])
        write_manifest(self.directory, self.manifest)
        self._filled = 0
        self._hashes = []

    def _split_by_document(self) -> None:
        tokens = self._buffer[: self._filled]
        held_out = _held_out(tokens, self._eot, self._hashes, self.manifest.val_tokens)
        # The manifest follows both files, so that an interruption between them starts over.
        self._write("val", tokens[held_out])
        self._write("train", tokens[~held_out])

    def _write(self, split: str, tokens: np.ndarray) -> None:
        file = f"{self.manifest.name}_{split}_{len(self.manifest.shards):06d}.npy"
        header, payload = npy_header(len(tokens)), np.ascontiguousarray(tokens).data
        write_atomically(self.directory / file, header, payload)
        digest = hashlib.sha256(header)
        digest.update(payload)
        text_bytes = int(self._token_bytes[tokens].sum())
        shard = Shard(file, split, len(tokens), text_bytes, digest.hexdigest(), self._reached)
        self.manifest = dataclasses.replace(self.manifest, shards=(*self.manifest.shards, shard))


def _held_out(
    tokens: np.ndarray, eot: int, hashes: list[int], val_tokens: int | None
) -> np.ndarray:
    """Return a mask of the tokens that a small corpus holds out for validation."""
    limit = val_tokens if val_tokens is not None else len(tokens) // 10
    if limit >= len(tokens):
        raise UserError(
            f"--val-tokens {limit} leaves nothing to train on: the source has {len(tokens)} tokens."
        )
    starts = np.flatnonzero(tokens == eot)
    lengths = np.diff(starts, append=len(tokens))
    by_hash = np.argsort(np.array(hashes, dtype=np.uint64), kind="stable")
    by_hash = by_hash[lengths[by_hash] <= limit]
    chosen = by_hash[np.cumsum(lengths[by_hash]) <= limit]
    if len(chosen) == 0:
        # No document fits, as when the corpus is one long text: its end is held out instead.
        return np.arange(len(tokens)) >= len(tokens) - max(limit, 1)
    mask = np.zeros(len(starts), dtype=bool)
    mask[chosen] = True
    return np.repeat(mask, lengths)


class TokenStream:
    """The tokens of one split as one long sequence, memory-mapped file by file."""

    def __init__(self, directory: str | Path, split: str):
        """Open a split; raises UserError for a missing, truncated or mislabelled file."""
        self.directory, self.split = Path(directory), split
        self.manifest = read_manifest(self.directory)
        if not self.manifest.complete:
            raise UserError(
                f"{directory} is not finished; run the same `python load_fineweb.py` command again."
            )
        shards = [shard for shard in self.manifest.shards if shard.split == split]
        if not shards:
            raise UserError(
                f"{directory} holds no {split} shards; prepare it with `python load_fineweb.py`."
            )
        self.vocab_size = self.manifest.vocab_size
        self._paths = [self.directory / shard.file for shard in shards]
        self._offsets = [
            _data_offset(path, s.tokens) for path, s in zip(self._paths, shards, strict=True)
        ]
        # ends[i] is the number of tokens in the files up to and including i.
        self._ends = np.cumsum([shard.tokens for shard in shards])
        self._maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would carry the whole file; a worker process maps it again instead.
        return {**self.__dict__, "_maps": {}}

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer whose ids these are."""
        return load_tokenizer(self.manifest.tokenizer, self.manifest.alphabet)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return tokens [start, start + count), uint16: a view unless they cross a boundary."""
        if start < 0 or start + count > len(self):
            raise IndexError(f"tokens {start} to {start + count} of {len(self)}")
        pieces = []
        index = int(np.searchsorted(self._ends, start, side="right"))
        while count > 0:
            offset = start - (int(self._ends[index - 1]) if index else 0)
            pieces.append(self._map(index)[offset : offset + count])
            start, count, index = start + len(pieces[-1]), count - len(pieces[-1]), index + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, "<u2")])

    def windows(self, starts: np.ndarray, count: int) -> np.ndarray:
        """Return `count` tokens from each start, uint16 of shape (len(starts), count).

        Raises UserError when a token is past the vocabulary.
        """
        batch = np.empty((len(starts), count), dtype=np.uint16)
        for row, start in zip(batch, starts, strict=True):
            row[:] = self.read(int(start), count)
        if batch.size and batch.max() >= self.vocab_size:
            raise UserError(
                f"{self.directory} holds token {batch.max()}, past its vocabulary of "
                f"{self.vocab_size}; it is damaged or was made with another tokenizer."
            )
        return batch

    def _map(self, index: int) -> np.ndarray:
        if index not in self._maps:
            tokens = int(self._ends[index] - (self._ends[index - 1] if index else 0))
            path, offset = self._paths[index], self._offsets[index]
            self._maps[index] = np.memmap(path, "<u2", "r", offset, (tokens,))
        return self._maps[index]


def _data_offset(path: Path, tokens: int) -> int:
    """Check a shard's header and size and return where its tokens begin; raises UserError."""
    found, offset = read_header(path)
    if found != tokens:
        raise UserError(
            f"{path} holds {found} tokens where its manifest says {tokens}; prepare it again."
        )
    if path.stat().st_size != offset + 2 * tokens:
        raise UserError(f"{path} is truncated or padded: it should hold {tokens} tokens.")
    return offset
