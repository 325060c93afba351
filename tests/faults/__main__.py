"""Whether runs survive what machines do to them: `python -m tests.faults` (needs Linux's /proc).

A failed trial says what differs and leaves its folder; the exit status is 1 then.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests.faults import damage, disk, kills
from utils import parse

PARTS = {
    "training": kills.training,
    "preparation": kills.preparation,
    "restarts": kills.restarts,
    "damage": damage.run,
    "disk": disk.run,
}


@dataclass(frozen=True)
class Options:
    """Kill, damage and fill up; compare with what nothing disturbed."""

    seed: int = 0
    """Draws the moments and the places; the moments also depend on the machine's speed."""
    kills: int = 30
    """How many kills the training and the preparation suffer, each; restarts, a third of them."""
    parts: tuple[str, ...] = tuple(PARTS)
    """What to try: kills of runs, of preparations and under torchrun, damaged files, full disks."""
    directory: Path | None = None
    """Where the trials' folders go; a temporary directory by default."""


def main() -> None:
    """Make all trials, print a summary a part, and exit with status 1 if any failed."""
    options = parse(Options)
    directory = (options.directory or Path(tempfile.mkdtemp(prefix="faults_"))).resolve()
    print(f"seed {options.seed}, in {directory}", flush=True)
    failures = []
    for name in options.parts:
        outcome = PARTS[name](options.seed, options.kills, directory / name)
        print(f"{name}: {len(outcome.failures)} failed; {dict(outcome.seen)}", flush=True)
        failures += outcome.failures
    if failures:
        raise SystemExit("\n".join(failures))
    if options.directory is None:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
