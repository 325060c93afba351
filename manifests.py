"""What a data directory says of itself: its manifest, and the headers of its shards.

    {"format": 1, "complete": true, "name": "fineweb-edu", "tokenizer": "gpt2", "alphabet": null,
     "vocab_size": 50257, "source": {...}, "shard_tokens": 100000000, "val_tokens": null,
     "min_document_tokens": null, "max_document_tokens": null,
     "left_out": {"empty": 3, "not_utf8": 1}, "left_out_names": {"not_utf8": ["notes/a.txt"]},
     "shards": [{"file": ..., "split": "val", "tokens": ..., "bytes": ..., "sha256": ...,
                 "reached": [chunk, token], "sampled_sha256": ...}, ...],
     "digest": ...}

`bytes` is the length of the shard's text in UTF-8; `reached` says how far into the source the shard
goes, so that an interrupted preparation continues after its last complete shard. `sampled_sha256`
covers a few blocks of the file, so that it can be compared whenever the data is opened; `sha256`
covers all of it. `digest` seals the record itself. A directory that someone else prepared has no
manifest; one is made up from its file names and headers.
"""

import dataclasses
import hashlib
import json
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from config import UserError
from files import seal, unseal, write_atomically
from tokenizer import CharTokenizer, GPT2Tokenizer

FORMAT = 1
MANIFEST = "manifest.json"
DATA_DIR = Path("data")

# llm.c's .bin files begin with 256 int32: magic number, version, token count, zeros.
LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER_BYTES = 20240520, 1, 1024
LLMC_LLAMA_MAGIC = 20240801

NPY_MAGIC = b"\x93NUMPY"
NPY_FIELDS = re.compile(
    rb"\{'descr': '([^']*)', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\), \} *\n"
)

# What is hashed of a file when the data is opened.
SAMPLED_BLOCKS, SAMPLED_BLOCK_BYTES = 16, 65536


@dataclass(frozen=True)
class Shard:
    """One file of tokens; `sha256`, `bytes` and `reached` are unknown for foreign files."""

    file: str
    split: str
    tokens: int
    bytes: int | None = None
    sha256: str | None = None
    reached: tuple[int, int] | None = None
    sampled_sha256: str | None = None


@dataclass(frozen=True)
class Manifest:
    """What a data directory holds; `source` says where it came from, in the preparer's words."""

    name: str
    tokenizer: str
    alphabet: str | None
    vocab_size: int
    source: dict[str, Any]
    shard_tokens: int
    val_tokens: int | None = None
    min_document_tokens: int | None = None
    max_document_tokens: int | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    left_out_names: dict[str, list[str]] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()
    complete: bool = False
    format: int = FORMAT

    def tokens(self, split: str) -> int:
        """Return the number of tokens in a split."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)


def find_data(data: str) -> Path:
    """Return the directory of a data set given by path or by its name under data/."""
    for path in (Path(data), DATA_DIR / data):
        if path.is_dir():
            return path
    command = f"load_fineweb.py --source ... --out {DATA_DIR / Path(data).name}"
    if data.startswith("shakespeare-"):
        command = "shakespeare/shakespeare.py"
    raise UserError(
        f"There is no data '{data}': neither a directory nor a name under {DATA_DIR}/. "
        f"Prepare it with `python {command}`."
    )


def read_manifest(directory: Path) -> Manifest:
    """Read a manifest, or make one up from foreign files; raises UserError if neither is there.

    A sealed one must fit its digest; one from before there were digests is taken as it is. Either
    way every field has been checked: the files it names lie in `directory`.
    """
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
        raw = json.loads(content)
        if not isinstance(raw, dict):
            raise ValueError("it is not an object")
        if raw.get("format") != FORMAT:
            raise UserError(
                f"{path} has format {raw.get('format')}; this version reads format {FORMAT}."
            )
        return _build_manifest(unseal(content) if "digest" in raw else raw)
    except (FileNotFoundError, NotADirectoryError):
        return _foreign_manifest(directory)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({error}); prepare the data again into a new directory."
        ) from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace a directory's manifest atomically."""
    write_atomically(directory / MANIFEST, seal(dataclasses.asdict(manifest)))


def _build_manifest(raw: dict[str, Any]) -> Manifest:
    """Return the manifest in a JSON object; raises ValueError and the like if it makes no sense."""
    shards, listed = [], raw.pop("shards")
    if not isinstance(listed, list):
        raise ValueError("its shards are not a list")
    for shard in listed:
        reached = tuple(shard["reached"]) if shard["reached"] is not None else None
        shards.append(Shard(**{**shard, "reached": reached}))
    manifest = Manifest(**raw, shards=tuple(shards))
    _check_types(manifest)
    known = {
        GPT2Tokenizer.name: GPT2Tokenizer.vocab_size,
        CharTokenizer.name: len(manifest.alphabet or "") + 1,
    }
    size = manifest.vocab_size
    if size != known.get(manifest.tokenizer, size) or not 1 <= size <= 65536:
        raise ValueError(f"{manifest.tokenizer} has no vocabulary of {size}")
    if len({shard.file for shard in shards}) < len(shards):
        raise ValueError("it names a file twice")
    for shard in shards:
        _check_entry(shard)
    return manifest


def _check_entry(shard: Shard) -> None:
    """Raise ValueError unless a shard's entry makes sense by itself."""
    _check_types(shard)
    # A name, not a path: what is read or written lies in the directory.
    if not re.fullmatch(r"[^/\\:\0]+", shard.file) or shard.file in (".", ".."):
        raise ValueError(f"{shard.file!r} is not the name of a file")
    if shard.split not in ("train", "val"):
        raise ValueError(f"{shard.file} is of an unknown split, {shard.split!r}")
    if shard.tokens < 0:
        raise ValueError(f"{shard.file} cannot hold {shard.tokens} tokens")
    if shard.reached is not None and [type(part) for part in shard.reached] != [int, int]:
        raise ValueError(f"{shard.file} cannot reach to {shard.reached}")


