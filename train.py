"""One update, one validation, the loop.

The loop is for step in range(start, total + 1): whatever is due after `step` updates (validation,
samples, a checkpoint) happens at its top, so that step 0 and the final weights are measured too.
Everything that depends on time is a function of (config, step); stopping and resuming changes
nothing.

As a script, the all-reduce check: torchrun --standalone --nproc_per_node=8 train.py
"""

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import checkpoint
import logs
from command_line import run_script
from config import (
    Config,
    UserError,
    accumulation_steps,
    flops_per_token,
    identity_digest,
    windows_per_update,
)
from distributed import (
    World,
    autocast,
    barrier,
    check_all_reduce,
    compile_module,
    distribute,
    join_world,
    peak_flops,
    pick_dtype,
    sum_over_ranks,
    synchronize,
)
from fineweb import FineWebEdu, training_batches, validation_batch_count, validation_batches
from manifests import find_data, manifest_digest
from model import GPT, IGNORED
from optim import build_optimizers, lr_at, schedule, set_rates
from recipes import PROMPTS
from sample import continuations
from tokenizer import can_encode
from tqdm_bars import EvaluationBar, TrainingBar


@dataclass
class Trainer:
    """What one process holds while it trains.

    `compiled` is `model` behind torch.compile, where that is on; `parallel` is that behind DDP,
    where there are other processes. All three share their parameters.
    """

    config: Config
    run: Path
    world: World
    data: FineWebEdu
    val_data: FineWebEdu
    model: GPT
    compiled: nn.Module
    parallel: nn.Module
    optimizers: list[torch.optim.Optimizer]
    dtype: torch.dtype
    total: int
    bar: TrainingBar
    # Training seconds before this process started, and the last losses, for state.json.
    earlier_seconds: float = 0.0
    losses: dict[str, Any] | None = None

    @property
    def seconds(self) -> float:
        """Seconds of training in the whole run so far, without validation and the like."""
        return self.earlier_seconds + self.bar.seconds


def train(config: Config, run: Path, world: World, resumed: Path | None = None) -> None:
    """Train until update config.train.updates, from scratch or from checkpoint `resumed`."""
    trainer, start = _begin(config, run, world, resumed)
    bar, total = trainer.bar, trainer.total
    batches = training_batches(trainer.data, config, world, start + 1, total)
    with contextlib.closing(batches), contextlib.closing(bar):
        bar.start()
        for step in range(start, total + 1):
            # A resumed run has been measured at its first step already.
            if step > start or resumed is None:
                measure(trainer, step)
            if step == total:
                break
            loss, norm = update(trainer, next(batches), step + 1)
            record_update(trainer, step + 1, loss, norm)


def _begin(config: Config, run: Path, world: World, resumed: Path | None) -> tuple[Trainer, int]:
    """Build the model, optimizers and data of a run, and load them from `resumed` if given."""
    dtype = pick_dtype(config.train.dtype, world.device)
    torch.set_float32_matmul_precision("high" if config.train.dtype == "tf32" else "highest")
    directory = find_data(config.data)
    block_size = config.model.block_size
    # Weights are drawn on the CPU, so that a seed means the same on every device.
    torch.manual_seed(config.train.seed)
    model = GPT(config.model).to(world.device)
    optimizers = build_optimizers(model, config.optim, dtype)
    state = {"step": 0, "seconds": 0.0}
    if resumed is not None:
        state = checkpoint.verify(resumed)
        _check_same_run(resumed, state, config, directory)
        checkpoint.load_model(resumed, model)
        checkpoint.load_optimizers(resumed, model, optimizers)
    compiled = compile_module(model, config.train.compile, world)
    start, total = state["step"], config.train.updates
    bar = TrainingBar(
        start,
        total,
        config.train.tokens_per_update,
        _peak_speed(config, world),
        disable=not world.is_main,
    )
    trainer = Trainer(
        config,
        run,
        world,
        FineWebEdu(directory, "train", block_size),
        FineWebEdu(directory, "val", block_size),
        model,
        compiled,
        distribute(compiled, world),
        optimizers,
        dtype,
        total,
        bar,
        earlier_seconds=state["seconds"],
        losses={name: state.get(name) for name in ("train_loss", "val_loss", "bits_per_byte")},
    )
    if world.is_main:
        logs.rewind(run, start if resumed is not None else -1)
        logs.write_environment(run, start, _facts(trainer, directory))
    return trainer, start


