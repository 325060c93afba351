"""The curves of a run, thinned until a page can hold them: what report.py draws.

A curve is `{"x": steps, "y": values}`, two lists of one length. Tokens and seconds follow from
the step: the one by multiplication, the other by the run's clock, which is a curve, too.
"""

import itertools
from typing import Any

import numpy as np

from figures import (
    LOSS_BASELINE,
    SCORE_BASELINES,
    comparable,
    complete,
    shares,
    smooth,
)
from metrics import Points, Run, is_share, points, scores

# What a curve keeps of itself: twice as many points as the widest panel has pixels to tell apart.
POINTS = 2000

Curve = dict[str, list[float]]


def curves(run: Run) -> dict[str, Any]:
    """Return everything of a run that is drawn against its steps."""
    return {
        "batch_tokens": run.config.train.batch_tokens,
        "clock": thinned(points(run, "train", "seconds"), POINTS // 4),
        "loss": noisy(points(run, "train", "loss")),
        "val_loss": thinned(points(run, "val", "loss")),
        "lr": thinned(points(run, "train", "lr"), POINTS // 2),
        "grad_norm": noisy(points(run, "train", "grad_norm")),
        "speed": noisy(points(run, "train", "tokens_per_second")),
        "scores": score_curves(run),
    }


def score_curves(run: Run) -> list[dict[str, Any]]:
    """Return a curve of each score, shares in percent, with its standard errors."""
    drawn, found = shares(run), []
    for (task, metric), score in scores(run).items():
        percent = 100 if is_share(metric) else 1
        errors = Points(score.steps, score.errors * percent, score.errors)
        found.append(
            {
                "task": task,
                "metric": metric,
                "share": is_share(metric),
                # The one share of a task that the others mostly run beside.
                "chosen": (task, metric) in drawn,
                **_listed(Points(score.steps, score.values * percent, score.errors)),
                "error": _listed(errors)["y"],
            }
        )
    return found


def baselines(runs: list[Run]) -> dict[str, Any]:
    """Return what others report of the same quantities, where that can be compared.

    Each is a label and the least and greatest value: one of the loss, and some of each score.
    """
    if not comparable(runs):
        return {"loss": [], "scores": []}
    loss = {
        "label": f"published: OpenAI GPT-2 124M, {LOSS_BASELINE}",
        "values": [LOSS_BASELINE] * 2,
    }
    known = [
        {"task": task, "metric": metric, "label": label, "values": [low, high]}
        for (task, metric), figures in SCORE_BASELINES.items()
        for label, low, high in figures
    ]
    return {"loss": [loss], "scores": known if complete(runs) else []}


def noisy(series: Points) -> dict[str, Curve]:
    """Return what was logged at every step twice: as it is, and smoothed."""
    smoothed = Points(series.steps, smooth(series.values), series.errors)
    return {"raw": thinned(series), "smooth": evenly(smoothed, POINTS // 2)}


def thinned(series: Points, most: int = POINTS) -> Curve:
    """Return about `most` points of a curve: the least and greatest of each of its stretches.

    So no spike is lost, however many points there are. The first and the last point stay.
    """
    count = len(series.values)
    if count <= most:
        return _listed(series)
    edges = np.linspace(0, count, most // 2 + 1).astype(int).tolist()
    kept = {0, count - 1}
    for start, stop in itertools.pairwise(edges):
        stretch = series.values[start:stop]
        kept |= {start + int(stretch.argmin()), start + int(stretch.argmax())}
    return _listed(series, np.array(sorted(kept)))


def evenly(series: Points, most: int) -> Curve:
    """Return at most `most` points of a curve at equal distances, the first and the last too."""
    count = len(series.values)
    if count <= most:
        return _listed(series)
    return _listed(series, np.linspace(0, count - 1, most).round().astype(int))


def _listed(series: Points, kept: np.ndarray | slice = slice(None)) -> Curve:
    return {
        "x": [int(step) for step in series.steps[kept]],
        "y": [significant(value) for value in series.values[kept]],
    }


def significant(value: float, figures: int = 6) -> float:
    """Return a number to so many significant figures, which are fewer characters in JSON."""
    rounded = float(f"{value:.{figures}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
