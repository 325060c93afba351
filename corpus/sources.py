"""Documents of a source, each with its place: (file, row).

    find_source(("fineweb-edu",)).batches((0, 0)) -> [(place, text), ...], ...

Data sets of the Hugging Face hub (its client keeps what it fetched), local .parquet, .jsonl,
.jsonl.gz and .txt files, Shakespeare, and Python's own documentation.
"""

import contextlib
import functools
import glob
import gzip
import hashlib
import json
import os
import platform
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from config import UserError
from corpus.pydocs import pydocs_documents
from corpus.shards import MANIFEST, Manifest, read_manifest
from corpus.tokenizer import TOKENIZER_FILE
from utils import check_name, fetch, sha256_file

# Name: repository, subset, and about how many tokens; FineWeb-Edu's are published to the token.
HUB = {
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample-10BT", 9_982_590_278),
    "fineweb": ("HuggingFaceFW/fineweb", "sample-10BT", 10_000_000_000),
    "openwebtext": ("Skylion007/openwebtext", "plain_text", 9_000_000_000),
    "climbmix": ("karpathy/climbmix-400b-shuffle", "default", 400_000_000_000),
}
# Name: place under data/, address, bytes, sha256. The lines of char-rnn, and the complete works.
RNN = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
RNN_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
GIST = "https://gist.githubusercontent.com/blakesanie/dde3a2b7e698f52f389532b4b52bc254/raw"
WORKS = f"{GIST}/76fe1b5e9efcf0d2afdfd78b0bfaa737ad0a67d3/shakespeare.txt"
TEXTS = {
    "shakespeare": ("shakespeare/tiny.txt", RNN, 1_115_394, RNN_SHA256),
    "shakespeare-large": ("shakespeare/large.txt", WORKS, 5_458_199, None),
}
NAMED = (*HUB, *TEXTS, "pydocs")
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".txt")
BATCH_BYTES = 1 << 20  # of text, for one turn of a thread
# A longer row is skipped: a line without an end, or a small file that unpacks to no end.
MOST_BYTES = 1 << 25
ROWS = 16  # of Parquet that are strings at one time

Place = tuple[int, int]  # (file, row)
Batch = list[tuple[Place, str]]  # a text may be `Skipped`


class Skipped(StrEnum):
    """Why there is no document in a row."""

    EMPTY, NOT_UTF8, UNREADABLE, LONG = "empty", "not UTF-8", "unreadable", "too long"


@dataclass
class Source:
    """Documents in files; `description` tells them from others, in the manifest."""

    name: str
    description: dict[str, Any]
    files: list[Any]  # paths, or what the hub's client wants to know, or lists of documents
    known_tokens: int | None = None

    def read(self, file: int, row: int) -> Iterator[str | None]:
        """Yield a file's rows from `row` on; raises UserError when it is damaged."""
        place = self.files[file]
        if isinstance(place, list):
            return iter(place[row:])
        if isinstance(place, dict):
            from huggingface_hub import hf_hub_download

            place = Path(on_hub(place["filename"], lambda: hf_hub_download(**self.files[file])))
        return read_file(place, row)

    def batches(self, start: Place = (0, 0)) -> Iterator[Batch]:
        """Yield all rows from a place on, about a MiB at a time; UserError for a damaged file."""
        file, row = start
        while file < len(self.files):
            batch, size = [], 0
            for number, text in enumerate(self.read(file, row), row):
                if text is not None:  # a blank line is no document, not even an empty one
                    batch.append(((file, number), text or Skipped.EMPTY))
                    size += len(text) + 1  # an empty one takes room, too
                if size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
            yield batch
            file, row = file + 1, 0

    def documents(self) -> Iterator[tuple[Place, str]]:
        """Yield (place, text) of each document."""
        for batch in self.batches():
            yield from (pair for pair in batch if not isinstance(pair[1], Skipped))

    def tokens(self, bytes_per_token: float) -> int | None:
        """Return about how many tokens there are, if that is known."""
        if self.description["kind"] == "hub":
            return self.known_tokens
        return int(sum(map(_text_bytes, self.files)) / bytes_per_token) + 1


