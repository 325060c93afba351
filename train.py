"""One update, and the loop around it.

The loop is for step in range(start, last + 1): whatever is due after `step` updates (validation,
samples, a checkpoint) happens at its top, so that step 0 and the final weights are measured too.
Everything that depends on time is a function of (config, step); stopping and resuming changes
nothing.

As a script, the all-reduce check: torchrun --standalone --nproc_per_node=8 train.py
"""

import contextlib
import gc
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from all_reduce import check_all_reduce
from attention import attention_by
from command_line import run_script
from config import Config, UserError, accumulation_steps
from devices import autocast
from distributed import (
    World,
    gather_over_ranks,
    join_world,
)
from files import write_atomically
from fineweb import inputs_and_targets, training_batches
from measuring import NOTHING, measure, save_unmeasured, what_is_due
from optim import lr_at, set_rates
from orders import update_windows
from outcome import Outcome, outcome
from sharding import whole
from signals import stop_requests
from trackers import CLOSING_SECONDS, close_trackers, open_trackers
from trainer import Trainer, begin, record
from window_losses import append as append_window_losses

# Seconds that trackers get to finish after a signal.
STOPPING_SECONDS = 10.0


def train(
    config: Config,
    run: Path,
    world: World,
    resumed: Path | None = None,
    tries_micro_batch: bool = False,
) -> tuple[int, bool]:
    """Train until the last update, or train.stop_at, from scratch or from checkpoint `resumed`.

    `tries_micro_batch` lets the config's micro-batch be halved where it does not fit the device.
    Returns the step reached and whether the run is complete. It is not when a signal asked to stop:
    then a checkpoint has been written, at the last step too, where measurements are still missing.
    Raises UserError, before a checkpoint holds them, when numbers are not finite.
    """
    with stop_requests(quiet=not world.is_main) as asked, contextlib.ExitStack() as stack:
        trainer, start = begin(config, run, world, resumed, asked, tries_micro_batch)
        # A checkpoint has been measured at its step, unless a signal left no time for that.
        measured = resumed is not None and trainer.losses["val_loss"] is not None
        bar, last = trainer.bar, trainer.last
        stack.enter_context(contextlib.closing(bar))
        batches = training_batches(trainer.data, config, world, start + 1, last)
        stack.enter_context(contextlib.closing(batches))
        stack.enter_context(attention_by(trainer.attention))
        stack.enter_context(_short_collections())
        if world.is_main:
            names = config.train.trackers
            trainer.trackers = open_trackers(names, run, config, start, bar.write)
            stack.callback(_close_trackers, trainer)
        bar.start()
        for step in range(start, last + 1):
            due = what_is_due(trainer, step) if step > start or not measured else NOTHING
            if any(due) or step == last:
                settle(trainer)
            if any(due) and not trainer.stopping:
                measure(trainer, step, due)
            if trainer.stopping and step > start:
                settle(trainer)
                save_unmeasured(trainer, step)
            if trainer.stopping or step == last:
                break
            update(trainer, next(batches), step + 1)
            settle(trainer, behind=trainer.updates_behind)
    return step, not trainer.stopping


def _close_trackers(trainer: Trainer) -> None:
    """Wait for the trackers, not long after a signal, whose sender does not wait either."""
    seconds = STOPPING_SECONDS if trainer.stopping else CLOSING_SECONDS
    close_trackers(trainer.trackers, seconds)


