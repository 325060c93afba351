"""What a data directory says of itself: its manifest, and the headers of its shards.

    {"format": 1, "complete": true, "name": "fineweb-edu", "tokenizer": "gpt2", "alphabet": null,
     "vocab_size": 50257, "source": {...}, "shard_tokens": 100000000, "val_tokens": null,
     "shards": [{"file": ..., "split": "val", "tokens": ..., "bytes": ..., "sha256": ...,
                 "reached": [chunk, token]}, ...]}

`bytes` is the length of the shard's text in UTF-8; `reached` says how far into the source the shard
goes, so that an interrupted preparation continues after its last complete shard. A directory that
someone else prepared has no manifest; one is made up from its file names and headers.
"""

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import UserError
from files import write_atomically

FORMAT = 1
MANIFEST = "manifest.json"
DATA_DIR = Path("data")

# llm.c's .bin files begin with 256 int32: magic number, version, token count, zeros.
LLMC_MAGIC, LLMC_VERSION, LLMC_HEADER_BYTES = 20240520, 1, 1024


@dataclass(frozen=True)
class Shard:
    """One file of tokens; `sha256`, `bytes` and `reached` are unknown for foreign files."""

    file: str
    split: str
    tokens: int
    bytes: int | None = None
    sha256: str | None = None
    reached: tuple[int, int] | None = None


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
    raise UserError(
        f"There is no data '{data}': neither a directory nor a name under {DATA_DIR}/. "
        f"Prepare it with `python load_fineweb.py --source ... --out {DATA_DIR / Path(data).name}`."
    )


def read_manifest(directory: Path) -> Manifest:
    """Read a manifest, or make one up from foreign files; raises UserError if neither is there."""
    path = directory / MANIFEST
    if not path.exists():
        return _foreign_manifest(directory)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw.get("format") != FORMAT:
            raise UserError(
                f"{path} has format {raw.get('format')}; this version reads format {FORMAT}."
            )
        shards = tuple(
            Shard(**{**shard, "reached": tuple(shard["reached"]) if shard["reached"] else None})
            for shard in raw.pop("shards")
        )
        return Manifest(**raw, shards=shards)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); prepare the data again into a new directory."
        ) from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace a directory's manifest atomically."""
    write_atomically(
        directory / MANIFEST, (json.dumps(dataclasses.asdict(manifest), indent=1) + "\n").encode()
    )


def manifest_digest(directory: Path) -> str | None:
    """Return the sha256 of manifest.json, or None for foreign data."""
    path = directory / MANIFEST
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _foreign_manifest(directory: Path) -> Manifest:
    """Describe `*_val_*` and `*_train_*` files (.npy, or llm.c's .bin) without a manifest."""
    named = re.compile(r"(?:^|.*_)(val|train)_.*\.(?:npy|bin)")
    matches = [(path, named.fullmatch(path.name)) for path in sorted(directory.glob("*"))]
    shards = tuple(
        Shard(path.name, match[1], read_header(path)[0])
        for path, match in matches
        if match is not None
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


def npy_header(tokens: int) -> bytes:
    """Return the header of a version 1.0 `.npy` file of uint16, the same bytes on every NumPy."""
    fields = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({tokens},), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + fields.ljust(117).encode() + b"\n"


def read_header(path: Path) -> tuple[int, int]:
    """Return the token count in a shard's header and the byte at which the tokens begin."""
    try:
        with open(path, "rb") as file:
            if path.suffix == ".bin":
                magic, version, tokens = np.frombuffer(
                    file.read(LLMC_HEADER_BYTES)[:12], dtype="<i4"
                )
                if (magic, version) != (LLMC_MAGIC, LLMC_VERSION):
                    raise ValueError("no llm.c header")
                return int(tokens), LLMC_HEADER_BYTES
            if np.lib.format.read_magic(file) != (1, 0):
                raise ValueError("a later .npy version")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if len(shape) != 1 or dtype != np.dtype("<u2"):
                raise ValueError(f"{len(shape)}-D {dtype}, not 1-D uint16")
            return shape[0], file.tell()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable token shard ({error}).") from error
