"""Turn documents into token shards: in parallel, and restartable to the same bytes.

    python load_fineweb.py                                   FineWeb-Edu, 10 billion tokens
    python load_fineweb.py --source pydocs                   Python's documentation, no network
    python load_fineweb.py --source notes/ more.jsonl.gz     your own files
    python load_fineweb.py --source pydocs --tokenizer bpe --vocab-size 4096
    python load_fineweb.py --source shards:OWNER/NAME        shards that somebody pushed to the hub

Threads tokenize batches of documents (tokenizers release the GIL); this one puts their tokens, in
the source's order, into one shard at a time, and records each whole shard in manifest.json.
"""

import contextlib
import functools
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from config import Count, UserError, check_values
from corpus import shards
from corpus import tokenizer as tokenizers
from corpus.preparation import Preparation, Split, split_of
from corpus.shards import MANIFEST, Manifest, read_manifest
from corpus.sources import Source, fetch_shards, find_source
from corpus.tokenizer import TOKENIZER_FILE, Tokenizer
from tqdm_bars import PreparationBar
from utils import DATA_DIR, locked, parse, run_script, write_atomically

BYTES_PER_TOKEN = {"gpt2": 4.6, "char": 1.0}  # of English, for estimates; others have about 3.5
PARQUET_BYTES = 2.9  # of the hub's files for a token of FineWeb-Edu
BPE_BYTES = 1 << 29  # of text that a vocabulary is trained on, at most
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Arguments:
    """Turn documents into token shards."""

    source: tuple[str, ...] = ("fineweb-edu",)
    """fineweb-edu, fineweb, openwebtext, climbmix, shakespeare, shakespeare-large, pydocs, .parquet
    .jsonl .jsonl.gz .txt files and directories, or shards:OWNER/NAME, ready ones of the hub."""
    out: Path | None = None  # Directory; data/SOURCE, or data/SOURCE-TOKENIZER unless GPT-2's.
    tokenizer: str = "gpt2"  # gpt2, char, bpe, or that of a MODEL: data, a run, a name of the hub.
    vocab_size: Annotated[int, Meta(ge=272, le=65536)] | None = None  # Of bpe; 16 ids are reserved.
    max_tokens: Annotated[int, Meta(ge=2)] | None = None  # Stop after exactly this many tokens.
    shard_tokens: Count = 100_000_000  # Tokens in a shard; the last one is shorter.
    val_tokens: Count | None = None  # Of a small source 4 bytes for each validate; else a tenth.
    min_document_tokens: Count | None = None  # Skip documents, and rests of cut ones, of fewer.
    max_document_tokens: Annotated[int, Meta(ge=2)] | None = None  # Cut longer ones into pieces.
    workers: Count = CORES  # Threads that tokenize; one a core by default.
    subset: str | None = None  # Of a hub source; sample-10BT for FineWeb and FineWeb-Edu.
    revision: str | None = None  # Commit, branch or tag of a hub source; the newest by default.

    def __post_init__(self) -> None:
        check_values(self)
        if not self.source:
            raise UserError("--source needs a name, a file or a directory.")
        if (self.min_document_tokens or 0) > (self.max_document_tokens or 2**48):
            raise UserError("--min-document-tokens is above --max-document-tokens.")
        if (self.tokenizer == "bpe") != (self.vocab_size is not None):
            raise UserError("--tokenizer bpe needs --vocab-size, and no other tokenizer has it.")


def main() -> None:
    """Prepare what the command line asks for."""
    for number in (signal.SIGTERM, signal.SIGINT):  # which a shell's background job may ignore
        signal.signal(number, _stop)
    try:
        prepare(parse(Arguments))
    except KeyboardInterrupt as stop:
        sentence = "interrupted; the same command continues after the last complete shard."
        print(f"\n{sentence}", file=sys.stderr, flush=True)
        os._exit(128 + stop.args[0])  # without waiting for threads: what counts is on the disk


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def prepare(asked: Arguments, quiet: bool = False) -> Manifest:
    """Write a source's token shards and return their manifest; leave a finished directory alone.

    Raises UserError when the source cannot be read, or `out` holds anything but this preparation,
    interrupted or finished.
    """
    say = (lambda line: None) if quiet else functools.partial(print, flush=True)
    if asked.source[0].startswith("shards:"):
        if asked != Arguments(asked.source[:1], asked.out, revision=asked.revision):
            raise UserError("With shards:OWNER/NAME go --out and --revision only.")
        repository = asked.source[0].removeprefix("shards:")
        out = asked.out or DATA_DIR / Path(repository).name
        manifest = fetch_shards(repository, asked.revision, out)
    else:
        out, manifest = _prepare(asked, say, quiet)
    counts = f"{manifest.tokens('train'):,} training and {manifest.tokens('val'):,} validation"
    say(f"{out} is complete: {counts} tokens in {len(manifest.shards)} shards.")
    if manifest.skipped:
        say("skipped: " + ", ".join(f"{n:,} {why}" for why, n in manifest.skipped.items()))
    return manifest


