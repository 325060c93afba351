"""The loss of every window at every update, for those who ask which text a model finds hard.

    runs/NAME/window_losses.bin     16 bytes a window an update: step, window, loss, little-endian

Kept with --train.log-window-losses: 154 MB for ten billion tokens at a context of 1,024. A window's
number is its place in the data (orders.py), the same in every epoch.
"""

import os
from pathlib import Path

import numpy as np

from config import UserError

FILE = "window_losses.bin"
RECORD = np.dtype([("step", "<i4"), ("window", "<i8"), ("loss", "<f4")])


def append(run: Path, step: int, windows: np.ndarray, losses: np.ndarray) -> None:
    """Add the losses of update `step`, nats a token; raises UserError when the disk is full."""
    records = np.empty(len(windows), RECORD)
    records["step"], records["window"], records["loss"] = step, windows, losses
    path = run / FILE
    try:
        with open(path, "ab") as file:
            file.write(records.tobytes())
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror}); the checkpoints are intact, so "
            f"`python main.py --resume {run.name}` continues once there is room."
        ) from error


def read(run: Path) -> np.ndarray:
    """Return all records of a run, shape (n,) with fields step, window and loss; none if not kept.

    A record that was cut off in the writing is left out.
    """
    path = run / FILE
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}).") from error
    return np.frombuffer(data, RECORD, len(data) // RECORD.itemsize)


def rewind(run: Path, step: int) -> None:
    """Drop the records after `step`, and what was cut off in writing, in place."""
    path = run / FILE
    if not path.exists():
        return
    kept = np.searchsorted(read(run)["step"], step, side="right")
    try:
        os.truncate(path, int(kept) * RECORD.itemsize)
    except OSError as error:
        raise UserError(f"{path} could not be cut back ({error.strerror}).") from error
