"""A run shown in Weights & Biases or TensorBoard, beside metrics.jsonl, which stays the record.

    python trackers.py RUN [RUN ...] --to wandb tensorboard       sends the record of finished runs

Lines of metrics.jsonl are sent as they are written: `loss` of a train line as train/loss, of a val
line as val/loss, metrics of a benchmark as eval/TASK/METRIC, `step` as the step. Each tracker works
in a thread of its own, so training never waits for a network; one that fails says so in one line
and is left out from there on. WANDB_MODE, WANDB_PROJECT and WANDB_API_KEY mean what they always do.
"""

import contextlib
import importlib.util
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tqdm import tqdm

from command_line import parse, run_script
from config import Config, UserError, flatten, identity_digest
from logs import run_directory
from metrics import is_number, read_run

# Seconds a run waits at its end for what is still on its way, and those that wandb takes of them.
CLOSING_SECONDS = 60.0
WANDB_SECONDS = 45.0

# Shows values, by name, at a step.
Log = Callable[[dict[str, float], int], None]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """Send the records of runs to trackers."""

    runs: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")
    ] = ()
    """Run directories, or names of runs."""
    to: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Where to: Weights & Biases, TensorBoard, or both."""
    runs_dir: str = "runs"
    """Directory that holds the run directories."""


@dataclass
class Tracker:
    """Lines on their way to one service; `failure` says what went wrong there, if anything did."""

    name: str
    run: Path
    tell: Tell
    # None is the end of them.
    lines: queue.SimpleQueue[dict[str, Any] | None] = field(default_factory=queue.SimpleQueue)
    thread: threading.Thread | None = None
    failure: str = ""


def main() -> None:
    """Send the records that the command line names."""
    options = parse(Options)
    if not options.runs or not options.to:
        raise UserError("Name at least one run, and after --to at least one tracker; see --help.")
    check_trackers(options.to)
    for name in dict.fromkeys(options.runs):
        replay(run_directory(name, options.runs_dir), options.to)


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise UserError, naming the package, unless all trackers of `names` are installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"{name} is not installed; `pip install {name}` brings it, or leave it out."
            )


def replay(run: Path, names: tuple[str, ...]) -> None:
    """Send all of a run's metrics.jsonl to trackers, in place of what they had of it.

    Raises UserError when there is none, or a tracker does not take it.
    """
    record, told = read_run(run), []
    trackers = open_trackers(names, run, record.config, 0, told.append)
    close_trackers(trackers, seconds=None)
    for tracker in trackers:
        if tracker.failure:
            raise UserError(f"{tracker.name} did not take the record of {run} ({tracker.failure}).")
    for tracker in trackers:
        print(f"{run}: {len(record.metrics):,} lines sent to {tracker.name}")
    print(*told, sep="\n", end="\n" if told else "")


def open_trackers(
    names: tuple[str, ...], run: Path, config: Config, step: int, tell: Tell | None = None
) -> list[Tracker]:
    """Return the trackers of `names`, begun, of a run that stands at `step`.

    What they have of later steps is taken back, as far as they can; a tracker that is new to the
    run is sent what metrics.jsonl has already. `tell` prints a line, by default on stderr. Never
    raises for a tracker that does not work.
    """
    trackers = []
    for name in dict.fromkeys(names):
        tracker = Tracker(name, run, tell or _print)
        known = (run / name).exists()
        for line in _history(run, _first_step(name, step) if known else 0):
            tracker.lines.put(line)
        arguments = (tracker, config, step if known else None)
        tracker.thread = threading.Thread(target=_serve, args=arguments, daemon=True)
        tracker.thread.start()
        trackers.append(tracker)
    return trackers


def send(trackers: list[Tracker], line: dict[str, Any]) -> None:
    """Hand a line of metrics.jsonl to all trackers that still work; returns at once."""
    for tracker in trackers:
        if tracker.thread.is_alive():
            tracker.lines.put(line)


def close_trackers(trackers: list[Tracker], seconds: float | None = CLOSING_SECONDS) -> None:
    """Let trackers finish what they were sent, and wait for it, but no longer than `seconds`."""
    for tracker in trackers:
        tracker.lines.put(None)
    for tracker in trackers:
        tracker.thread.join(seconds)
        if tracker.thread.is_alive():
            _give_up(tracker, f"it is not done after {seconds:g} seconds")


def values_of(line: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl by the names they are shown under."""
    group = f"eval/{line['task']}" if line["kind"] == "eval" else line["kind"]
    return {
        key if key == "tokens" else f"{group}/{key}": value
        for key, value in line.items()
        if key != "step" and is_number(value)
    }


