"""How big (the size table) and what differs (one function a recipe).

    python main.py [RECIPE] [--size SIZE] ...      defaults < size < recipe < command line

Every recipe runs at every size: a size sets width, depth, context, batch, token budget and a base
learning rate; a recipe scales that rate, and gives warm-up and cool-down as fractions of the run.
"""

import dataclasses
import difflib
from collections.abc import Callable, Iterable

from config import Config, UserError, divisors, replace, windows_per_process

# Continued at step 0 and at every checkpoint, so that one can watch a model learn to write.
PROMPTS = (
    "The meaning of life is",
    "The function returns",
    "In the beginning",
)


@dataclasses.dataclass(frozen=True)
class Size:
    """A row of the size table; from 124m up, rates follow GPT-3's table 2.1 (Brown et al. 2020)."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    tokens_per_update: int
    max_micro_batch: int
    tokens: int
    lr: float
    val_interval: int = 250
    val_tokens: int = 10_485_760
    checkpoint_interval: int = 1000
    eval_interval: int = 250


# 9,882,304,512 tokens are the 18,849 whole updates in one epoch of FineWeb-Edu sample-10BT.
EPOCH = 18_849 * 524_288

SIZES = {
    # All of HellaSwag takes a CPU minutes, every time.
    "nano": Size(4, 4, 128, 256, 2048, 32, 1_024_000, 5e-4, 100, 65_536, 250, eval_interval=0),
    "124m": Size(12, 12, 768, 1024, 524_288, 16, EPOCH, 6e-4),
    "350m": Size(24, 16, 1024, 1024, 524_288, 8, EPOCH, 3e-4),
    "774m": Size(36, 20, 1280, 1024, 524_288, 4, EPOCH, 2.5e-4),
    "1558m": Size(48, 25, 1600, 1024, 1_048_576, 2, EPOCH, 2e-4),
}


def gpt2(config: Config) -> Config:
    """GPT-2 as OpenAI built it, with the settings of the gpt2_124m project.

    Peak rate 2e-3 at 124M (3.3 times GPT-3's), warm-up over 750 of 18,850 updates, cosine decay to
    10%, weight decay 0.1, windows in the order of the shards.

    Command: `torchrun --standalone --nproc_per_node=8 main.py` (after `python load_fineweb.py`).
    Cost: 8.5e18 FLOP at 124M; by that, 1.6 hours on 8 A100s at 60% of their peak.
    Expected: that project reports validation loss 3.04 and HellaSwag 31.3% on FineWeb-Edu.
    """
    return replace(config, {"optim.lr": config.optim.lr * (2e-3 / 6e-4)})


def quickstart(config: Config) -> Config:
    """GPT-2 trained with Muon on the embedded corpus: real English, no download.

    Muon for the matrices inside the blocks, AdamW for the rest, windows shuffled anew each epoch,
    linear decay to zero.

    Command: `python main.py quickstart`.
    Cost: about five minutes on two CPU cores with AVX512-BF16.
    Expected: validation loss at most 4.4 nats a token, from 10.8.
    """
    return replace(
        config,
        {
            "data": "pydocs",
            "optim.optimizer": "muon",
            # Only embeddings, norms and biases are left to AdamW, and they bear a high rate.
            "optim.lr": config.optim.lr * 20,
            "optim.schedule": "linear",
            "optim.warmup": 0.05,
            "optim.final_lr": 0.0,
            "train.order": "shuffle_windows",
        },
    )


def shakespeare_char(config: Config) -> Config:
    """Tiny Shakespeare by character: the quickstart's optimizer, dropout, and fifteen epochs.

    Command: `python main.py shakespeare-char` (after `python shakespeare/shakespeare.py`).
    Cost: about 12 minutes on two CPU cores with AVX512-BF16.
    Expected: validation loss at most 1.52 nats a character on the last tenth, from 4.2.
    """
    return replace(
        quickstart(config),
        {
            "data": "shakespeare-char",
            "model.dropout": 0.1,
            # Masks for the attention weights would cost a CPU half as much time again.
            "model.attention_dropout": 0.0,
            "train.tokens_per_update": 8192,
            "train.tokens": 15_000_000,
            # All of the last tenth.
            "train.val_tokens": 1 << 17,
            "train.val_interval": 250,
        },
    )


RECIPES: dict[str, Callable[[Config], Config]] = {
    "gpt2": gpt2,
    "quickstart": quickstart,
    "shakespeare-char": shakespeare_char,
}

# The size of a recipe that is not the flagship's.
DEFAULT_SIZES = {"quickstart": "nano", "shakespeare-char": "nano"}


def build(recipe: str, size: str | None = None) -> Config:
    """Return the config of a recipe at a size; raises UserError suggesting the nearest name."""
    check_name(recipe, RECIPES, "recipe")
    size = size or DEFAULT_SIZES.get(recipe, "124m")
    check_name(size, SIZES, "size")
    changes = {}
    for name, value in dataclasses.asdict(SIZES[size]).items():
        if name != "max_micro_batch":
            changes[f"{_group(name)}.{name}"] = value
    config = replace(Config(recipe=recipe, size=size), changes)
    return RECIPES[recipe](config)


def _group(name: str) -> str:
    if name == "lr":
        return "optim"
    return "model" if name.startswith("n_") or name == "block_size" else "train"


def fit_micro_batch(config: Config, world_size: int) -> Config:
    """Return the config with a micro-batch: the one given, or the largest that divides.

    It is at most the size's `max_micro_batch`. Raises UserError when the processes do not divide
    the update.
    """
    if config.train.micro_batch is not None:
        return config
    share, limit = windows_per_process(config, world_size), SIZES[config.size].max_micro_batch
    fitting = max(n for n in divisors(share) if n <= limit)
    return replace(config, {"train.micro_batch": fitting})


def check_name(name: str, known: Iterable[str], kind: str) -> None:
    """Raise UserError unless `name` is among `known`; the sentence suggests the nearest."""
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}."
        raise UserError(f"There is no {kind} '{name}'; {hint}")
