"""How fast documents become shards, against an ordinary pool of processes.

    python -m bench.tokenization --data 'corpus/*.parquet' [--workers N] [--max-tokens N]
    python -m bench.tokenization --data python               Python's own sources: code, not prose

Both read the same Parquet files, use as many threads or processes, start them afresh each time and
write equal shards; the figure is tokens over wall-clock time, start-up included. The reference is
what most repositories have: the main process iterates over the documents, `Pool.imap` maps
tiktoken's `encode_ordinary` over them in chunks of 16, and the main process copies the arrays into
a shard.
"""

import glob
import multiprocessing
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.record import report
from corpus.tokenizer import END_OF_TEXT, RANK_FILE, read_ranks
from load_fineweb import CORES, Arguments, prepare
from utils import parse, run_script

SHARD_TOKENS = 1_000_000


@dataclass(frozen=True)
class Options:
    """Measure tokens per second from Parquet files to shards."""

    data: tuple[str, ...]
    """Parquet files with a text column, patterns of them, or python: its standard library."""
    workers: int = CORES
    """Threads, or processes, that tokenize; every core by default."""
    max_tokens: int = 10_000_000
    """Tokens to prepare each time."""
    repeats: int = 5
    """Measurements of each, taken in turn; their medians are compared."""


def main() -> None:
    """Print one JSON line."""
    arguments = parse(Options)
    workers = arguments.workers
    with tempfile.TemporaryDirectory() as directory:
        if arguments.data == ("python",):
            files = [write_sources(Path(directory) / "python.parquet")]
        else:
            files = [name for pattern in arguments.data for name in sorted(glob.glob(pattern))]
        compare(files, workers, arguments)


def write_sources(path: Path) -> str:
    """Write the modules of Python's standard library as documents of a Parquet file."""
    import pyarrow
    from pyarrow import parquet

    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    texts = [path.read_text("utf-8", "replace") for path in paths if path.stat().st_size]
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=500)
    return str(path)


def compare(files: list[str], workers: int, arguments: Options) -> None:
    """Measure both in turn and report."""
    ours, reference = [], []
    for _ in range(arguments.repeats):
        ours.append(measure(prepare_here, files, workers, arguments.max_tokens))
        reference.append(measure(prepare_plainly, files, workers, arguments.max_tokens))
    report(f"tokenization, {workers} workers", "tokens/s", ours, reference)


def measure(
    run: Callable[[list[str], Path, int, int], int], files: list[str], workers: int, limit: int
) -> float:
    """Return the tokens a second that `run` writes into an empty directory."""
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        tokens = run(files, Path(directory), workers, limit)
        return tokens / (time.perf_counter() - start)


def prepare_here(files: list[str], out: Path, workers: int, limit: int) -> int:
    """Prepare shards the way this project does; returns the tokens written."""
    sizes = {"max_tokens": limit, "shard_tokens": SHARD_TOKENS}
    return prepare(Arguments(tuple(files), out, workers=workers, **sizes), quiet=True).tokens()


def prepare_plainly(files: list[str], out: Path, workers: int, limit: int) -> int:
    """Prepare shards the ordinary way; returns the tokens written."""
    buffer, filled, shard, total = np.empty(SHARD_TOKENS, dtype=np.uint16), 0, 0, 0
    with multiprocessing.Pool(workers, initializer=begin_worker) as pool:
        for tokens in pool.imap(tokenize, documents(files), chunksize=16):
            tokens = tokens[: limit - total]
            total += len(tokens)
            room = SHARD_TOKENS - filled
            buffer[filled : filled + min(len(tokens), room)] = tokens[:room]
            filled += min(len(tokens), room)
            if len(tokens) > room:
                np.save(out / f"shard_{shard:06d}", buffer)
                shard, filled = shard + 1, len(tokens) - room
                buffer[:filled] = tokens[room:]
            if total == limit:
                break
    np.save(out / f"shard_{shard:06d}", buffer[:filled])
    return total


def documents(files: list[str]) -> Iterator[str]:
    """Yield the documents of Parquet files."""
    from pyarrow import parquet

    for file in files:
        for batch in parquet.ParquetFile(file).iter_batches(columns=["text"]):
            yield from batch.column(0).to_pylist()


def begin_worker() -> None:
    """Build the tokenizer as `tiktoken.get_encoding("gpt2")` does, which would need a network."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str

    ranks, special = read_ranks(RANK_FILE), {END_OF_TEXT: 50256}
    global encoding
    encoding = tiktoken.Encoding(
        name="gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special
    )


def tokenize(document: str) -> np.ndarray:
    """Return a document's tokens after <|endoftext|>, the ordinary way."""
    tokens = [50256]
    tokens.extend(encoding.encode_ordinary(document))
    return np.array(tokens, dtype=np.uint16)


if __name__ == "__main__":
    run_script(main)
