"""Checkpoints: atomic save, verify, resume, prune.

    runs/NAME/checkpoints/step_000250/  model.safetensors  optimizer.safetensors  state.json

A checkpoint is written beside its place and appears by one rename, so one that is present is
complete; `state.json` holds the sha256 of its siblings and a digest of itself, so one that was
damaged later is noticed. Tensors are stored in full, under the raw model's parameter names and
without vocabulary padding, however many ranks held them. Nothing is pickled.
"""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from config import UserError
from corpus.tokenizer import Tokenizer, read_tokenizer
from modern import build_model
from training.distributed import full_tensor, is_sharded
from utils import load_config, seal, sha256_file, sync_directory, unseal, write_atomically

STATE = "state.json"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
# Matrices with rows past the vocabulary.
PADDED = ("wte.weight", "lm_head.weight")
Optimizers = list[torch.optim.Optimizer]
STATE_KEYS = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum",)}


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optimizers: Optimizers,
    state: dict[str, Any],
    is_main: bool = True,
) -> Path:
    """Write the checkpoint of `step` and return its directory; `state` is added to state.json.

    All ranks call this and the main one writes; the others give it their rows, under FSDP. Raises
    UserError when the disk is full; earlier checkpoints are untouched then.
    """
    final = checkpoint_path(run, step)
    if hasattr(model, "reshard"):
        model.reshard()  # FSDP keeps gathered what no backward pass follows
    weights = _gather(model.named_parameters(), model, is_main)
    # Optimizers have no state before a first step, as where every step in float16 overflowed.
    moments = (
        (name, optimizer.state[parameter][key])
        for name, parameter, optimizer, key in _state_places(model, optimizers)
        if parameter in optimizer.state
    )
    moments = _gather(moments, model, is_main)
    if not is_main:
        return final
    temporary = final.with_name(f".{final.name}.tmp")
    try:
        remove_leftovers(run)
        temporary.mkdir(parents=True)
        digests = {}
        for name, tensors in ((WEIGHTS, weights), (OPTIMIZER, moments)):
            save_file(tensors, temporary / name)
            # safetensors makes files that only their owner reads; the umask decides, as elsewhere.
            os.chmod(temporary / name, temporary.stat().st_mode & 0o666)
            with open(temporary / name, "rb") as file:
                os.fsync(file.fileno())
            digests[name] = sha256_file(temporary / name)
        write_atomically(temporary / STATE, seal({"step": step, **state, "sha256": digests}))
        if final.exists():  # damaged, or left by a signal without a validation
            os.replace(final, final.with_name(f".{final.name}.old.tmp"))
        os.replace(temporary, final)
        sync_directory(final.parent)
        remove_leftovers(run)
    except (OSError, SafetensorError, UserError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"The checkpoint of step {step} could not be written ({error}); earlier ones are "
            f"intact. Make room and continue with `python main.py --resume {run.name}`."
        ) from error
    return final


def _state_places(model: nn.Module, optimizers: Optimizers) -> Iterator[tuple]:
    """Yield (name/key, parameter, its optimizer, key) of every tensor of the optimizers' state."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            for key in STATE_KEYS[type(optimizer).__name__]:
                yield f"{names[parameter]}/{key}", parameter, optimizer, key


def _gather(tensors: Iterable[tuple], model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Return full, unpadded tensors by name on the CPU; nothing on ranks that only give rows."""
    gathered = {}
    for name, tensor in tensors:
        tensor = full_tensor(tensor.detach())  # one at a time: no GPU has room for all
        if keep:
            padded = tensor.dim() == 2 and name.partition("/")[0] in PADDED
            tensor = tensor[: model.config.vocab_size] if padded else tensor
            gathered[name] = tensor.cpu().contiguous()
    return gathered


def checkpoint_path(run: Path, step: int) -> Path:
    """Return where the checkpoint of `step` belongs."""
    return run / "checkpoints" / f"step_{step:06d}"


def all_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint directories of a run, oldest first."""
    directory = run / "checkpoints"
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{directory} cannot be read ({error.strerror}).") from error
    steps = [n for n in names if n.startswith("step_") and n.removeprefix("step_").isdecimal()]
    return sorted((directory / name for name in steps), key=step_of)


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's directory is named after."""
    return int(path.name.removeprefix("step_"))


def newest(run: Path) -> Path | None:
    """Return the newest checkpoint that is intact, or None when a run has none yet.

    One that is not, or cannot be read, is named in a line. Raises UserError when none is left.
    """
    reasons = []
    for path in reversed(all_checkpoints(run)):
        try:
            verify(path)
            return path
        except UserError as error:
            reasons.append(str(error))
            print(f"skipping {path.name}: {error}", file=sys.stderr, flush=True)
    if reasons:
        raise UserError(
            f"None of the {len(reasons)} checkpoints of {run} can be used; of the newest: "
            f"{reasons[0]}"
        )
    return None


def newest_to_resume(run: Path) -> Path | None:
    """Return `newest` after tidying up, for the one process that writes to the run."""
    remove_leftovers(run)
    return newest(run)


