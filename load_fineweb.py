"""Turn documents into token shards: in parallel, and restartable.

    python load_fineweb.py                                   FineWeb-Edu, 10 billion tokens
    python load_fineweb.py --source pydocs                   Python's documentation, no network
    python load_fineweb.py --source notes/ more.jsonl.gz     your own files
    python load_fineweb.py --source shards:OWNER/NAME        shards that somebody pushed to the hub

Worker processes read and tokenize the chunks of the source; this process puts their tokens, in the
source's order, into shards. An interrupted preparation continues after its last complete shard when
the same command is given again, and the files come out byte for byte the same, whatever the number
of workers.
"""

import contextlib
import math
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chunks import CHUNK_BYTES, Chunk
from config import UserError
from corpus.shards import DATA_DIR, Manifest
from corpus.tokenizer import GPT2Tokenizer, gpt2_tokenizer
from hub import fetch_shards, is_repository
from left_out import LeftOut
from preparation import agreed, check_disk, claimed, read_previous, size, token_count, totals
from sources import PYDOCS as PYDOCS
from sources import Source, open_source, source_name
from tqdm_bars import PreparationBar
from utils import parse, run_script
from workers import cores, tokenized
from writer import ShardWriter

SHARD_TOKENS = 100_000_000
# Before the name of a repository that holds token shards.
READY = "shards:"
# English text in GPT-2's encoding; only estimates rest on it.
BYTES_PER_TOKEN = 4.6


@dataclass(frozen=True)
class Arguments:
    """Turn documents into token shards."""

    source: tuple[str, ...] = ("fineweb-edu",)
    """fineweb-edu, fineweb, openwebtext, shakespeare, pydocs, .parquet .jsonl .jsonl.gz .txt files,
    or shards:OWNER/NAME, ready ones from a repository of the hub (hf.py pushes them)."""
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
    min_document_tokens: int | None = None
    """Leave out documents, and rests of cut ones, of fewer tokens; <|endoftext|> counts."""
    max_document_tokens: int | None = None
    """Cut longer documents into pieces of at most this many; each one's <|endoftext|> counts."""
    workers: int | None = None
    """Processes that tokenize; every core by default."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, which unwinds what Ctrl-C unwinds."""


def main() -> None:
    """Prepare what the command line asks for."""
    signal.signal(signal.SIGTERM, _terminate)
    # A shell without job control lets what it starts in the background ignore this one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        prepare(**vars(parse(Arguments)))
    except KeyboardInterrupt as stop:
        print(
            "\ninterrupted; the same command continues after the last complete shard.",
            file=sys.stderr,
        )
        number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        raise SystemExit(128 + number) from None


def _terminate(number: int, frame: object) -> None:
    raise Terminated


