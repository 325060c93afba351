"""What all scripts share: the command line, mistakes as one sentence, files that are old or new."""

import contextlib
import difflib
import errno
import hashlib
import json
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from config import Config, UserError, from_json
from tqdm_bars import DownloadBar

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

T = TypeVar("T")
DATA_DIR = Path("data")

# What the surroundings of a program can do to it anywhere: full or read-only disks, missing rights.
SURROUNDINGS = {"ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE", "ENAMETOOLONG"}


def parse(cls: type[T], args: Sequence[str] | None = None, default: T | None = None) -> T:
    """Return `cls`, a dataclass, filled from the command line over `default`; tyro's mistakes."""
    args = sys.argv[1:] if args is None else args
    if any("\ud800" <= character <= "\udfff" for character in "".join(args)):
        raise UserError("The command line holds text that is not UTF-8; rename or convert it.")
    options = {} if default is None else {"default": default}
    # All ranks of torchrun read the same command line; the first of a node says what is wrong.
    return tyro.cli(cls, args=args, console_outputs=_is_first(), **options)


def run_script(main: Callable[[], None]) -> None:
    """Call a script's main; a UserError becomes one sentence on stderr and exit status 1."""
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        main()
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if errno.errorcode.get(error.errno) not in SURROUNDINGS:
            raise
        _fail(f"{error.filename or 'A file'} cannot be used ({error.strerror}).")
    except KeyboardInterrupt:
        print("\ninterrupted.", file=sys.stderr)
        raise SystemExit(130) from None


def _fail(sentence: str) -> None:
    time.sleep(0 if _is_first() else 3)  # the first of a node says it, torchrun ends the others
    print(f"error: {printable(sentence)}", file=sys.stderr, flush=True)
    raise SystemExit(1) from None


def _is_first() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


class Output:
    """A text stream whose loss never ends the program: what cannot be written is dropped."""

    def __init__(self, stream: Any):
        self._stream = open(os.devnull, "w") if stream is None else stream  # noqa: SIM115
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write as the stream does."""
        with self._surviving():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush as the stream does."""
        with self._surviving():
            self._stream.flush()

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # EPIPE, EIO, ENOSPC, closed: from here on to the null device
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as null:
                os.dup2(null.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def printable(text: str) -> str:
    """Return text that others named with its control characters escaped, on one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_name(name: str, known: Iterable[str], kind: str) -> None:
    """Raise UserError unless `name` is among `known`; the sentence suggests the nearest."""
    if name not in (known := list(known)):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}."
        raise UserError(f"There is no {kind} '{name}'; {hint}")


def find_run(run: str | Path, runs_dir: str | Path = "runs") -> Path:
    """Return the directory of a run given by path or by name; raises UserError if there is none."""
    for path in (Path(run), Path(runs_dir) / run):
        if os.path.isfile(path / "config.json"):  # False for a name that is too long, too
            return path
    raise UserError(f"There is no run '{run}': neither a directory nor a name in {runs_dir}/.")


def load_config(run: Path) -> Config:
    """Return a run's config.json; raises UserError when it is missing or does not fit."""
    path = run / "config.json"
    try:
        return from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error


def write_atomically(path: Path, *parts: bytes | memoryview) -> None:
    """Replace `path` by `parts`; a power cut or a full disk (UserError) leaves the old file."""
    # Created under a name nobody can guess (no planted link is followed), with the umask's mode.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        reason = f"{path} could not be written ({error.strerror}); what was there is unchanged."
        raise UserError(f"{reason} Make room, or name another place, and try again.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_directory(directory: Path) -> None:
    """Make a rename inside `directory` durable, where the system can."""
    if os.name == "posix":
        os.fsync(descriptor := os.open(directory, os.O_RDONLY))
        os.close(descriptor)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; raises UserError, naming host and process, if another does."""
    # The lock is the system's: it ends with the process, however that ends. The file stays.
    with open(path, "a+", encoding="utf-8") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # Some network file systems have no locks, and then there is none to wait for.
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                file.seek(0)
                holder = file.read(200).strip() or "it does not say which"
                where = f"Another process ({holder}) is writing to {path.parent}"
                raise UserError(f"{where}; wait for it to end, or end it.") from None
        holder = f"process {os.getpid()} on {socket.gethostname()}, {time.ctime()}\n"
        with contextlib.suppress(OSError):  # a full disk is told by what needs the room
            file.truncate(0)
            os.write(file.fileno(), holder.encode())
        try:
            yield
        finally:
            os.ftruncate(file.fileno(), 0)


def seal(record: dict[str, Any]) -> bytes:
    """Return a record as indented JSON that ends in a digest of the rest of it."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**record, "digest": digest}, indent=1) + "\n").encode()


def unseal(content: bytes) -> dict[str, Any]:
    """Return the record in what `seal` made; raises ValueError when any of it has changed."""
    try:
        digest = (record := json.loads(content)).pop("digest")
    except (RecursionError, AttributeError, TypeError, KeyError) as error:
        raise ValueError("it is not a sealed record") from error
    if json.loads(seal(record))["digest"] != digest:
        raise ValueError("its digest does not fit the rest of it")
    return record


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(place: str, url: str, size=None, sha256=None, attempts: int = 4) -> Path:
    """Return data/`place`, or that of $GPT2_DATA, or fetch it from `url`; raises UserError.

    What comes has the `size` in bytes and the sha256 that are given, and is there whole or not.
    """
    for root in (DATA_DIR, *filter(None, [os.environ.get("GPT2_DATA")])):
        if os.path.isfile(Path(root, place)):  # False in a directory one may not enter
            return Path(root, place)
    import pooch
    import requests

    def download(address: str, target: str, _: Any) -> None:
        answer = requests.get(address, stream=True, timeout=30)
        with answer, open(target, "wb") as file, DownloadBar(path.name, size) as bar:
            answer.raise_for_status()
            for chunk in answer.iter_content(2**18):
                bar.update(file.write(chunk))
                if size is not None and file.tell() > size:  # a server may never stop
                    raise ValueError(f"it has more than {size:,} bytes")
            if size not in (None, file.tell()):
                raise ValueError(f"it has {file.tell():,} bytes, not {size:,}")

    path, known = DATA_DIR / place, sha256 and f"sha256:{sha256}"
    pooch.get_logger().setLevel("WARNING")
    for attempt in range(1, attempts + 1):
        try:
            pooch.retrieve(url, known, path.name, path.parent, downloader=download)
            break
        except Exception as error:  # of the network's library, which has many
            if attempt == attempts:
                advice = f"fetch it in another way and put the file at {path}"
                raise UserError(f"{url} could not be fetched ({error}); {advice}.") from error
            time.sleep(2**attempt / 2)
    return path