def verify(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state after comparing digests; raises UserError naming a bad file."""
    state = read_state(path)
    if path.name != f"step_{state['step']:06d}":
        raise UserError(f"{path} holds the checkpoint of step {state['step']}; rename it back.")
    for name in (WEIGHTS, OPTIMIZER):
        _verify_file(path / name, state)
    return state


def _verify_file(path: Path, state: dict[str, Any]) -> None:
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    if digest != state["sha256"].get(path.name):
        raise UserError(f"{path} is damaged: its checksum differs from that in {STATE}.")


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json; raises UserError if it is unreadable or damaged."""
    try:
        state = unseal((path / STATE).read_bytes())
        if not (isinstance(state.get("step"), int) and isinstance(state.get("sha256"), dict)):
            raise ValueError("it lacks step or sha256")
    except OSError as error:
        raise UserError(f"{path / STATE} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"{path / STATE} is damaged ({error}).") from error
    return state


def best(run: Path) -> Path | None:
    """Return the checkpoint with the best validation loss, the earlier of equals, or None."""
    losses = {}
    for path in all_checkpoints(run):
        with contextlib.suppress(UserError):  # an old one that is damaged stops nothing
            if (loss := read_state(path).get("val_loss")) is not None:
                losses[path] = loss
    return min(losses, key=losses.get) if losses else None


def prune(run: Path, keep: int, step: int) -> None:
    """Delete all checkpoints up to `step` but the `keep` newest of them and the best.

    A later one was found damaged when the run was resumed; it must not take the place of a good one
    here, and is replaced when the run comes to it again. What cannot be deleted costs a line.
    """
    try:
        paths = [path for path in all_checkpoints(run) if step_of(path) <= step]
        kept = {*paths[-keep:], best(run)}
        for path in paths:
            if path not in kept:
                # Renamed first, so that a half-deleted one never looks complete.
                doomed = path.with_name(f".{path.name}.tmp")
                os.replace(path, doomed)
                shutil.rmtree(doomed)
    except (OSError, UserError) as error:
        print(f"an old checkpoint could not be deleted ({error})", file=sys.stderr, flush=True)


def remove_leftovers(run: Path) -> None:
    """Delete what an interrupted save or prune left behind; put back what was to be replaced."""
    for old in (run / "checkpoints").glob(".step_*.old.tmp"):
        final = old.with_name(old.name.removeprefix(".").removesuffix(".old.tmp"))
        if not final.exists():
            with contextlib.suppress(OSError):
                os.replace(old, final)
    for path in (run / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def load_model(path: Path, model: nn.Module) -> None:
    """Read a checkpoint's weights into a model, before it is sharded; UserError if misshapen."""
    parameters = dict(model.named_parameters())
    with _opened(path / WEIGHTS, parameters, model, "architecture") as file, torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_padded(file.get_tensor(name), parameter))


def load_optimizers(path: Path, model: nn.Module, optimizers: Optimizers) -> None:
    """Read the optimizers' state, under FSDP this rank's rows; UserError if it is of others."""
    places = list(_state_places(model, optimizers))
    parameters = {name: parameter for name, parameter, _, _ in places}
    with _opened(path / OPTIMIZER, parameters, model, "optimizer") as file:
        for name, parameter, optimizer, key in places if file.keys() else ():
            optimizer.state[parameter][key] = _as_state(file.get_tensor(name), parameter)


@contextlib.contextmanager
def _opened(path: Path, like: dict[str, Tensor], model: nn.Module, kind: str) -> Iterator[Any]:
    """Open a file of tensors that has to have the names and unpadded shapes of `like`."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {n: tuple(file.get_slice(n).get_shape()) for n in file.keys()}  # noqa: SIM118
            wanted = {}
            for name, parameter in like.items():
                parameter_name, _, key = name.partition("/")
                rows = model.config.vocab_size if parameter_name in PADDED else len(parameter)
                wanted[name] = () if key == "step" else (rows, *parameter.shape[1:])
            wrong = [n for n in {**wanted, **shapes} if wanted.get(n) != shapes.get(n)]
            # No optimizer has state before its first step.
            if wrong and (shapes or kind != "optimizer"):
                raise UserError(
                    f"{path} is of another {kind}: {len(wrong)} tensors differ, first {wrong[0]}."
                )
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error


def _padded(stored: Tensor, like: Tensor) -> Tensor:
    """Return `stored` with rows of zeros added up to the number `like` has."""
    missing = like.shape[0] - stored.shape[0]
    return torch.cat([stored, stored.new_zeros(missing, *stored.shape[1:])]) if missing else stored


def _as_state(stored: Tensor, parameter: Tensor) -> Tensor:
    """Return an optimizer's tensor on the device of its parameter, and sharded as that is."""
    if stored.dim() == 0:
        return stored.to(parameter.device, copy=True)
    stored = _padded(stored, parameter)
    if not is_sharded(parameter):
        # A copy: what is read is the file itself, mapped into memory.
        return stored.to(parameter.device, copy=True)
    from torch.distributed.tensor import distribute_tensor

    # Every rank has read all of it, so nothing is sent.
    layout = parameter.device_mesh, parameter.placements
    return distribute_tensor(stored.to(parameter.device), *layout, src_data_rank=None)


def load_run_model(path: Path) -> tuple[nn.Module, Tokenizer]:
    """Return the model of a checkpoint, on the CPU, and its tokenizer."""
    state = read_state(path)
    _verify_file(path / WEIGHTS, state)
    run = path.resolve().parent.parent
    model = build_model(load_config(run).model)
    load_model(path, model)
    return model, read_tokenizer(directory=run, **(state.get("tokenizer") or {"name": "gpt2"}))
