"""Checkpoints: atomic save, verify, resume, prune.

    runs/NAME/checkpoints/step_000250/  model.safetensors  optimizer.safetensors  state.json

A checkpoint is written beside its place and appears by one rename, so one that is present is
complete; `state.json` holds the sha256 of its siblings and a digest of itself, so one that was
damaged later is noticed.
Tensors are stored whole, under the raw model's parameter names and without vocabulary padding,
however many processes held them. Nothing is pickled.
"""

import hashlib
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from config import UserError
from files import seal, sync_directory, unseal
from model import GPT
from sharding import from_rows, rows_of, whole

FORMAT = 2
STATE = "state.json"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
# Matrices with rows past the vocabulary.
PADDED = ("wte.weight", "lm_head.weight")
STATE_KEYS = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum",)}


def save(
    run: Path,
    step: int,
    model: GPT,
    optimizers: list[torch.optim.Optimizer],
    state: dict[str, Any],
    writes: bool = True,
) -> Path:
    """Write the checkpoint of `step` and return its directory; `state` is added to state.json.

    All processes of a run call this, and one of them writes; the others give it their shares, where
    the model is shared out. Raises UserError when the disk is full; earlier checkpoints are
    untouched then.
    """
    final = checkpoint_path(run, step)
    weights = _weights(model, writes)
    moments = _optimizer_tensors(model, optimizers, writes)
    if not writes:
        return final
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        remove_leftovers(run)
        temporary.mkdir(parents=True)
        save_file(weights, temporary / WEIGHTS)
        save_file(moments, temporary / OPTIMIZER)
        digests = {name: _sha256(temporary / name) for name in (WEIGHTS, OPTIMIZER)}
        record = {"format": FORMAT, "step": step, **state, "sha256": digests}
        (temporary / STATE).write_bytes(seal(record))
        for name in (WEIGHTS, OPTIMIZER, STATE):
            _sync_file(temporary / name)
        sync_directory(temporary)
        # One of this step was found damaged, or was left by a signal without a validation.
        if final.exists():
            os.replace(final, final.with_name(f".{final.name}.old.tmp"))
        os.replace(temporary, final)
        sync_directory(final.parent)
        remove_leftovers(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"The checkpoint of step {step} could not be written ({error}); earlier ones are "
            f"intact. Make room and continue with `python main.py --resume {run.name}`."
        ) from error
    return final


def checkpoint_path(run: Path, step: int) -> Path:
    """Return where the checkpoint of `step` belongs."""
    return run / "checkpoints" / f"step_{step:06d}"


def all_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint directories of a run, oldest first."""
    found = (run / "checkpoints").glob("step_*")
    whole = (path for path in found if path.name.removeprefix("step_").isdecimal())
    return sorted(whole, key=step_of)


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's directory is named after."""
    return int(path.name.removeprefix("step_"))


class OtherVersionError(UserError):
    """A checkpoint that is intact, but not for this version to read."""


def newest(run: Path) -> Path | None:
    """Return the newest checkpoint that is intact, or None when a run has none yet.

    Each damaged one is named in a line. Raises UserError when there are some and none is intact, or
    when the newest that is belongs to another version: beginning again is for a person to decide.
    """
    paths = all_checkpoints(run)
    for path in reversed(paths):
        try:
            verify(path)
        except OtherVersionError:
            raise
        except UserError as error:
            print(f"skipping a damaged checkpoint: {error}", file=sys.stderr, flush=True)
        else:
            return path
    if paths:
        raise UserError(
            f"None of the {len(paths)} checkpoints of {run} is intact; to train it again from the "
            f"start, delete {run / 'checkpoints'}."
        )
    return None


def best(run: Path) -> Path | None:
    """Return the checkpoint with the least validation loss, the earlier of equals, or None."""
    losses = {path: _val_loss(path) for path in all_checkpoints(run)}
    known = {path: loss for path, loss in losses.items() if loss is not None}
    return min(known, key=known.get) if known else None


def _val_loss(path: Path) -> float | None:
    try:
        return read_state(path).get("val_loss")
    except UserError:
        # An old checkpoint that is damaged is no reason to stop a run.
        return None


