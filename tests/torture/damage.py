"""What is damaged, torn, exchanged or planted is refused by name, and nothing intact is harmed.

Here the run and the data that are damaged, and the order of the trials; damaged_runs.py,
damaged_data.py and planted.py are what is done to them.
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.torture import damaged_data, damaged_runs, planted
from tests.torture.common import Outcome, attempt, succeed
from tests.torture.runs import DATA, command, make_data

# Each is given random numbers, a folder with a finished run and its data, a counter of what it
# tried, and the folder of the same run as it was.
TRIALS = (
    ("checkpoints with flipped bytes", damaged_runs.flip_checkpoints),
    ("checkpoints with files cut, removed, replaced", damaged_runs.break_checkpoints),
    ("config.json", damaged_runs.flip_config),
    ("metrics.jsonl", damaged_runs.spoil_metrics),
    ("samples.md", damaged_runs.spoil_samples),
    ("shards and manifest with flipped bytes", damaged_data.flip_data),
    ("shards of several blocks with flipped bytes", damaged_data.flip_large_shards),
    ("shards and manifest cut, removed, replaced, exchanged", damaged_data.break_data),
    ("pickles, read here", planted.read_planted),
    ("main.py --resume with a damaged checkpoint", damaged_runs.resume_damaged),
    ("main.py --resume with no intact checkpoint", damaged_runs.resume_without_any),
    ("main.py --resume with a damaged config.json", damaged_runs.resume_other_config),
    ("main.py --resume with damaged records", damaged_runs.resume_spoiled_records),
    ("main.py with damaged data", damaged_data.start_with_damaged_data),
    ("main.py --resume with damaged data", damaged_data.resume_with_damaged_data),
    ("main.py --resume with pickles", planted.resume_planted),
)


def run(
    seed: int, kills: int, directory: Path, only: Callable[[str], bool] = lambda name: True
) -> tuple[str, Outcome]:
    """Damage everything in turn; returns the summary and the outcome."""
    outcome = Outcome()
    straight = finished_run(directory / "straight")
    for number, (name, damage) in enumerate(TRIALS):
        if only(name):

            def trial(rng: random.Random, folder: Path, seen: Counter[str]) -> None:
                shutil.copytree(straight / DATA, folder / DATA)
                shutil.copytree(straight / "runs", folder / "runs")
                damage(rng, folder, seen, straight)  # noqa: B023 - called in this round

            attempt(outcome, seed, directory, number, name, trial)
    return summary(outcome.seen), outcome


def finished_run(folder: Path) -> Path:
    """Make a run with three checkpoints, and its data, in a folder; returns that."""
    shutil.rmtree(folder, ignore_errors=True)
    make_data(folder / DATA)
    succeed(folder, *command(updates=12, checkpoint_interval=4, keep_checkpoints=9))
    return folder


def summary(seen: Counter[str]) -> str:
    """Return what was tried, and what came of it, in a sentence."""
    return (
        f"{seen['damages']} damages to checkpoints, records, shards and manifest: each named and "
        "passed over, refused in one sentence, mended, or without a meaning "
        f"({seen['without a meaning']}); {seen['pickles']} planted pickles, none of them loaded; "
        f"{seen['commands']} of all through main.py, with nothing intact harmed and resumed runs "
        "ending like the straight one"
    )