def _print(line: str) -> None:
    """Print a line on stderr, above whatever bars there are."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


def _history(run: Path, first: int) -> list[dict[str, Any]]:
    """Return a run's metric lines from step `first` on."""
    try:
        return [line for line in read_run(run).metrics if line["step"] >= first]
    except UserError:
        # A run that begins has none.
        return []


def _first_step(name: str, step: int) -> int:
    """Return the first step a tracker has to be sent again when a run goes on at `step`.

    TensorBoard forgets `step` too, at which measurements may still be made. wandb leaves out what
    it has, unless it is offline and cannot know.
    """
    if name == "wandb":
        return step + 1 if step > 0 and _wandb_mode() != "online" else 0
    return step


def _serve(tracker: Tracker, config: Config, purge_step: int | None) -> None:
    """Open a tracker and send it lines until their end, or until it fails."""
    try:
        with OPENERS[tracker.name](tracker, config, purge_step) as log:
            while (line := tracker.lines.get()) is not None:
                log(values_of(line), line["step"])
    # Whatever it is, SystemExit included, a run does not end for it.
    except BaseException as error:
        _give_up(tracker, " ".join(str(error).split())[:200] or type(error).__name__)


def _give_up(tracker: Tracker, reason: str) -> None:
    """Say that a tracker is left out, and why, in one line."""
    tracker.failure = reason.rstrip(".")
    tracker.tell(
        f"{tracker.name} is left out from here on ({tracker.failure}); metrics.jsonl has "
        f"everything, and `python trackers.py {tracker.run} --to {tracker.name}` sends it."
    )


@contextlib.contextmanager
def _tensorboard(tracker: Tracker, config: Config, purge_step: int | None) -> Iterator[Log]:
    """Open event files in RUN/tensorboard, of which everything from `purge_step` on is void."""
    from torch.utils.tensorboard import SummaryWriter

    directory = str(tracker.run / "tensorboard")
    with SummaryWriter(directory, purge_step=purge_step, flush_secs=30) as writer:

        def log(values: dict[str, float], step: int) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield log


@contextlib.contextmanager
def _wandb(tracker: Tracker, config: Config, purge_step: int | None) -> Iterator[Log]:
    """Open a run of Weights & Biases, or go on with it; its files lie in RUN/wandb.

    Its id is made of the run's name and config, so that a resumed run goes on with its own curves.
    wandb cannot purge: steps that it has stay as they were first sent, and are left out here.
    """
    import wandb

    # A question on the terminal would never be answered from this thread.
    if _wandb_mode() == "online" and not wandb.login(prompt=False, verify=False):
        raise UserError("no API key; `wandb login` stores one, WANDB_MODE=offline needs none")
    settings = wandb.Settings(silent=True, console="off", finish_timeout=WANDB_SECONDS)
    name = tracker.run.resolve().name
    session = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "gpt2"),
        id=f"{re.sub('[^A-Za-z0-9_-]', '-', name)[:40]}-{identity_digest(config)}",
        name=name,
        resume="allow",
        dir=str(tracker.run),
        config=flatten(config),
        # Where and how a run is computed may differ when it goes on.
        allow_val_change=True,
        settings=settings,
    )

    def log(values: dict[str, float], step: int) -> None:
        # Of a run that goes on, the step after its last.
        if step >= session.step:
            session.log(values, step=step)

    try:
        if _wandb_mode() == "online":
            tracker.tell(f"Weights & Biases: {session.url}")
        yield log
    finally:
        session.finish()


def _wandb_mode() -> str:
    return os.environ.get("WANDB_MODE", "online")


OPENERS = {"wandb": _wandb, "tensorboard": _tensorboard}


if __name__ == "__main__":
    run_script(main)