def find_source(words: tuple[str, ...], subset: str | None, revision: str | None) -> Source:
    """Return a source by its name or its files; raises UserError when there is no such thing."""
    if len(words) > 1 and any(word in NAMED for word in words):
        raise UserError("--source takes one named source, or one or more files.")
    if words[0] in HUB:
        return HubSource(words[0], subset, revision)
    if subset is not None or revision is not None:
        raise UserError(f"--subset and --revision go with {', '.join(HUB)} only.")
    if words[0] == "pydocs":
        documents = pydocs_documents()
        digest = hashlib.sha256("\0".join(documents).encode()).hexdigest()
        facts = {"kind": "pydocs", "python": platform.python_version(), "digest": digest}
        return Source("pydocs", facts, [documents])
    if words[0] in TEXTS:
        return _file_source(words[0], [fetch(*TEXTS[words[0]])])
    path = Path(words[0]).resolve()
    name = path.parent.name if glob.has_magic(words[0]) else path.name
    name = re.sub(r"(\.parquet|\.jsonl|\.jsonl\.gz|\.txt)$", "", name)
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.")[:100] or "data"
    return _file_source(name, [path for word in words for path in _matching(word)])


def _file_source(name: str, paths: list[Path]) -> Source:
    digest = hashlib.sha256()
    for path in paths:  # name, size and end, which of a Parquet file describes the rest
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(size - 2**20, 0))
                digest.update(os.fsencode(path.name) + b" %d " % size + file.read())
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    # A directory of many small texts is told by its digest; a manifest need not list them all.
    facts = {"kind": "files", "files": [path.name for path in paths[:100]], "count": len(paths)}
    return Source(name, {**facts, "digest": digest.hexdigest()}, paths)


def _matching(word: str) -> list[Path]:
    """Return the files that a path, a directory or a pattern names, sorted."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from error

    path = Path(word)
    found = [path] if path.exists() else sorted(map(Path, glob.glob(word, recursive=True)))
    if path.is_dir():
        tree = os.walk(path, onerror=refuse)
        inside = [os.path.join(place, name) for place, _, names in tree for name in names]
        found = [Path(name) for name in sorted(inside) if name.endswith(SUFFIXES)]
        found = [file for file in found if "/." not in f"/{file.relative_to(path)}"]  # hidden
    if not found and not path.exists():
        if re.fullmatch(r"[\w-]+", word):
            check_name(word, NAMED, "source and no file")
        raise UserError(f"There is no file {word}.")
    for file in found or [path]:
        if not found or not file.name.endswith(SUFFIXES) or file.is_dir() or file.is_fifo():
            raise UserError(f"{file} cannot be read; these can: {', '.join(SUFFIXES)} files.")
    return found


def _text_bytes(file: Path | list[str]) -> int:
    """Return about how many bytes of text are in a file."""
    if isinstance(file, list):
        return sum(map(len, file))
    if file.suffix == ".parquet":
        with _damage_told(file):
            from pyarrow import parquet

            meta = parquet.ParquetFile(file).metadata
            groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
            columns = [group.column(i) for group in groups for i in range(group.num_columns)]
            return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == "text")
    return file.stat().st_size * (3 if file.suffix == ".gz" else 1)


# --- The Hugging Face hub ---


class HubSource(Source):
    """A subset of a data set at one commit; its files are fetched when they are read."""

    def __init__(self, name: str, subset: str | None, revision: str | None):
        self.repository, usual, self.known_tokens = HUB[name]
        self.name, self.subset, self.revision = name, subset or usual, revision
        if self.subset != usual:
            self.name, self.known_tokens = f"{name}-{subset}", None

    @functools.cached_property
    def files(self) -> list[dict[str, str]]:
        """What the hub's client wants to know of each file."""

        def find() -> list[str]:
            import datasets

            reach_hub()
            names, commit = (self.repository, self.subset), self.revision
            return datasets.load_dataset_builder(*names, revision=commit).config.data_files["train"]

        # Such as hf://datasets/OWNER/NAME@COMMIT/sample/10BT/000_00000.parquet
        addresses = map(str, on_hub(f"{self.repository} ({self.subset})", find))
        parts = [re.fullmatch(r".+@(\w+)/(.+)", address).groups() for address in addresses]
        same = {"repo_id": self.repository, "repo_type": "dataset"}
        return [{**same, "revision": commit, "filename": file} for commit, file in parts]

    @property
    def description(self) -> dict[str, Any]:
        """Its commit, once recorded, tells finished data without the network."""
        known = re.fullmatch("[0-9a-f]{40}", self.revision or "")
        commit = self.revision if known else self.files[0]["revision"]
        facts = {"repository": self.repository, "subset": self.subset, "revision": commit}
        return {"kind": "hub", **facts}


