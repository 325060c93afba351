"""Token shards: the files of a data directory, what its manifest says of them, and their reading.

Shards are 1-D little-endian uint16 `.npy` files; each document is <|endoftext|> and its tokens, and
runs on over the end of a file. `manifest.json` beside them carries a digest of itself. Directories
of build-nanogpt (`*_train_*.npy`) and llm.c (`.bin`) have none and are read as they are.
"""

import dataclasses
import functools
import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from config import UserError, decode
from corpus.tokenizer import Tokenizer, read_tokenizer
from utils import DATA_DIR, seal, unseal, write_atomically

MANIFEST = "manifest.json"
# llm.c's .bin files begin with 256 int32: magic number, version, token count, zeros.
LLMC_MAGIC, LLMC_LLAMA_MAGIC, LLMC_VERSION, LLMC_HEADER_BYTES = 20240520, 20240801, 1, 1024
OPEN_SHARDS = 128  # a map keeps its file open, and some systems allow a few hundred
BLOCK_BYTES = 1 << 22  # hashed, or searched for documents, at once
AGAIN = "restore it or prepare the data again."  # ends the sentences below


@dataclass(frozen=True)
class Shard:
    """One file of tokens; `bytes` of text, `sha256` and `reached` are unknown for foreign files."""

    file: str
    split: Literal["train", "val"]
    tokens: int
    bytes: int | None = None
    sha256: str | None = None
    reached: tuple[int, int, int] | None = None  # how far: (file, document, token in it)

    def __post_init__(self) -> None:
        # A name, not a path: what is read or written lies in the directory.
        if not re.fullmatch(r"[^/\\:\0]+", self.file) or self.file in (".", ".."):
            raise ValueError(f"{self.file!r} is not the name of a file")
        if self.tokens < 0:
            raise ValueError(f"{self.file} cannot hold {self.tokens} tokens")


@dataclass(frozen=True)
class Manifest:
    """What a data directory holds; `source` says where it came from, in the preparer's words."""

    name: str
    tokenizer: str
    vocab_size: int
    eot: int  # the id of <|endoftext|>
    source: dict[str, Any]
    tokenizer_sha256: str | None = None  # of tokenizer.json; GPT-2 has none
    skipped: dict[str, int] = field(default_factory=dict)  # documents, by reason
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.eot < self.vocab_size <= 65536:
            raise ValueError(f"{self.tokenizer} has no vocabulary of {self.vocab_size}")
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("it names a file twice")

    def tokens(self, *splits: str) -> int:
        """Return the number of tokens in the splits, by default in both."""
        return sum(s.tokens for s in self.shards if s.split in (splits or ("train", "val")))


def find_data(data: str) -> Path:
    """Return the directory of a data set given by path or by its name under data/."""
    for path in (Path(data), DATA_DIR / data):
        if path.is_dir():
            return path
    command = f"load_fineweb.py --source ... --out {DATA_DIR / Path(data).name}"
    command = "shakespeare/shakespeare.py" if data.startswith("shakespeare-") else command
    nowhere = f"There is no data '{data}': neither a directory nor a name under {DATA_DIR}/"
    raise UserError(f"{nowhere}. Prepare it with `python {command}`.")


