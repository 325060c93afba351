"""Whether this project's runs survive what machines do to them.

    python -m tests.torture [--seed 0] [--kills 30] [--parts training damage] [--directory DIR]

    training      runs killed at random moments and resumed, against undisturbed ones
    preparation   load_fineweb.py killed at random moments and repeated
    worlds        runs that go on with another number of processes
    restarts      processes killed under torchrun --max-restarts, on one node and on two
    damage        checkpoints, records and shards with flipped bytes, torn, exchanged, planted
    disk          disks that fill up: during checkpoints, metrics, shards, downloads

A failed trial says what differs and leaves its folder; the exit status is 1 then. It needs Linux,
whose /proc tells which processes are left.
"""

import importlib
import shutil
import tempfile
import time
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from command_line import parse, run_script
from tests.torture.common import Difference, Outcome

Part = Literal["training", "preparation", "worlds", "restarts", "damage", "disk"]


@dataclass(frozen=True)
class Options:
    """Kill, damage and fill up; compare with what nothing disturbed."""

    seed: int = 0
    """Draws the moments and the places; the moments also depend on the machine's speed."""
    kills: int = 30
    """How many kills the training and the preparation suffer, each; restarts, a third of them."""
    parts: tuple[Part, ...] = typing.get_args(Part)
    """What to try."""
    directory: Path | None = None
    """Where the trials' folders go; a temporary directory by default."""


def main() -> None:
    """Make all trials, print a summary a part, and exit with status 1 if any failed."""
    options = parse(Options)
    directory = (options.directory or Path(tempfile.mkdtemp(prefix="torture_"))).resolve()
    print(f"seed {options.seed}, in {directory}", flush=True)
    lines, failures = [], []
    for name in options.parts:
        begun = time.monotonic()
        part = importlib.import_module(f"tests.torture.{name}")
        try:
            text, outcome = part.run(options.seed, options.kills, directory / name)
        except Difference as error:
            # What nothing disturbed went wrong, so there is nothing to compare with.
            text, outcome = "the rest", Outcome(failures=[f"{name}: {error}"])
        minutes, seconds = divmod(round(time.monotonic() - begun), 60)
        failed = f"{len(outcome.failures)} FAILED of: " if outcome.failures else ""
        lines.append(f"{name:<13} {failed}{text}   {minutes} min {seconds:02d} s")
        failures += outcome.failures
        print(lines[-1], flush=True)
    print("\n" + "\n".join(lines + failures), flush=True)
    if failures:
        raise SystemExit(1)
    if options.directory is None:
        shutil.rmtree(directory)


if __name__ == "__main__":
    run_script(main)
