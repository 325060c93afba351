"""Token shards: the files of a data directory, what its manifest says of them, and their reading.

Shards are 1-D little-endian uint16 `.npy` files; each document is <|endoftext|> and its tokens, and
runs on over the end of a file. `manifest.json` beside them carries a digest of itself. Directories
of build-nanogpt (`*_train_*.npy`) and llm.c (`.bin`) have none and are read as they are.
"""

import dataclasses
import functools
import hashlib
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from config import UserError, decode
from corpus.tokenizer import Tokenizer, load_tokenizer
from tqdm_bars import PreparationBar
from utils import seal, unseal, write_atomically

MANIFEST = "manifest.json"
DATA_DIR = Path("data")
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
    reached: tuple[int, int] | None = None  # how far into the source: (chunk, token in it)

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

    def __post_init__(self) -> None:
        sizes, size = {"gpt2": 50257, "char": len(self.alphabet or "") + 1}, self.vocab_size
        if size != sizes.get(self.tokenizer, size) or not 1 <= size <= 65536:
            raise ValueError(f"{self.tokenizer} has no vocabulary of {size}")
        if len({shard.file for shard in self.shards}) < len(self.shards):
            raise ValueError("it names a file twice")

    def tokens(self, split: str) -> int:
        """Return the number of tokens in a split."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)


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
    shards = tuple(Shard(path.name, name[1], read_header(path)[0]) for path, name in found if name)
    if not shards:
        command = f"prepare it with `python load_fineweb.py --out {directory}`."
        raise UserError(
            f"{directory} holds no token shards (no {MANIFEST}, no *_train_*.npy); {command}"
        )
    facts = {"source": {"kind": "foreign"}, "shard_tokens": max(shard.tokens for shard in shards)}
    return Manifest(directory.name, "gpt2", None, 50257, **facts, shards=shards, complete=True)


def npy_header(count: int) -> bytes:
    """Return the 128-byte header of a `.npy` file of tokens, the same bytes on every NumPy."""
    fields = f"{{'descr': '<u2', 'fortran_order': False, 'shape': ({count},), }}"
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + fields.ljust(117).encode() + b"\n"


def read_header(path: Path) -> tuple[int, int]:
    """Return how many tokens a whole shard holds and the byte at which they begin, or UserError."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise ValueError("not a file" if path.exists() else "it is missing")
        with open(path, "rb") as file:
            tokens = (_llmc_count if path.suffix == ".bin" else _npy_count)(file)
            offset = file.tell()
        if missing := offset + 2 * tokens - path.stat().st_size:
            kind, few = ("truncated", "few") if missing > 0 else ("padded", "many")
            raise ValueError(f"{kind}: {abs(missing)} bytes too {few} for its {tokens} tokens")
        return tokens, offset
    except Exception as error:  # a flipped bit in a header makes NumPy raise almost anything
        reason = str(error).split("\n")[0].rstrip(".")
        raise UserError(f"{path} is not a readable token shard ({reason}); {AGAIN}") from error


def _npy_count(file: BinaryIO) -> int:
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not version 1.0 of .npy")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)  # nothing is unpickled
    if len(shape) != 1 or fortran_order or dtype.str != "<u2" or shape[0] < 0:
        raise ValueError(f"{len(shape)}-D {dtype.str}, not 1-D <u2 in C order")
    return shape[0]


def _llmc_count(file: BinaryIO) -> int:
    header = file.read(LLMC_HEADER_BYTES)
    if len(header) < LLMC_HEADER_BYTES:
        raise ValueError("its header is cut off")
    magic, version, tokens = np.frombuffer(header, "<i4")[:3].tolist()
    if magic == LLMC_LLAMA_MAGIC:
        raise ValueError("its tokens are Llama 3's in uint32, made with another tokenizer")
    if (magic, version) != (LLMC_MAGIC, LLMC_VERSION) or tokens < 0:
        raise ValueError("no llm.c header")
    return tokens


def check_shard(directory: Path, shard: Shard) -> int:
    """Return the byte where a shard's tokens begin; raises UserError for a wrong header or size."""
    found, offset = read_header(directory / shard.file)
    if found != shard.tokens:
        expected = f"where its manifest says {shard.tokens}; {AGAIN}"
        raise UserError(f"{directory / shard.file} holds {found} tokens {expected}")
    return offset


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
        self._offsets = [check_shard(self.directory, shard) for shard in self.shards]
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
        return load_tokenizer(self.manifest.tokenizer, self.manifest.alphabet)

    def _map(self, i: int) -> np.ndarray:
        """Return shard i as a read-only map, uint16 (tokens,)."""
        path, tokens = self.directory / self.shards[i].file, self.shards[i].tokens
        try:
            return np.asarray(np.memmap(path, "<u2", "r", self._offsets[i], (tokens,)))
        except (OSError, ValueError) as error:  # gone or cut off since it was opened
            raise UserError(f"{path} cannot be read ({error}); {AGAIN}") from error

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


class Verification:
    """Reads every byte of a data directory in a background thread: digests and token ids."""

    def __init__(self, directory: str | Path):
        """Begin; raises UserError when the manifest cannot be read."""
        self.directory, self.manifest = Path(directory), read_manifest(Path(directory))
        self._read, self._error, self._stopped = 0, None, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the UserError that has been found, if any."""
        if self._error is not None:
            raise self._error

    def wait(self, quiet: bool = True) -> str:
        """Wait for the last byte, and return what was checked in a sentence."""
        shards, total = self.manifest.shards, sum(s.tokens for s in self.manifest.shards)
        with PreparationBar("verifying", total, disable=quiet) as bar:
            while self._thread.is_alive():
                self._thread.join(0.1)
                bar.update(self._read // 2 - bar.n)
        self.check()
        known = sum(shard.sha256 is not None for shard in shards)
        found = f"{self.directory} is intact: {len(shards)} shards with {total:,} tokens, all below"
        return f"{found} {self.manifest.vocab_size:,}; the digests of {known} are right."

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for shard in self.manifest.shards:
                self._verify(shard)
        except Exception as error:  # belongs to whoever checks
            self._error = error

    def _verify(self, shard: Shard) -> None:
        path, offset = self.directory / shard.file, check_shard(self.directory, shard)
        block = np.empty(BLOCK_BYTES, np.uint8)
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read(offset))
            while not self._stopped.is_set() and (count := file.readinto(block)):
                digest.update(block[:count])
                check_ids(block[: count & ~1].view("<u2"), self.manifest.vocab_size, path)
                self._read += count
        if shard.sha256 not in (None, digest.hexdigest()) and not self._stopped.is_set():
            raise UserError(f"{path} is damaged: its sha256 is not the manifest's; {AGAIN}")
