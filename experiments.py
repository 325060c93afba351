"""Recipes compared: many runs of one size on the same tokens, a table and figures.

    python experiments.py RECIPE [RECIPE ...] --size SIZE --data DIR [DIR ...] --name NAME
                          [--seeds N] [--lr X ...] [--jobs N] [--processes N] [--any.field value]

    runs/experiments/NAME/  RUN/  RUN.log  table.json  table.md  figures/

Every run is a process of its own, `python main.py ...`. The same command again reuses what is done,
and continues what was interrupted.
"""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import comparison
from arms import Options, Planned, planned_runs, read_command
from comparison import Trial
from comparison_figures import draw_overlay, draw_rates
from config import UserError
from metrics import Run, points, read_run
from train import StopSignal
from utils import locked, run_script, write_atomically

MAIN = Path(__file__).parent / "main.py"
# How train.py's sentence goes on where the validation loss is not finite.
DIVERGED = "the weights have diverged"


def main() -> None:
    """Train whatever the command line asks for and is not done, then compare."""
    options, arms = read_command()
    runs = planned_runs(options, arms)
    directory = runs[0].directory.parent
    try:
        (directory / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory} cannot be made ({error.strerror}).") from error
    with locked(directory / ".lock"):
        report(train_all(runs, options), options, directory)


def train_all(runs: list[Planned], options: Options) -> list[Trial]:
    """Train first all rates with the first seed, then the other seeds at the best; return them."""
    first = [run for run in runs if not run.waits]
    later = {(run.arm, run.data, run.seed) for run in runs if run.waits}
    begun, count = len(_distinct(first)), len(_distinct(first)) + len(later)
    print(f"{count} runs in {first[0].directory.parent}; each prints into a log.", flush=True)
    train_some(first, options, 1, count)
    trials = [_trial(run) for run in first]
    best = {(entry.arm, entry.data): entry for entry in comparison.entries(trials)}
    chosen = [
        run
        for run in runs
        if run.waits and best[run.arm, run.data].runs and run.lr == best[run.arm, run.data].lr
    ]
    train_some(chosen, options, begun + 1, count)
    return trials + [_trial(run) for run in chosen]


def _trial(run: Planned) -> Trial:
    return Trial(run.arm, run.data, run.lr, run.seed, run.config.name, finished(run))


def _distinct(runs: list[Planned]) -> list[Planned]:
    """Return the runs without those that another arm asks for too."""
    return list({run.directory: run for run in reversed(runs)}.values())[::-1]


@dataclass(frozen=True)
class Active:
    """A run that is being trained, and since when."""

    run: Planned
    label: str
    process: subprocess.Popen
    output: TextIO
    started: float


def train_some(runs: list[Planned], options: Options, number: int, count: int) -> None:
    """Train those runs that are not done, so many at a time, and print a line for each.

    Lines are numbered from `number` of `count`. Raises UserError, after the others have stopped in
    good order, when a run fails; one that diverged has not failed. A signal stops all of them.
    """
    waiting = deque(enumerate(_distinct(runs), number))
    active: list[Active] = []
    with StopSignal() as stop, _stopped_in_the_end(active):
        while (waiting or active) and not stop.requested:
            while waiting and len(active) < options.jobs:
                i, run = waiting.popleft()
                label = f"[{i}/{count}] {_described(run, options)}"
                if is_done(run):
                    print(f"{label}: {_outcome(run)}, reused", flush=True)
                else:
                    active.append(_start(run, label, options))
            for one in [one for one in active if one.process.poll() is not None]:
                active.remove(one)
                _conclude(one, stop)
            time.sleep(0.2 if active else 0)
    if stop.requested:
        print("stopped; the same command continues.")
        raise SystemExit(130)


def _described(run: Planned, options: Options) -> str:
    data = f" on {run.data}" if len(options.data) > 1 else ""
    return f"{run.arm}{data} lr {run.lr:g} seed {run.seed}"


