"""What a benchmark is: its file, its examples, the requests they become, and how they are judged.

    find(file) -> path               data/ first, then what GPT2_DATA names, then the web
    read_json_lines(path)            rows, or one sentence that names file and line
    is_published(file, path, rows)   whether that is the file everyone else scores

Each benchmark has a module of its own that makes a `Task` of a file. Nothing here knows a model or
a device; `tasks.py` lists them all by name.
"""

import gzip
import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import UserError
from corpus.shards import DATA_DIR
from corpus.tokenizer import GPT2Tokenizer, Tokenizer
from likelihood import Request, Scores, encode_request
from utils import fetch as fetch_file
from utils import write_atomically


@dataclass(frozen=True)
class WebFile:
    """A benchmark's file as its authors publish it."""

    # Where it lies under data/ and under GPT2_DATA, such as hellaswag/hellaswag_val.jsonl.
    path: str
    address: str
    # Whatever is known of it; `rows` is checked by `is_published`.
    size: int | None = None
    sha256: str | None = None
    rows: int | None = None
    # Other names under which the same text is accepted where it lies already.
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """Examples with one request each, and how the model's answers are judged and summed up."""

    name: str
    # One line that tells this score from others of the same name: which text, which rule.
    protocol: str
    path: Path
    # Whether the file is, by checksum or number of rows, the one that is published.
    published: bool
    examples: list[Any]
    requests: list[Request]
    # One example's answer in numbers, such as {"acc": 1.0, "acc_norm": 0.0}.
    judge: Callable[[Any, Scores], dict[str, Any]]
    # All of them in metrics with their standard errors, such as {"acc": ..., "acc_stderr": ...}.
    summarize: Callable[[list[dict[str, Any]]], dict[str, float]]
    # The metric to watch.
    headline: str
    # Ids with which an ending cannot begin in `Scores.greedy_filtered`.
    excluded: np.ndarray | None = None


def places(file: WebFile) -> Iterator[Path]:
    """Yield every path where a benchmark's file may lie, the best first."""
    roots = [DATA_DIR, *(Path(root) for root in [os.environ.get("GPT2_DATA")] if root)]
    for root in roots:
        for name in (file.path, *file.also):
            yield root / name


def search(file: WebFile) -> Path | None:
    """Return the path of a benchmark's file if it is on this machine."""
    # Unlike Path.is_file, this takes a directory one may not enter for one without the file.
    return next((path for path in places(file) if os.path.isfile(path)), None)


def find(file: WebFile, fetch: bool = True, attempts: int | None = None) -> Path:
    """Return the path of a benchmark's file, fetched into data/ unless it is somewhere already.

    Raises UserError when it is not here and, with `fetch`, cannot be had in so many `attempts`
    (by default as many as a download makes).
    """
    path, target = search(file), DATA_DIR / file.path
    if path is not None:
        return path
    if not fetch:
        raise UserError(f"{target} is not here; fetch {file.address} and put it there.")
    return fetch_file(file.path, file.address, file.size, file.sha256, attempts or 4)


def is_published(file: WebFile, path: Path, rows: int) -> bool:
    """Say whether a file with so many rows is its authors': by checksum, else by those rows.

    A person's own file may be another, and its scores say so. One where downloads go has to have
    all rows, or UserError is raised: it is most likely a part of the published one.
    """
    if path == DATA_DIR / file.path and file.rows not in (None, rows):
        raise UserError(
            f"{path} has {rows:,} rows where {file.rows:,} are published; delete it and give the "
            "command again, to fetch it anew."
        )
    if file.sha256 is not None:
        return sha256_of(path) == file.sha256
    return rows == file.rows


def sha256_of(path: Path) -> str:
    """Return a file's sha256 in hexadecimal; raises UserError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error


def read_bytes(path: Path) -> bytes:
    """Return a file's content; raises UserError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error


def count_rows(path: Path) -> int:
    """Return how many lines of a file are not blank; raises UserError when it cannot be read."""
    return sum(bool(line.strip()) for line in read_bytes(path).split(b"\n"))


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) of a text file, without line ends; blank lines are passed over.

    Raises UserError for a file that cannot be read, and naming the line for what is not UTF-8.
    """
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        if line.strip():
            try:
                yield number, line.decode().removesuffix("\r")
            except UnicodeDecodeError:
                raise bad_line(path, number, "is not UTF-8") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a .jsonl file; blank lines are passed over.

    Raises UserError, naming file and line, for what is not a JSON object in UTF-8.
    """
    for number, line in read_lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            # Its own sentence counts lines from this one.
            place = f"{error.msg}, column {error.colno}"
            raise bad_line(path, number, f"is not valid JSON ({place})") from None
        except (ValueError, RecursionError) as error:
            raise bad_line(path, number, f"is not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise bad_line(path, number, "is not a JSON object")
        yield number, row


def bad_line(path: Path, number: int, complaint: str) -> UserError:
    """Return the error that names a line of a benchmark's file and what is wrong with it."""
    return UserError(f"{path}, line {number} {complaint}; mend the line or fetch the file again.")


def encode_line(
    tokenizer: Tokenizer,
    path: Path,
    number: int,
    context: str,
    endings: Sequence[str],
    scores_context: bool = False,
) -> Request:
    """Return `encode_request` of what a line holds; its UserError names file and line."""
    try:
        return encode_request(tokenizer, context, endings, scores_context)
    except UserError as error:
        raise bad_line(path, number, f"cannot be scored ({error})") from error


def read_member(archive: Path, member: str) -> bytes:
    """Return the content of one file in a .tar.gz, wherever in it that lies.

    Nothing else is unpacked, and nothing is written. Raises UserError when the archive is damaged
    or has no such file.
    """
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for entry in tar:
                if entry.isfile() and Path(entry.name).name == member:
                    return tar.extractfile(entry).read()
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(
            f"{archive} is damaged ({error}); delete it and give the command again, to fetch it "
            "anew."
        ) from error
    except OSError as error:
        raise UserError(f"{archive} cannot be read ({error.strerror}).") from error
    raise UserError(f"{archive} has no {member} in it; delete it, it is another archive.")


def store(file: WebFile, content: bytes) -> Path:
    """Write a benchmark's file where a download of it would go, and return its path.

    Raises UserError, and leaves nothing behind, when it cannot be written.
    """
    path = DATA_DIR / file.path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made ({error.strerror}).") from error
    write_atomically(path, content)
    return path


def require_examples(examples: Sequence[Any], path: Path) -> None:
    """Raise UserError if a benchmark's file gave no examples: there would be nothing to score."""
    if not examples:
        raise UserError(f"{path} has no examples; fetch the file again, or raise the limit.")


def require_gpt2_vocabulary(tokenizer: Tokenizer, task: str) -> None:
    """Raise UserError unless a model reads GPT-2's tokens, in which any text can be written."""
    if tokenizer.name != GPT2Tokenizer.name:
        raise UserError(f"{task} needs GPT-2's vocabulary; this model has {tokenizer.name}'s.")
