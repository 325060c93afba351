"""Turn documents into token shards: in parallel, and restartable.

    python load_fineweb.py                                   FineWeb-Edu, 10 billion tokens
    python load_fineweb.py --source pydocs                   Python's documentation, no network
    python load_fineweb.py --source notes/ more.jsonl.gz     your own files

Worker processes read and tokenize the chunks of the source; this process puts their tokens, in the
source's order, into shards. An interrupted preparation continues after its last complete shard when
the same command is given again, and the files come out byte for byte the same, whatever the number
of workers.
"""

import collections
import contextlib
import math
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chunks import CHUNK_BYTES, Chunk, tokenize
from config import UserError
from manifests import DATA_DIR, MANIFEST, Manifest, read_manifest, write_manifest
from shards import ShardWriter
from sources import PYDOCS as PYDOCS
from sources import Source, open_source, source_name
from tokenizer import GPT2Tokenizer, gpt2_tokenizer
from tqdm_bars import PreparationBar

SHARD_TOKENS = 100_000_000
# English text in GPT-2's encoding; only estimates rest on it.
BYTES_PER_TOKEN = 4.6
NPY_HEADER_BYTES = 128


@dataclass(frozen=True)
class Arguments:
    """Turn documents into token shards."""

    source: tuple[str, ...] = ("fineweb-edu",)
    """fineweb-edu, fineweb, openwebtext, pydocs, or .parquet .jsonl .jsonl.gz .txt files."""
    out: Path | None = None
    """Directory for the shards; data/<source name> by default."""
    subset: str | None = None
    """Subset of a hub source; sample-10BT for FineWeb and FineWeb-Edu by default."""
    revision: str | None = None
    """Commit, branch or tag of a hub source; the newest commit by default, which is recorded."""
    max_tokens: int | None = None
    """Stop after exactly this many tokens."""
    shard_tokens: int = SHARD_TOKENS
    """Tokens in a shard; the last one is shorter."""
    val_tokens: int | None = None
    """Tokens to hold out of a source smaller than one shard; a tenth of it by default."""
    workers: int | None = None
    """Processes that tokenize; every core by default."""


def main() -> None:
    """Prepare what the command line asks for."""
    # Not at the top, because every worker process imports this module, and none parses options.
    from command_line import parse

    prepare(**vars(parse(Arguments)))


