"""What all parts share: processes that are started and killed, files compared, trials counted."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from config import UserError

ROOT = Path(__file__).parent.parent.parent
# Nothing here takes a tenth of this; what does is stuck.
PATIENCE = 240


class Difference(Exception):  # noqa: N818 - a finding, not an error of the program
    """Something that is not as it should be; the sentence says what."""


@dataclass
class Outcome:
    """What came of a part: how often it saw what, and a sentence for each trial that failed."""

    seen: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


Trial = Callable[[random.Random, Path, Counter[str]], None]
# Trials run two at a time, and their lines should not.
_speaking = threading.Lock()


def attempt(outcome: Outcome, seed: int, directory: Path, number: int, name: str, trial: Trial):
    """Make a trial in a folder of its own, and count and say what came of it.

    `trial` is given its random numbers, its folder and a counter of what it sees, and raises
    Difference. The folder goes when all was well, and stays for a person to look at when not.
    """
    part, folder = directory.name, directory / f"trial_{number:03d}"
    seen: Counter[str] = Counter()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    failed = ""
    try:
        trial(random.Random(f"{seed} {part} {number}"), folder, seen)
    except Exception as error:
        (folder / "traceback.txt").write_text(traceback.format_exc())
        # Of what is not a Difference the kind is worth knowing: a bug, here or in the project.
        kind = "" if isinstance(error, Difference) else f"{type(error).__name__}: "
        failed = f"{part}, trial {number} ({name}; --seed {seed}; {folder}): {kind}{error}"
    finally:
        kill_all(folder)
    if not failed:
        shutil.rmtree(folder)
    with _speaking:
        outcome.seen += seen
        outcome.failures += [failed] if failed else []
        print(
            f"  {part} {number}: {name}; {failed or listed(seen) or 'as it should be'}", flush=True
        )


def listed(seen: Counter[str]) -> str:
    """Return what was seen how often, in words."""
    return ", ".join(f"{count} {what}" for what, count in seen.items())


def require(condition: bool, sentence: str) -> None:
    """Raise Difference unless the condition holds."""
    if not condition:
        raise Difference(sentence)


# --- Processes ---


def start(folder: Path, *args: object, processes: int = 1) -> subprocess.Popen:
    """Start a script of the project in `folder`, where output.txt and errors.txt hold its words."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / str(args[0])), *map(str, args[1:])]
    with open(folder / "output.txt", "wb") as output, open(folder / "errors.txt", "wb") as errors:
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )


def finish(process: subprocess.Popen, folder: Path) -> subprocess.CompletedProcess:
    """Wait for the end of a process of `start`, and return it with its words."""
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        kill_all(folder)
        raise Difference(f"a process did not end within {PATIENCE} s") from None
    output, errors = ((folder / f"{name}.txt").read_text() for name in ("output", "errors"))
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def succeed(folder: Path, *args: object, processes: int = 1) -> str:
    """Run a script to its end, which must be a good one; returns what it wrote to stderr."""
    result = finish(start(folder, *args, processes=processes), folder)
    good = result.returncode == 0 and "Traceback" not in result.stderr
    require(good, f"{args[0]} ended with status {result.returncode}: {result.stderr[-800:]}")
    return result.stderr


def refused(folder: Path, *args: object, naming: str) -> None:
    """Run a script that must end with one sentence, in which `naming` occurs, and status 1."""
    check_refusal(finish(start(folder, *args), folder), naming)


def check_refusal(result: subprocess.CompletedProcess, naming: str) -> None:
    """Raise Difference unless a script ended with one sentence naming what is wrong, status 1."""
    sentences = re.findall(r"(?m)^error: (.*)$", result.stderr)
    end = result.stderr[-800:]
    require(result.returncode == 1, f"status {result.returncode} instead of 1: {end}")
    require("Traceback" not in result.stderr, f"a traceback: {end}")
    require(len(sentences) == 1, f"{len(sentences)} sentences instead of one: {end}")
    require(result.stderr.rstrip().endswith(sentences[0].rstrip()), f"not one sentence: {end}")
    require(naming in sentences[0], f"'{naming}' is not named: {sentences[0]}")


def refusal(call: Callable[[], object]) -> str | None:
    """Return the sentence with which `call` is refused, or None when it is not.

    Any error but a UserError is a bug, and passes through.
    """
    try:
        call()
    except UserError as error:
        require("\n" not in str(error), f"not one sentence: {error}")
        return str(error)
    return None


def processes_in(folder: Path) -> list[Path]:
    """Return /proc's directory of each process that lives in `folder`, as workers and ranks do."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if (directory / "cwd").readlink() == folder.resolve():
                found.append(directory)
        except OSError:
            # It ended just now, or is a zombie, which lives nowhere, or is somebody else's.
            continue
    return found


def kill_all(folder: Path) -> None:
    """End every process that lives in `folder`, and wait until none does."""
    for directory in processes_in(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(directory.name), signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while processes_in(folder) and time.monotonic() < deadline:
        time.sleep(0.002)


def wait_for(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Wait until `condition()` holds; raises Difference when it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        require(time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.002)


def kill_at_random(
    process: subprocess.Popen,
    rng: random.Random,
    seconds: float,
    writing: Callable[[], bool] | None = None,
    number: signal.Signals = signal.SIGKILL,
) -> bool:
    """End a process that takes about `seconds` by a signal; returns False if it was done before.

    The moment is uniform over that time, or the first few milliseconds in which `writing` holds,
    after a random time.
    """
    deadline = time.monotonic() + rng.uniform(0, seconds)
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    while writing is not None and process.poll() is None and not writing():
        time.sleep(0.0002)
    if writing is not None:
        time.sleep(rng.uniform(0, 0.003))
    process.send_signal(number)
    try:
        status = process.wait(PATIENCE / 4)
    except subprocess.TimeoutExpired:
        raise Difference(f"{number.name} did not end it") from None
    # A script that gives way to a signal in good order says so as shells do.
    require(status in (0, -number, 128 + number), f"it failed, with status {status}")
    return status != 0


# --- Files ---


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file under a directory, hidden ones too, by its path from there."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def check_nothing_hidden(directory: Path) -> None:
    """Raise Difference when there are hidden or temporary files or folders."""
    found = [p for p in directory.rglob("*") if p.name.startswith(".") or p.name.endswith(".tmp")]
    require(not found, f"left behind: {', '.join(map(str, found))}")


def check_same_files(found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    """Raise Difference unless both hold the same files, byte for byte."""
    names = sorted(found.keys() ^ wanted.keys())
    require(not names, f"on one side only: {', '.join(names)}")
    names = [name for name in wanted if found[name] != wanted[name]]
    require(not names, f"other bytes: {', '.join(names)}")
