"""Tokens into shards: cutting a stream of documents into files, and a small corpus into splits.

    ShardWriter(directory, manifest, tokenizer)    add(tokens, hashes, chunk) ...   finish()

What it holds in memory is the shard in hand: everything else goes by in blocks.
"""

import dataclasses
import hashlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from config import UserError
from corpus.shards import Manifest, Shard, npy_header, write_manifest
from corpus.tokenizer import Tokenizer
from left_out import LeftOut
from utils import write_atomically

# Tokens looked at in one go, so that what NumPy makes of them on the way stays small.
BLOCK = 1 << 20


class ShardWriter:
    """Cuts a stream of tokenized documents into shards and keeps the manifest up to date.

    The first shard becomes the validation split once a second one has begun. A corpus that ends
    before is instead split by document: those with the smallest hashes, up to `val_tokens` tokens,
    are held out.
    """

    def __init__(self, directory: Path, manifest: Manifest, tokenizer: Tokenizer):
        """Continue the directory that `manifest` describes, after its last complete shard.

        Raises UserError when memory has no room for a shard.
        """
        self.directory, self.manifest = directory, manifest
        self._token_bytes = tokenizer.token_bytes().astype(np.uint8)  # at most 128 bytes
        self._eot = tokenizer.eot
        self._buffer = _buffer(manifest.shard_tokens)
        self._filled, self._text_bytes = 0, 0
        self._hashes = array("Q")
        self._reached = manifest.shards[-1].reached if manifest.shards else (0, 0)
        # A preparation that continues reads the chunk it had reached again, and what that one and
        # the chunks after it leave out is counted then; the manifest has the chunks before it.
        self._left_out = LeftOut(manifest.left_out, manifest.left_out_names)
        self._left_out_since = LeftOut()

    def add(
        self,
        tokens: np.ndarray,
        hashes: Sequence[int],
        chunk: int,
        left_out: LeftOut | None = None,
    ) -> None:
        """Append the documents of source chunk number `chunk` (uint16, each beginning with
        end-of-text).

        `hashes` holds one integer a document, drawn from its text, and `left_out` counts those that
        are not among them. Tokens of the chunk that earlier shards already hold are skipped.
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
            added = self._buffer[self._filled : self._filled + count]
            added[:] = tokens[position : position + count]
            self._text_bytes += self._bytes(added)
            self._filled += count
            position += count
            self._reach(chunk, position)
        self._left_out_since += left_out or LeftOut()

    def _reach(self, chunk: int, position: int) -> None:
        if chunk > self._reached[0]:
            self._left_out += self._left_out_since
            self._left_out_since = LeftOut()
        self._reached = (chunk, position)

    def finish(self) -> Manifest:
        """Write what is left and mark the directory complete; returns its manifest.

        Raises UserError when there is nothing to write.
        """
        if self.manifest.shards and self._filled:
            # Until the directory is complete, its manifest counts only what will not be read again.
            self._flush()
        self._left_out += self._left_out_since
        if not self.manifest.shards and not self._filled:
            without = f" (left out: {self._left_out})" if self._left_out.counts else ""
            raise UserError(f"The source holds no text to use{without}, so nothing was written.")
        if not self.manifest.shards:
            return self.write_splits(*self._split_by_document())
        return self._complete()

    def write_splits(self, val: np.ndarray, train: np.ndarray) -> Manifest:
        """Write a corpus whose split is already made, and mark the directory complete."""
        # The manifest follows all files, so that an interruption between them starts over.
        for split, tokens in (("val", val), ("train", train)):
            for start in range(0, len(tokens), self.manifest.shard_tokens):
                shard = tokens[start : start + self.manifest.shard_tokens]
                self._write(split, shard, self._bytes(shard))
        return self._complete()

    def _complete(self) -> Manifest:
        self.manifest = dataclasses.replace(self.manifest, complete=True)
        self._write_manifest()
        return self.manifest

    def _flush(self) -> None:
        split = "train" if self.manifest.shards else "val"
        self._write(split, self._buffer[: self._filled], self._text_bytes)
        self._write_manifest()
        self._filled, self._text_bytes = 0, 0
        self._hashes = array("Q")

    def _write_manifest(self) -> None:
        left_out = self._left_out.in_order()
        self.manifest = dataclasses.replace(
            self.manifest, left_out=left_out.counts, left_out_names=left_out.names
        )
        write_manifest(self.directory, self.manifest)

    def _split_by_document(self) -> tuple[np.ndarray, np.ndarray]:
        tokens = self._buffer[: self._filled]
        edges = _held_out(tokens, self._eot, self._hashes, self.manifest.val_tokens)
        return _part(tokens, edges)

    def _write(self, split: str, tokens: np.ndarray, text_bytes: int) -> None:
        file = f"{self.manifest.name}_{split}_{len(self.manifest.shards):06d}.npy"
        header, payload = npy_header(len(tokens)), np.ascontiguousarray(tokens, dtype="<u2").data
        write_atomically(self.directory / file, header, payload)
        digest = hashlib.sha256(header)
        digest.update(payload)
        shard = Shard(file, split, len(tokens), text_bytes, digest.hexdigest(), self._reached)
        self.manifest = dataclasses.replace(self.manifest, shards=(*self.manifest.shards, shard))

    def _bytes(self, tokens: np.ndarray) -> int:
        """Return the length of the tokens' text in UTF-8."""
        return sum(int(self._token_bytes[block].sum()) for _, block in _blocks(tokens))


