"""Documents in pieces: a source cut into ordered chunks, each read where its tokens are made.

    file_chunks(paths) -> RowRange | LineBlock | TextFiles ...     chunk.texts() -> documents
    tokenize(chunk) -> tokens, hashes

How a source is cut depends on the source alone, so that an interrupted preparation can count on
finding the same chunks again. A chunk is small enough to be sent to a worker; Parquet files,
local or remote, are opened only there, row group by row group and for the `text` column alone, so
that neither memory nor disk fills with text.
"""

import functools
import gzip
import hashlib
import itertools
import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from config import UserError
from tokenizer import gpt2_tokenizer

# Bytes of text in a chunk, about: a third of a second of tokenizing.
CHUNK_BYTES = 8 << 20
# Rows inside a group are reached by reading it from its start, so a large one is cut into few.
RANGES_PER_ROW_GROUP = 8
ATTEMPTS = 6
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".txt")


def file_kind(path: str | Path) -> str | None:
    """Return the suffix that says how a file is read, or None."""
    return next((suffix for suffix in SUFFIXES if str(path).endswith(suffix)), None)


def file_chunks(paths: list[str]) -> Iterator["Chunk"]:
    """Cut files into chunks, in their order; raises UserError for one that is damaged."""
    for kind, group in itertools.groupby(paths, key=file_kind):
        if kind == ".txt":
            yield from _text_file_batches(group)
        else:
            cut = _row_ranges if kind == ".parquet" else _line_blocks
            yield from itertools.chain.from_iterable(map(cut, group))


def text_bytes(path: str) -> int:
    """Estimate the bytes of text in a file; gzip makes text about three times smaller."""
    if file_kind(path) == ".parquet":
        return sum(size for _, size in _row_groups(path))
    return Path(path).stat().st_size * (3 if path.endswith(".gz") else 1)


@dataclass(frozen=True)
class RowRange:
    """Rows [start, stop) of one row group of a Parquet file, local or remote."""

    path: str
    group: int
    start: int
    stop: int

    def texts(self) -> Iterable[str]:
        """Read the documents; raises UserError for a file that is damaged or out of reach."""
        if "://" in self.path:
            return _retrying(lambda: list(self._rows()), self.path)
        return self._rows()

    def _rows(self) -> Iterator[str]:
        import pyarrow

        position = 0
        try:
            for batch in _open_parquet(self.path).iter_batches(
                batch_size=1024, row_groups=[self.group], columns=["text"], use_threads=False
            ):
                first, last = max(self.start - position, 0), min(self.stop - position, len(batch))
                if first < last:
                    yield from batch.column(0).slice(first, last - first).to_pylist()
                position += len(batch)
                if position >= self.stop:
                    break
        except pyarrow.ArrowException as error:
            raise UserError(f"{self.path} is a damaged Parquet file ({error}).") from error


@functools.lru_cache(maxsize=2)
def _open_parquet(path: str) -> Any:
    """Return the open `pyarrow.parquet.ParquetFile`; raises UserError unless it has a text column.

    The cache saves reading the footer again for each row group, over the network a whole request.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        if "://" in path:
            import fsspec

            filesystem, inner = fsspec.url_to_fs(path)
            file = parquet.ParquetFile(filesystem.open(inner), pre_buffer=True)
        else:
            file = parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not a readable Parquet file ({error}).") from error
    names = file.schema_arrow.names
    if "text" not in names:
        raise UserError(f"{path} has no column 'text'; its columns are {', '.join(names)}.")
    kind = file.schema_arrow.field("text").type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"The column 'text' of {path} holds {kind}, not text.")
    return file


def _row_groups(path: str) -> list[tuple[int, int]]:
    """Return (rows, bytes of text) of each row group."""
    return _retrying(lambda: _read_row_groups(path), path)


def _read_row_groups(path: str) -> list[tuple[int, int]]:
    metadata = _open_parquet(path).metadata
    names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    column = names.index("text")
    return [(group.num_rows, group.column(column).total_uncompressed_size) for group in groups]


def _row_ranges(path: str) -> Iterator[RowRange]:
    """Cut a Parquet file into its row groups, and a large row group into a few ranges of rows."""
    for group, (rows, size) in enumerate(_row_groups(path)):
        ranges = min(max(round(size / CHUNK_BYTES), 1), RANGES_PER_ROW_GROUP, max(rows, 1))
        edges = [rows * i // ranges for i in range(ranges + 1)]
        for start, stop in itertools.pairwise(edges):
            yield RowRange(path, group, start, stop)


def _retrying(read: Callable[[], Any], path: str) -> Any:
    """Return `read()`; a remote file is tried again, waiting longer each time."""
    if "://" not in path:
        return read()
    for attempt in range(ATTEMPTS):
        if attempt:
            _open_parquet.cache_clear()
            time.sleep(2 ** (attempt - 1))
        try:
            return read()
        except network_errors() as error:
            reason = error
    raise UserError(
        f"{path} could not be read after {ATTEMPTS} attempts ({reason}); "
        "run the same command again to continue."
    ) from reason


def network_errors() -> tuple[type[BaseException], ...]:
    """Return what the hub's packages raise when the network fails."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its bases are the errors of whichever HTTP library the hub's package is built on.
    return (*HfHubHTTPError.__bases__, OSError, EOFError)


