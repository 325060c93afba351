"""The two-panel figure of a run, or of several laid over each other."""

import contextlib
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from metrics import Points, Run, best, is_share, points, scores, short
from utils import write_atomically

# What others report, by their own measurement: loss on FineWeb-Edu's validation shard, and, in
# percent, all of HellaSwag with per-token normalisation (least and most, where sources differ).
BASELINE_DATA = "fineweb-edu"
LOSS_BASELINE = 3.292
BASELINE_EXAMPLES = {"hellaswag": 10_042}
SCORE_BASELINES = {
    ("hellaswag", "acc_norm"): (
        ("published: OpenAI GPT-2 124M, 29.4 to 29.55", 29.4, 29.55),
        ("published: GPT-3 125M, 33.7", 33.7, 33.7),
    )
}

# Okabe and Ito's palette, which readers with any colour vision can tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE = {
    **{"font.size": 9.5, "axes.titlesize": 10.5, "legend.fontsize": 9},
    **{"axes.spines.top": False, "grid.alpha": 0.25},
    # Identifiers in an SVG are drawn from this, and so are the same every time.
    "svg.hashsalt": "gpt2",
}
MARKERS, STYLES, GREY = "osD^", ("-", "--", "-.", ":"), "#6b6b6b"
RULES = [{"color": "black", "lw": 1, "ls": (0, dashes)} for dashes in ((6, 3), (2, 2))]


def draw(runs: list[Run]) -> list[Path]:
    """Draw the runs into the first one's figures/ as PNG and SVG; return the paths.

    The same metrics give the same bytes: no dates, no random identifiers.
    """
    import matplotlib
    from matplotlib.figure import Figure

    stem = runs[0].directory / "figures" / ("results" if len(runs) == 1 else "overlay")
    with matplotlib.rc_context(STYLE):
        # A Figure made without pyplot renders through Agg and needs no window system.
        figure = Figure(figsize=(12.5, 5.4), dpi=150, layout="constrained")
        figure.suptitle(_title(runs), fontsize=12, fontweight="bold")
        left, right = figure.subplots(1, 2)
        _draw_losses(left, runs)
        (_draw_scores if any(map(shares, runs)) else _draw_gradients)(right, runs)
        for axes in (left, right):
            axes.set_xlabel("step")
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.margins(x=0.02)
            axes.grid(True)
        return save(figure, stem)


def save(figure: Any, stem: Path) -> list[Path]:
    """Write a figure as PNG and SVG, without dates and versions, and return both paths."""
    return [
        _save(figure, stem.with_suffix(".png"), {"Software": None}),
        _save(figure, stem.with_suffix(".svg"), {"Date": None}),
    ]


def _save(figure: Any, path: Path, metadata: dict[str, None]) -> Path:
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:], metadata=metadata)
    # Where there can be no directory, the writing says so.
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
    write_atomically(path, image.getbuffer())
    return path


def _title(runs: list[Run]) -> str:
    data = ", ".join(dict.fromkeys(run.data for run in runs))
    if len(runs) > 1:
        return f"{len(runs)} runs on {data}"
    run = runs[0]
    return f"{run.name}: {run.config.recipe} {run.config.size} on {data}, {run.progress} steps"