def prepare(
    source: str | tuple[str, ...],
    out: Path | None = None,
    subset: str | None = None,
    revision: str | None = None,
    max_tokens: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    val_tokens: int | None = None,
    min_document_tokens: int | None = None,
    max_document_tokens: int | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> Manifest:
    """Write a source's token shards and return their manifest; leave a finished directory alone.

    The arguments are the fields of `Arguments`. Raises UserError when one makes no sense, the
    source cannot be read, or `out` holds anything but this preparation, interrupted or finished.
    """
    words = (source,) if isinstance(source, str) else tuple(source)
    numbers = (max_tokens, shard_tokens, val_tokens, min_document_tokens, max_document_tokens)
    asked = Arguments(words, out, subset, revision, *numbers, workers)
    _check_numbers(asked)
    say = print if not quiet else lambda line: None
    if any(word.startswith(READY) for word in words):
        manifest = _fetch_ready(asked)
        say(f"{out or _place_of_ready(words[0])} is complete: {totals(manifest)}.")
        return manifest
    out = out or DATA_DIR / source_name(words, subset)
    found = read_previous(out)
    # The commit that a preparation began with is the one it ends with.
    recorded = found.source.get("revision") if found is not None else None
    documents = open_source(words, subset, revision or recorded)
    wanted = _new_manifest(documents, asked)
    manifest = agreed(out, wanted)
    if manifest.complete:
        say(f"{out} is already complete: {totals(manifest)}.")
        return manifest
    expected = _expected_tokens(documents, max_tokens)
    check_disk(out, expected - token_count(manifest))
    begun = f", continuing after {token_count(manifest):,} tokens" if manifest.shards else ""
    say(f"{' '.join(words)} -> {out}: about {expected:,} tokens, {size(2 * expected)}{begun}")
    with claimed(out, wanted) as manifest:
        if not manifest.complete:
            # Some sources are fetched here, which has a bar of its own.
            chunks = documents.chunks()
            bar = PreparationBar("tokenizing", expected, token_count(manifest), disable=quiet)
            manifest = _write_shards(out, manifest, chunks, _processes(workers, expected), bar)
    for line in _summary(out, manifest, documents.published_tokens):
        say(line)
    return manifest


def _check_numbers(asked: Arguments) -> None:
    # A document is at least its <|endoftext|> and one token.
    for name, value, least in (
        ("max-tokens", asked.max_tokens, 2),
        ("shard-tokens", asked.shard_tokens, 1),
        ("val-tokens", asked.val_tokens, 1),
        ("min-document-tokens", asked.min_document_tokens, 1),
        ("max-document-tokens", asked.max_document_tokens, 2),
        ("workers", asked.workers, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"--{name} must be at least {least}, not {value}.")
    shortest, longest = asked.min_document_tokens, asked.max_document_tokens
    if None not in (shortest, longest) and shortest > longest:
        raise UserError(
            f"--min-document-tokens {shortest} is above --max-document-tokens {longest}, "
            "which leaves no document."
        )


def _fetch_ready(asked: Arguments) -> Manifest:
    """Fetch shards that are ready; raises UserError for options that would change them."""
    free = Arguments(asked.source, asked.out, revision=asked.revision, workers=asked.workers)
    if len(asked.source) > 1 or asked != free:
        raise UserError(
            f"{READY}OWNER/NAME brings shards as they are; leave out other sources, and all "
            "options but --out and --revision."
        )
    repository = asked.source[0].removeprefix(READY)
    if not is_repository(repository):
        raise UserError(f"'{repository}' is no repository of the hub; give {READY}OWNER/NAME.")
    return fetch_shards(repository, asked.revision, asked.out or _place_of_ready(asked.source[0]))


def _place_of_ready(source: str) -> Path:
    return DATA_DIR / source.rpartition("/")[2]


def _new_manifest(source: Source, asked: Arguments) -> Manifest:
    return Manifest(
        name=source.name,
        tokenizer=GPT2Tokenizer.name,
        alphabet=None,
        vocab_size=GPT2Tokenizer.vocab_size,
        source={**source.description, "max_tokens": asked.max_tokens},
        shard_tokens=asked.shard_tokens,
        val_tokens=asked.val_tokens,
        min_document_tokens=asked.min_document_tokens,
        max_document_tokens=asked.max_document_tokens,
    )


def _expected_tokens(source: Source, max_tokens: int | None) -> int:
    known = source.published_tokens or math.ceil(source.text_bytes() / BYTES_PER_TOKEN)
    return min(known, max_tokens or known)


def _processes(workers: int | None, expected: int) -> int:
    # A small source is sooner tokenized here than a second process is started.
    enough = math.ceil(BYTES_PER_TOKEN * expected / CHUNK_BYTES)
    return min(workers or cores(), max(enough, 1))


def _summary(out: Path, manifest: Manifest, published: int | None) -> Iterable[str]:
    yield f"{out} is complete: {totals(manifest)}."
    if manifest.left_out:
        yield f"left out: {LeftOut(manifest.left_out, manifest.left_out_names)}."
    chosen = (manifest.source["max_tokens"], manifest.min_document_tokens)
    all_of_it = {*chosen, manifest.max_document_tokens} == {None}
    if published is not None and all_of_it and token_count(manifest) != published:
        yield f"warning: {published:,} tokens were published for this source."


def _write_shards(
    out: Path, manifest: Manifest, chunks: Iterable[Chunk], workers: int, bar: PreparationBar
) -> Manifest:
    """Give a writer the tokens of every chunk that the shards do not hold yet, to the limit."""
    writer = ShardWriter(out, manifest, gpt2_tokenizer())
    first, skipped = manifest.shards[-1].reached if manifest.shards else (0, 0)
    total, limit = token_count(manifest) - skipped, manifest.source["max_tokens"]
    results = tokenized(
        chunks,
        first,
        workers,
        manifest.min_document_tokens,
        manifest.max_document_tokens,
    )
    with bar, contextlib.closing(results):
        for number, (tokens, hashes, left_out) in results:
            if limit is not None and total + len(tokens) > limit:
                tokens = tokens[: limit - total]
                hashes = hashes[: np.count_nonzero(tokens == GPT2Tokenizer.eot)]
            writer.add(tokens, hashes, number, left_out)
            total += len(tokens)
            bar.update(len(tokens) - skipped)
            skipped = 0
            if total == limit:
                break
    return writer.finish()


if __name__ == "__main__":
    run_script(main)
