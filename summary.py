"""What a run is, in a few lines, for a person to check before it begins; how to go on with it."""

from pathlib import Path
from typing import TYPE_CHECKING

from config import (
    LATER_FIELDS,
    Config,
    ModelConfig,
    accumulation_steps,
    windows_per_update,
)
from counts import flops_per_token, parameter_count
from manifests import find_data, read_manifest
from rows import PaddedRows, training_windows
from shards import TokenStream

if TYPE_CHECKING:
    from distributed import World


def resume_command(config: Config) -> str:
    """Return the command that continues a run."""
    train = config.train
    where = f" --train.runs-dir {train.runs_dir}" if train.runs_dir != "runs" else ""
    # The one in config.json may be that of an earlier start.
    end = "" if train.stop_at is None else f" --train.stop-at {train.stop_at}"
    return f"python main.py --resume {config.name}{where}{end}"


def summary(config: Config, run: Path, world: "World") -> str:
    """Return what is about to happen, for a person to check before it does."""
    from devices import pick_dtype

    model, train = config.model, config.train
    manifest = read_manifest(find_data(config.data))
    train_tokens, size = manifest.tokens("train"), windows_per_update(config)
    windows = training_windows(config)
    per_epoch = windows // size
    tokens = train.updates * train.tokens_per_update
    dtype = str(pick_dtype(train.dtype, world.device)).removeprefix("torch.")
    steps = accumulation_steps(config, world.size)
    end = "" if train.stop_at is None else f" (stopping after update {train.stop_at:,})"
    rows = {
        "run": f"{config.recipe} at size {config.size}, in {run}",
        "model": f"{parameter_count(model):,} parameters: {model.n_layer} layers, "
        f"{model.n_head} heads, width {model.n_embd}, context {model.block_size}, "
        f"vocabulary {model.vocab_size:,}{parts(model)}"
        + (f", begun with the weights of {config.init}" if config.init else ""),
        "data": f"{config.data}: {train_tokens:,} training and {manifest.tokens('val'):,} "
        f"validation tokens, {train.order.replace('_', ' ')}{padding(config)}",
        "updates": f"{train.updates:,} of {train.tokens_per_update:,} tokens, "
        f"{tokens:,} in all{end}: "
        f"{train.updates / per_epoch:.2f} epochs of {per_epoch:,} updates "
        f"(the last {windows % size} of {windows:,} windows do not fill one)",
        "batch": f"{size} windows = {world.size} process(es) x {steps} accumulation step(s) x "
        f"{train.micro_batch}",
        "compute": f"{world.device}, {dtype}, {tokens * flops_per_token(model):.2e} FLOP",
        "continue": f"{resume_command(config)}   (after an interruption)",
    }
    return "\n".join(f"{name:<9} {text}" for name, text in rows.items()) + "\n"


def padding(config: Config) -> str:
    """Return how much of the windows is text, where they have padding."""
    if config.train.rows == "packed":
        return ""
    stream = TokenStream(find_data(config.data), "train")
    filled = PaddedRows(stream, config.model.block_size).filled
    return f", a document a window ({filled:.0%} text, the rest padding)"


def parts(model: ModelConfig) -> str:
    """Return what a model has that GPT-2 has not, each part after a comma."""
    default = ModelConfig()
    found = []
    for name, value in vars(model).items():
        if f"model.{name}" in LATER_FIELDS and value != getattr(default, name):
            words = name.replace("_", " ")
            found.append(value if isinstance(value, str) else words if value else f"no {words}")
    return "".join(f", {part}" for part in found)
