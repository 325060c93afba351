"""Documents in pieces: a source cut into ordered chunks, each read where its tokens are made.

    file_chunks(paths) -> RowRange | LineBlock | TextFiles ...     chunk.texts() -> documents

How a source is cut depends on the source alone, so that an interrupted preparation can count on
finding the same chunks again. A chunk is small enough to be sent to a worker; Parquet files,
local or remote, are opened only there, row group by row group and for the `text` column alone, so
that neither memory nor disk fills with text.

Among the documents of a chunk, `Unusable` stands for one that cannot be read, and nothing (None or
an empty string) for an empty one. A file that is not what its name says is an error instead.
"""

import functools
import gzip
import io
import itertools
import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from config import UserError
from left_out import Unusable

# Bytes of text in a chunk, about: a third of a second of tokenizing.
CHUNK_BYTES = 8 << 20
# Rows inside a group are reached by reading it from its start, so a large one is cut into few.
RANGES_PER_ROW_GROUP = 8
# Rows that are strings at one time: more cost memory, and many fewer cost time.
ROWS = 128
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
    return file_size(path) * (3 if path.endswith(".gz") else 1)


def file_size(path: str) -> int:
    """Return the bytes of a file, 0 for one that cannot be reached, as its reader will say."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0


@dataclass(frozen=True)
class RowRange:
    """Rows [start, stop) of one row group of a Parquet file, local or remote."""

    path: str
    group: int
    start: int
    stop: int
    size: int

    def texts(self) -> Iterable[str | Unusable | None]:
        """Read the documents; raises UserError for a file that is damaged or out of reach."""
        if "://" in self.path:
            return _retrying(lambda: list(self._rows()), self.path)
        return self._rows()

    def _rows(self) -> Iterator[str | Unusable | None]:
        import pyarrow

        position = 0
        try:
            file = _open_parquet(self.path)
            before = sum(file.metadata.row_group(i).num_rows for i in range(self.group))
            for batch in file.iter_batches(
                batch_size=ROWS, row_groups=[self.group], columns=["text"], use_threads=False
            ):
                first, last = max(self.start - position, 0), min(self.stop - position, len(batch))
                if first < last:
                    column = batch.column(0).slice(first, last - first)
                    yield from _parquet_texts(column, self.path, before + position + first + 1)
                position += len(batch)
                if position >= self.stop:
                    break
        except pyarrow.ArrowException as error:
            raise UserError(f"{self.path} is a damaged Parquet file ({error}).") from error
        except OSError as error:
            # A remote file is tried again.
            if "://" in self.path:
                raise
            raise _unreadable(self.path, error) from error


def _parquet_texts(column: Any, path: str, first_row: int) -> Iterable[str | Unusable | None]:
    """Return the texts of a pyarrow column, whose rows are numbered from `first_row` on."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_parquet_text(text, path, row) for row, text in enumerate(column, first_row)]


def _parquet_text(text: Any, path: str, row: int) -> str | Unusable | None:
    try:
        return text.as_py()
    except UnicodeDecodeError:
        return Unusable("not_utf8", path, f" row {row}")


def _unreadable(path: str, error: OSError) -> UserError:
    # pyarrow's errors have a text but no strerror.
    return UserError(f"{path} cannot be read ({error.strerror or error}).")


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
    except OSError as error:
        if "://" in path:
            raise
        raise _unreadable(path, error) from error
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
            yield RowRange(path, group, start, stop, size // ranges)


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

    @property
    def size(self) -> int:
        """Bytes of text."""
        return len(self.block)

    def texts(self) -> Iterator[str | Unusable | None]:
        """Parse the documents; raises UserError naming the line that is not one."""
        for number, line in enumerate(io.BytesIO(self.block), start=self.first_line):
            if line.strip():
                yield self._text(number, line)

    def _text(self, number: int, line: bytes) -> str | Unusable | None:
        try:
            document = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            return Unusable("not_utf8", self.path, f" line {number}")
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}, line {number}, is not JSON ({error}).") from error
        if isinstance(document, dict) and "text" in document:
            text = document["text"]
            if text is None or isinstance(text, str):
                return text
        raise UserError(f'{self.path}, line {number}, is no object with a "text" string.')


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
    except OSError as error:
        raise _unreadable(path, error) from error


def _open_lines(path: str) -> IO[bytes]:
    return gzip.open(path) if path.endswith(".gz") else Path(path).open("rb")


@dataclass(frozen=True)
class TextFiles:
    """Plain text files, each one document."""

    paths: tuple[str, ...]
    size: int

    def texts(self) -> Iterator[str | Unusable]:
        """Read the documents."""
        return map(_file_text, self.paths)


def _file_text(path: str) -> str | Unusable:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return Unusable("not_utf8", path)
    except OSError:
        return Unusable("unreadable", path)


def _text_file_batches(paths: Iterable[str]) -> Iterator[TextFiles]:
    batch, size = [], 0
    for path in paths:
        batch.append(path)
        size += file_size(path)
        if size >= CHUNK_BYTES:
            yield TextFiles(tuple(batch), size)
            batch, size = [], 0
    if batch:
        yield TextFiles(tuple(batch), size)


@dataclass(frozen=True)
class Documents:
    """Documents that are at hand."""

    documents: tuple[str, ...]

    @property
    def size(self) -> int:
        """Characters of text."""
        return sum(map(len, self.documents))

    def texts(self) -> tuple[str, ...]:
        """Return the documents."""
        return self.documents


Chunk = RowRange | LineBlock | TextFiles | Documents