def _prepare(asked: Arguments, say: Any, quiet: bool) -> tuple[Path, Manifest]:
    source = find_source(asked.source, asked.subset, asked.revision)
    codec = f"bpe-{asked.vocab_size}" if asked.vocab_size else asked.tokenizer
    codec = Path(codec).resolve().name if os.path.exists(codec) else codec
    name = source.name if codec == "gpt2" else f"{source.name}-{Path(codec).name}"
    out = asked.out or DATA_DIR / name
    found = read_previous(out)
    if found and "revision" in found.source and not asked.revision:  # it ends with its commit
        source = find_source(asked.source, asked.subset, found.source["revision"])
    options = ("max_tokens", "shard_tokens", "val_tokens")
    options += ("min_document_tokens", "max_document_tokens")
    facts = {**source.description, "tokenizer": codec, **{o: getattr(asked, o) for o in options}}
    check_same(out, found, facts)
    if found and found.complete:
        return out, found
    known, begun = source.tokens(BYTES_PER_TOKEN.get(codec, 3.5)), found.tokens() if found else 0
    expected = min(known or 2**48, asked.max_tokens or 2**48)
    if expected < 2**48:
        cache = f", and {_size(PARQUET_BYTES * expected)} of files in the hub's cache"
        cache = cache if source.description["kind"] == "hub" else ""
        say(f"{out}: about {expected:,} tokens, {_size(2 * expected)}{cache}; {begun:,} are there.")
        check_disk(out, 2 * (expected - begun))
    with claimed(out), PreparationBar("tokenizing", known and expected, begun, quiet) as bar:
        check_same(out, found := read_previous(out), facts)  # another process may have been here
        if not (found and found.complete):
            split = split_of(source, asked.shard_tokens, asked.max_tokens, asked.val_tokens)
            if found is None or not found.shards:
                made = make_tokenizer(asked, source, split)
                found = Manifest(name, made.name, made.vocab_size, made.eot, facts, made.sha256)
                shards.write_manifest(out, found)
                if made.json:
                    write_atomically(out / TOKENIZER_FILE, made.json.encode())
            made = tokenizers.read_tokenizer(found.tokenizer, out, found.tokenizer_sha256)
            lengths = asked.min_document_tokens or 0, asked.max_document_tokens or 2**48
            writer = shards.ShardWriter(out, found, made, asked.shard_tokens)
            found = Preparation(source, split, made, *lengths).write(
                writer, bar, asked.workers, asked.max_tokens or 2**48
            )
    whole = Arguments(out=asked.out, shard_tokens=asked.shard_tokens, workers=asked.workers)
    if asked == whole and known != found.tokens():
        say(f"warning: {known:,} tokens are published for it.")
    return out, found


# --- The directory: whose it is, and one writer at a time ---


def read_previous(out: Path) -> Manifest | None:
    """Return an earlier preparation's manifest; raises UserError where `out` holds other things."""
    if (out / MANIFEST).exists():
        for shard in (manifest := read_manifest(out)).shards:
            shards.open_shard(out / shard.file, shard.tokens)
        return manifest
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out names a directory.")
    for path in sorted(out.glob("[!.]*")):  # texts from the web may lie there
        if path.suffix != ".txt":
            raise UserError(f"{out} holds other files ({path.name}); name an empty --out.")
    return None


def check_same(out: Path, found: Manifest | None, facts: dict[str, Any]) -> None:
    """Raise UserError naming what differs between what `out` holds and what is asked for."""
    old = found.source if found else facts
    for key in {**old, **facts}:
        if old.get(key) != facts.get(key):
            option = f"--{key.replace('_', '-')}" if key in Arguments.__annotations__ else key
            was = f"{out} was prepared with {option} {old.get(key)}, not {facts.get(key)}"
            raise UserError(f"{was}; name another --out, or delete it.")


def check_disk(out: Path, size: int) -> None:
    """Raise UserError when the disk has no room for so many bytes more."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if size > (free := shutil.disk_usage(existing).free):
        lacks = f"{out} needs {_size(size)} more, and its disk has {_size(free)} free"
        raise UserError(f"{lacks}; make room, name another --out, or lower --max-tokens.")


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Keep other processes out of a directory; leave nothing where no shard was written."""
    new, half = not out.exists(), r"\.(manifest|tokenizer|.*_\d{6})\.(json|npy)\.[0-9a-f]{16}\.tmp"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out} cannot be made ({error.strerror}).") from error
    with locked(out / ".lock"):
        try:
            yield
        finally:
            ours = {".lock"} if any(out.glob("*.npy")) else {".lock", MANIFEST, TOKENIZER_FILE}
            for path in out.iterdir():
                if path.name in ours or re.fullmatch(half, path.name):
                    path.unlink()
            if new and not any(out.iterdir()):
                out.rmdir()


def make_tokenizer(asked: Arguments, source: Source, split: Split) -> Tokenizer:
    """Return the tokenizer that is asked for; characters and bpe are made of the source's text."""
    if asked.tokenizer == "char":
        alphabet = set().union(*(tokenizers.mended(text) for _, text in source.documents()))
        return tokenizers.CharTokenizer("".join(sorted(alphabet)))
    if asked.vocab_size is None:
        return tokenizers.find_tokenizer(asked.tokenizer)
    # What validates of a large source comes before its training text.
    which, first = ("train", 0) if split.held is not None else (None, 8 * asked.shard_tokens)

    def texts() -> Iterator[str]:
        done = 0
        for place, text in source.documents():
            if done >= first:
                yield split.part(which, place, text)
            done += len(text.encode("utf-8", "surrogatepass"))
            if done >= first + BPE_BYTES:
                return

    return tokenizers.train_bpe(texts(), asked.vocab_size)


if __name__ == "__main__":
    run_script(main)
