"""The record of a run, read back: config.json and metrics.jsonl as plain values."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from config import Config, UserError
from utils import load_config


@dataclass(frozen=True)
class Run:
    """A run as it stands on disk; `metrics` are the lines of metrics.jsonl."""

    directory: Path
    config: Config
    metrics: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def data(self) -> str:
        return Path(self.config.data).name

    @property
    def progress(self) -> str:
        """Steps done and planned; planned in epochs where only the data knows their length."""
        train, done = self.config.train, max(line["step"] for line in self.metrics)
        if train.steps is None and train.epochs is not None:
            return f"{done:,} ({train.epochs:g} epochs)"
        # The number of training sequences matters for epochs only.
        total = self.config.total_steps(sys.maxsize)
        early = train.stop_at_step is not None and train.stop_at_step <= done < total
        return f"{done:,} of {total:,}" + (", stopped early" if early else "")


@dataclass(frozen=True)
class Points:
    """One quantity over the run; `errors` are standard errors, 0 where none is known."""

    steps: np.ndarray
    values: np.ndarray
    errors: np.ndarray


def newest_run(runs_dir: str) -> Path:
    """Return the run under `runs_dir` that was written last; raises UserError if there is none."""
    # A hidden one is a run directory whose making was cut short.
    runs = [path.parent for path in Path(runs_dir).glob("[!.]*/config.json")]
    if not runs:
        raise UserError(f"No run under {runs_dir}/ yet; `python main.py quickstart` makes one.")
    return max(runs, key=_last_written)


def _last_written(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return (metrics if metrics.exists() else run / "config.json").stat().st_mtime_ns


def read_run(directory: Path) -> Run:
    """Read config and metrics; raises UserError when they are broken or there are none yet."""
    path, metrics = directory / "metrics.jsonl", []
    try:
        texts = path.read_text("utf-8", errors="replace").split("\n") if path.exists() else []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    for number, text in enumerate(texts, 1):
        try:
            metrics.append(_parse(text))
        except (ValueError, KeyError, TypeError) as error:
            # After the last newline comes nothing, or a line that was cut off in the writing.
            if number < len(texts):
                raise UserError(f"{path}, line {number} is no metric line; delete it.") from error
    if not metrics:
        raise UserError(f"Run {directory} has no metrics yet; look again when it has begun.")
    return Run(directory, load_config(directory), metrics)


def _parse(text: str) -> dict[str, Any]:
    """Return one metric line, or raise whatever goes wrong with what is none."""
    line = json.loads(text)
    needed = {"train": "loss", "val": "loss", "eval": "task"}.get(line["kind"], "kind")
    if needed not in line or type(line["step"]) is not int:
        raise ValueError(text)
    return line


def points(run: Run, kind: str, key: str, task: str | None = None) -> Points:
    """Return one logged quantity, leaving out where it is absent or not finite."""
    lines = [
        line
        for line in run.metrics
        if line["kind"] == kind and line.get("task") == task and is_number(line.get(key))
    ]
    errors = [line.get(f"{key}_stderr") for line in lines]
    return Points(
        np.array([line["step"] for line in lines]),
        np.array([line[key] for line in lines]),
        np.array([error if is_number(error) else 0.0 for error in errors]),
    )


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def scores(run: Run) -> dict[tuple[str, str], Points]:
    """Return the points of each (task, metric).

    A metric is any field that holds a float, but for times; whole numbers are counts.
    """
    names = {
        (line["task"], key): None
        for line in run.metrics
        for key, value in line.items()
        if line["kind"] == "eval" and isinstance(value, float)
        if not key.endswith(("_stderr", "seconds"))
    }
    found = {name: points(run, "eval", name[1], task=name[0]) for name in names}
    return {name: score for name, score in found.items() if len(score.steps)}


def newest_scores(directory: Path, step: int) -> dict[str, dict[str, Any]]:
    """Return the newest eval line of each task up to `step`; {} for a run that has none."""
    try:
        lines = read_run(directory).metrics
    except UserError:
        return {}
    found = (line for line in lines if line["kind"] == "eval" and line["step"] <= step)
    return {line["task"]: line for line in sorted(found, key=lambda line: line["step"])}


def is_share(metric: str) -> bool:
    """Say whether a metric is a share of right answers; the others are better the less they are."""
    return not any(word in metric for word in ("perplexity", "ppl", "loss", "bits", "bytes"))


def score_text(metric: str, value: float, error: float = 0.0) -> str:
    """Return a score with its standard error, if that is known: shares in percent."""
    if is_share(metric):
        return f"{100 * value:.2f}" + (f" ± {100 * error:.2f} %" if error else " %")
    # Perplexities go from one to astronomical, and bits per byte differ in the third place.
    form = ".4f" if abs(value) < 10 else ".2f" if abs(value) < 1e5 else ".3g"
    return f"{value:{form}}" + (f" ± {error:{form}}" if math.isfinite(error) and error else "")


def best(series: Points) -> str:
    """Return the lowest value and its step in words; "" when there is none."""
    if not len(series.values):
        return ""
    return f"{series.values.min():.4f} at {series.steps[series.values.argmin()]:,}"


def short(number: float) -> str:
    """Return a number in three figures with K, M or B."""
    number = float(f"{number:.3g}")
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if limit <= number < math.inf:
            return f"{number / limit:g}{letter}"
    return f"{number:g}"


def aligned(rows: list[dict[str, str]]) -> str:
    """Return rows of cells by heading as an aligned Markdown table; "-" stands for the unknown."""
    # Columns that no row can fill would only widen the table.
    names = dict.fromkeys(name for row in rows for name in row)
    names = [name for name in names if any(row.get(name) for row in rows)]
    cells = [names, *([row.get(name) or "-" for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)
