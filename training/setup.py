"""Before a run: its data checked, what that decides, how a step is divided, what it costs."""

import contextlib
import dataclasses
import math
import shlex
import time
from pathlib import Path
from typing import Any

import recipes
from config import Config, ModelConfig, UserError, divisors, replace
from corpus.shards import TokenShards, find_data, read_manifest
from corpus.tokenizer import Tokenizer
from training.verification import Verification
from utils import DATA_DIR, printable

PYDOCS = "pydocs"
# Of a model, what its weights do not depend on, and what a recipe leaves to the size.
FREE = ("dropout", "attention_dropout", "document_mask", "zero_init_proj")
SIZED = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "eot")
SECONDS_TO_SEE = 60  # what rank 0 has written, from another node


def prepare_data(data: str, verifies: bool = False) -> None:
    """Make the embedded corpus if it is asked for, and check that the data can be read."""
    if data == PYDOCS:  # it needs no download, so it is made when first asked for
        import load_fineweb

        asked = load_fineweb.Arguments((PYDOCS,), DATA_DIR / data)
        load_fineweb.prepare(asked, quiet=True)
    for split in ("train", "val"):
        TokenShards(find_data(data), split)
    if verifies:
        print(Verification(find_data(data)).wait(quiet=False), flush=True)


def sees(path: Path, world_size: int, timeout: float) -> bool:
    """Say whether a file is there; among several ranks it may take a while to appear."""
    deadline = time.monotonic() + (min(SECONDS_TO_SEE, timeout / 2) if world_size > 1 else 0)
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    return path.exists()


def complete_config(config: Config) -> Config:
    """Return the config with what its data decides: vocabulary and number of steps."""
    manifest = read_manifest(find_data(config.data))
    ids, sequences = manifest.vocab_size, (manifest.tokens("train") - 1) // config.model.block_size
    if config.init_from and ids != config.model.vocab_size:
        raise UserError(
            f"{config.data} has a vocabulary of {ids} ids, but {config.init_from} one of "
            f"{config.model.vocab_size}; prepare the data with its tokenizer."
        )
    eot = -1 if manifest.eot == ids - 1 else manifest.eot
    changes = {"model.vocab_size": ids, "model.eot": eot}
    return replace(config, {**changes, "train.steps": config.total_steps(sequences)})


def with_micro_batch(config: Config, world_size: int, device_type: str = "cpu") -> Config:
    """Return the config with a micro-batch size: the one given, or the largest worth computing.

    Raises UserError for a number of ranks, or a given size, that does not divide a step.
    """
    if config.train.micro_batch_size is None:
        limit = recipes.micro_batch_limit(config, device_type)
        size = max(n for n in divisors(config.sequences_per_rank(world_size)) if n <= limit)
        config = replace(config, {"train.micro_batch_size": size})
    config.accumulation_steps(world_size)
    return config


def resume_command(run: Path) -> str:
    """Return the command that continues a run."""
    name = run.name if run.parent == Path("runs") else str(run)
    return shlex.join(["python", "main.py", "--resume", name])


def summary(config: Config, run: Path, info: Any, dtype: str) -> str:
    """Return what is about to happen, for a person to check before it does."""
    model, train, steps = config.model, config.train, config.accumulation_steps(info.world_size)
    manifest, tokens = read_manifest(find_data(config.data)), train.steps * train.batch_tokens
    splits = [f"{manifest.tokens(split):,}" for split in ("train", "val")]
    stops = f" (stopping after step {train.stop_at_step:,})" if train.stop_at_step else ""
    begun = f"; begun with the weights of {config.init_from}" if config.init_from else ""
    rows = {
        "run": f"{config.recipe} at size {config.size}, in {run}",
        "model": describe_model(model) + begun,
        "data": f"{config.data}: {splits[0]} training and {splits[1]} validation tokens, shuffle "
        f"{train.shuffle}",
        "steps": f"{train.steps:,} of {train.batch_tokens:,} tokens, {tokens:,} in all{stops}: "
        f"{tokens / manifest.tokens('train'):.2f} epochs",
        "batch": f"{config.sequences_per_step} sequences = {info.world_size} process(es) x {steps} "
        f"accumulation step(s) x {train.micro_batch_size}",
        "compute": f"{info.device}, {dtype}, {tokens * model.flops_per_token:.2e} FLOP",
        "continue": f"{resume_command(run)}   (after an interruption)",
    }
    return "".join(f"{name:<9} {printable(text)}\n" for name, text in rows.items())


def describe_model(model: ModelConfig) -> str:
    """Return a model's size and shape, and what it has that GPT-2 has not."""
    default = ModelConfig()
    parts = {name: value for name, value in vars(model).items() if name not in SIZED}
    own = [f"{name} {v}" for name, v in parts.items() if v != getattr(default, name)]
    return (
        f"{model.num_params:,} parameters: {model.n_layer} layers, {model.n_head} heads, width "
        f"{model.n_embd}, context {model.block_size}, vocabulary {model.vocab_size:,}"
        + "".join(f", {part}" for part in own)
    )


def state_bytes(config: Config) -> tuple[int, int]:
    """Return the bytes of weights in memory and of optimizer state, both float32."""
    model, tables = config.model, 1 if config.model.tie_embeddings else 2
    padding = tables * model.n_embd * (model.padded_vocab_size - model.vocab_size)
    mlp = (3 if model.activation == "swiglu" else 2) * model.mlp_width
    matrices = model.n_layer * model.n_embd * (4 * model.n_embd + mlp)
    # AdamW keeps two averages a parameter; Muon, which has the matrices in the blocks, one.
    saved = 4 * matrices if config.optim.optimizer == "muon" else 0
    return 4 * (model.num_params + padding), 8 * (model.num_params + padding) - saved