def _check_types(record: Manifest | Shard) -> None:
    """Raise ValueError for a field whose value is not of its annotated type."""
    for name, hint in typing.get_type_hints(type(record)).items():
        value = getattr(record, name)
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        # Compared exactly, because Python counts True among the integers.
        if type(value) not in [typing.get_origin(kind) or kind for kind in kinds]:
            raise ValueError(f"{name} cannot be {value!r}")


def manifest_digest(directory: Path) -> str | None:
    """Return the sha256 of manifest.json, or None for foreign data."""
    path = directory / MANIFEST
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _foreign_manifest(directory: Path) -> Manifest:
    """Describe `*_val_*` and `*_train_*` files (.npy, or llm.c's .bin) without a manifest."""
    named = re.compile(r"(?:.*_)?(val|train)_.*\.(?:npy|bin)")
    # documents.py may have put an index beside the shards, which is none.
    index = re.compile(r"documents_(?:val|train)_[0-9a-f]{12}\.npy")
    matches = [(path, named.fullmatch(path.name)) for path in sorted(directory.glob("*"))]
    shards = tuple(
        Shard(path.name, match[1], read_header(path)[0])
        for path, match in matches
        if match is not None and not index.fullmatch(path.name)
    )
    if not shards:
        raise UserError(
            f"{directory} holds no token shards (no {MANIFEST}, no *_train_*.npy); "
            f"prepare it with `python load_fineweb.py --out {directory}`."
        )
    return Manifest(
        name=directory.name,
        tokenizer="gpt2",
        alphabet=None,
        vocab_size=50257,
        source={"kind": "foreign"},
        shard_tokens=max(shard.tokens for shard in shards),
        shards=shards,
        complete=True,
    )


def npy_header(count: int, descr: str = "<u2") -> bytes:
    """Return the header of a version 1.0 `.npy` file of numbers, the same bytes on every NumPy."""
    fields = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({count},), }}"
    return (
        NPY_MAGIC + b"\x01\x00" + (118).to_bytes(2, "little") + fields.ljust(117).encode() + b"\n"
    )


def read_header(path: Path, descr: str = "<u2") -> tuple[int, int]:
    """Return how many numbers a file's header announces and the byte at which they begin.

    Raises UserError unless it is a 1-D `.npy` file of `descr`, or llm.c's `.bin`. Nothing of the
    file is evaluated or unpickled.
    """
    try:
        # Opening a pipe would wait for ever.
        if not path.is_file():
            raise ValueError("not a file" if path.exists() else "it is missing")
        with open(path, "rb") as file:
            return _llmc_header(file) if path.suffix == ".bin" else _npy_header(file, descr)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable token shard ({error}); restore it or prepare the data again."
        ) from error


def _llmc_header(file: BinaryIO) -> tuple[int, int]:
    content = file.read(LLMC_HEADER_BYTES)
    if len(content) < LLMC_HEADER_BYTES:
        raise ValueError("its header is cut off")
    magic, version, tokens = np.frombuffer(content[:12], dtype="<i4").tolist()
    if magic == LLMC_LLAMA_MAGIC:
        raise ValueError("its tokens are Llama 3's in uint32, made with another tokenizer")
    if (magic, version) != (LLMC_MAGIC, LLMC_VERSION):
        raise ValueError("no llm.c header")
    if tokens < 0:
        raise ValueError(f"its header announces {tokens} tokens")
    return tokens, LLMC_HEADER_BYTES


def _npy_header(file: BinaryIO, descr: str) -> tuple[int, int]:
    start = file.read(10)
    if start[:6] != NPY_MAGIC or len(start) < 10:
        raise ValueError("it does not begin like an .npy file")
    if start[6:8] != b"\x01\x00":
        raise ValueError(f".npy version {start[6]}.{start[7]}, not 1.0")
    length = int.from_bytes(start[8:], "little")
    content = file.read(length)
    fields = NPY_FIELDS.fullmatch(content)
    if fields is None:
        raise ValueError("its header is cut off" if len(content) < length else "a strange header")
    found, fortran_order, shape = (field.decode("latin-1") for field in fields.groups())
    sizes = [int(size) for size in shape.split(",") if size.strip()]
    if (len(sizes), found, fortran_order) != (1, descr, "False"):
        order = ", Fortran order" if fortran_order == "True" else ""
        raise ValueError(f"{len(sizes)}-D {found}{order}, not 1-D {descr}")
    return sizes[0], 10 + length


def sampled_digest(path: Path) -> str:
    """Return the sha256 of 16 blocks of 64 KiB, evenly spread over a file from its first byte to
    its last; of all of a file that is no larger.

    Quick enough to be compared whenever data is opened: truncated, exchanged and mostly overwritten
    files show, and the header is covered. Raises UserError when the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            size = file.seek(0, 2)
            last = size - SAMPLED_BLOCK_BYTES
            starts = [i * last // (SAMPLED_BLOCKS - 1) for i in range(SAMPLED_BLOCKS)]
            if size <= SAMPLED_BLOCKS * SAMPLED_BLOCK_BYTES:
                starts = range(0, size, SAMPLED_BLOCK_BYTES)
            for start in starts:
                file.seek(start)
                digest.update(file.read(SAMPLED_BLOCK_BYTES))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    return digest.hexdigest()
