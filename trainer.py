"""What one process holds while it trains, made from a config or read back from a checkpoint."""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import checkpoint
import logs
import window_losses
from attention import choose_attention
from config import Config, UserError, accumulation_steps, identity_digest, last_update
from counts import flops_per_token
from devices import peak_flops, pick_dtype
from distributed import World, compile_module, distribute
from fineweb import FineWebEdu
from in_loop_evals import Benchmark, open_benchmarks
from loss_scale import LossScale, loss_scale
from manifests import find_data, manifest_digest
from micro_batch import largest_that_fits
from model import GPT
from modern import build_model
from optim import build_optimizers
from outcome import Outcome, updates_behind
from scoring import Scorer
from sharding import is_shared, shard
from start import load_start
from tqdm_bars import TrainingBar
from trackers import Tracker, send

# What state.json says of the model; its scores are by benchmark, each with the step they are of.
MEASURED = ("train_loss", "val_loss", "bits_per_byte", "scores")


@dataclass
class Trainer:
    """What one process holds while it trains.

    `compiled` is `model` behind torch.compile, where that is on; `parallel` is that behind DDP,
    where there are other processes. All three share their parameters, and under FSDP are one.
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
    # Where this start ends: at `total`, or before it at train.stop_at.
    last: int
    bar: TrainingBar
    # What is scored on the way, and by what; nothing, where train.eval_interval is 0.
    benchmarks: list[Benchmark]
    scorer: Scorer | None
    loss_scale: LossScale | None
    # How many updates late their outcomes are read.
    updates_behind: int
    # The kernel that computes attention.
    attention: str
    # What came of updates and has not been read yet, oldest first.
    outcomes: list[Outcome] = field(default_factory=list)
    # Training seconds before this process started, and the last losses and scores, for state.json.
    earlier_seconds: float = 0.0
    losses: dict[str, Any] = field(default_factory=dict)
    # Where the record is shown besides, on the main process.
    trackers: list[Tracker] = field(default_factory=list)
    # Set by a signal to this process; `stopping` when all processes have agreed to stop.
    asked: threading.Event = field(default_factory=threading.Event)
    stopping: bool = False

    @property
    def seconds(self) -> float:
        """Seconds of training in the whole run so far, without validation and the like."""
        return self.earlier_seconds + self.bar.seconds


def record(trainer: Trainer, line: dict[str, Any]) -> None:
    """Add a line to metrics.jsonl and show it in the trackers; one process does that for all."""
    if trainer.world.is_main:
        logs.append_metrics(trainer.run, line)
        send(trainer.trackers, line)


def begin(
    config: Config,
    run: Path,
    world: World,
    resumed: Path | None,
    asked: threading.Event,
    tries_micro_batch: bool = False,
) -> tuple[Trainer, int]:
    """Build the model, optimizers and data of a run, and load them from `resumed` if given.

    With `tries_micro_batch`, the micro-batch is halved for as long as it does not fit the device.
    Returns the trainer and the step it stands at. Raises UserError when the checkpoint is damaged,
    or the config or the data are not those it was made with.
    """
    dtype = pick_dtype(config.train.dtype, world.device)
    directory = find_data(config.data)
    train_data = FineWebEdu(directory, "train", config.model.block_size, config.train.rows)
    # Whatever is trained on, validation reads the same windows.
    val_data = FineWebEdu(directory, "val", config.model.block_size)
    state = {"step": 0, "seconds": 0.0}
    if resumed is not None:
        state = checkpoint.read_state(resumed)
        _check_same_run(resumed, state, config, directory)
    model, compiled, optimizers = _build(config, world, resumed, dtype)
    shared = is_shared(model.head_weight)
    if tries_micro_batch and not shared:
        config = largest_that_fits(config, compiled, resumed is None, world)
    attention = choose_attention(config, world, dtype)
    start = state["step"]
    last = last_update(config, start)
    losses = {name: state.get(name) for name in MEASURED}
    if world.is_main:
        _tidy(config, run, start, losses["val_loss"] is not None)
        logs.write_environment(run, start, _facts(config, world, dtype, directory, attention))
    evaluates, compile_mode = config.train.eval_interval > 0, config.train.compile
    scorer = Scorer(model, world, dtype, compile_mode) if evaluates else None
    trainer = Trainer(
        config,
        run,
        world,
        train_data,
        val_data,
        model,
        compiled,
        model if shared else distribute(compiled, world),
        optimizers,
        dtype,
        config.train.updates,
        last,
        _bar(start, last, config, world),
        open_benchmarks(config, train_data.stream.tokenizer, scorer) if scorer else [],
        scorer,
        loss_scale(dtype, config.train.loss_scale, state.get("loss_scale")),
        updates_behind(world.device, dtype),
        attention,
        earlier_seconds=state["seconds"],
        losses=losses,
        asked=asked,
    )
    return trainer, start


def _build(
    config: Config, world: World, resumed: Path | None, dtype: torch.dtype
) -> tuple[GPT, nn.Module, list[torch.optim.Optimizer]]:
    """Return the model on its devices, whole or in shares, the same compiled, and its optimizers.

    With `resumed`, they are as in that checkpoint.
    """
    train = config.train
    torch.set_float32_matmul_precision("high" if train.dtype == "tf32" else "highest")
    # Weights are drawn on the CPU, so that a seed means the same on every device.
    torch.manual_seed(train.seed)
    model = build_model(config.model)
    model.gradient_checkpointing = train.gradient_checkpointing
    model.gives_window_losses = train.log_window_losses
    if resumed is not None:
        checkpoint.load_model(resumed, model)
    elif config.init:
        load_start(config, model)
    compiled = model
    if train.parallel == "fsdp" and world.size > 1:
        shard(model, train.compile, world)
    else:
        compiled = compile_module(model.to(world.device), train.compile, world)
    # Sharing out replaces the parameters, so whatever refers to them comes after it.
    optimizers = build_optimizers(model, config.optim, dtype)
    if resumed is not None:
        checkpoint.load_optimizers(resumed, model, optimizers)
    return model, compiled, optimizers


def _bar(start: int, last: int, config: Config, world: World) -> TrainingBar:
    """Draw the bar, so that whatever fails to begin afterwards has a line of its own."""
    train, peak = config.train, _peak_speed(config, world)
    disable = not world.is_main
    return TrainingBar(start, last, train.tokens_per_update, peak, disable=disable)


def _tidy(config: Config, run: Path, start: int, measured: bool) -> None:
    """Make a run's directory that of a run which stands at `start`, and was measured there or not.

    Whatever a kill left behind goes: half a checkpoint, one too many, and later records.
    """
    checkpoint.remove_leftovers(run)
    checkpoint.prune(run, config.train.keep_checkpoints, start)
    logs.rewind(run, start, measured)
    window_losses.rewind(run, start)


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


def _facts(
    config: Config, world: World, dtype: torch.dtype, directory: Path, attention: str
) -> dict[str, Any]:
    on_gpu = world.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(world.device) if on_gpu else world.device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "attention": attention,
        "parallel": config.train.parallel if world.size > 1 else None,
        "world_size": world.size,
        "micro_batch": config.train.micro_batch,
        "accumulation": accumulation_steps(config, world.size),
        "data_manifest_sha256": manifest_digest(directory),
    }
