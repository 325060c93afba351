"""Documents to shards: which of them validate, their tokens in order, one shard at a time."""

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from config import UserError
from corpus.shards import Manifest, ShardWriter
from corpus.sources import Batch, Place, Skipped, Source
from corpus.tokenizer import Tokenizer
from tqdm_bars import PreparationBar

SHORT = "shorter than --min-document-tokens"
Row = tuple[Place, np.ndarray, list[str]]  # tokens, uint16, and the reasons for what is left out


@dataclass(frozen=True)
class Split:
    """Which documents of a small source validate: those at the places `held`.

    Where all are too long for that, the last one does, from its character `cut` on. Of a large
    source (`held` is None), the first shard validates.
    """

    held: set[Place] | None
    last: Place = (-1, 0)
    cut: int = 0

    def part(self, split: str | None, place: Place, text: str) -> str:
        """Return what of a document belongs to a split."""
        if place == self.last:
            return text[self.cut :] if split == "val" else text[: self.cut]
        return text if split is None or (place in self.held) == (split == "val") else ""


def split_of(
    source: Source, shard_tokens: int, max_tokens: int | None = None, val_tokens: int | None = None
) -> Split:
    """Return the split of a source by its text, so that it is the same for all tokenizers.

    A source of less than 8 bytes for each token of a shard is small. The documents with the
    smallest hashes validate, to a tenth of its bytes or 4 for each of `val_tokens`. Where
    `max_tokens` fill no second shard, 4 bytes for each of them are the source.
    """
    few = max_tokens is not None and max_tokens <= shard_tokens
    most = 4 * max_tokens if few else 8 * shard_tokens
    documents, total, last = [], 0, ((-1, 0), b"")
    for place, text in source.documents():
        if total >= most:
            break
        last = place, text.encode("utf-8", "surrogatepass")
        documents.append((hashlib.blake2b(last[1], digest_size=8).digest(), len(last[1]), place))
        total += len(last[1])
    if total >= most and not few:
        return Split(None)
    total = min(total, most)  # a document may go beyond
    limit = 4 * val_tokens if val_tokens else total - total * 9 // 10
    if limit >= total > 0:
        raise UserError(f"--val-tokens leave nothing to train on: the text has {total:,} bytes.")
    held, room = set(), limit
    for _, alike in itertools.groupby(sorted(documents), key=lambda document: document[0]):
        _, sizes, places = zip(*alike, strict=True)  # the same text is on one side
        if sum(sizes) <= room:
            held.update(places)
            room -= sum(sizes)
    if held or not documents:
        return Split(held)
    return Split(held, last[0], len(last[1][:-limit].decode("utf-8", "ignore")))


@dataclass(frozen=True)
class Preparation:
    """How the documents of a source become tokens."""

    source: Source
    split: Split
    tokenizer: Tokenizer
    shortest: int = 0  # tokens of a document, or of a piece of one, that is not left out
    longest: int = 2**48  # a longer document is cut into pieces of so many tokens

    def tokenize(self, which: str | None, batch: Batch) -> list[Row]:
        """Return the rows of a batch; the tokens of a piece are <|endoftext|> and its text's."""
        eot, step, rows = np.array([self.tokenizer.eot], np.uint16), self.longest - 1, []
        skips = [isinstance(text, Skipped) for _, text in batch]
        parts = ["" if s else self.split.part(which, *r) for s, r in zip(skips, batch, strict=True)]
        encoded = iter(self.tokenizer.encode_batch([part for part in parts if part]))
        for (place, text), skip, part in zip(batch, skips, parts, strict=True):
            # What is no document is met in both passes over a small source, and counted in one.
            why, pieces = [str(text)] if skip and which != "val" else [], [eot[:0]]
            body = next(encoded) if part else eot[:0]
            for start in range(0, len(body), step):
                piece = body[start : start + step]
                if len(piece) + 1 < self.shortest:
                    why.append(SHORT)
                else:
                    pieces += [eot, piece]
            rows.append((place, np.concatenate(pieces), why))
        return rows

    def rows(self, which: str | None, start: Place, workers: int) -> Iterator[Row]:
        """Yield the rows of a split from a place on, in their order, tokenized by threads."""
        pool, waiting = ThreadPoolExecutor(workers), deque()
        try:
            for batch in self.source.batches(start):
                waiting.append(pool.submit(self.tokenize, which, batch))
                if len(waiting) > 2 * workers:  # bounded, and so is memory
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def write(self, writer: ShardWriter, bar: PreparationBar, workers: int, most: int) -> Manifest:
        """Write the shards that a manifest lacks, to `most` tokens in all; returns the last."""
        left, done = most - writer.manifest.tokens(), writer.manifest.shards[-1:]
        for which in (None,) if self.split.held is None else ("val", "train"):
            if done and done[0].split == "train" and which == "val":
                continue  # that pass is done
            again = done and which in (None, done[0].split)
            *start, skip = done[0].reached if again else (0, 0, 0)
            for place, tokens, why in self.rows(which, tuple(start), workers):
                skip = skip if place == tuple(start) else 0
                tokens = tokens[: skip + left]
                writer.add(tokens, skip, which, place)
                bar.update(len(tokens) - skip)
                writer.skipped.update(why)  # when it is done, since it may be read again
                left -= len(tokens) - skip
                if not left:
                    break
            writer.flush(which, (len(self.source.files), 0, 0))
        if not writer.manifest.tokens("train") or not writer.manifest.tokens("val"):
            for shard in writer.manifest.shards:
                (writer.directory / shard.file).unlink()
            counts = ", ".join(f"{n:,} {why}" for why, n in writer.skipped.items())
            few = "The source lacks text to train on and to validate with; take more tokens of it"
            raise UserError(f"{few}, or smaller shards ({counts or 'nothing'} skipped).")
        return writer.record(complete=True)