def _draw_losses(axes: Any, runs: list[Run]) -> None:
    """Training and validation loss, and the learning rate on an axis of its own."""
    _draw_noisy(axes, runs, "loss", "training loss, smoothed")
    for i, run in enumerate(runs):
        validation = points(run, "val", "loss")
        (curve,) = axes.plot(validation.steps, validation.values, linestyle="none", zorder=3)
        curve.set(color=PALETTE[1] if len(runs) == 1 else color_of(i))
        mark(curve, MARKERS[i // len(PALETTE) % 4])
        if len(runs) == 1:
            curve.set_label(f"validation loss, best {best(validation)}")
    if len(runs) > 1:
        axes.plot([], [], "o", color=GREY, label="validation loss")
    if comparable(runs):
        label = f"published: OpenAI GPT-2 124M, {LOSS_BASELINE}"
        axes.axhline(LOSS_BASELINE, label=label, **RULES[0])
    axes.set(title="Loss", ylabel="loss (nats a token)")
    _limit_losses(axes, runs)
    _legend(axes, _second_axis(axes, runs, "lr", "learning rate"))


def _limit_losses(axes: Any, runs: list[Run]) -> None:
    """Leave the fall of the first steps outside the panel where it would squash the rest."""
    losses = [points(run, kind, "loss").values for kind in ("train", "val") for run in runs]
    losses = [values for values in losses if len(values)]
    if not losses:
        return
    low, high = min(map(np.min, losses)), max(map(np.max, losses))
    low = min(low, LOSS_BASELINE) if comparable(runs) else low
    usual = max(np.quantile(values, 0.98) for values in losses[: len(runs)])
    if high - low > 2.5 * (usual - low) > 0:
        axes.set_title(f"Loss (its peak of {high:.1f} is above the panel)")
        high = usual
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def _draw_gradients(axes: Any, runs: list[Run]) -> None:
    """What is worth watching where there are no scores: gradient norm and speed."""
    from matplotlib.ticker import LogLocator

    _draw_noisy(axes, runs, "grad_norm", "gradient norm, smoothed")
    clips = {run.config.optim.grad_clip for run in runs}
    for clip in clips - {0} if len(clips) == 1 else ():
        axes.axhline(clip, label=f"clipped above {clip:g}", **RULES[0])
    axes.set(title="Gradient norm and speed", ylabel="gradient norm", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter("")
    second = _second_axis(axes, runs, "tokens_per_second", "tokens a second")
    second.yaxis.set_major_formatter(lambda y, _: short(y))
    _legend(axes, second)


def _draw_scores(axes: Any, runs: list[Run]) -> None:
    """Shares of right answers: a colour a score, or a colour a run where there are several."""
    alone = len(runs) == 1
    names = list(dict.fromkeys(name for run in runs for name in shares(run)))
    for i, run in enumerate(runs):
        for name, score in shares(run).items():
            j = names.index(name)
            color, dashes = (color_of(j), "-") if alone else (color_of(i), STYLES[j % 4])
            label = " ".join(name) if alone else f"{run.name}: {' '.join(name)}"
            values, errors = 100 * score.values, 100 * score.errors
            band = (values - errors, values + errors)
            axes.fill_between(score.steps, *band, color=color, alpha=0.2, linewidth=0)
            (curve,) = axes.plot(score.steps, values, color=color, linestyle=dashes, label=label)
            mark(curve, MARKERS[j % 4])
    for name in names if comparable(runs) and complete(runs) else ():
        for (label, low, high), rule in zip(SCORE_BASELINES.get(name, ()), RULES, strict=False):
            axes.axhspan(low, high, color="black", alpha=0.25, linewidth=0)
            axes.axhline(high, label=label, **rule)
    axes.set(title="Scores, each in a band of one standard error", ylabel="right answers (%)")
    _legend(axes, axes)


def shares(run: Run) -> dict[tuple[str, str], Points]:
    """Return the one score drawn of each task: acc_norm where there is one, or acc, or the first.

    A task's other metrics mostly run beside it; the table has them all.
    """
    found = {name: score for name, score in scores(run).items() if is_share(name[1])}
    chosen = {}
    for task in dict.fromkeys(task for task, _ in found):
        metrics = [metric for of, metric in found if of == task]
        preferred = [metric for metric in ("acc_norm", "acc") if metric in metrics]
        name = (task, (preferred or metrics)[0])
        chosen[name] = found[name]
    return chosen


def complete(runs: list[Run]) -> bool:
    """Say whether every score that published figures stand beside is of all the examples."""
    return all(
        line.get("examples") == BASELINE_EXAMPLES[line["task"]]
        for run in runs
        for line in run.metrics
        if line["kind"] == "eval" and line["task"] in BASELINE_EXAMPLES
    )


def comparable(runs: list[Run]) -> bool:
    """Say whether the published figures were measured on what all these runs read."""
    return all(run.data == BASELINE_DATA for run in runs)


def mark(curve: Any, marker: str) -> None:
    """Mark some forty points of a curve; markers that touch would hide it."""
    every = math.ceil(len(curve.get_xdata()) / 40) or 1
    curve.set(marker=marker, markevery=every, markersize=6, markeredgecolor="white")


def color_of(i: int) -> str:
    """Return the colour of the i-th curve; after the palette they come again."""
    return PALETTE[i % len(PALETTE)]


def _draw_noisy(axes: Any, runs: list[Run], key: str, label: str) -> None:
    """Draw what was logged at every step: smoothed, and faintly as it is when a run is alone."""
    for i, run in enumerate(runs):
        series, name = points(run, "train", key), run.name
        if len(runs) == 1:
            name = label
            # One picture instead of a hundred thousand line segments keeps the SVG small.
            (raw,) = axes.plot(series.steps, series.values, color=color_of(i), linewidth=0.8)
            raw.set(alpha=0.25, rasterized=True)
        axes.plot(series.steps, smooth(series.values), color=color_of(i), label=name)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the running mean over at most 2 x 50 + 1 values, fewer in a short run.

    The window grows from one value at the start, where a full one would smear the first fall.
    """
    i = np.arange(len(values))
    reach = np.minimum(i, min(len(values) // 50, 50))
    end = np.minimum(i + reach + 1, len(values))
    sums = np.concatenate(([0.0], np.cumsum(values)))
    return (sums[end] - sums[i - reach]) / (end - i + reach)


def _second_axis(axes: Any, runs: list[Run], key: str, label: str) -> Any:
    """Draw a quantity dotted, behind everything else, against an axis on the right."""
    second = axes.twinx()
    for i, run in enumerate(runs):
        series = points(run, "train", key)
        second.plot(series.steps, series.values, ":", color=GREY if len(runs) == 1 else color_of(i))
    second.plot([], [], ":", color=GREY, label=label)
    second.set_ylim(0, second.get_ylim()[1])
    second.set_ylabel(label, color=GREY)
    second.tick_params(colors=GREY)
    axes.set_zorder(second.get_zorder() + 1)
    axes.patch.set_visible(False)
    return second


def _legend(axes: Any, second: Any) -> None:
    """Put one legend for both axes under the panel, where it hides no curve."""
    lines = [line for side in dict.fromkeys((axes, second)) for line in side.get_lines()]
    shown = [line for line in lines if not line.get_label().startswith("_")]
    axes.legend(
        handles=shown, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2, frameon=False
    )
