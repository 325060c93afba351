"""Files that are either the old ones or the whole new ones, and records that show damage."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Replace `path` by `parts`, one after the other; a power cut leaves the old file or the new.

    Raises UserError, and leaves no temporary file, when the disk is full or not writable.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path} could not be written ({error.strerror}); what was there is unchanged. Make "
            "room, or name another place, and give the command again."
        ) from error


def sync_directory(directory: Path) -> None:
    """Make a rename inside `directory` durable, where the system can."""
    if os.name == "posix":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes that ask for the same directory out; raises UserError if one is in.

    The lock is the system's, on the directory itself: it ends with the process, however that ends,
    and leaves no file.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks, and then there is none to wait for.
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"Another process is writing to {directory}; wait for it to end, or end it."
                ) from error
        yield
    finally:
        os.close(descriptor)


def seal(record: dict[str, Any]) -> bytes:
    """Return a record as indented JSON that ends in a digest of the rest of it."""
    return (json.dumps({**record, "digest": _digest(record)}, indent=1) + "\n").encode()


def unseal(content: bytes) -> dict[str, Any]:
    """Return the record in what `seal` made; raises ValueError when any of it has changed."""
    try:
        record = json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(record, dict) or "digest" not in record:
        raise ValueError("it is not a sealed record")
    if record.pop("digest") != _digest(record):
        raise ValueError("its digest does not fit the rest of it")
    return record


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
