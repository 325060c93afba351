"""Which windows of the corpus a run found hard, and which easy, from its window_losses.bin.

A window read early has a high loss because the model knew little then. So windows are ranked twice:
by how far their loss lies above that of the updates that read them, and by the loss itself.
"""

from typing import Any

import numpy as np

import window_losses
from curves import significant
from figures import smooth
from metrics import Run
from rows import PaddedRows
from shards import TokenStream

LISTED, BINS = 20, 48
# Tokens shown of a window: a line or two of text.
SHOWN = 64


def rank_windows(run: Run, stream: TokenStream | None) -> dict[str, Any] | None:
    """Return the windows with the highest and lowest losses, or None where none were logged.

    `stream` is the training split, if it is here, for the windows' text. Raises UserError when the
    record or the data cannot be read.
    """
    records = window_losses.read(run.directory)
    records = records[np.isfinite(records["loss"])]
    if not len(records):
        return None
    table = by_window(records)
    rankings = []
    for name in ("excess", "loss"):
        order = np.argsort(table[name], kind="stable")
        rankings.append(
            {
                "by": name,
                "highest": _rows(run, stream, table, order[::-1][:LISTED]),
                "lowest": _rows(run, stream, table, order[:LISTED]),
                "histogram": _histogram(table[name]),
            }
        )
    return {"reads": len(records), "windows": len(table["window"]), "rankings": rankings}


def by_window(records: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of a table with a row for each window, in the order of their numbers.

    `loss` and `excess`, how far that is above the updates' own, are means over all `reads`.
    """
    order = np.lexsort((records["step"], records["window"]))
    window, step = records["window"][order], records["step"][order]
    loss = records["loss"][order].astype(np.float64)
    excess = loss - _loss_of_updates(records)[step]
    begins = np.flatnonzero(np.r_[True, window[1:] != window[:-1]])
    reads = np.diff(np.r_[begins, len(window)])
    return {
        "window": window[begins],
        "reads": reads,
        "loss": np.add.reduceat(loss, begins) / reads,
        "excess": np.add.reduceat(excess, begins) / reads,
        "first": loss[begins],
        "last": loss[begins + reads - 1],
    }


def _loss_of_updates(records: np.ndarray) -> np.ndarray:
    """Return the mean loss of the windows of each update, smoothed, by its number."""
    counts = np.bincount(records["step"])
    sums = np.bincount(records["step"], weights=records["loss"])
    read = np.flatnonzero(counts)
    means = np.zeros(len(counts))
    means[read] = smooth(sums[read] / counts[read])
    return means


def _rows(
    run: Run, stream: TokenStream | None, table: dict[str, np.ndarray], chosen: np.ndarray
) -> list[dict[str, Any]]:
    texts = beginnings(run, stream, table["window"][chosen])
    return [
        {
            **{name: int(table[name][i]) for name in ("window", "reads")},
            **{
                name: significant(table[name][i], 5) for name in ("loss", "excess", "first", "last")
            },
            "text": text,
        }
        for i, text in zip(chosen.tolist(), texts, strict=True)
    ]


def beginnings(run: Run, stream: TokenStream | None, windows: np.ndarray) -> list[str]:
    """Return the text that each window begins with; "" where it is past the data, or that is not
    here.
    """
    if stream is None:
        return [""] * len(windows)
    length = run.config.model.block_size
    if run.config.train.rows == "padded":
        padded = PaddedRows(stream, length)
        there = windows < len(padded)
        starts, counts = padded.places(np.where(there, windows, 0))
    else:
        there = windows < (len(stream) - 1) // length
        starts, counts = windows * length, np.full(len(windows), length)
    return [
        stream.tokenizer.decode(stream.read(start, min(count, SHOWN))) if known else ""
        for known, start, count in zip(there, starts.tolist(), counts.tolist(), strict=True)
    ]


def _histogram(values: np.ndarray) -> dict[str, list[float]]:
    """Return the counts of `BINS` equal bins and their edges; what is far out is in the last."""
    low, high = np.quantile(values, (0.001, 0.999))
    edges = np.linspace(low, max(high, low + 1e-6), BINS + 1)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return {"edges": [significant(edge) for edge in edges], "counts": counts.tolist()}