def prune(run: Path, keep: int, step: int) -> None:
    """Delete all checkpoints up to `step` but the `keep` newest of them and the best.

    A later one was found damaged when the run was resumed; it must not take the place of a good one
    here, and is replaced when the run comes to it again.
    """
    paths = [path for path in all_checkpoints(run) if step_of(path) <= step]
    kept = {*paths[-keep:], best(run)}
    for path in paths:
        if path not in kept:
            # Renamed first, so that a half-deleted one never looks complete.
            doomed = path.with_name(f".{path.name}.tmp")
            os.replace(path, doomed)
            shutil.rmtree(doomed)


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json; raises UserError if it is damaged or of another version."""
    try:
        state = unseal((path / STATE).read_bytes())
    except OSError as error:
        raise UserError(f"{path / STATE} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"{path / STATE} is damaged ({error}).") from error
    if state.get("format") != FORMAT:
        raise OtherVersionError(
            f"{path} has checkpoint format {state.get('format')}, and this version reads {FORMAT}; "
            "continue it with the version that wrote it."
        )
    return state


def verify(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state after comparing digests; raises UserError naming a bad file."""
    state = read_state(path)
    if path.name != f"step_{state['step']:06d}":
        raise UserError(f"{path} holds the checkpoint of step {state['step']}; rename it back.")
    for name in (WEIGHTS, OPTIMIZER):
        _verify_file(path, name, state)
    return state


def _verify_file(path: Path, name: str, state: dict[str, Any]) -> None:
    try:
        intact = _sha256(path / name) == state["sha256"][name]
    except (OSError, KeyError, TypeError) as error:
        raise UserError(f"{path / name} is missing or unreadable ({error}).") from error
    if not intact:
        raise UserError(f"{path / name} is damaged: its checksum differs from {STATE}.")


def load_model(path: Path, model: GPT) -> None:
    """Read a checkpoint's weights into `model`; raises UserError if damaged or misshapen."""
    stored = _read_tensors(path, WEIGHTS)
    expected = dict(model.named_parameters())
    shapes = {name: tuple(_unpad(name, tensor, model).shape) for name, tensor in expected.items()}
    wrong = [n for n, shape in shapes.items() if n not in stored or stored[n].shape != shape]
    wrong += [n for n in stored if n not in shapes]
    if wrong:
        raise UserError(
            f"{path} is of another architecture: {len(wrong)} tensors differ, first {wrong[0]}."
        )
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(_pad(stored[name], parameter))


def load_optimizers(path: Path, model: GPT, optimizers: list[torch.optim.Optimizer]) -> None:
    """Read the optimizers' state; raises UserError if damaged or not that of these optimizers."""
    stored = _read_tensors(path, OPTIMIZER)
    if not stored:
        # In float16, all updates so far may have overflowed.
        return
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                prefix = f"{names[parameter]}/"
                for key in STATE_KEYS[type(optimizer).__name__]:
                    if prefix + key not in stored:
                        raise UserError(
                            f"{path / OPTIMIZER} is of another optimizer: no {prefix}{key}."
                        )
                    tensor = _restore(key, stored.pop(prefix + key), parameter)
                    optimizer.state[parameter][key] = tensor
    if stored:
        raise UserError(f"{path / OPTIMIZER} is of another optimizer: it has {min(stored)}.")


def _restore(key: str, stored: Tensor, parameter: nn.Parameter) -> Tensor:
    if key == "step":
        return stored.to(parameter.device)
    rows = rows_of(_pad(stored, parameter), parameter)
    # A share of its own, so that the file's memory can go.
    rows = rows.to(parameter.device, copy=len(rows) < len(parameter))
    return from_rows(rows, parameter)


def _weights(model: GPT, keep: bool) -> dict[str, Tensor]:
    """Return the weights by name on the CPU, or nothing on a process that only gives its shares."""
    tensors = {}
    for name, parameter in model.named_parameters():
        # One at a time: no device has room for all.
        tensor = whole(parameter.detach())
        if keep:
            tensors[name] = _unpad(name, tensor, model).cpu().contiguous()
    return tensors


def _optimizer_tensors(
    model: GPT, optimizers: list[torch.optim.Optimizer], keep: bool
) -> dict[str, Tensor]:
    """Return every tensor of the optimizers' state under "parameter name/key", as `_weights`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            name = names[parameter]
            for key, tensor in state.items():
                gathered = whole(tensor.detach())
                if keep:
                    unpadded = gathered if key == "step" else _unpad(name, gathered, model)
                    tensors[f"{name}/{key}"] = unpadded.cpu().contiguous()
    return tensors


def _unpad(name: str, tensor: Tensor, model: GPT) -> Tensor:
    return tensor[: model.config.vocab_size] if name in PADDED else tensor


def _pad(stored: Tensor, like: Tensor) -> Tensor:
    """Return `stored` with rows of zeros added up to the number `like` has."""
    missing = like.shape[0] - stored.shape[0]
    return torch.cat([stored, stored.new_zeros(missing, *stored.shape[1:])]) if missing else stored


def _read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    _verify_file(path, name, read_state(path))
    try:
        with safe_open(path / name, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path / name} cannot be read ({error}).") from error


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def remove_leftovers(run: Path) -> None:
    """Delete what an interrupted save or prune left behind."""
    for path in (run / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