def read_manifest(directory: Path) -> Manifest:
    """Return a directory's manifest, or one made up from foreign files; raises UserError."""
    path = directory / MANIFEST
    try:
        content = path.read_bytes()
        unseal(content)
        return decode(content, Manifest, MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return _foreign_manifest(directory)
    except (OSError, ValueError, RecursionError, UserError) as error:
        reason = f"{path} is damaged ({str(error).rstrip('.')})"
        raise UserError(f"{reason}; prepare the data again into a new directory.") from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Replace a directory's manifest atomically."""
    write_atomically(directory / MANIFEST, seal(dataclasses.asdict(manifest)))


def manifest_sha256(directory: Path) -> str:
    """Return the sha256 of manifest.json; of a foreign directory, that of its names and sizes."""
    path = directory / MANIFEST
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    files = str([(shard.file, shard.tokens) for shard in read_manifest(directory).shards])
    return hashlib.sha256(files.encode()).hexdigest()


def _foreign_manifest(directory: Path) -> Manifest:
    """Describe `*_val_*` and `*_train_*` files (.npy, or llm.c's .bin), in the order of names."""
    named = re.compile(r"(?!documents_\w+_[0-9a-f]{12}\.npy)(?:.*_)?(val|train)_.*\.(?:npy|bin)")
    found = [(path, named.fullmatch(path.name)) for path in sorted(directory.glob("*"))]
    shards = tuple(Shard(path.name, name[1], len(open_shard(path))) for path, name in found if name)
    if not shards:
        command = f"prepare it with `python load_fineweb.py --out {directory}`."
        raise UserError(
            f"{directory} holds no token shards (no {MANIFEST}, no *_train_*.npy); {command}"
        )
    source = {"kind": "foreign"}
    return Manifest(directory.name, "gpt2", 50257, 50256, source, shards=shards, complete=True)


class ShardWriter:
    """Fills one shard at a time, and records each whole one in the manifest."""

    def __init__(self, directory: Path, manifest: Manifest, tokenizer: Tokenizer, size: int):
        """Go on after a manifest's last shard; raises UserError where memory has no room."""
        self.directory, self.manifest, self._filled = directory, manifest, 0
        self._token_bytes, self.skipped = tokenizer.token_bytes(), Counter(manifest.skipped)
        try:
            self._buffer = np.empty(size, "<u2")  # takes up memory as it fills
        except (MemoryError, ValueError) as error:
            raise UserError("Memory has no room for a shard; lower --shard-tokens.") from error

    def add(self, tokens: np.ndarray, start: int, split: str | None, place: Any) -> None:
        """Append a document's tokens, uint16, from `start` on; its place is (file, row)."""
        while start < len(tokens):
            room = self._buffer[self._filled :][: len(tokens) - start]
            room[:] = tokens[start : start + len(room)]
            start, self._filled = start + len(room), self._filled + len(room)
            if self._filled == len(self._buffer):
                self.flush(split, (*place, start))

    def flush(self, split: str | None, reached: tuple[int, int, int]) -> None:
        """Write what there is as a shard; with no split, the first one validates."""
        if not self._filled:
            return
        tokens, shards = self._buffer[: self._filled], self.manifest.shards
        split = split or ("train" if shards else "val")
        file = f"{self.manifest.name}_{split}_{len(shards):06d}.npy"
        header, blocks = npy_header(len(tokens)), range(0, len(tokens), BLOCK_BYTES)
        write_atomically(self.directory / file, header, tokens.data)
        size = sum(int(self._token_bytes[tokens[i : i + BLOCK_BYTES]].sum()) for i in blocks)
        (digest := hashlib.sha256(header)).update(tokens.data)
        shard = Shard(file, split, len(tokens), size, digest.hexdigest(), reached)
        self.manifest = dataclasses.replace(self.manifest, shards=(*shards, shard))
        self._filled = 0
        self.record()

    def record(self, complete: bool = False) -> Manifest:
        """Write the manifest and return it."""
        facts = {"skipped": dict(sorted(self.skipped.items())), "complete": complete}
        self.manifest = dataclasses.replace(self.manifest, **facts)
        write_manifest(self.directory, self.manifest)
        return self.manifest


def npy_header(count: int) -> bytes:
    """Return the 128-byte header of a `.npy` file of tokens, the same bytes on every NumPy."""
    fields = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({count},), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + fields.ljust(117).encode() + b"\n"


def open_shard(path: Path, tokens: int | None = None) -> np.memmap:
    """Return a whole shard as a read-only map, uint16; UserError where it has not `tokens`."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise ValueError("not a file" if path.exists() else "it is missing")
        if path.suffix == ".bin":
            shard = np.memmap(path, "<u2", "r", LLMC_HEADER_BYTES, (_llmc_count(path),))
        else:
            shard = np.load(path, mmap_mode="r", allow_pickle=False)
        if shard.ndim != 1 or shard.dtype.str != "<u2":
            raise ValueError(f"{shard.ndim}-D {shard.dtype.str}, not 1-D <u2")
        if extra := path.stat().st_size - shard.offset - shard.nbytes:
            raise ValueError(f"padded: {extra} bytes too many for its {len(shard)} tokens")
    except Exception as error:  # a flipped bit in a header makes NumPy raise almost anything
        reason = str(error).split("\n")[0].rstrip(".")
        raise UserError(f"{path} is not a readable token shard ({reason}); {AGAIN}") from error
    if tokens not in (None, len(shard)):
        expected = f"where its manifest says {tokens}; {AGAIN}"
        raise UserError(f"{path} holds {len(shard)} tokens {expected}")
    return shard


def _llmc_count(path: Path) -> int:
    with path.open("rb") as file:
        header = file.read(LLMC_HEADER_BYTES)
    if len(header) < LLMC_HEADER_BYTES:
        raise ValueError("its header is cut off")
    magic, version, tokens = np.frombuffer(header, "<i4")[:3].tolist()
    if magic == LLMC_LLAMA_MAGIC:
        raise ValueError("its tokens are Llama 3's in uint32, made with another tokenizer")
    if (magic, version) != (LLMC_MAGIC, LLMC_VERSION) or tokens < 0:
        raise ValueError("no llm.c header")
    return tokens


class TokenShards:
    """The tokens of one split, read through memory maps; threads and forks may share it."""

    def __init__(self, directory: str | Path, split: str):
        """Open a split and check its headers and sizes; raises UserError."""
        self.directory, self.split = Path(directory), split
        self.manifest = read_manifest(self.directory)
        self.vocab_size = self.manifest.vocab_size
        self.shards = [shard for shard in self.manifest.shards if shard.split == split]
        prepare = "`python load_fineweb.py`"
        if not self.manifest.complete:
            raise UserError(f"{directory} is not finished; run its {prepare} command again.")
        if not self.shards:
            raise UserError(f"{directory} holds no {split} shards; prepare it with {prepare}.")
        for shard in self.shards:
            open_shard(self.directory / shard.file, shard.tokens)
        # int64: tokens before each shard, and at last of all
        self.bounds = np.cumsum([0, *(shard.tokens for shard in self.shards)])
        self.shard = functools.lru_cache(OPEN_SHARDS)(self._map)

    def __reduce__(self):
        return TokenShards, (self.directory, self.split)  # another process opens the files itself

    def __len__(self) -> int:
        return int(self.bounds[-1])

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer whose ids these are."""
        manifest = self.manifest
        return read_tokenizer(manifest.tokenizer, self.directory, manifest.tokenizer_sha256)

    def _map(self, i: int) -> np.ndarray:
        """Return shard i as a read-only map, uint16 (tokens,)."""
        return np.asarray(open_shard(self.directory / self.shards[i].file, self.shards[i].tokens))

    def read(self, starts: np.ndarray, count: int) -> np.ndarray:
        """Return `count` tokens from each start on, uint16 (len(starts), count)."""
        starts = np.asarray(starts, dtype=np.int64)
        if count < 0 or ((starts < 0) | (starts + count > len(self))).any():
            raise IndexError(f"{count} tokens from {starts.tolist()} on, of {len(self)}")
        tokens, bounds = np.empty((len(starts), count), np.uint16), self.bounds.tolist()
        first = np.searchsorted(self.bounds, starts, side="right") - 1
        for row, start, i in zip(tokens, starts.tolist(), first.tolist(), strict=True):
            done = 0
            while done < count:  # a row may run on into further shards
                begin = start + done - bounds[i]
                part = self.shard(i)[begin : begin + count - done]
                row[done : done + len(part)] = part
                done, i = done + len(part), i + 1
        return check_ids(tokens, self.vocab_size, self.directory)


def check_ids(tokens: np.ndarray, vocab_size: int, place: Path) -> np.ndarray:
    """Return the tokens; raises UserError naming `place` when one is past the vocabulary."""
    if (largest := int(tokens.max(initial=0))) >= vocab_size:
        past = f"{place} holds token {largest}, past its vocabulary of {vocab_size}"
        raise UserError(f"{past}; {AGAIN}")
    return tokens
