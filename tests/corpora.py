"""Small corpora as files, their tokens made the plain way, and disks that are soon full."""

import contextlib
import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from config import UserError
from corpus.shards import Manifest, ShardWriter, TokenShards, read_manifest
from corpus.tokenizer import Tokenizer, gpt2_tokenizer
from load_fineweb import Arguments, prepare
from tests.conftest import ROOT

TEXTS = [f"Document {i} says: {'over and over ' * (i % 7)}\n\nEnd." for i in range(300)]


def write(path: Path, texts=TEXTS) -> Path:
    """Write a .parquet, .jsonl or .jsonl.gz file of texts; for .txt, a directory of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table = pa.table({"id": list(range(len(texts))), "text": texts})
        parquet.write_table(table, path, row_group_size=40)
    elif path.suffix == ".txt":
        path.mkdir()
        for i, text in enumerate(texts):
            (path / f"{i:06d}.txt").write_bytes(text.encode())
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def tokens_of(texts: Iterable[str], tokenizer: Tokenizer | None = None) -> np.ndarray:
    """The plain way: one document after another."""
    codec = tokenizer or gpt2_tokenizer()
    return np.concatenate([np.append(np.uint16(codec.eot), codec.encode(t)) for t in texts])


def held_out(texts: list[str], val_tokens: int | None = None) -> set[int]:
    """The plain way: the least hashes, to a tenth of the bytes, or 4 for each token asked for."""
    sizes, held = [len(text.encode("utf-8", "surrogatepass")) for text in texts], set()
    room = 4 * val_tokens if val_tokens else sum(sizes) - sum(sizes) * 9 // 10
    for i in sorted(range(len(texts)), key=lambda i: hash_of(texts[i])):
        if sizes[i] <= room:
            held, room = held | {i}, room - sizes[i]
    return held


def hash_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def everything(directory: Path, *splits: str) -> np.ndarray:
    shards = [s for s in read_manifest(directory).shards if s.split in (splits or ("val", "train"))]
    return np.concatenate([np.load(directory / shard.file) for shard in shards])


def documents(directory: Path, split: str) -> list[str]:
    """Return the texts of a split."""
    tokenizer, tokens = TokenShards(directory, split).tokenizer, everything(directory, split)
    ends = [*np.flatnonzero(tokens == tokenizer.eot), len(tokens)]
    return [tokenizer.decode(tokens[a + 1 : b]) for a, b in pairwise(ends)]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def prepared(source, out, **options) -> Manifest:
    """Prepare a path, a word or several of them."""
    words = (source,) if isinstance(source, str | Path) else source
    return prepare(Arguments(tuple(map(str, words)), out, **options), quiet=True)


def refuses(source, out, **options) -> str:
    with pytest.raises(UserError) as caught:
        prepared(source, out, **options)
    assert "\n" not in str(caught.value), str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def stopped_after(count: int) -> Iterator[None]:
    """Interrupt a preparation after so many shards, and go on after the block."""
    flush, left = ShardWriter.flush, [count]

    def flush_and_stop(writer, *arguments):
        before = len(writer.manifest.shards)
        flush(writer, *arguments)
        left[0] -= len(writer.manifest.shards) - before
        if left[0] == 0:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(ShardWriter, "flush", flush_and_stop)
        yield


def run(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "load_fineweb.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


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
