"""Ways to damage a file, and to put it back as it was."""

import contextlib
import random
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced(path: Path, content: bytes | None) -> Iterator[None]:
    """Put other bytes into a file, or a directory in its place for None, while the block lasts."""
    before = path.read_bytes()
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    try:
        yield
    finally:
        put(path, before)


@contextlib.contextmanager
def removed(path: Path) -> Iterator[None]:
    """Remove a file while the block lasts."""
    before = path.read_bytes()
    path.unlink()
    try:
        yield
    finally:
        put(path, before)


def put(path: Path, content: bytes) -> None:
    """Make `path` a file with that content, whatever is there now."""
    if path.is_dir():
        shutil.rmtree(path)
    path.write_bytes(content)


def flipped(content: bytes, place: int, rng: random.Random) -> bytes:
    """Return the bytes with one to eight bits of the one at `place` flipped."""
    changed = bytearray(content)
    changed[place] ^= rng.randint(1, 255)
    return bytes(changed)


def places(region: range, rng: random.Random, count: int) -> list[int]:
    """Return the first place of a region, its last, and up to `count` others."""
    return sorted({region[0], region[-1], *rng.sample(region, min(count, len(region)))})


def safetensors_places(content: bytes, rng: random.Random, count: int) -> Iterable[int]:
    """Return places in the header's length, the JSON header and the tensors of such a file."""
    begin = 8 + int.from_bytes(content[:8], "little")
    for region in (range(8), range(8, begin), range(begin, len(content))):
        yield from places(region, rng, count)


def wrecks(
    path: Path, rng: random.Random, cuts: int
) -> Iterator[contextlib.AbstractContextManager]:
    """Yield a file's other ends: cut at random lengths, longer, empty, removed, a directory."""
    content = path.read_bytes()
    for _ in range(cuts):
        yield replaced(path, content[: rng.randrange(len(content))])
    yield replaced(path, content + b"\0")
    yield replaced(path, b"")
    yield replaced(path, None)
    yield removed(path)