def _buffer(tokens: int) -> np.ndarray:
    """Return room for a shard, which takes up memory only as it fills."""
    try:
        return np.empty(tokens, dtype="<u2")
    except (MemoryError, ValueError) as error:
        raise UserError(
            f"Memory has no room for a shard of {tokens:,} tokens; choose fewer --shard-tokens."
        ) from error


def _blocks(tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(tokens), BLOCK):
        yield start, tokens[start : start + BLOCK]


def _held_out(
    tokens: np.ndarray, eot: int, hashes: Sequence[int], val_tokens: int | None
) -> np.ndarray:
    """Return where, in turn, the text that a small corpus holds out begins and ends, as int64.

    Documents with the same hash, being the same text or pieces of one, are on the same side.
    """
    limit = val_tokens if val_tokens is not None else len(tokens) // 10
    if limit >= len(tokens):
        raise UserError(
            f"--val-tokens {limit} leaves nothing to train on: the source has {len(tokens)} tokens."
        )
    starts = np.concatenate(
        [start + np.flatnonzero(block == eot) for start, block in _blocks(tokens)]
    )
    lengths = np.diff(starts, append=len(tokens))
    _, group = np.unique(np.array(hashes, dtype=np.uint64), return_inverse=True)
    sizes = np.bincount(group, weights=lengths).astype(np.int64)
    fitting = np.flatnonzero(sizes <= limit)
    chosen = np.isin(np.arange(len(sizes)), fitting[np.cumsum(sizes[fitting]) <= limit])
    if not chosen.any():
        # No document fits, as when the corpus is one long text: its end is held out instead.
        return np.array([len(tokens) - max(limit, 1)])
    return starts[np.flatnonzero(np.diff(chosen[group], prepend=False))]


def _part(tokens: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens between the first and second edge, the third and fourth ..., and the rest.

    The rest is moved together in place, since a copy would take as much memory again.
    """
    ends = edges[1::2] if len(edges) % 2 == 0 else np.append(edges[1::2], len(tokens))
    held_out = np.empty(int((ends - edges[::2]).sum()), dtype=tokens.dtype)
    taken, kept = 0, 0
    for start, block in _blocks(tokens):
        first, last = np.searchsorted(edges, [start, start + len(block)])
        turns = np.zeros(len(block), dtype=bool)
        turns[edges[first:last] - start] = True
        turns[0] ^= bool(first % 2)
        inside = np.logical_xor.accumulate(turns)
        out, rest = block[inside], block[~inside]
        held_out[taken : taken + len(out)] = out
        tokens[kept : kept + len(rest)] = rest
        taken, kept = taken + len(out), kept + len(rest)
    return held_out, tokens[:kept]
