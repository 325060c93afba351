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


def modern(config: Config) -> Config:
    """The architecture of modern.py with Muon: the loss of GPT-2 for a fraction of its tokens.

    Muon with rising momentum for the matrices in the blocks, AdamW for the rest, all windows
    shuffled, no warm-up, and a cool-down to zero over the last 60%. ReLU^2, which others report
    as a gain at 124M, lost at nano, so the MLP keeps GELU (EXPERIMENTS.md has all parts).

    Command: `torchrun --standalone --nproc_per_node=8 main.py modern`.
    Cost: 8.4e18 FLOP at 124M, with 123,532,067 parameters; at nano 7.5 minutes on one CPU core.
    Expected: at nano, the final loss of `gpt2-baseline` at its best rate after a fifth of its
    tokens; not measured at 124M yet.
    """
    return replace(
        config,
        {
            "model.architecture": "modern",
            "model.bias": False,
            "model.positions": "rotary",
            "model.norm": "rmsnorm",
            "model.qk_norm": True,
            "model.zero_init": True,
            "model.x0_shortcut": True,
            "model.value_residual": True,
            "model.softcap": 15.0,
            "optim.optimizer": "muon",
            "optim.lr": config.optim.lr * 20,
            "optim.momentum_warmup": 0.1,
            "optim.warmup": 0.0,
            "optim.schedule": "constant",
            "optim.cooldown": 0.6,
            "optim.final_lr": 0.0,
            "train.order": "shuffle_windows",
        },
    )


def modern_untied(config: Config) -> Config:
    """`modern` with a head of its own, at a tenth of the embedding's rate.

    Command: `torchrun --standalone --nproc_per_node=8 main.py modern-untied`.
    Cost: as `modern`; 162,129,443 parameters at 124M, of which the second table has 38,597,376.
    Expected: at nano 0.39 worse than tied after half of its tokens; not measured at 124M yet.
    """
    config = modern(config)
    return replace(config, {"model.tied": False, "optim.head_lr": config.optim.lr / 10})


def quickstart(config: Config) -> Config:
    """GPT-2 trained with Muon on the embedded corpus: real English, no download.

    Muon for the matrices inside the blocks, AdamW for the rest, windows shuffled anew each epoch,
    linear decay to zero.

    Command: `python main.py quickstart`.
    Cost: about four minutes on two CPU cores with AVX512-BF16.
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


def gpt2_baseline(config: Config) -> Config:
    """GPT-2 at GPT-3's rates: 6e-4 at 124M, warm-up over 715 of 19,073 updates, cosine to 10%.

    The first of six experiments by Garg (2025), each of which differs in one thing from the one
    before; all read the windows of one epoch.

    Command: `torchrun --standalone --nproc_per_node=8 main.py gpt2-baseline`.
    Cost: 8.5e18 FLOP at 124M.
    Expected: Garg reports validation loss 3.0658 and HellaSwag 30.4% on FineWeb-Edu.
    """
    return replace(config, {"optim.warmup": 715 / 19073})


def gpt2_periodicity_fix(config: Config) -> Config:
    """`gpt2-baseline`, with shards and the documents in each in a new order every epoch.

    Command: `torchrun --standalone --nproc_per_node=8 main.py gpt2-periodicity-fix`.
    Cost: that of `gpt2-baseline`, and one random read a document.
    Expected: Garg reports validation loss 3.0639 and HellaSwag 30.6% on FineWeb-Edu.
    """
    return replace(gpt2_baseline(config), {"train.order": "shuffle_documents"})


def gpt2_lr_inc(config: Config) -> Config:
    """`gpt2-periodicity-fix`, with three times the rate and a warm-up of 285 of 19,073 updates.

    Command: `torchrun --standalone --nproc_per_node=8 main.py gpt2-lr-inc`.
    Cost: that of `gpt2-periodicity-fix`.
    Expected: Garg reports validation loss 3.0210 and HellaSwag 31.5% on FineWeb-Edu.
    """
    changes = {"optim.lr": 3 * config.optim.lr, "optim.warmup": 285 / 19073}
    return replace(gpt2_periodicity_fix(config), changes)


def gpt2_global_datafix(config: Config) -> Config:
    """`gpt2-lr-inc`, with all windows of all shards in one new order every epoch.

    Garg's own run ended near update 18,250, out of places; this one reads every window.

    Command: `torchrun --standalone --nproc_per_node=8 main.py gpt2-global-datafix`.
    Cost: that of `gpt2-baseline`, and one random read a window.
    Expected: Garg reports validation loss 3.0045 and HellaSwag 31.7% on FineWeb-Edu.
    """
    return replace(gpt2_lr_inc(config), {"train.order": "shuffle_windows"})


def gpt2_rope(config: Config) -> Config:
    """`gpt2-global-datafix`, with rotary instead of learned positions: the best of the six.

    Command: `torchrun --standalone --nproc_per_node=8 main.py gpt2-rope`.
    Cost: that of `gpt2-global-datafix`; 123,653,376 parameters at 124M.
    Expected: Garg reports validation loss 2.9874 and HellaSwag 32.0% on FineWeb-Edu.
    """
    return replace(gpt2_global_datafix(config), {"model.positions": "rotary"})


def gpt2_swiglu(config: Config) -> Config:
    """`gpt2-rope`, with SwiGLU instead of GELU at the same number of parameters.

    Garg's run was ended at update 15,000, with the schedule of the whole: `--train.stop-at 15000`.

    Command: `torchrun --standalone --nproc_per_node=8 main.py gpt2-swiglu`.
    Cost: that of `gpt2-rope`; 123,665,664 parameters at 124M.
    Expected: Garg reports validation loss 3.0311 and HellaSwag 31.7% there, and saw no gain.
    """
    return replace(gpt2_rope(config), {"model.activation": "swiglu"})


def gpt3_settings(config: Config) -> Config:
    """`gpt2-rope`, the best AdamW recipe, with GPT-3's context and four epochs.

    The context is twice the size's: 2,048 from 124M up.

    Command: `torchrun --standalone --nproc_per_node=8 main.py gpt3-settings`.
    Cost: 3.8e19 FLOP at 124M.
    Expected: not known; the last line of Garg's plans.
    """
    changes = {
        "model.block_size": 2 * config.model.block_size,
        "train.tokens": 4 * config.train.tokens,
    }
    return replace(gpt2_rope(config), changes)


RECIPES: dict[str, Callable[[Config], Config]] = {
    "gpt2": gpt2,
    "gpt2-baseline": gpt2_baseline,
    "gpt2-periodicity-fix": gpt2_periodicity_fix,
    "gpt2-lr-inc": gpt2_lr_inc,
    "gpt2-global-datafix": gpt2_global_datafix,
    "gpt2-rope": gpt2_rope,
    "gpt2-swiglu": gpt2_swiglu,
    "gpt3-settings": gpt3_settings,
    "modern": modern,
    "modern-untied": modern_untied,
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

    It is at most the size's `max_micro_batch`, and as many times less as windows are longer than
    the size's. Raises UserError when the processes do not divide the update.
    """
    if config.train.micro_batch is not None:
        return config
    share, size = windows_per_process(config, world_size), SIZES[config.size]
    longer = max(config.model.block_size // size.block_size, 1)
    limit = max(size.max_micro_batch // longer, 1)
    fitting = max(n for n in divisors(share) if n <= limit)
    return replace(config, {"train.micro_batch": fitting})


def check_name(name: str, known: Iterable[str], kind: str) -> None:
    """Raise UserError unless `name` is among `known`; the sentence suggests the nearest."""
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}."
        raise UserError(f"There is no {kind} '{name}'; {hint}")
