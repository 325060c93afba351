"""Files from the web: whole, checked, and in place at once, or not at all.

    download(url, path, sha256, size) -> path

What arrives goes into a hidden file beside `path`, which takes its name only when every byte is
there and on the disk. A connection that breaks is taken up again where it broke, if the server can.
"""

import contextlib
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from config import UserError
from tqdm_bars import DownloadBar
from utils import sync_directory

# In a row, without a byte more than there was, before a download is given up.
ATTEMPTS = 4
BLOCK_BYTES = 1 << 18
# Seconds without a byte before a connection counts as broken.
TIMEOUT = 30
# Answers that another attempt may change: the server was busy, or something behind it failed.
PASSING = {408, 425, 429, 500, 502, 503, 504}


class _BrokenError(Exception):
    """The network failed, and may not the next time."""


def download(
    url: str,
    path: Path,
    sha256: str | None = None,
    size: int | None = None,
    quiet: bool = False,
    attempts: int = ATTEMPTS,
) -> Path:
    """Fetch `url` into `path`, unless something is there, and return `path`.

    With `sha256` (hexadecimal) or `size` (bytes), what comes must have it. A network that fails is
    given up at the last of so many `attempts`, counted anew whenever one brings more. Raises
    UserError, and leaves nothing at `path` or beside it, when the file cannot be fetched, stored,
    or is another.
    """
    if path.exists():
        return path
    # Another process may be fetching the same file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb+") as file, DownloadBar(path.name, size, quiet) as bar:
            _fetch(url, path, file, bar, attempts)
            _check(url, path, file, sha256, size)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        raise UserError(_sentence(url, path, f"be stored ({error.strerror})")) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def _fetch(url: str, path: Path, file: BinaryIO, bar: DownloadBar, attempts: int) -> None:
    """Fill `file` with what `url` gives, in as many attempts as bring more of it, and a few."""
    progress = _Progress()
    failures, furthest = 0, 0
    while True:
        try:
            for block in _blocks(url, progress, bar):
                file.seek(progress.done)
                file.write(block)
                progress.done += len(block)
                bar.update(len(block))
            file.truncate(progress.done)
            return
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code}, {error.reason}"
            raise UserError(_sentence(url, path, f"be fetched ({reason})")) from error
        except _BrokenError as broken:
            failures = 1 if progress.done > furthest else failures + 1
            furthest = max(furthest, progress.done)
            if failures >= attempts:
                raise UserError(_sentence(url, path, f"be fetched ({broken})")) from broken
            time.sleep(2 ** (failures - 1))


@dataclass
class _Progress:
    """How many bytes are there, of which version of the file."""

    done: int = 0
    version: str | None = None


def _blocks(url: str, progress: _Progress, bar: DownloadBar) -> Iterator[bytes]:
    """Yield the bytes from `progress.done` on; sets it to 0 when the server starts from there.

    Raises _BrokenError when another attempt may do better, and HTTPError when it will not.
    """
    headers = {"Range": f"bytes={progress.done}-"} if progress.done else {}
    if headers and progress.version:
        # Of a file that has changed meanwhile, the server is to send all.
        headers["If-Range"] = progress.version
    with _open(url, headers) as response:
        progress.done = _first_byte(response, progress.done)
        progress.version = _version(response)
        length = response.headers.get("Content-Length")
        end = progress.done + int(length) if length is not None else None
        bar.place(progress.done, end)
        while block := _read(response):
            yield block
    if end is not None and progress.done != end:
        raise _BrokenError(f"the connection ended after {progress.done:,} of {end:,} bytes")


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code in PASSING:
            raise _BrokenError(f"the server answers {error.code}, {error.reason}") from error
        raise
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(_reason(error)) from error


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(BLOCK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(_reason(error)) from error


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    return str(getattr(cause, "strerror", None) or cause or type(cause).__name__).rstrip(".")


def _first_byte(response: http.client.HTTPResponse, done: int) -> int:
    """Return where in the file an answer begins."""
    if response.status != 206:
        return 0
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if found is None or int(found[1]) != done:
        raise _BrokenError("the server sent another part of the file than it was asked for")
    return done


def _version(response: http.client.HTTPResponse) -> str | None:
    """Return what tells this version of the file from others, as If-Range accepts it."""
    tag = response.headers.get("ETag")
    if tag is not None and not tag.startswith("W/"):
        return tag
    return response.headers.get("Last-Modified")


def _check(url: str, path: Path, file: BinaryIO, sha256: str | None, size: int | None) -> None:
    """Raise UserError when the file is not the one that was meant."""
    found = file.seek(0, 2)
    if size is not None and found != size:
        reason = f"be used (it has {found:,} bytes, not {size:,})"
        raise UserError(_sentence(url, path, reason))
    file.seek(0)
    if sha256 is not None and (other := hashlib.file_digest(file, "sha256").hexdigest()) != sha256:
        raise UserError(_sentence(url, path, f"be used (its sha256 is {other}, not {sha256})"))


def _sentence(url: str, path: Path, failure: str) -> str:
    return f"{url} could not {failure}; fetch it in another way and put the file at {path}."
