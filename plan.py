"""What a run costs, before it starts: operations, memory, hours on known GPUs, disk.

    python main.py [RECIPE] [--size SIZE] [--group.field value ...] --plan
                   [--gpus N] [--mfu FRACTION] [--price PER_GPU_HOUR]

Nothing is measured or built here. Memory is memory.py's estimate; time is operations divided by
what the GPUs are assumed to reach, a fraction of their peak in hardware.py that the reader chooses.
"""

import dataclasses
import math
from dataclasses import dataclass

import recipes
from config import (
    Config,
    UserError,
    accumulation_steps,
    replace,
    total_updates,
)
from counts import flops_per_token, parameter_count
from hardware import GPUS, Gpu
from manifests import Manifest, find_data, read_manifest
from memory import (
    FLOAT,
    Memory,
    Where,
    largest_micro_batch,
    memory,
    optimizer_state,
    padded_parameters,
)
from rows import training_windows

# What is assumed where nothing is said.
GPU_COUNT, GPU_COUNTS = 8, {"nano": 1}
MFU = 0.4

# How much of a GPU's memory tensors may take; contexts, buffers and gaps have the rest.
USABLE = 0.9

TOKEN_BYTES = 2

PARTS = [field.name for field in dataclasses.fields(Memory)]


@dataclass(frozen=True)
class Assumptions:
    """What a plan rests on besides the config; raises UserError for what cannot be."""

    gpus: int
    mfu: float
    price: float | None

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise UserError(f"--gpus {self.gpus} must be at least 1.")
        if not 0 < self.mfu <= 1:
            raise UserError(f"--mfu {self.mfu:g} is a fraction of the peak, above 0 and up to 1.")
        if self.price is not None and not 0 <= self.price < math.inf:
            raise UserError(f"--price {self.price:g} must not be negative: it is paid an hour.")


def describe(
    config: Config, gpus: int | None = None, mfu: float | None = None, price: float | None = None
) -> str:
    """Return the plan of a run as text, with this module's own assumptions where none are given.

    The data's manifest is read if there is one. Raises UserError for assumptions that cannot be,
    GPUs that do not divide an update, and updates that only the data could tell.
    """
    gpus = GPU_COUNTS.get(config.size, GPU_COUNT) if gpus is None else gpus
    assumed = Assumptions(gpus, MFU if mfu is None else mfu, price)
    manifest = found_manifest(config)
    config = with_updates(config, manifest)
    sections = {
        "plan": [f"{config.recipe} at size {config.size}; nothing has been started"],
        "model": _model(config),
        "data": _data(config, manifest),
        "compute": _compute(config),
        "memory": _memory(config, assumed),
        "time": _time(config, assumed),
        "disk": _disk(config, manifest),
    }
    lines = []
    for name, rows in sections.items():
        lines += [f"{name if i == 0 else '':<9} {row}".rstrip() for i, row in enumerate(rows)]
    return "\n".join(lines)


def found_manifest(config: Config) -> Manifest | None:
    """Return what the run's data says of itself, or None where there is none yet."""
    try:
        directory = find_data(config.data)
    except UserError:
        return None
    try:
        return read_manifest(directory)
    except UserError:
        # A directory that is being filled has no manifest yet.
        if any(directory.glob("*.npy")) or any(directory.glob("*.bin")):
            raise
        return None