def reach_hub() -> None:
    """Ask the hub for a sign of life, once: its clients would try again for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    get_session().head(constants.ENDPOINT, timeout=10)


def on_hub(what: str, call: Callable[[], Any]) -> Any:
    """Return what a call of the hub's client returns; UserError, in a sentence, if it fails."""
    try:
        return call()
    except Exception as error:  # its classes differ between versions, and those of its network
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        advice = "the same command continues; without a network use --source pydocs or files"
        raise UserError(f"{what} cannot be fetched from the hub ({reason}); {advice}.") from error


def fetch_shards(repository: str, revision: str | None, out: Path) -> Manifest:
    """Fetch token shards that `hf.py` pushed into `out`; every file must have its digest.

    Raises UserError for what is no such repository, or when something else is in `out`.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    named = {"repo_type": "dataset", "revision": revision}
    on_hub(repository, reach_hub)
    place = Path(on_hub(repository, lambda: hf_hub_download(repository, MANIFEST, **named)))
    if not (manifest := read_manifest(place.parent)).complete:
        raise UserError(f"{repository} holds an unfinished preparation.")
    # Without a manifest it may be what an interrupted call has fetched: the client keeps notes.
    other = any(out.glob("[!.]*")) and not (out / ".cache").exists()
    if read_manifest(out) != manifest if (out / MANIFEST).exists() else other:
        raise UserError(f"{out} holds something else already; name another directory with --out.")
    digests = {shard.file: shard.sha256 for shard in manifest.shards}
    if manifest.tokenizer_sha256:
        digests[TOKENIZER_FILE] = manifest.tokenizer_sha256
    named |= {"allow_patterns": [MANIFEST, *map(glob.escape, digests)], "local_dir": out}
    on_hub(repository, lambda: snapshot_download(repository, **named))
    for name, digest in digests.items():
        if not (out / name).is_file() or sha256_file(out / name) != digest:
            (out / name).unlink(missing_ok=True)
            raise UserError(f"{name} of {repository} is missing or damaged; try again.")
    return manifest


# --- Reading a file ---


@contextlib.contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged ({' '.join(str(error).split())}).") from error
    except OSError as error:  # pyarrow's have no strerror, and lines
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason}).") from error


def read_file(path: Path, row: int) -> Iterator[str | None]:
    """Yield a file's rows from `row` on: a document, why there is none, or None for nothing."""
    readers = {".parquet": _read_parquet, ".txt": _read_text}
    with _damage_told(path):
        yield from readers.get(path.suffix, _read_lines)(path, row)


def _read_text(path: Path, row: int) -> Iterator[str]:
    try:
        if row == 0:
            yield path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        yield Skipped.NOT_UTF8
    except OSError:
        yield Skipped.UNREADABLE


def _read_parquet(path: Path, row: int) -> Iterator[str]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        columns, first = dict(zip(file.schema_arrow.names, file.schema_arrow.types, strict=True)), 0
        if str(columns.get("text")) not in ("string", "large_string"):
            raise UserError(f"{path} has no column 'text' of strings; its columns are {columns}.")
        for group in range(file.num_row_groups):
            end = first + file.metadata.row_group(group).num_rows
            read = file.iter_batches(ROWS, [group], ["text"], use_threads=False)
            for batch in read if end > row else ():
                for value in batch.column(0)[max(row - first, 0) :]:
                    try:
                        text = value.as_py() or ""
                        yield text if len(text) < MOST_BYTES else Skipped.LONG
                    except UnicodeDecodeError:
                        yield Skipped.NOT_UTF8
                first += len(batch)
            first = end


def _read_lines(path: Path, row: int) -> Iterator[str | None]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        number = 0
        while line := file.readline(MOST_BYTES):
            number, long = number + 1, len(line) == MOST_BYTES
            while len(line) == MOST_BYTES and not line.endswith(b"\n"):
                line = file.readline(MOST_BYTES)
            if number > row:
                yield Skipped.LONG if long else _line_text(path, number, line)


def _line_text(path: Path, number: int, line: bytes) -> str | None:
    if not line.strip():
        return None
    try:
        text = json.loads(line.decode("utf-8-sig"))["text"]
        return "" if text is None else "".join([text])  # TypeError for what is no text
    except UnicodeDecodeError:
        return Skipped.NOT_UTF8
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise UserError(f'{path}, line {number}, is no object with a "text" ({error}).') from error