@contextlib.contextmanager
def _short_collections() -> Iterator[None]:
    """Leave what is there now out of Python's garbage collections.

    Modules and their code are hundreds of thousands of objects, and looking through all of them
    takes a tenth of a second, at any time, while the other processes wait.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def update(trainer: Trainer, windows: Tensor, step: int) -> None:
    """Make update `step` from this rank's windows (G / world size, T + 1).

    What came of it is left to `settle`. Raises UserError, with the weights as they were, when loss
    or gradient is not finite, where that is known in time.
    """
    config, scale = trainer.config, trainer.loss_scale
    set_rates(trainer.optimizers, step, trainer.total, config.optim)
    losses, window_losses = accumulate_gradients(trainer, windows, step)
    if scale is not None:
        scale.unscale(trainer.model)
    clip = config.optim.grad_clip or math.inf
    norm = whole(nn.utils.clip_grad_norm_(trainer.model.parameters(), clip))
    asked = trainer.asked.is_set()
    found = outcome(step, losses, norm, asked, trainer.world, window_losses)
    trainer.outcomes.append(found)
    takes_step = trainer.updates_behind > 0 or _may_step(trainer, found)
    for optimizer in trainer.optimizers:
        if takes_step:
            optimizer.step()
        optimizer.zero_grad()


def _may_step(trainer: Trainer, found: Outcome) -> bool:
    """Say whether gradients are finite; raises UserError if they should be and are not.

    With loss scaling they may overflow, and the loss may not.
    """
    _require_finite(trainer, found)
    _, norm, _ = found.read()
    finite, scale = math.isfinite(norm), trainer.loss_scale
    if scale is not None and finite:
        scale.held()
    elif scale is not None:
        scale.overflowed()
    return finite


def _require_finite(trainer: Trainer, found: Outcome) -> None:
    """Raise UserError unless loss and norm are finite; with loss scaling, the norm need not be."""
    loss, norm, _ = found.read()
    if not math.isfinite(loss) or not (math.isfinite(norm) or trainer.loss_scale):
        raise UserError(_not_finite(trainer, found))


def settle(trainer: Trainer, behind: int = 0) -> None:
    """Read what came of all updates but the last `behind`, and record it.

    Raises UserError when it is not finite, before anything is made of the weights.
    """
    while len(trainer.outcomes) > behind:
        found = trainer.outcomes.pop(0)
        _require_finite(trainer, found)
        loss, norm, asked = found.read()
        # The processes have agreed on it; one update more changes nothing about that.
        trainer.stopping = trainer.stopping or asked
        if found.window_losses is not None and trainer.world.is_main:
            windows = update_windows(trainer.config, found.step, len(trainer.data))
            append_window_losses(
                trainer.run, found.step, windows, found.window_losses.cpu().numpy()
            )
        record_update(trainer, found.step, loss, norm)


def accumulate_gradients(
    trainer: Trainer, windows: Tensor, step: int
) -> tuple[Tensor, Tensor | None]:
    """Add up the gradients of update `step`, averaged over all ranks' windows.

    Returns the mean loss of each of this rank's micro-batches, on the device, weighed by tokens,
    and that of each window if the run keeps it.
    """
    config, forward, world = trainer.config, trainer.parallel, trainer.world
    micro_batches = windows.split(config.train.micro_batch)
    factor = trainer.loss_scale.factor if trainer.loss_scale else 1.0
    weights, losses, window_losses = micro_batch_weights(trainer, step), [], []
    for i, batch in enumerate(micro_batches):
        _seed_dropout(config, step, world.rank * len(windows) + i * config.train.micro_batch)
        # Gradients are averaged over ranks only with the last micro-batch; DDP decides that in the
        # forward pass already. FSDP would have to keep whole gradients to wait.
        ddp = world.size > 1 and config.train.parallel == "ddp"
        waits = ddp and i < len(micro_batches) - 1
        with forward.no_sync() if waits else contextlib.nullcontext():
            with autocast(world.device, trainer.dtype):
                by_window, mean = forward(*inputs_and_targets(batch))
            # This adds up to the mean over all tokens of the update.
            mean = mean * weights[i]
            (mean / len(micro_batches) * factor).backward()
        losses.append(mean.detach())
        window_losses.append(by_window)
    return torch.stack(losses), torch.cat(window_losses) if by_window is not None else None


def micro_batch_weights(trainer: Trainer, step: int) -> list[float]:
    """Return what this rank's micro-batches of update `step` weigh, 1 on average over all ranks.

    All have as many tokens, unless windows have padding.
    """
    config, data, world = trainer.config, trainer.data, trainer.world
    size = config.train.micro_batch
    mine = accumulation_steps(config, world.size)
    if data.padded is None:
        return [1.0] * mine
    _, counts = data.padded.places(update_windows(config, step, len(data)))
    tokens = counts.reshape(-1, size).sum(axis=1)
    return (tokens / tokens.mean())[world.rank * mine : (world.rank + 1) * mine].tolist()


def _not_finite(trainer: Trainer, found: Outcome) -> str:
    """Write non_finite.json and return the sentence that says what was found, and where."""
    step, losses, (loss, norm, _) = found.step, found.losses, found.read()
    windows = update_windows(trainer.config, step, len(trainer.data))
    by_micro_batch = windows.reshape(-1, trainer.config.train.micro_batch)
    bad = ~torch.isfinite(gather_over_ranks(losses)).flatten().cpu().numpy()
    suspects = by_micro_batch[bad].flatten().tolist() or windows.tolist()
    facts = {"step": step, "loss": str(loss), "grad_norm": str(norm)}
    facts |= {"suspects": suspects, "windows": windows.tolist()}
    path = trainer.run / "non_finite.json"
    if trainer.world.is_main:
        write_atomically(path, (json.dumps(facts) + "\n").encode())
    shown = ", ".join(map(str, suspects[:8]))
    more = f" and {len(suspects) - 8} more" if len(suspects) > 8 else ""
    return (
        f"Update {step} has a loss of {loss:g} and a gradient norm of {norm:g}; it comes "
        f"from windows {shown}{more} ({path} lists them), and no checkpoint has seen it. "
        "Those before are good: --resume continues, perhaps with --train.dtype float32, or start "
        "again with a lower --optim.lr."
    )


def _seed_dropout(config: Config, step: int, window: int) -> None:
    """Make dropout noise a function of (config, step) and of the windows' place in the update."""
    if max(config.model.dropout, config.model.attention_dropout or 0) > 0:
        key = np.random.SeedSequence([config.train.seed, step, window])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))


def record_update(trainer: Trainer, step: int, loss: float, norm: float) -> None:
    """Advance the bar and, at the log interval, write the train line of update `step`."""
    config, bar = trainer.config, trainer.bar
    if step % config.train.log_interval and step != trainer.last:
        bar.update()
        return
    bar.update(loss)
    trainer.losses["train_loss"] = loss
    line = {
        "kind": "train",
        "step": step,
        "tokens": step * config.train.tokens_per_update,
        "loss": loss,
        "lr": lr_at(step, trainer.total, config.optim),
        # Not finite where loss scaling left the update out.
        "grad_norm": norm if math.isfinite(norm) else None,
        "tokens_per_second": bar.tokens_per_second,
        "mfu": bar.mfu,
        "seconds": trainer.seconds,
    }
    if trainer.loss_scale is not None:
        line["loss_scale"] = trainer.loss_scale.factor
    record(trainer, line)


def main() -> None:
    """Check the processes and their all-reduce."""
    with join_world("auto") as world:
        check_all_reduce(world)


if __name__ == "__main__":
    run_script(main)