def plan(
    config: Config, gpus: int | None = None, mfu: float = 0.4, price: float | None = None
) -> str:
    """Return what a run costs: FLOPs, memory, disk, and hours on known GPUs; reads no data."""
    gpus = (8 if recipes.SIZES[config.size].block_size >= 1024 else 1) if gpus is None else gpus
    if gpus < 1 or not 0 < mfu <= 1 or not 0 <= (price or 0) < math.inf:
        raise UserError("--gpus is at least 1, --mfu above 0 and at most 1, --price not negative.")
    here = "not here"
    with contextlib.suppress(UserError):
        tokens = read_manifest(find_data(config.data)).tokens("train")
        here = f"{tokens:,} training tokens"
    if here != "not here":
        config = complete_config(config)
    elif config.train.steps is None and config.train.epochs is not None:
        raise UserError(
            f"How many steps {config.train.epochs:g} epochs are depends on the data "
            f"'{config.data}', which is not here; give --train.tokens or --train.steps."
        )
    model, train, share = config.model, config.train, config.sequences_per_rank(gpus)
    steps = config.total_steps(config.sequences_per_step)  # no longer a matter of the data
    tokens = steps * train.batch_tokens
    flops = tokens * model.flops_per_token
    weights, state = state_bytes(config)
    saved = (weights + state) * 4 * model.num_params / weights  # without the padding
    rows = {
        "plan": f"{config.recipe} at size {config.size}; nothing has been started",
        "model": describe_model(model),
        "data": f"{config.data}: {here}",
        "steps": f"{steps:,} of {train.batch_tokens:,} tokens, {tokens:,} in all; {share} "
        f"sequences a step on each of {gpus} GPU(s)",
        "compute": f"{flops:.3g} FLOP: {model.flops_per_token / 1e9:.3g} GFLOP a token",
        "memory": f"a GPU: weights {_size(weights)}, gradients {_size(weights)}, optimizer "
        f"{_size(state)}, and activations; --train.parallel fsdp divides these three",
        "disk": f"{_size(2 * tokens)} for as many tokens of data; {train.keep_checkpoints + 2} "
        f"checkpoints of {_size(saved)}",
        "time": f"on {gpus} GPU(s) at {mfu:.0%} of their peak, which is an assumption (--mfu)",
    }
    lines = [f"{name:<9} {printable(text)}" for name, text in rows.items()]
    for gpu in recipes.GPUS:
        hours = flops / (gpus * gpu.flops * mfu) / 3600
        took = f"{60 * hours:,.2g} minutes" if hours < 1 else f"{hours:,.1f} hours"
        cost = "" if price is None else f"   costs {hours * gpus * price:,.2f}"
        peak = f"{gpu.flops / 1e12:>5,.0f} TFLOP/s {gpu.dtype:<8}"
        lines.append(f"  {gpu.name:<10} {peak} {gpu.memory:>4} GB {took:>16}{cost}")
    return "\n".join(lines)


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def with_shape_of(source: str, found: ModelConfig, base: Config, sized: bool) -> Config:
    """Return a recipe's config with the shape `found` of the model that --init-from names.

    Unless a size is typed (`sized`), batch, budget and intervals are those of the largest size
    that is not larger. UserError where the recipe wants other parts than the model has.
    """
    default = ModelConfig()
    if not sized:
        counts = {}
        for name, size in recipes.SIZES.items():
            shape = {k: getattr(size, k) for k in ("n_layer", "n_head", "n_embd")}
            counts[name] = dataclasses.replace(found, **shape).num_params
        smallest = min(counts, key=counts.get)
        fitting = [name for name in counts if counts[name] <= found.num_params]
        base = recipes.build(base.recipe, max(fitting, key=counts.get, default=smallest))
    for name, value in vars(found).items():
        asked = getattr(base.model, name)
        if name not in (*FREE, *SIZED) and asked not in (value, getattr(default, name)):
            raise UserError(
                f"{base.recipe} has model.{name} {asked}, but {source} has {value}; choose a "
                "recipe that leaves it as it is."
            )
    kept = {name: getattr(base.model, name) for name in FREE}
    whole = max(base.train.batch_tokens // found.block_size, 1) * found.block_size
    changes = {"model": dataclasses.replace(found, **kept), "train.batch_tokens": whole}
    return replace(base, {**changes, "init_from": source})


def check_shape(config: Config, source: ModelConfig) -> None:
    """Raise UserError unless what was typed leaves a model that the source's weights fit."""
    for name, value in vars(source).items():
        asked = getattr(config.model, name)
        fewer = name == "block_size" and (asked <= value or config.model.pos_emb == "rope")
        if asked != value and name not in FREE and not fewer:
            raise UserError(
                f"model.{name} {asked} does not fit {config.init_from}, which has {value}; leave "
                "it out."
            )


def check_tokenizer(config: Config, theirs: Tokenizer) -> None:
    """Raise UserError unless the data's ids mean what they mean to the model begun with."""
    ours = read_manifest(find_data(config.data))
    if ours.tokenizer_sha256 != theirs.sha256:
        raise UserError(
            f"{config.data} has the ids of another tokenizer ({ours.tokenizer}) than "
            f"{config.init_from} ({theirs.name}); prepare the data with that tokenizer."
        )