def prepare(
    source: str | tuple[str, ...],
    out: Path | None = None,
    subset: str | None = None,
    revision: str | None = None,
    max_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    val_tokens: int | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> Manifest:
    """Write a source's token shards and return their manifest; leave a finished directory alone.

    The arguments are the fields of `Arguments`. Raises UserError when one makes no sense, the
    source cannot be read, or `out` holds anything but this preparation, interrupted or finished.
    """
    _check_numbers(max_tokens, shard_tokens, val_tokens, workers)
    say = print if not quiet else lambda line: None
    words = (source,) if isinstance(source, str) else tuple(source)
    out = out or DATA_DIR / source_name(words, subset)
    found = _read_previous(out)
    # The commit that a preparation began with is the one it ends with.
    recorded = found.source.get("revision") if found is not None else None
    documents = open_source(words, subset, revision or recorded)
    manifest = _new_manifest(documents, max_tokens, shard_tokens, val_tokens)
    if found is not None:
        _check_same(out, found, manifest)
        _check_files(out, found)
        manifest = found
    if manifest.complete:
        say(f"{out} is already complete: {_totals(manifest)}.")
        return manifest
    expected = _expected_tokens(documents, max_tokens)
    _check_disk(out, expected - _tokens(manifest))
    begun = f", continuing after {_tokens(manifest):,} tokens" if manifest.shards else ""
    say(f"{' '.join(words)} -> {out}: about {expected:,} tokens, {_size(2 * expected)}{begun}")
    _begin(out, manifest)
    writer = ShardWriter(out, manifest, gpt2_tokenizer())
    # A small source is sooner tokenized here than a second process is started.
    enough = math.ceil(BYTES_PER_TOKEN * expected / CHUNK_BYTES)
    with PreparationBar("tokenizing", expected, _tokens(manifest), disable=quiet) as bar:
        _fill(writer, documents.chunks(), min(workers or cores(), max(enough, 1)), max_tokens, bar)
    manifest = writer.finish()
    say(f"{out} is complete: {_totals(manifest)}.")
    published = documents.published_tokens
    if published is not None and max_tokens is None and _tokens(manifest) != published:
        say(f"warning: {published:,} tokens were published for this source.")
    return manifest


def _check_numbers(
    max_tokens: int | None, shard_tokens: int, val_tokens: int | None, workers: int | None
) -> None:
    # A document is at least its <|endoftext|> and one token.
    for name, value, least in (
        ("max-tokens", max_tokens, 2),
        ("shard-tokens", shard_tokens, 1),
        ("val-tokens", val_tokens, 1),
        ("workers", workers, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}.")


# --- The directory ---


def _read_previous(out: Path) -> Manifest | None:
    """Return an earlier preparation's manifest; raises UserError when `out` holds other things."""
    if (out / MANIFEST).exists():
        return read_manifest(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out names a directory.")
    others = [path.name for path in out.glob("*") if not path.name.startswith(".")]
    if others:
        raise UserError(
            f"{out} holds other files ({min(others)}) and no {MANIFEST}; name an empty --out."
        )
    return None


def _new_manifest(
    source: Source, max_tokens: int | None, shard_tokens: int, val_tokens: int | None
) -> Manifest:
    return Manifest(
        name=source.name,
        tokenizer=GPT2Tokenizer.name,
        alphabet=None,
        vocab_size=GPT2Tokenizer.vocab_size,
        source={**source.description, "max_tokens": max_tokens},
        shard_tokens=shard_tokens,
        val_tokens=val_tokens,
    )


def _check_same(out: Path, found: Manifest, wanted: Manifest) -> None:
    """Raise UserError naming what differs between what `out` holds and what is asked for."""
    old, new = (
        {
            "tokenizer": manifest.tokenizer,
            "--shard-tokens": manifest.shard_tokens,
            "--val-tokens": manifest.val_tokens,
            **{f"source {key}": value for key, value in manifest.source.items()},
        }
        for manifest in (found, wanted)
    )
    for key in {**old, **new}:
        if old.get(key) != new.get(key):
            name = key.replace("source max_tokens", "--max-tokens")
            raise UserError(
                f"{out} was prepared with {name} {old.get(key)}, not {new.get(key)}; "
                "choose another --out, or delete it."
            )


def _check_files(out: Path, manifest: Manifest) -> None:
    """Raise UserError when a shard that the manifest lists is gone or has another size."""
    for shard in manifest.shards:
        path = out / shard.file
        if not path.is_file() or path.stat().st_size != NPY_HEADER_BYTES + 2 * shard.tokens:
            raise UserError(f"{path} is missing or damaged; delete {out} and prepare it again.")


def _check_disk(out: Path, tokens: int) -> None:
    """Raise UserError when the disk has no room for so many tokens more."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if 2 * tokens > free:
        raise UserError(
            f"{out} needs about {_size(2 * tokens)} more, and its disk has {_size(free)} free; "
            "make room, choose another --out, or prepare less with --max-tokens."
        )


def _begin(out: Path, manifest: Manifest) -> None:
    """Make the directory ours: from now on its manifest says whose shards these are."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        # A kill in the middle of a write leaves one of these behind.
        for path in out.glob(".*.tmp"):
            path.unlink()
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}).") from error
    write_manifest(out, manifest)


def _expected_tokens(source: Source, max_tokens: int | None) -> int:
    known = source.published_tokens or math.ceil(source.text_bytes() / BYTES_PER_TOKEN)
    return min(known, max_tokens or known)


def _tokens(manifest: Manifest) -> int:
    return sum(shard.tokens for shard in manifest.shards)


def _totals(manifest: Manifest) -> str:
    train, val, files = manifest.tokens("train"), manifest.tokens("val"), len(manifest.shards)
    size = _size(2 * (train + val))
    return f"{train:,} training and {val:,} validation tokens in {files} shards, {size}"


def _size(count: int) -> str:
    """Return a number of bytes in MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


# --- The tokens ---


def _fill(
    writer: ShardWriter,
    chunks: Iterable[Chunk],
    workers: int,
    max_tokens: int | None,
    bar: PreparationBar,
) -> None:
    """Give the writer the tokens of every chunk that its shards do not hold yet."""
    shards = writer.manifest.shards
    first, skipped = shards[-1].reached if shards else (0, 0)
    total = _tokens(writer.manifest) - skipped
    ahead = _in_processes if workers > 1 else _in_this_process
    with contextlib.closing(ahead(chunks, first, workers)) as results:
        for number, tokens, hashes in results:
            if max_tokens is not None and total + len(tokens) > max_tokens:
                tokens = tokens[: max_tokens - total]
                hashes = hashes[: np.count_nonzero(tokens == GPT2Tokenizer.eot)]
            writer.add(tokens, hashes, number)
            total += len(tokens)
            bar.update(len(tokens) - skipped)
            skipped = 0
            if total == max_tokens:
                return


Result = tuple[int, np.ndarray, list[int]]


def _in_this_process(chunks: Iterable[Chunk], first: int, workers: int) -> Iterator[Result]:
    for number, chunk in enumerate(chunks):
        if number >= first:
            yield number, *tokenize(chunk)


def _in_processes(chunks: Iterable[Chunk], first: int, workers: int) -> Iterator[Result]:
    """Yield the chunks from number `first` on, tokenized by worker processes, in their order."""
    others = set(multiprocessing.active_children())
    pool = _start_pool(workers)
    waiting = collections.deque()
    try:
        for number, chunk in enumerate(chunks):
            if number < first:
                continue
            waiting.append((number, pool.submit(tokenize, chunk)))
            # Two chunks a worker keep all of them busy, and bound what is held in memory.
            if len(waiting) > 2 * workers:
                number, future = waiting.popleft()
                yield number, *future.result()
        for number, future in waiting:
            yield number, *future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process died, perhaps because memory ran out; run the same command again to "
            "continue, with fewer --workers if it dies again."
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()


def _start_pool(workers: int) -> ProcessPoolExecutor:
    """Start worker processes afresh, since a forked copy of a threaded process may hang."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    # Ctrl-C reaches the workers too, even before they can say that it is not for them; they inherit
    # that from here. A process is started for each call that finds none idle.
    with _ignoring_interrupts():
        for _ in range(workers):
            pool.submit(int)
    return pool


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker whose parent was killed would otherwise wait for work for ever.
    multiprocessing.parent_process().join()
    os._exit(1)


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    from command_line import run_script

    run_script(main)
