"""All rungs in turn: one table, one file, one figure."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from makemore.data import Data
from makemore.figures import draw_climb
from makemore.rungs import RUNGS, settings_for
from makemore.sampling import marked_words
from makemore.train import Result, train
from metrics import aligned
from utils import write_atomically

# Words that a rung shows of what it has learnt.
SHOWN = 5


def climb(
    data: Data,
    seed: int,
    name: str,
    runs: Path,
    steps: int | None = None,
    asked: Callable[[], bool] | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]] | None:
    """Train every rung on `data`, print the table, and return its rows; None when stopped.

    Rungs are runs of their own under `runs`/`name`, so a climb that was interrupted goes on where
    it was. climb.json and the figure, in `runs`, are those of the climb that ended last. Raises
    UserError, before anything is trained, when a rung does not fit the data.
    """
    every = [settings_for(rung, data, seed, steps) for rung in RUNGS]
    climbed = []
    for settings in every:
        result = train(data, settings, runs / name / settings.rung, asked, quiet)
        if not result.finished:
            return None
        climbed.append(_row(data, result))
    content = json.dumps(climbed, indent=1, ensure_ascii=False) + "\n"
    write_atomically(runs / "climb.json", content.encode())
    draw_climb(f"The ladder on {data.name}", climbed, runs / "climb")
    print(aligned([_cells(row) for row in climbed]))
    return climbed


def _row(data: Data, result: Result) -> dict[str, Any]:
    settings, (train_loss, val_loss) = result.settings, result.losses
    return {
        "rung": settings.rung,
        "parameters": result.parameters,
        "train_loss": train_loss,
        "val_loss": val_loss,
        "seconds": result.record.seconds,
        "context": result.model.block_size,
        "steps": settings.steps,
        "data": data.name,
        "seed": settings.seed,
        "words": marked_words(result.model, data, SHOWN, settings.seed),
        "curve": result.record.curve,
    }


def _cells(row: dict[str, Any]) -> dict[str, str]:
    return {
        "rung": row["rung"],
        "parameters": f"{row['parameters']:,}",
        "context": str(row["context"]),
        "train": f"{row['train_loss']:.4f}",
        "val": f"{row['val_loss']:.4f}",
        "seconds": f"{row['seconds']:.1f}",
        "five words it makes": ", ".join(row["words"]),
    }
