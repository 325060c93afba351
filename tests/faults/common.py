"""What all parts share: trials, processes that are killed, files and runs compared."""

import contextlib
import os
import random
import re
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from config import UserError
from corpus.tokenizer import CharTokenizer
from recipes import PROMPTS
from tests import tiny
from tests.runs import TIMES, assert_same_end, steps
from tests.tiny import script, wait_for
from training import checkpoint
from utils import unseal

# Some letters take two or three bytes, so that a text can be torn within one.
TEXT = "the cat sät on ä mat añd rän höme again über 猫 眠る 日本 €"
ALPHABET = "".join(sorted(set("\n .").union(TEXT, *PROMPTS)))
# From the folder of a trial, which is where its processes live.
DATA, RUN = Path("data"), Path("runs", "faults")
RESUME = ("main.py", "--resume", RUN.name)


@dataclass
class Outcome:
    """What came of a part: how often it saw what, and a sentence for each trial that failed."""

    seen: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


# It is given its random numbers, its folder and a counter of what it sees.
Trial = Callable[[random.Random, Path, Counter[str]], None]


def attempt(outcome: Outcome, seed: int, directory: Path, name: str, trial: Trial) -> None:
    """Make a trial in a folder of its own, and count and say what came of it.

    What it raises, mostly an AssertionError, is a failure: the folder stays to be looked at.
    """
    folder, seen, failed = directory / name, Counter(), ""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        trial(random.Random(f"{seed} {directory.name} {name}"), folder, seen)
    except Exception as error:
        (folder / "traceback.txt").write_text(traceback.format_exc())
        failed = f"{folder}, --seed {seed}: {type(error).__name__}: {error}"
        outcome.failures.append(failed)
    finally:
        kill_all(folder)
    if not failed:
        shutil.rmtree(folder)
    outcome.seen += seen
    print(f"  {directory.name}, {name}: {failed or dict(seen)}", flush=True)


def each(seed: int, directory: Path, trials: dict[str, Trial]) -> Outcome:
    """Make every trial once."""
    outcome = Outcome()
    for name, trial in trials.items():
        attempt(outcome, seed, directory, name.replace(" ", "_"), trial)
    return outcome


def repeat(seed: int, kills: int, directory: Path, trial: Trial) -> Outcome:
    """Repeat a trial until it saw so many kills, or failed more often than one need see."""
    outcome, number = Outcome(), 0
    while outcome.seen["kills"] < kills and len(outcome.failures) < 3:
        attempt(outcome, seed, directory, f"trial_{number:03d}", trial)
        number += 1
    return outcome


def succeed(folder: Path, *args: object, processes: int = 1) -> str:
    """Run a script to its end, which must be a good one; returns all that it said."""
    result = script(*args, cwd=folder, processes=processes)
    good = result.returncode == 0 and "Traceback" not in result.stderr
    assert good, f"{args[0]} ended with status {result.returncode}: {result.stderr[-800:]}"
    return result.stdout + result.stderr


def check_refused(folder: Path, *args: object, naming: str) -> None:
    """Run a script that must end with one sentence, naming `naming`, and change no file."""
    before = contents(folder / "runs")
    result = script(*args, cwd=folder)
    check_sentence(result.returncode, result.stderr, naming)
    check_same_files(contents(folder / "runs"), before)


def check_sentence(status: int, errors: str, naming: str) -> None:
    """Fail unless a script ended with one sentence that names what is wrong, and status 1."""
    sentences, tail = re.findall(r"(?m)^error: (.*)$", errors), errors[-800:]
    assert status == 1, f"status {status} instead of 1: {tail}"
    one = "Traceback" not in errors and len(sentences) == 1
    assert one and errors.rstrip().endswith(sentences[0].rstrip()), f"not one sentence: {tail}"
    assert naming in sentences[0], f"'{naming}' is not named: {sentences[0]}"


def refusal(call: Callable[[], object]) -> str:
    """Return the sentence with which `call` is refused, or "" when it is not."""
    try:
        call()
    except UserError as error:
        assert "\n" not in str(error), f"not one sentence: {error}"
        return str(error)
    return ""


def processes_in(folder: Path) -> list[int]:
    """Return the ids of the processes that live in `folder`, as workers and ranks do."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended just now, a zombie, or somebody else's
            if (directory / "cwd").readlink() == folder.resolve():
                found.append(int(directory.name))
    return found


def kill_all(folder: Path) -> None:
    """End every process that lives in `folder`, and wait until none does."""
    for pid in processes_in(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not processes_in(folder))


def kill_at_random(process, rng, seconds, is_writing=None, number=signal.SIGKILL) -> bool:
    """End a process that takes about `seconds` at a random moment; False if it was done before.

    With `is_writing`, in the first milliseconds in which that holds after the random moment.
    """
    deadline = time.monotonic() + rng.uniform(0, seconds)
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    if is_writing is not None:
        while process.poll() is None and not is_writing():
            time.sleep(0.0002)
        time.sleep(rng.uniform(0, 0.003))
    process.send_signal(number)
    process.communicate(timeout=60)
    # A script that gives way to a signal in good order says so as shells do.
    status = process.returncode
    assert status in (0, -number, 128 + number), f"it failed, with status {status}"
    return status != 0


def contents(directory: Path) -> dict[str, bytes]:
    """Return every file under a directory, but lock files, by its path from there."""
    files = [path for path in directory.rglob("*") if path.is_file() and "lock" not in path.name]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def check_nothing_left(directory: Path) -> None:
    """Fail when there are temporary files or folders."""
    found = [path for path in directory.rglob(".*") if "lock" not in path.name]
    assert not found, f"left behind: {', '.join(map(str, found))}"


def check_same_files(found: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    """Fail unless both hold the same files, byte for byte."""
    assert found.keys() == wanted.keys(), f"on one side: {sorted(found.keys() ^ wanted.keys())}"
    assert not (names := [n for n in wanted if found[n] != wanted[n]]), f"other bytes: {names}"


def make_data(folder: Path) -> None:
    """Write the shards of a trial."""
    tiny.make_data(folder / DATA, 60, 3000, CharTokenizer(ALPHABET), TEXT.split())


def command(**changes: object) -> list[str]:
    """Return the command that starts a tiny run, from the folder of its trial."""
    changes = {"steps": 60, "checkpoint_interval": 2, "keep_checkpoints": 2} | changes
    config = tiny.tiny_config(DATA, RUN.parent, vocab_size=len(ALPHABET) + 1, **changes)
    return tiny.command(config, RUN.name)


def straight(folder: Path, processes: int = 1, **changes: object) -> tuple[Path, float]:
    """Make, anew, a run that nothing disturbs; returns its folder and how long it took."""
    shutil.rmtree(folder, ignore_errors=True)
    make_data(folder)
    begun = time.monotonic()
    succeed(folder, *command(**changes), processes=processes)
    return folder, time.monotonic() - begun


def check_same_run(folder: Path, wanted: Path) -> None:
    """Fail unless the run in a trial's folder ended like that in another's, but for times."""
    ours, theirs = folder / RUN, wanted / RUN
    check_nothing_left(folder / "runs")
    assert contents(ours).keys() == contents(theirs).keys()
    for step in steps(theirs):
        assert_same_end(ours, theirs, step)
        a, b = (
            unseal((checkpoint.checkpoint_path(run, step) / "state.json").read_bytes())
            for run in (ours, theirs)
        )
        assert a | dict.fromkeys(TIMES) == b | dict.fromkeys(TIMES)
    for name in ("samples.md", "config.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), f"{name} differs"
