"""The document order: shards change places every epoch, and so do the documents within each.

Shards that are read in the same order in every epoch show as waves in the loss, since neighbouring
documents come from neighbouring pages. Here an epoch is a re-ordered stream: the shards in permuted
order, each with its pieces permuted. A piece is a document, or at the start of a shard the tail of
one that began in the shard before. No shard is copied: an index beside them says where the pieces
begin, and the pieces of a window are gathered where they lie.

The index is one `.npy` file of int64, the places of a split's pieces in ascending order and then
the split's length. Its name carries a digest of the manifest, so that of other data is not taken.
"""

import bisect
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np

from config import UserError
from files import locked, write_atomically
from manifests import manifest_digest, npy_header, read_header
from orders import permute, subseed
from shards import OpenFile, TokenStream
from tqdm_bars import PreparationBar

# A block of a shard that is scanned at once.
BLOCK_TOKENS = 1 << 20


def build_index(directory: str | Path, split: str = "train", quiet: bool = False) -> None:
    """See to it that a split's document index lies beside its shards, by scanning them if need be.

    To be called on one process before the others open the data. Where the directory cannot be
    written a line says so, and every process will make an index of its own, in its memory.
    """
    open_index(TokenStream(directory, split), quiet)


class DocumentOrder:
    """The tokens of a split in the document order of any epoch, drawn from a seed."""

    def __init__(self, stream: TokenStream, seed: int, quiet: bool = True):
        """Open the index of a stream, or make it; raises UserError when it is damaged."""
        self.stream, self.seed = stream, seed
        self._path, self._places = index_path(stream), open_index(stream, quiet)
        # The pieces of the shards read last, by epoch and shard.
        self._held: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def read(self, epoch: int, start: int, count: int) -> np.ndarray:
        """Return tokens [start, start + count) of an epoch's stream, uint16 of shape (count,).

        Raises UserError when the index does not fit the shards.
        """
        if start < 0 or count < 0 or start + count > len(self.stream):
            raise IndexError(f"{count} tokens from {start} on, of {len(self.stream)}")
        order, ends = self._shard_order(epoch)
        parts = []
        number = int(np.searchsorted(ends, start, side="right"))
        while count > 0:
            shard = int(order[number])
            skipped = start - (int(ends[number - 1]) if number else 0)
            here = min(count, int(ends[number]) - start)
            parts.append(self._read_shard(epoch, shard, skipped, here))
            start, count, number = start + here, count - here, number + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, "<u2"), *parts])

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards in the epoch's order, and the number of tokens up to each one's end."""
        lengths = np.diff(self.stream.bounds)
        order = permute(np.arange(len(lengths)), len(lengths), subseed(self.seed, 0), epoch)
        order = order[lengths[order] > 0]
        return order, np.cumsum(lengths[order])

    def _read_shard(self, epoch: int, shard: int, skipped: int, count: int) -> np.ndarray:
        """Return `count` tokens of a shard in its epoch's order, after the first `skipped`."""
        starts, ends = self._pieces(epoch, shard)
        first = int(np.searchsorted(ends, skipped, side="right"))
        last = int(np.searchsorted(ends, skipped + count, side="left")) + 1
        places, stops = starts[first:last].copy(), ends[first:last]
        counts = np.diff(stops, prepend=ends[first - 1] if first else 0)
        # The last piece goes on past what is wanted, and the first began before it.
        counts[-1] -= stops[-1] - (skipped + count)
        begun = skipped - int(ends[first - 1] if first else 0)
        places[0], counts[0] = places[0] + begun, counts[0] - begun
        tokens = self.stream.read_pieces(places, counts)
        self._check_starts(shard, places, tokens[np.cumsum(counts) - counts], begun > 0)
        return tokens

    def _check_starts(
        self, shard: int, places: np.ndarray, tokens: np.ndarray, begun: bool
    ) -> None:
        """Raise UserError unless pieces begin with <|endoftext|>, or where the shard does."""
        fits = (tokens == _eot(self.stream)) | (places == self.stream.bounds[shard])
        if not fits[int(begun) :].all():
            raise _misfit(self._path)

    def _pieces(self, epoch: int, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where a shard's pieces begin, in the epoch's order, and their summed lengths."""
        found = self._held.get((epoch, shard))
        if found is None:
            begin, end = self.stream.bounds[shard : shard + 2].tolist()
            first, last = (bisect.bisect_left(self._places, place) for place in (begin, end))
            places = self._places[first : last + 1]
            fits = len(places) > 1 and (places[0], places[-1]) == (begin, end)
            if not (fits and (places[1:] > places[:-1]).all()):
                raise _misfit(self._path)
            seed = subseed(self.seed, shard + 1)
            order = permute(np.arange(len(places) - 1), len(places) - 1, seed, epoch)
            found = places[order], np.cumsum(np.diff(places)[order])
            # The one before stays, since an update may lie across both.
            self._held = dict([*self._held.items()][-1:]) | {(epoch, shard): found}
        return found


class StoredPlaces:
    """The numbers of an index file, read where they are asked for, like an array's."""

    def __init__(self, path: Path, total: int):
        """Open the index of a split of `total` tokens; raises UserError if it cannot be that."""
        try:
            self._length, self._offset = read_header(path, "<i8")
        except UserError as error:
            raise _misfit(path) from error
        self._file = OpenFile(str(path))
        size = self._offset + 8 * self._length
        if path.stat().st_size != size or len(self) < 2 or (self[0], self[-1]) != (0, total):
            raise _misfit(path)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, which: int | slice) -> np.ndarray | np.int64:
        if not isinstance(which, slice):
            which %= len(self)
            return self[which : which + 1][0]
        first, stop, _ = which.indices(len(self))
        numbers = np.empty(max(stop - first, 0), dtype="<i8")
        self._file.read_into(numbers.view(np.uint8).data, self._offset + 8 * first)
        return numbers