def with_updates(config: Config, manifest: Manifest | None) -> Config:
    """Return the config with its number of updates, and with the vocabulary if the data is there.

    Raises UserError where only the data can tell how many there are.
    """
    train = config.train
    if manifest is not None:
        config = replace(config, {"model.vocab_size": manifest.vocab_size})
        return replace(config, {"train.updates": total_updates(config, training_windows(config))})
    if train.updates is None and train.epochs is not None:
        raise UserError(
            f"How many updates {train.epochs:g} epochs are depends on the data '{config.data}', "
            "which is not here; give --train.tokens or --train.updates to plan without it."
        )
    budget = max(1, train.tokens // train.tokens_per_update)
    return replace(config, {"train.updates": budget if train.updates is None else train.updates})


def tokens_of(config: Config) -> int:
    """Return the tokens that all updates of a run read."""
    return config.train.updates * config.train.tokens_per_update


def flops_of(config: Config) -> float:
    """Return the floating-point operations of a whole run."""
    return tokens_of(config) * flops_per_token(config.model)


def hours(config: Config, gpu: Gpu, count: int, mfu: float) -> float:
    """Return the hours of training on so many GPUs at a fraction `mfu` of their peak."""
    return flops_of(config) / (count * gpu.flops * mfu) / 3600


def checkpoint_bytes(config: Config) -> int:
    """Return the size of one checkpoint: weights and optimizer state, without padding."""
    unpadded = parameter_count(config.model) / padded_parameters(config.model)
    return round(FLOAT * parameter_count(config.model) + optimizer_state(config) * unpadded)


def checkpoints_kept(config: Config) -> int:
    """Return how many checkpoints a run has at most: the newest, the best, the one being made."""
    return config.train.keep_checkpoints + 2


def _model(config: Config) -> list[str]:
    model = config.model
    return [
        f"{parameter_count(model):,} parameters ({padded_parameters(model):,} in memory, the "
        f"vocabulary of {model.vocab_size:,} padded to {model.padded_vocab_size:,})",
        f"{model.architecture}: {model.n_layer} layers, {model.n_head} heads, width "
        f"{model.n_embd}, context {model.block_size}",
    ]


def _data(config: Config, manifest: Manifest | None) -> list[str]:
    train = config.train
    run = (
        f"{train.updates:,} updates of {train.tokens_per_update:,} tokens, "
        f"{tokens_of(config):,} in all"
    )
    if manifest is None:
        return [f"{config.data} is not here; the tokens are the recipe's budget", run]
    here = manifest.tokens("train")
    return [
        f"{config.data}: {here:,} training and {manifest.tokens('val'):,} validation tokens",
        f"{run}: {tokens_of(config) / here:.2f} epochs",
    ]


def _compute(config: Config) -> list[str]:
    each = flops_per_token(config.model) / 1e9
    return [f"{flops_of(config):.3g} FLOP: {each:.3g} GFLOP a token, forward and backward"]


def _memory(config: Config, assumed: Assumptions) -> list[str]:
    where = _where(config, assumed)
    count = where.processes
    chosen = config.train.micro_batch is None and where.device == "cuda"
    example = ", for example: a run takes the largest that fits" if chosen else ""
    config = recipes.fit_micro_batch(config, count)
    steps, batch = accumulation_steps(config, count), config.train.micro_batch
    held = memory(config, batch, where)
    device = "a CPU" if where.device == "cpu" else f"one of {count} GPU(s)"
    table = [(name, getattr(held, name)) for name in PARTS if getattr(held, name)]
    table.append(("total", held.total))
    for words, changes in _alternatives(config, count).items():
        table.append((words, memory(replace(config, changes), batch, where).total))
    width = max(len(words) for words, _ in table)
    return [
        f"of {device} in {where.dtype} when it is most, without torch.compile, which needs less; "
        f"{steps} accumulation step(s) of micro-batch {batch}{example}",
        *(f"  {words:<{width}} {_size(number):>12}" for words, number in table),
    ]


def _where(config: Config, assumed: Assumptions) -> Where:
    """Return where the run would be; nano is for a CPU unless the config says otherwise."""
    device, dtype = config.train.device, config.train.dtype
    if device == "auto":
        device = "cpu" if config.size == "nano" and assumed.gpus == 1 else "cuda"
    dtype = "bfloat16" if dtype == "auto" else dtype
    return Where(device, dtype, 1 if device in ("cpu", "mps") else assumed.gpus)


def _alternatives(config: Config, gpus: int) -> dict[str, dict[str, object]]:
    """Return the options that save memory and are not on yet, with what each changes."""
    changes = {}
    if not config.train.gradient_checkpointing:
        changes["with --train.gradient-checkpointing"] = {"train.gradient_checkpointing": True}
    if gpus > 1 and config.train.parallel == "ddp":
        changes["with --train.parallel fsdp"] = {"train.parallel": "fsdp"}
    if len(changes) == 2:
        first, second = changes.values()
        changes["with both"] = first | second
    return changes


def _time(config: Config, assumed: Assumptions) -> list[str]:
    count = assumed.gpus
    rows = [
        f"of training on {count} GPU(s) at {assumed.mfu:.0%} of their peak, which is an assumption "
        "(--mfu); without validation and checkpoints"
    ]
    head = ["GPU", "dtype", "peak TFLOP/s", "micro-batch that fits", "time"]
    if assumed.price is not None:
        head.append(f"cost at {assumed.price:g}")
    table = [head]
    for gpu in GPUS:
        took = hours(config, gpu, count, assumed.mfu)
        row = [gpu.name, gpu.dtype, f"{gpu.peak:,.0f}", _fit(config, gpu, count), _duration(took)]
        if assumed.price is not None:
            row.append(f"{took * count * assumed.price:,.2f}")
        table.append(row)
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    for row in table:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        rows.append(("  " + "   ".join(cells)).rstrip())
    return rows


def _fit(config: Config, gpu: Gpu, count: int) -> str:
    """Return the largest micro-batch that fits a GPU, or what would have to be on for one."""
    where, room = Where("cuda", gpu.dtype, count), USABLE * gpu.bytes
    given = config.train.micro_batch
    for words, changes in {"": {}, **_alternatives(config, count)}.items():
        other = replace(config, changes)
        if given is None:
            fitting = largest_micro_batch(other, where, room)
        else:
            fitting = given if memory(other, given, where).total <= room else None
        if fitting:
            return f"{fitting} {words}".strip()
    return "does not fit"


def _disk(config: Config, manifest: Manifest | None) -> list[str]:
    tokens = tokens_of(config)
    if manifest is not None:
        tokens = sum(shard.tokens for shard in manifest.shards)
    here = "is there already" if manifest is not None else "and the validation split's"
    one, number = checkpoint_bytes(config), checkpoints_kept(config)
    return [
        f"data: {_size(TOKEN_BYTES * tokens)} at {TOKEN_BYTES} bytes a token, {here}",
        f"checkpoints: {_size(number * one)}, {number} of {_size(one)} (the newest "
        f"{config.train.keep_checkpoints}, the best, and one being written)",
    ]


def _size(number: float) -> str:
    """Return bytes as gigabytes of 10^9, or as megabytes where they are less than one."""
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.0f} MB"


def _duration(took: float) -> str:
    """Return hours in the unit a person would use."""
    if took < 1:
        return f"{60 * took:.0f} minutes" if took > 1 / 60 else f"{3600 * took:.2g} seconds"
    return f"{took:.1f} hours" if took < 100 else f"{took / 24:,.1f} days"