def _check_same_run(path: Path, state: dict[str, Any], config: Config, directory: Path) -> None:
    """Raise UserError if the run's config or data are not those the checkpoint was made with."""
    if state["config_digest"] != identity_digest(config):
        raise UserError(f"{path} was made with another config.json; restore that to continue.")
    if state["data_manifest_sha256"] != manifest_digest(directory):
        raise UserError(f"{directory} is not the data {path} was trained on; restore that first.")


def _peak_speed(config: Config, world: World) -> float | None:
    """Return the tokens per second that would keep all devices at their peak, where it is known."""
    peak = peak_flops(world.device)
    return peak * world.size / flops_per_token(config.model) if peak else None


def _facts(trainer: Trainer, directory: Path) -> dict[str, Any]:
    world, config = trainer.world, trainer.config
    on_gpu = world.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(world.device) if on_gpu else world.device.type,
        "dtype": str(trainer.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "world_size": world.size,
        "micro_batch": config.train.micro_batch,
        "accumulation": accumulation_steps(config, world.size),
        "data_manifest_sha256": manifest_digest(directory),
    }


def update(trainer: Trainer, windows: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Make update `step` from this rank's windows (G / world size, T + 1).

    Returns this rank's mean loss in nats a token and the norm of the global gradient, on the
    device.
    """
    config, forward, world = trainer.config, trainer.parallel, trainer.world
    set_rates(trainer.optimizers, schedule(step, trainer.total, config.optim), config.optim)
    micro_batches = windows.split(config.train.micro_batch)
    loss = torch.zeros((), device=world.device)
    for i, batch in enumerate(micro_batches):
        _seed_dropout(config, step, world.rank * len(windows) + i * config.train.micro_batch)
        # Gradients are averaged over ranks only with the last micro-batch; DDP decides that in the
        # forward pass already.
        waits = world.size > 1 and i < len(micro_batches) - 1
        with forward.no_sync() if waits else contextlib.nullcontext():
            with autocast(world.device, trainer.dtype):
                _, mean = forward(batch[:, :-1], batch[:, 1:])
            # All micro-batches have as many tokens, so this adds up to the mean over all of them.
            share = mean / len(micro_batches)
            share.backward()
        loss += share.detach()
    clip = config.optim.grad_clip or math.inf
    norm = nn.utils.clip_grad_norm_(trainer.model.parameters(), clip)
    for optimizer in trainer.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss, norm


def _seed_dropout(config: Config, step: int, window: int) -> None:
    """Make dropout noise a function of (config, step) and of the windows' place in the update."""
    if config.model.dropout > 0:
        key = np.random.SeedSequence([config.train.seed, step, window])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))


def record_update(trainer: Trainer, step: int, loss: Tensor, norm: Tensor) -> None:
    """Advance the bar and, at the log interval, write the train line of update `step`."""
    config, world, bar = trainer.config, trainer.world, trainer.bar
    if step % config.train.log_interval and step != trainer.total:
        bar.update()
        return
    mean_loss = (sum_over_ranks(loss) / world.size).item()
    bar.update(mean_loss)
    trainer.losses["train_loss"] = mean_loss
    if world.is_main:
        line = {
            "kind": "train",
            "step": step,
            "tokens": step * config.train.tokens_per_update,
            "loss": mean_loss,
            "lr": lr_at(step, trainer.total, config.optim),
            "grad_norm": norm.item(),
            "tokens_per_second": bar.tokens_per_second,
            "mfu": bar.mfu,
            "seconds": trainer.seconds,
        }
        logs.append_metrics(trainer.run, line)


