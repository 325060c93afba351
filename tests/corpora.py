"""Small corpora as files, their tokens made the plain way, and disks that are soon full."""

import contextlib
import gzip
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from config import UserError
from corpus.shards import read_manifest
from corpus.tokenizer import gpt2_tokenizer
from load_fineweb import prepare
from tests.tiny import ROOT

TEXTS = [f"Document {i} says: {'over and over ' * (i % 7)}\n\nEnd." for i in range(300)]


def write_parquet(path: Path, texts=TEXTS, group: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": list(range(len(texts))), "text": texts})
    parquet.write_table(table, path, row_group_size=group)
    return path


def write_jsonl(path: Path, texts=TEXTS) -> Path:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wb") as file:
        file.write(lines.encode())
    return path


def tokens_of(texts: Iterable[str | None]) -> np.ndarray:
    """The plain way: one document after another."""
    gpt2 = gpt2_tokenizer()
    pieces = [np.append(np.uint16(gpt2.eot), gpt2.encode(text)) for text in texts if text]
    return np.concatenate(pieces)


def everything(directory: Path) -> np.ndarray:
    names = [shard.file for shard in read_manifest(directory).shards]
    return np.concatenate([np.load(directory / name) for name in names])


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def run(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "load_fineweb.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def refuses(source, out, **arguments) -> str:
    with pytest.raises(UserError) as caught:
        prepare(source, out, quiet=True, **arguments)
    return str(caught.value)


@contextlib.contextmanager
def small_disk(directory: Path, size: str) -> Iterator[Path]:
    """Mount a file system of so many bytes, in memory; skips the test where that is forbidden."""
    directory.mkdir(exist_ok=True)
    try:
        mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no file system can be mounted here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
