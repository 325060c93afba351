"""One update, one validation, the loop.

The loop is for step in range(start, last + 1): whatever is due after `step` updates (validation,
samples, a checkpoint) happens at its top, so that step 0 and the final weights are measured too.
Everything that depends on time is a function of (config, step); stopping and resuming changes
nothing.

As a script, the all-reduce check: torchrun --standalone --nproc_per_node=8 train.py
"""

import contextlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import logs
from command_line import run_script
from config import Config, UserError, identity_digest, windows_per_update
from cross_entropy import IGNORED
from distributed import (
    World,
    any_over_ranks,
    autocast,
    barrier,
    check_all_reduce,
    gather_over_ranks,
    join_world,
    sum_over_ranks,
    synchronize,
)
from evaluation import evaluate, headline
from files import write_atomically
from fineweb import training_batches, validation_batch_count, validation_batches
from in_loop_evals import sentence
from manifests import manifest_digest
from optim import lr_at, set_rates
from orders import update_windows
from recipes import PROMPTS
from sample import continuations
from signals import stop_requests
from tokenizer import can_encode
from tqdm_bars import EvaluationBar
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


def measure(trainer: Trainer, step: int) -> None:
    """Do what is due after `step` updates: validate, score benchmarks, sample, save a checkpoint.

    A request to stop leaves it undone, for when the run is resumed.
    """
    train = trainer.config.train
    epoch = len(trainer.data) // windows_per_update(trainer.config)
    saves = step > 0 and (_every(train.checkpoint_interval, step) or step % epoch == 0)
    saves = saves or step == trainer.last
    validates = saves or step == 0 or _every(train.val_interval, step)
    # At step 0 as at all multiples, and in the end.
    scores = _every(train.eval_interval, step) or step == trainer.last
    scores = scores and bool(trainer.benchmarks)
    if not (validates or scores):
        return
    synchronize(trainer.world.device)
    with trainer.bar.paused():
        if validates:
            record_validation(trainer, step)
        if scores and not trainer.stopping:
            record_scores(trainer, step)
        if trainer.stopping:
            return
        if (saves or step == 0) and trainer.world.is_main:
            write_samples(trainer, step)
        if saves and step > 0:
            save_checkpoint(trainer, step)


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def record_validation(trainer: Trainer, step: int) -> None:
    """Validate, write the val line and print it above the bar; raises UserError for nan or inf."""
    sums = validate(trainer)
    if trainer.stopping:
        return
    nats, tokens, text_bytes = sums
    loss = nats / tokens
    if not math.isfinite(loss):
        raise UserError(
            f"After update {step} the validation loss is {loss:g}: the weights have diverged, so "
            "no checkpoint is made of them. The ones before are good; start again with a lower "
            "--optim.lr."
        )
    bits_per_byte = nats / math.log(2) / text_bytes if text_bytes else None
    trainer.losses |= {"val_loss": loss, "bits_per_byte": bits_per_byte}
    line = {"kind": "val", "step": step}
    line |= {"tokens": step * trainer.config.train.tokens_per_update, "loss": loss}
    if bits_per_byte is not None:
        line["bits_per_byte"] = bits_per_byte
    per_byte = f", {bits_per_byte:.3f} bits a byte" if bits_per_byte is not None else ""
    trainer.bar.write(f"step {step:>6}: validation loss {loss:.4f}{per_byte}")
    if trainer.world.is_main:
        logs.append_metrics(trainer.run, line)


def record_scores(trainer: Trainer, step: int) -> None:
    """Score the benchmarks, write an eval line each and print it above the bar.

    A request to stop ends it, and sets `stopping`, without a line for what was not finished.
    """
    for benchmark in trainer.benchmarks:
        task = benchmark.task
        result = evaluate(trainer.scorer, task, benchmark.plan, trainer.asked.is_set)
        trainer.stopping = result is None
        if trainer.stopping:
            return
        latest = {task.name: {"step": step, **result.metrics}}
        trainer.losses["scores"] = (trainer.losses["scores"] or {}) | latest
        trainer.bar.write(f"step {step:>6}: {sentence(benchmark, result.metrics)}")
        # The first benchmark is the one to watch.
        if benchmark is trainer.benchmarks[0]:
            trainer.bar.show_score(f"{task.name} {headline(task, result.metrics)}")
        if trainer.world.is_main:
            line = {"kind": "eval", "step": step}
            line |= {"tokens": step * trainer.config.train.tokens_per_update, "task": task.name}
            line |= {"examples": result.examples, **result.metrics, "seconds": result.seconds}
            logs.append_metrics(trainer.run, line)