@dataclass(frozen=True)
class LineBlock:
    """Consecutive lines of a .jsonl file, the first of them numbered from 1."""

    path: str
    first_line: int
    block: bytes

    def texts(self) -> Iterator[str]:
        """Parse the documents; raises UserError naming the line that is not one."""
        for number, line in enumerate(self.block.split(b"\n"), start=self.first_line):
            if line.strip():
                yield self._text(number, line)

    def _text(self, number: int, line: bytes) -> str:
        try:
            document = json.loads(line)
        except ValueError as error:
            raise UserError(f"{self.path}, line {number}, is not JSON ({error}).") from error
        if not isinstance(document, dict) or not isinstance(document.get("text"), str):
            raise UserError(f'{self.path}, line {number}, is no object with a "text" string.')
        return document["text"]


def _line_blocks(path: str) -> Iterator[LineBlock]:
    """Cut a .jsonl or .jsonl.gz file into blocks of whole lines; may raise UserError."""
    first_line = 1
    try:
        with _open_lines(path) as file:
            while block := file.read(CHUNK_BYTES) + file.readline():
                yield LineBlock(path, first_line, block)
                first_line += block.count(b"\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is a damaged gzip file ({error}).") from error


def _open_lines(path: str) -> IO[bytes]:
    return gzip.open(path) if path.endswith(".gz") else Path(path).open("rb")


@dataclass(frozen=True)
class TextFiles:
    """Plain text files, each one document."""

    paths: tuple[str, ...]

    def texts(self) -> Iterator[str]:
        """Read the documents; raises UserError naming a file that is not UTF-8."""
        for path in self.paths:
            try:
                yield Path(path).read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise UserError(f"{path} is not UTF-8 text ({error}).") from error


def _text_file_batches(paths: Iterable[str]) -> Iterator[TextFiles]:
    batch, size = [], 0
    for path in paths:
        batch.append(path)
        size += Path(path).stat().st_size
        if size >= CHUNK_BYTES:
            yield TextFiles(tuple(batch))
            batch, size = [], 0
    if batch:
        yield TextFiles(tuple(batch))


@dataclass(frozen=True)
class Documents:
    """Documents that are at hand."""

    documents: tuple[str, ...]

    def texts(self) -> tuple[str, ...]:
        """Return the documents."""
        return self.documents


Chunk = RowRange | LineBlock | TextFiles | Documents


def tokenize(chunk: Chunk) -> tuple[np.ndarray, list[int]]:
    """Return a chunk's uint16 tokens, <|endoftext|> before each document, and a hash for each."""
    tokenizer = gpt2_tokenizer()
    mark = np.array([tokenizer.eot], dtype=np.uint16)
    pieces, hashes = [np.empty(0, dtype=np.uint16)], []
    for text in chunk.texts():
        # A document without text, or without a value in the text column, is none.
        if text:
            pieces += [mark, tokenizer.encode(text)]
            hashes.append(_hash(text))
    return np.concatenate(pieces), hashes


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")
