"""The directory that data is prepared into: whose it is, what it has, and one writer at a time."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from config import UserError
from corpus.shards import MANIFEST, Manifest, read_manifest, write_manifest
from sources import TEXT_FILES
from utils import locked

NPY_HEADER_BYTES = 128
# What a kill in the middle of a write leaves behind. Other programs' temporary files may lie here
# too, so the names are exact.
RANDOM = 16 * "[0-9a-f]"
TEMPORARIES = (
    f".{MANIFEST}.{RANDOM}.tmp",
    *(f".*_{split}_??????.npy.{RANDOM}.tmp" for split in ("val", "train")),
)
LOCK = ".lock"


def read_previous(out: Path) -> Manifest | None:
    """Return an earlier preparation's manifest; raises UserError when `out` holds other things."""
    try:
        if (out / MANIFEST).exists():
            return read_manifest(out)
        if out.exists() and not out.is_dir():
            raise UserError(f"{out} is a file; --out names a directory.")
        names = [path.name for path in out.glob("*")]
    except OSError as error:
        raise UserError(f"{out} cannot be read ({error.strerror}).") from error
    # The texts that sources are made from may lie where their shards go.
    others = [name for name in names if not name.startswith(".") and name not in TEXT_FILES]
    if others:
        raise UserError(
            f"{out} holds other files ({min(others)}) and no {MANIFEST}; name an empty --out."
        )
    return None


def agreed(out: Path, wanted: Manifest) -> Manifest:
    """Return the manifest to go on from: that in `out` if there is one, else `wanted`.

    Raises UserError when `out` holds anything but the preparation `wanted`, or lost part of it.
    """
    found = read_previous(out)
    if found is None:
        return wanted
    _check_same(out, found, wanted)
    _check_files(out, found)
    if found.complete:
        remove_temporaries(out)
    return found


@contextlib.contextmanager
def claimed(out: Path, wanted: Manifest) -> Iterator[Manifest]:
    """Keep other processes out of `out` and yield the manifest to go on from, which is in it now.

    However the block ends, no temporary file is left; and nothing at all, if nothing was prepared.
    Raises UserError like `agreed`, when `out` cannot be written, and when a process is in it.
    """
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = contextlib.ExitStack()
        lock.enter_context(locked(out / LOCK))
        lock.callback(_leave_no_lock, out, new)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}).") from error
    with lock:
        # Another process may have been here since this one looked.
        manifest = agreed(out, wanted)
        try:
            if not manifest.complete:
                remove_temporaries(out)
                write_manifest(out, manifest)
            yield manifest
        finally:
            remove_temporaries(out)
            _leave_no_manifest(out)


def remove_temporaries(out: Path) -> None:
    """Remove what interrupted writes left in a directory, as far as it can be written."""
    for pattern in TEMPORARIES:
        for path in out.glob(pattern):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _leave_no_manifest(out: Path) -> None:
    """Remove a manifest without shards, so that a mistake or another source can follow at once."""
    with contextlib.suppress(OSError, UserError):
        # A shard may be there before the manifest names it.
        if not any(out.glob("*.npy")) and not read_manifest(out).shards:
            (out / MANIFEST).unlink()


def _leave_no_lock(out: Path, new: bool) -> None:
    with contextlib.suppress(OSError):
        (out / LOCK).unlink()
        if new:
            out.rmdir()


def _check_same(out: Path, found: Manifest, wanted: Manifest) -> None:
    """Raise UserError naming what differs between what `out` holds and what is asked for."""
    old, new = (
        {
            "tokenizer": manifest.tokenizer,
            "--shard-tokens": manifest.shard_tokens,
            "--val-tokens": manifest.val_tokens,
            "--min-document-tokens": manifest.min_document_tokens,
            "--max-document-tokens": manifest.max_document_tokens,
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


def check_disk(out: Path, tokens: int) -> None:
    """Raise UserError when the disk has no room for so many tokens more."""
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if 2 * tokens > free:
        raise UserError(
            f"{out} needs about {size(2 * tokens)} more, and its disk has {size(free)} free; "
            "make room, choose another --out, or prepare less with --max-tokens."
        )


def token_count(manifest: Manifest) -> int:
    """Return the number of tokens in all shards."""
    return sum(shard.tokens for shard in manifest.shards)


def totals(manifest: Manifest) -> str:
    """Return the tokens and files of a directory in words."""
    train, val, files = manifest.tokens("train"), manifest.tokens("val"), len(manifest.shards)
    disk = size(2 * (train + val))
    return f"{train:,} training and {val:,} validation tokens in {files} shards, {disk}"


def size(count: int) -> str:
    """Return a number of bytes in MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