@torch.no_grad()
def validate(trainer: Trainer) -> tuple[float, float, float]:
    """Return the nats, the tokens and the bytes of text of the validation tokens, over all ranks.

    Every validation of every run reads the same tokens; ranks share them and their sums are added.
    A request to stop cuts it short and sets `stopping`.
    """
    config, world, data = trainer.config, trainer.world, trainer.val_data
    token_bytes = data.stream.tokenizer.token_bytes()
    sums = torch.zeros(3, dtype=torch.float64)
    trainer.compiled.eval()
    batches = validation_batches(data, config, world)
    # The first process has as many batches as any; the others go round with it, to agree.
    count = validation_batch_count(data, config, World(0, world.size, world.device))
    with EvaluationBar("validating", count, "batch", disable=not world.is_main) as bar:
        for _ in range(count):
            trainer.stopping = any_over_ranks(trainer.asked.is_set(), world)
            if trainer.stopping:
                break
            for inputs, targets in itertools.islice(batches, 1):
                sums += _score(trainer, inputs, targets, token_bytes)
            bar.update()
    trainer.compiled.train()
    # MPS has no float64, but then there is nobody to add up with.
    device = world.device if world.size > 1 else "cpu"
    return tuple(sum_over_ranks(sums.to(device)).tolist())


def _score(trainer: Trainer, inputs: Tensor, targets: Tensor, token_bytes: np.ndarray) -> Tensor:
    """Return the nats, the tokens and the bytes of text of one batch, float64 (3,)."""
    device = trainer.world.device
    scored = targets[targets != IGNORED]
    with autocast(device, trainer.dtype):
        _, mean = trainer.compiled(inputs.to(device), targets.to(device))
    text_bytes = token_bytes[scored.numpy()].sum()
    return torch.tensor([mean.item() * len(scored), len(scored), text_bytes], dtype=torch.float64)


def write_samples(trainer: Trainer, step: int) -> None:
    """Continue the fixed prompts, on one process, into samples.md."""
    train, tokenizer = trainer.config.train, trainer.data.stream.tokenizer
    if train.sample_tokens == 0:
        return
    prompts = [prompt for prompt in PROMPTS if can_encode(tokenizer, prompt)]
    with autocast(trainer.world.device, trainer.dtype):
        texts = continuations(trainer.model, tokenizer, prompts, train.sample_tokens, train.seed)
    logs.append_samples(trainer.run, step, prompts, texts)


def save_unmeasured(trainer: Trainer, step: int) -> None:
    """Save where a signal stopped the run; if a measurement is due, resuming begins with it."""
    trainer.losses |= {"val_loss": None, "bits_per_byte": None}
    with trainer.bar.paused():
        save_checkpoint(trainer, step)


def save_checkpoint(trainer: Trainer, step: int) -> None:
    """Save, on one process while the others wait, and delete what need not be kept."""
    if trainer.world.is_main:
        tokenizer = trainer.data.stream.tokenizer
        state = {
            "config_digest": identity_digest(trainer.config),
            "data_manifest_sha256": manifest_digest(trainer.data.stream.directory),
            "seconds": trainer.seconds,
            "tokenizer": {
                "name": tokenizer.name,
                "alphabet": getattr(tokenizer, "alphabet", None),
            },
            **trainer.losses,
        }
        checkpoint.save(trainer.run, step, trainer.model, trainer.optimizers, state)
        checkpoint.prune(trainer.run, trainer.config.train.keep_checkpoints, step)
    barrier()


def main() -> None:
    """Check the processes and their all-reduce."""
    with join_world("auto") as world:
        check_all_reduce(world)


if __name__ == "__main__":
    run_script(main)
