"""Which sequences of the corpus a run found hard, and which easy, from its sequence_losses.bin.

A sequence read early has a high loss because the model knew little then. So sequences are ranked
twice: by how far their loss lies above that of the steps that read them, and by the loss itself.
"""

from typing import Any

import numpy as np

from corpus.shards import TokenShards
from curves import significant
from figures import smooth
from metrics import Run
from training.logger import read_sequence_losses

LISTED, BINS = 20, 48
# Tokens shown of a sequence: a line or two of text.
SHOWN = 64


def rank_sequences(run: Run, shards: TokenShards | None) -> dict[str, Any] | None:
    """Return the sequences with the highest and lowest losses, or None where none were logged.

    `shards` is the training split, if it is here, for the sequences' text. Raises UserError when
    the record or the data cannot be read.
    """
    records = read_sequence_losses(run.directory)
    records = records[np.isfinite(records["loss"])]
    if not len(records):
        return None
    table = by_sequence(records)
    rankings = []
    for name in ("excess", "loss"):
        order = np.argsort(table[name], kind="stable")
        rankings.append(
            {
                "by": name,
                "highest": _rows(run, shards, table, order[::-1][:LISTED]),
                "lowest": _rows(run, shards, table, order[:LISTED]),
                "histogram": _histogram(table[name]),
            }
        )
    return {"reads": len(records), "sequences": len(table["sequence"]), "rankings": rankings}


def by_sequence(records: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of a table with a row for each sequence, in the order of their numbers.

    `loss` and `excess`, how far that is above the steps' own, are means over all `reads`.
    """
    order = np.lexsort((records["step"], records["sequence"]))
    sequence, step = records["sequence"][order], records["step"][order]
    loss = records["loss"][order].astype(np.float64)
    excess = loss - _loss_of_steps(records)[step]
    begins = np.flatnonzero(np.r_[True, sequence[1:] != sequence[:-1]])
    reads = np.diff(np.r_[begins, len(sequence)])
    return {
        "sequence": sequence[begins],
        "reads": reads,
        "loss": np.add.reduceat(loss, begins) / reads,
        "excess": np.add.reduceat(excess, begins) / reads,
        "first": loss[begins],
        "last": loss[begins + reads - 1],
    }


def _loss_of_steps(records: np.ndarray) -> np.ndarray:
    """Return the mean loss of the sequences of each step, smoothed, by its number."""
    counts = np.bincount(records["step"])
    sums = np.bincount(records["step"], weights=records["loss"])
    read = np.flatnonzero(counts)
    means = np.zeros(len(counts))
    means[read] = smooth(sums[read] / counts[read])
    return means


def _rows(
    run: Run, shards: TokenShards | None, table: dict[str, np.ndarray], chosen: np.ndarray
) -> list[dict[str, Any]]:
    texts = beginnings(run, shards, table["sequence"][chosen])
    return [
        {
            **{name: int(table[name][i]) for name in ("sequence", "reads")},
            **{
                name: significant(table[name][i], 5) for name in ("loss", "excess", "first", "last")
            },
            "text": text,
        }
        for i, text in zip(chosen.tolist(), texts, strict=True)
    ]


def beginnings(run: Run, shards: TokenShards | None, sequences: np.ndarray) -> list[str]:
    """Return the text that each sequence begins with; "" where it is past the data, or that is not
    here.
    """
    if shards is None:
        return [""] * len(sequences)
    length = run.config.model.block_size
    there = sequences < (len(shards) - 1) // length
    tokens = shards.read(np.where(there, sequences, 0) * length, min(length, SHOWN, len(shards)))
    return [
        shards.tokenizer.decode(row) if known else ""
        for known, row in zip(there, tokens, strict=True)
    ]


def _histogram(values: np.ndarray) -> dict[str, list[float]]:
    """Return the counts of `BINS` equal bins and their edges; what is far out is in the last."""
    low, high = np.quantile(values, (0.001, 0.999))
    edges = np.linspace(low, max(high, low + 1e-6), BINS + 1)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return {"edges": [significant(edge) for edge in edges], "counts": counts.tolist()}
