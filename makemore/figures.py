"""The figures of the ladder, each as PNG and SVG: counts, embeddings, insides, and the climb."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from figures import GREY, PALETTE, STYLE, color_of, save
from makemore.diagnostics import Probe

# What stands for the boundary and for a space.
BOUNDARY, SPACE = "·", "␣"
# More curves than this in a panel are too many to tell apart.
MOST_CURVES = 8


def labels(alphabet: str) -> list[str]:
    """Return what to print for each id: the boundary, then characters, the invisible as escapes."""
    shown = (c if c.isprintable() else repr(c)[1:-1] for c in alphabet.replace(" ", SPACE))
    return [BOUNDARY, *shown]


def draw_counts(counts: np.ndarray, alphabet: str, stem: Path) -> Path:
    """Draw a bigram's table (V, V) as a map, with its numbers where there is room for them."""
    from matplotlib.colors import LogNorm

    names, size = labels(alphabet), len(counts)
    inches = min(max(0.4 * size, 4), 16)
    with _page((inches, inches), stem) as figure:
        axes = figure.subplots()
        axes.imshow(counts + 1, cmap="Blues", norm=LogNorm())
        axes.set(title="How often the column's character follows the row's")
        step = max(size // 80, 1)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(range(0, size, step), names[::step])
        for row, column in np.argwhere(counts) if size <= 40 else ():
            count = int(counts[row, column])
            color = "white" if count > counts.max() ** 0.6 else "black"
            axes.text(column, row, count, ha="center", va="center", fontsize=5, color=color)
    return stem.with_suffix(".png")


def draw_embedding(table: np.ndarray, alphabet: str, stem: Path) -> Path:
    """Draw embeddings (V, width) as characters in the plane of their first two components."""
    # Left singular vectors times singular values: the principal components.
    left, values, _ = np.linalg.svd(table - table.mean(0), full_matrices=False)
    points = left[:, :2] * values[:2]
    share = (values[:2] ** 2).sum() / (values**2).sum()
    vowels = set("aeiouyAEIOUY")
    with _page((6, 5.5), stem) as figure:
        axes = figure.subplots()
        for (x, y), name in zip(points, labels(alphabet), strict=True):
            color = PALETTE[1] if name in vowels else PALETTE[0]
            axes.text(x, y, name, ha="center", va="center", fontsize=12, color=color)
        # Text does not count when limits are found.
        axes.scatter(*points.T, alpha=0)
        title = f"Embeddings of characters, vowels in orange\n(two components, {share:.0%})"
        axes.set(title=title, xticks=[], yticks=[])
    return stem.with_suffix(".png")


def draw_insides(
    title: str,
    first: dict[str, Probe],
    last: dict[str, Probe],
    ratios: dict[str, list[list[float]]],
    stem: Path,
) -> Path:
    """Draw what the hidden layers do before the first step and after the last one.

    `ratios` are, by matrix, pairs of a step and log10 of the step's size to the weights'.
    """
    with _page((13, 7), stem) as figure:
        figure.suptitle(title, fontweight="bold")
        (top_left, top, top_right), (low_left, low, low_right) = figure.subplots(2, 3)
        for left, middle, probes, when in (
            (top_left, top, first, "before the first step"),
            (low_left, low, last, "after the last"),
        ):
            _histograms(left, {name: p.activations for name, p in probes.items()})
            _histograms(middle, {name: p.gradients for name, p in probes.items()})
            left.set(title=f"Activations, {when}", ylabel="density")
            middle.set(title=f"Gradients, {when}", yscale="log")
            middle.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2))
        _draw_ratios(top_right, ratios)
        _draw_flat(low_right, first, last)
    return stem.with_suffix(".png")


def _histograms(axes: Any, values: dict[str, np.ndarray]) -> None:
    for i, (name, numbers) in enumerate(values.items()):
        # A few extremes would leave the rest one bar.
        low, high = np.quantile(numbers, (0.001, 0.999))
        bins = np.linspace(low, high, 61) if high > low else 10
        density, edges = np.histogram(numbers, bins, density=True)
        label = f"{name}, std {numbers.std():.1e}"
        axes.plot((edges[1:] + edges[:-1]) / 2, density, color=color_of(i), label=label)
    _legend(axes, values)


