"""One update, and the loop around it.

The loop is for step in range(start, last + 1): whatever is due after `step` updates (validation,
samples, a checkpoint) happens at its top, so that step 0 and the final weights are measured too.
Everything that depends on time is a function of (config, step); stopping and resuming changes
nothing.

As a script, the all-reduce check: torchrun --standalone --nproc_per_node=8 train.py
"""

import contextlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import logs
from all_reduce import check_all_reduce
from command_line import run_script
from config import Config, UserError
from devices import autocast
from distributed import (
    World,
    gather_over_ranks,
    join_world,
    sum_over_ranks,
)
from files import write_atomically
from fineweb import training_batches
from measuring import measure, save_unmeasured
from optim import lr_at, set_rates
from orders import update_windows
from signals import stop_requests
from trainer import Trainer, begin


def train(config: Config, run: Path, world: World, resumed: Path | None = None) -> tuple[int, bool]:
    """Train until the last update, or train.stop_at, from scratch or from checkpoint `resumed`.

    Returns the step reached and whether the run is complete. It is not when a signal asked to stop:
    then a checkpoint has been written, at the last step too, where measurements are still missing.
    Raises UserError, before the weights are touched, when numbers are not finite.
    """
    with stop_requests(quiet=not world.is_main) as asked:
        trainer, start = begin(config, run, world, resumed, asked)
        # A checkpoint has been measured at its step, unless a signal left no time for that.
        measured = resumed is not None and trainer.losses["val_loss"] is not None
        bar, last = trainer.bar, trainer.last
        batches = training_batches(trainer.data, config, world, start + 1, last)
        with contextlib.closing(batches), contextlib.closing(bar):
            bar.start()
            for step in range(start, last + 1):
                if not trainer.stopping and (step > start or not measured):
                    measure(trainer, step)
                if trainer.stopping and step > start:
                    save_unmeasured(trainer, step)
                if trainer.stopping or step == last:
                    break
                loss, norm = update(trainer, next(batches), step + 1)
                record_update(trainer, step + 1, loss, norm)
    return step, not trainer.stopping


def update(trainer: Trainer, windows: Tensor, step: int) -> tuple[float, float]:
    """Make update `step` from this rank's windows (G / world size, T + 1).

    Returns the mean loss over all ranks in nats a token and the norm of the global gradient. Raises
    UserError when either is not finite, with the weights as they were.
    """
    config, world = trainer.config, trainer.world
    set_rates(trainer.optimizers, step, trainer.total, config.optim)
    losses = accumulate_gradients(trainer, windows, step)
    clip = config.optim.grad_clip or math.inf
    grad_norm = nn.utils.clip_grad_norm_(trainer.model.parameters(), clip)
    # One message and one wait for the device tell all: the loss, and whether anyone is to stop.
    facts = torch.stack([losses.mean(), losses.new_tensor(trainer.asked.is_set()), grad_norm])
    sum_over_ranks(facts[:2])
    total, asked, norm = facts.tolist()
    loss, trainer.stopping = total / world.size, asked > 0
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(_not_finite(trainer, step, losses, loss, norm))
    for optimizer in trainer.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss, norm


def accumulate_gradients(trainer: Trainer, windows: Tensor, step: int) -> Tensor:
    """Add up the gradients of update `step`, averaged over all ranks' windows.

    Returns the mean loss of each of this rank's micro-batches, on the device.
    """
    config, forward, world = trainer.config, trainer.parallel, trainer.world
    micro_batches = windows.split(config.train.micro_batch)
    losses = []
    for i, batch in enumerate(micro_batches):
        _seed_dropout(config, step, world.rank * len(windows) + i * config.train.micro_batch)
        # Gradients are averaged over ranks only with the last micro-batch; DDP decides that in the
        # forward pass already.
        waits = world.size > 1 and i < len(micro_batches) - 1
        with forward.no_sync() if waits else contextlib.nullcontext():
            with autocast(world.device, trainer.dtype):
                _, mean = forward(batch[:, :-1], batch[:, 1:])
            # All micro-batches have as many tokens, so this adds up to the mean over all of them.
            (mean / len(micro_batches)).backward()
        losses.append(mean.detach())
    return torch.stack(losses)


def _not_finite(trainer: Trainer, step: int, losses: Tensor, loss: float, norm: float) -> str:
    """Write non_finite.json and return the sentence that says what was found, and where."""
    windows = update_windows(trainer.config, step, len(trainer.data))
    by_micro_batch = windows.reshape(-1, trainer.config.train.micro_batch)
    bad = ~torch.isfinite(gather_over_ranks(losses)).flatten().cpu().numpy()
    suspects = by_micro_batch[bad].flatten().tolist() or windows.tolist()
    found = {"step": step, "loss": str(loss), "grad_norm": str(norm)}
    found |= {"suspects": suspects, "windows": windows.tolist()}
    path = trainer.run / "non_finite.json"
    if trainer.world.is_main:
        write_atomically(path, (json.dumps(found) + "\n").encode())
    shown = ", ".join(map(str, suspects[:8]))
    more = f" and {len(suspects) - 8} more" if len(suspects) > 8 else ""
    return (
        f"Update {step} has a loss of {loss:g} and a gradient norm of {norm:g}, and has not "
        f"touched the weights; it comes from windows {shown}{more} ({path} lists them). The "
        "checkpoints are good: --resume continues, perhaps with --train.dtype float32, or start "
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
    if trainer.world.is_main:
        line = {
            "kind": "train",
            "step": step,
            "tokens": step * config.train.tokens_per_update,
            "loss": loss,
            "lr": lr_at(step, trainer.total, config.optim),
            "grad_norm": norm,
            "tokens_per_second": bar.tokens_per_second,
            "mfu": bar.mfu,
            "seconds": trainer.seconds,
        }
        logs.append_metrics(trainer.run, line)


def main() -> None:
    """Check the processes and their all-reduce."""
    with join_world("auto") as world:
        check_all_reduce(world)


if __name__ == "__main__":
    run_script(main)