def measure(trainer: Trainer, step: int) -> None:
    """Do what is due after `step` updates: validate, sample, save a checkpoint."""
    train = trainer.config.train
    epoch = len(trainer.data) // windows_per_update(trainer.config)
    saves = step > 0 and (_every(train.checkpoint_interval, step) or step % epoch == 0)
    saves = saves or step == trainer.total
    if not (saves or step == 0 or _every(train.val_interval, step)):
        return
    synchronize(trainer.world.device)
    with trainer.bar.paused():
        record_validation(trainer, step)
        if (saves or step == 0) and trainer.world.is_main:
            write_samples(trainer, step)
        if saves and step > 0:
            save_checkpoint(trainer, step)


def _every(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def record_validation(trainer: Trainer, step: int) -> None:
    """Validate, write the val line and print it above the bar."""
    loss, bits_per_byte = validate(trainer)
    trainer.losses |= {"val_loss": loss, "bits_per_byte": bits_per_byte}
    tokens = step * trainer.config.train.tokens_per_update
    line = {"kind": "val", "step": step, "tokens": tokens, "loss": loss}
    if bits_per_byte is not None:
        line["bits_per_byte"] = bits_per_byte
    per_byte = f", {bits_per_byte:.3f} bits a byte" if bits_per_byte is not None else ""
    trainer.bar.write(f"step {step:>6}: validation loss {loss:.4f}{per_byte}")
    if trainer.world.is_main:
        logs.append_metrics(trainer.run, line)


@torch.no_grad()
def validate(trainer: Trainer) -> tuple[float, float | None]:
    """Return the mean loss in nats a token over the validation tokens, and bits per byte of text.

    Every validation of every run reads the same tokens; ranks share them and their sums are added.
    """
    config, world, data = trainer.config, trainer.world, trainer.val_data
    token_bytes = data.stream.tokenizer.token_bytes()
    # One row a batch: nats, tokens, bytes of text.
    rows = [torch.zeros(3, dtype=torch.float64)]
    trainer.compiled.eval()
    count = validation_batch_count(data, config, world)
    with EvaluationBar("validating", count, "batch", disable=not world.is_main) as bar:
        for inputs, targets in validation_batches(data, config, world):
            scored = targets[targets != IGNORED]
            with autocast(world.device, trainer.dtype):
                _, mean = trainer.compiled(inputs.to(world.device), targets.to(world.device))
            text_bytes = token_bytes[scored.numpy()].sum()
            sums = [mean.item() * len(scored), len(scored), text_bytes]
            rows.append(torch.tensor(sums, dtype=torch.float64))
            bar.update()
    trainer.compiled.train()
    # MPS has no float64, but then there is nobody to add up with.
    device = world.device if world.size > 1 else "cpu"
    nats, tokens, text_bytes = sum_over_ranks(torch.stack(rows).sum(0).to(device)).tolist()
    return nats / tokens, nats / math.log(2) / text_bytes if text_bytes else None


def write_samples(trainer: Trainer, step: int) -> None:
    """Continue the fixed prompts, on one process, into samples.md."""
    train, tokenizer = trainer.config.train, trainer.data.stream.tokenizer
    if train.sample_tokens == 0:
        return
    prompts = [prompt for prompt in PROMPTS if can_encode(tokenizer, prompt)]
    with autocast(trainer.world.device, trainer.dtype):
        texts = continuations(trainer.model, tokenizer, prompts, train.sample_tokens, train.seed)
    logs.append_samples(trainer.run, step, prompts, texts)


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
        checkpoint.prune(trainer.run, trainer.config.train.keep_checkpoints)
    barrier()


def main() -> None:
    """Check the processes and their all-reduce."""
    with join_world("auto") as world:
        check_all_reduce(world)


if __name__ == "__main__":
    run_script(main)
