"""A run shown in Weights & Biases, TensorBoard or trackio, beside metrics.jsonl, the record.

Each shows the numbers of a metric line at its step: `loss` of a train line as train/loss, metrics
of a benchmark as eval/TASK/METRIC. WANDB_MODE, WANDB_PROJECT, WANDB_API_KEY, TRACKIO_PROJECT and
TRACKIO_SPACE_ID mean what they always do. Whatever they raise is caught in logger.py.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from config import Config, UserError, flatten


class Tracker(NamedTuple):
    """Shows values by name at a step; what came before step `first` it has already."""

    name: str
    first: int
    log: Callable[[dict[str, float], int], Any]
    close: Callable[[], Any]
    flush: Callable[[], Any] = lambda: None

    def send(self, line: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl."""
        if line["step"] >= self.first:
            self.log(tracker_values(line), line["step"])


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise UserError, naming the package, unless all trackers of `names` are installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"{name} is not installed; `pip install {name}` brings it, or leave it out."
            )


def open_tracker(name: str, run: Path, config: Config, step: int) -> Tracker:
    """Return a tracker of a run that stands at `step`; it goes on with the run's own curves."""
    openers = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
    return openers[name](run, config, step)


def tracker_values(line: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a metric line by the names they are shown under."""
    group = f"eval/{line['task']}" if line["kind"] == "eval" else line["kind"]
    return {
        key if key == "tokens" else f"{group}/{key}": value
        for key, value in line.items()
        if key != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def run_id(run: Path, config: Config) -> str:
    """Return the run's name with a digest of what does not change when it is resumed."""
    kept = {name: value for name, value in flatten(config).items() if not name.startswith("train.")}
    digest = hashlib.sha256(json.dumps([kept, config.train.seed]).encode()).hexdigest()[:8]
    return f"{re.sub('[^A-Za-z0-9_-]', '-', run.resolve().name)[:40]}-{digest}"


def _tensorboard(run: Path, config: Config, step: int) -> Tracker:
    """Write event files to RUN/tensorboard; of earlier ones everything from `step` on is void."""
    from torch.utils.tensorboard import SummaryWriter

    first = step if (run / "tensorboard").exists() else None
    writer = SummaryWriter(str(run / "tensorboard"), purge_step=first, flush_secs=30)

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker("tensorboard", first or 0, log, writer.close, writer.flush)


def _wandb(run: Path, config: Config, step: int) -> Tracker:
    """Go on with the run of Weights & Biases; steps that it has stay as they were first sent."""
    import wandb

    online = os.environ.get("WANDB_MODE", "online") == "online"
    # A question on the terminal would stop the training until somebody comes by.
    if online and not wandb.login(prompt=False, verify=False):
        raise UserError("no API key; `wandb login` stores one, WANDB_MODE=offline needs none")
    known = (run / "wandb").exists()
    session = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "gpt2"),
        id=run_id(run, config),
        name=run.resolve().name,
        resume="allow",
        dir=str(run),
        config=flatten(config),
        allow_val_change=True,  # device and micro-batch may change when it goes on
        settings=wandb.Settings(silent=True, console="off", finish_timeout=45.0),
    )
    if online:
        tqdm.write(f"Weights & Biases: {session.url}", file=sys.stderr)
    # Offline it cannot tell what it has; earlier starts lie in directories of their own.
    first = step if known and not online else session.step
    return Tracker("wandb", first, session.log, session.finish)


def _trackio(run: Path, config: Config, step: int) -> Tracker:
    """Go on with the run of trackio; steps that it has stay as they were first sent."""
    import trackio

    project, name = os.environ.get("TRACKIO_PROJECT", "gpt2"), run_id(run, config)
    with contextlib.redirect_stdout(io.StringIO()):  # ten lines of greetings
        session = trackio.init(project, name, resume="allow", config=flatten(config), embed=False)
    tqdm.write(f"trackio: `trackio show --project {project}` shows {name}", file=sys.stderr)

    def close() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()

    return Tracker("trackio", getattr(session, "_next_step", 0), session.log, close)