def _draw_ratios(axes: Any, ratios: dict[str, list[list[float]]]) -> None:
    curves: dict[str, list[list[list[float]]]] = {}
    for name, pairs in ratios.items():
        # Where there are many matrices, those of a kind are averaged over the blocks.
        kind = re.sub(r"\.\d+", "", name) if len(ratios) > MOST_CURVES else name
        curves.setdefault(kind.removesuffix(".weight"), []).append(pairs)
    for i, (name, several) in enumerate(curves.items()):
        steps, sizes = np.array(several).mean(0).T
        dashes = "-" if i < len(PALETTE) else "--"
        axes.plot(steps, sizes, dashes, color=color_of(i), lw=1, label=name)
    axes.axhline(-3, color="black", ls=":", lw=1, label="a thousandth")
    axes.set(title="Size of steps, relative to the weights", xlabel="step", ylabel="log10")
    axes.legend(frameon=False, fontsize=7, ncols=2)


def _draw_flat(axes: Any, first: dict[str, Probe], last: dict[str, Probe]) -> None:
    places = np.arange(len(first))
    for offset, when, probes in ((-0.2, "before", first), (0.2, "after", last)):
        color = PALETTE[1] if when == "before" else PALETTE[0]
        saturated = [100 * p.saturated for p in probes.values()]
        dead = [100 * p.dead for p in probes.values()]
        axes.bar(places + offset, saturated, 0.36, color=color, alpha=0.4, label=f"flat, {when}")
        axes.bar(places + offset, dead, 0.18, color=color, label=f"dead, {when}")
    axes.set_xticks(places, list(first))
    axes.set(title="Flat answers and dead units", ylabel="%")
    axes.set_ylim(0, max(axes.get_ylim()[1], 5))
    _legend(axes, first)


def draw_climb(title: str, rungs: list[dict[str, Any]], stem: Path) -> Path:
    """Draw the curves of all rungs, and where they end.

    A rung has `rung`, `parameters`, `train_loss`, `val_loss`, and `curve`: (step, seconds, training
    loss, validation loss) of each evaluation.
    """
    with _page((12, 4.8), stem) as figure:
        figure.suptitle(title, fontweight="bold")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_curves(left, rungs)
        _draw_ends(right, rungs)
        for axes in (left, right):
            axes.grid(True)
            axes.legend(frameon=False)
    return stem.with_suffix(".png")


def _draw_curves(axes: Any, rungs: list[dict[str, Any]]) -> None:
    for i, rung in enumerate(rungs):
        steps, _, _, losses = zip(*rung["curve"], strict=True)
        if len(steps) == 1:
            label = f"{rung['rung']}, counted"
            axes.axhline(losses[0], color=color_of(i), ls="--", lw=1.2, label=label)
        else:
            axes.plot(steps, losses, color=color_of(i), label=rung["rung"])
    axes.set(title="Validation loss on the way", xlabel="step", xscale="log")
    axes.set(ylabel="nats a character")
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _draw_ends(axes: Any, rungs: list[dict[str, Any]]) -> None:
    names = [rung["rung"] for rung in rungs]
    axes.plot([rung["train_loss"] for rung in rungs], names, "o", color=GREY, label="training")
    losses = [rung["val_loss"] for rung in rungs]
    axes.plot(losses, names, "s", color=PALETTE[0], label="validation")
    for name, loss in zip(names, losses, strict=True):
        axes.annotate(f"{loss:.3f}", (loss, name), xytext=(8, -3), textcoords="offset points")
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set(title="Where each rung ends", xlabel="nats a character")


def _legend(axes: Any, entries: dict[str, Any]) -> None:
    if entries:
        axes.legend(frameon=False, fontsize=7)


@contextlib.contextmanager
def _page(inches: tuple[float, float], stem: Path) -> Iterator[Any]:
    """Yield an empty figure, and write what has become of it."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        # A Figure made without pyplot needs no window system.
        figure = Figure(figsize=inches, dpi=120, layout="constrained")
        yield figure
        save(figure, stem)
