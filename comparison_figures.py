"""The two figures of an experiment: validation losses overlaid, and final losses by rate."""

from pathlib import Path
from typing import Any

import numpy as np

from comparison import Curve, Entry, compare, final_loss, loss_text, validation_curve
from figures import MARKERS, PALETTE, RULES, STYLE, STYLES, color_of, mark, save
from metrics import short

# What part of the budget may lie above the panel, where losses fall from ten to five.
OPENING = 0.1


def draw_overlay(found: list[Entry], directory: Path) -> list[Path]:
    """Draw validation loss against tokens, a line an arm, a panel a data set; return the paths.

    A line is the mean over seeds in a band from the least to the greatest. The same runs give the
    same bytes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    datasets = _datasets(found)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_size(found), dpi=150, layout="constrained")
        panels = figure.subplots(1, len(datasets), squeeze=False)[0]
        for axes, data in zip(panels, datasets, strict=True):
            _draw_curves(axes, [entry for entry in found if entry.data == data])
            axes.set(xlabel="tokens", ylabel="validation loss (nats a token)")
            axes.xaxis.set_major_formatter(lambda x, _: short(x))
            _finish(axes)
        return save(figure, directory / "overlay")


def draw_rates(found: list[Entry], directory: Path) -> list[Path]:
    """Draw final validation loss against peak rate, a line an arm, the best one marked.

    Runs that diverged have no point. The same runs give the same bytes.
    """
    import matplotlib
    from matplotlib.figure import Figure

    datasets = _datasets(found)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=_size(found), dpi=150, layout="constrained")
        panels = figure.subplots(1, len(datasets), squeeze=False)[0]
        for axes, data in zip(panels, datasets, strict=True):
            here = [entry for entry in found if entry.data == data]
            _draw_sweeps(axes, here)
            _name_rates(axes, [trial.lr for entry in here for trial in entry.sweep])
            axes.set_xlabel("peak learning rate of AdamW")
            axes.set_ylabel("final validation loss (nats a token)")
            _finish(axes)
        return save(figure, directory / "rates")


def _size(found: list[Entry]) -> tuple[float, float]:
    """Return width and height in inches: a panel a data set, and room for a line an arm below."""
    datasets = _datasets(found)
    return 1.5 + 6.5 * len(datasets), 4.8 + 0.25 * len(found) / len(datasets)


def _datasets(found: list[Entry]) -> list[str]:
    return list(dict.fromkeys(entry.data for entry in found))


def _draw_curves(axes: Any, found: list[Entry]) -> None:
    """Draw the arms on one data set, and the final loss of the first as a level."""
    curves = []
    for i, (entry, row) in enumerate(zip(found, compare(found), strict=True)):
        if not entry.runs:
            axes.plot([], [], color=color_of(i), label=f"{entry.arm}: diverged")
            continue
        curve = validation_curve(entry.runs)
        curves.append(curve)
        low, high = curve.losses.min(axis=0), curve.losses.max(axis=0)
        axes.fill_between(curve.tokens, low, high, color=color_of(i), alpha=0.2, linewidth=0)
        (line,) = axes.plot(curve.tokens, curve.mean, _dashes(i), color=color_of(i))
        line.set_label(f"{entry.arm}: {loss_text(row)}")
        mark(line, MARKERS[i // len(PALETTE) % len(MARKERS)])
    if found[0].runs:
        level = curves[0].mean[-1]
        axes.axhline(level, label=f"final loss of {found[0].arm}, {level:.4f}", **RULES[0])
    axes.set_title(f"Validation loss on {found[0].data}")
    if curves:
        _limit(axes, curves)


def _limit(axes: Any, curves: list[Curve]) -> None:
    """Leave the fall of the first tokens outside the panel, where it would squash the rest."""
    low, top = (choose([choose(curve.losses) for curve in curves]) for choose in (np.min, np.max))
    later = [curve.losses[:, curve.tokens >= OPENING * curve.tokens[-1]] for curve in curves]
    high = max(float(losses.max()) for losses in later)
    if top - low > 2 * (high - low) > 0:
        axes.set_title(f"{axes.get_title()} (its start at {top:.1f} is above the panel)")
        top = high
    margin = 0.05 * (top - low) or 0.1
    axes.set_ylim(low - margin, top + margin)


def _draw_sweeps(axes: Any, found: list[Entry]) -> None:
    """Draw the arms of one data set; an arm with one rate is a point."""
    for i, entry in enumerate(found):
        sweep = sorted((t for t in entry.sweep if t.run is not None), key=lambda trial: trial.lr)
        rates, losses = [trial.lr for trial in sweep], [final_loss(trial) for trial in sweep]
        (line,) = axes.plot(rates, losses, _dashes(i), color=color_of(i))
        mark(line, MARKERS[i // len(PALETTE) % len(MARKERS)])
        if not sweep:
            line.set_label(f"{entry.arm}: diverged")
            continue
        line.set_label(f"{entry.arm}: {min(losses):.4f} at {entry.lr:g}")
        axes.plot(entry.lr, min(losses), "*", color=color_of(i), markersize=16, zorder=3)
    axes.plot([], [], "*", color="black", markersize=12, label="best rate of an arm")
    axes.set_title(f"Final validation loss on {found[0].data}")


def _name_rates(axes: Any, rates: list[float]) -> None:
    """Make the axis of rates logarithmic, with those that were tried as its marks.

    One that is so close to the mark on its left that their names would touch has none.
    """
    axes.set_xscale("log")
    apart = (max(rates) / min(rates)) ** 0.08
    marks: list[float] = []
    for rate in sorted(set(rates)):
        if not marks or rate >= apart * marks[-1]:
            marks.append(rate)
    axes.minorticks_off()
    axes.set_xticks(marks, [f"{rate:g}" for rate in marks])


def _dashes(i: int) -> str:
    return STYLES[i // len(PALETTE) % len(STYLES)]


def _finish(axes: Any) -> None:
    """Draw the grid, and the legend under the panel, where it hides no curve."""
    axes.margins(x=0.02)
    axes.grid(True)
    # Two columns of long names would leave no room for the panel.
    names = axes.get_legend_handles_labels()[1]
    columns = 2 if max(map(len, names)) <= 45 else 1
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=columns, frameon=False)