def index_path(stream: TokenStream) -> Path:
    """Return where the index of a split lies; its name is another one for other data."""
    digest = manifest_digest(stream.directory)
    if digest is None:
        files = [(shard.file, shard.tokens) for shard in stream.shards]
        digest = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return stream.directory / f"documents_{stream.split}_{digest[:12]}.npy"


def write_index(path: Path, parts: list[np.ndarray]) -> None:
    """Write an index from its places, int64, in consecutive arrays."""
    header = npy_header(sum(len(part) for part in parts), "<i8")
    write_atomically(path, header, *(part.astype("<i8", copy=False).data for part in parts))


def open_index(stream: TokenStream, quiet: bool) -> "StoredPlaces | np.ndarray":
    """Return the places of a split's pieces and its length, from a file if there can be one."""
    path = index_path(stream)
    if not path.exists():
        parts = find_pieces(stream, quiet)
        try:
            # Another run may have begun on the same data at the same time.
            with locked(path.parent):
                write_index(path, parts)
        except UserError as error:
            if not quiet:
                print(f"{error} The document index is kept in memory.", flush=True)
            return np.concatenate(parts)
    return StoredPlaces(path, len(stream))


def find_pieces(stream: TokenStream, quiet: bool = True) -> list[np.ndarray]:
    """Scan a split; returns its pieces' places, ascending, and its length, in several arrays."""
    parts, eot = [], _eot(stream)
    with PreparationBar("finding documents", len(stream), disable=quiet) as bar:
        for begin, end in itertools.pairwise(stream.bounds.tolist()):
            for start in range(begin, end, BLOCK_TOKENS):
                tokens = stream.read(start, min(BLOCK_TOKENS, end - start))
                begins = tokens == eot
                # A shard begins with a piece, whether or not a document does there.
                begins[0] |= start == begin
                parts.append(start + np.flatnonzero(begins))
                bar.update(len(tokens))
    return [*parts, np.array([len(stream)])]


def _eot(stream: TokenStream) -> int:
    """Return the id of <|endoftext|>, which is the last one of both tokenizers."""
    # Loading the tokenizer for it would take a third of a second.
    return stream.vocab_size - 1


def _misfit(path: Path) -> UserError:
    return UserError(
        f"{path} is damaged or not the index of the shards beside it; delete it, and it is made "
        "again."
    )