def _start(run: Planned, label: str, options: Options) -> Active:
    """Start main.py on a run."""
    command = [sys.executable]
    if options.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={options.processes}"]
    # A run that was ended early knows that itself, and has to be told where it is to end now.
    command += [
        str(MAIN),
        *run.arguments,
        "--train.stop-at-step",
        str(run.config.train.stop_at_step),
    ]
    environment = dict(os.environ)
    sharing = options.jobs * options.processes
    if sharing > 1:
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // sharing, 1)))
    try:
        output = open(run.log, "w", encoding="utf-8")  # noqa: SIM115 - closed when the run has ended
    except OSError as error:
        raise UserError(f"{run.log} cannot be written ({error.strerror}).") from error
    # In a group of its own, because Ctrl-C would reach it once from the terminal and once from us,
    # and a second signal stops it at once.
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return Active(run, label, process, output, time.monotonic())


@contextlib.contextmanager
def _stopped_in_the_end(active: list[Active]) -> Iterator[None]:
    """Ask whatever still trains in the end to stop, and wait for it."""
    try:
        yield
    finally:
        for one in active:
            one.process.terminate()
        for one in active:
            one.process.wait()
            one.output.close()


def _conclude(one: Active, stop: StopSignal) -> None:
    """Print what became of a run that has ended; raises UserError if it failed."""
    one.output.close()
    if (one.process.returncode == 0 or diverged(one.run)) and is_done(one.run):
        minutes = (time.monotonic() - one.started) / 60
        print(f"{one.label}: {_outcome(one.run)} in {minutes:.1f} min", flush=True)
    elif one.process.returncode == 0:
        # By itself a run ends in good order only at its end.
        print(f"{one.label}: stopped", flush=True)
        stop.requested = True
    else:
        raise UserError(
            f"The run {one.run.config.name} failed ({_last_words(one.run.log).rstrip('.')}); its "
            f"log is {one.run.log}, and the same command continues."
        )


def _outcome(run: Planned) -> str:
    found = finished(run)
    return "diverged" if found is None else f"{points(found, 'val', 'loss').values[-1]:.4f}"


def is_done(run: Planned) -> bool:
    """Say whether nothing is left to train: the run came to its end, or diverged."""
    return finished(run) is not None or diverged(run)


def finished(run: Planned) -> Run | None:
    """Return a run as it stands on disk if it has validated its last step, else None."""
    last, stop = run.config.train.steps, run.config.train.stop_at_step
    last = last if stop is None else min(last, stop)
    try:
        found = read_run(run.directory)
    except UserError:
        # Not begun, or not far enough to be read; if damaged, resuming will say so.
        return None
    return found if max(points(found, "val", "loss").steps, default=-1) >= last else None


def diverged(run: Planned) -> bool:
    """Say whether a run has ended because its loss was not finite."""
    if finished(run) is not None or not run.directory.is_dir():
        return False
    words = _last_words(run.log) if run.log.is_file() else ""
    return (run.directory / "non_finite.json").is_file() or DIVERGED in words


def _last_words(log: Path) -> str:
    """Return the last complaint in a log, or else its last line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    # Progress bars begin each of their lines with a carriage return.
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    complaints = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (complaints or lines or ["it has printed nothing"])[-1]


def report(trials: list[Trial], options: Options, directory: Path) -> None:
    """Write table.json, table.md and the figures, and print the tables."""
    found = comparison.entries(trials)
    facts, sweeps = comparison.compare(found), comparison.sweep_rows(found)
    warnings = comparison.warnings(found)
    record = {
        "command": shlex.join(sys.argv),
        "name": options.name,
        "size": options.size,
        "runs": [comparison.trial_facts(trial) for trial in trials],
        "rows": facts,
        "sweep": sweeps,
        "warnings": warnings,
    }
    write_atomically(directory / "table.json", (json.dumps(record, indent=2) + "\n").encode())
    paragraphs = [f"Compared with {found[0].arm}:", comparison.table(facts)]
    if sweeps:
        paragraphs += ["Peak learning rates, with the first seed:", comparison.sweep_table(sweeps)]
    text = "\n\n".join(paragraphs + warnings)
    heading = f"# {options.name}\n\n`{record['command']}`\n\n"
    write_atomically(directory / "table.md", f"{heading}{text}\n".encode())
    print(f"\n{text}\n")
    paths = draw_overlay(found, directory / "figures")
    paths += draw_rates(found, directory / "figures") if sweeps else []
    for path in (directory / "table.json", directory / "table.md", *paths):
        print(f"Written: {path}")


if __name__ == "__main__":
    run_script(main)
