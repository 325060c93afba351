"""How big (the size table), what differs (one function a recipe), and what GPUs can do.

    python main.py [RECIPE] [--size SIZE] ...      defaults < size < recipe < command line

Every recipe runs at every size: a size sets width, depth, context, batch, token budget and a base
learning rate; a recipe scales that rate, and gives warm-up and cool-down as fractions of the run.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from config import Config, replace
from utils import check_name

# Continued at step 0 and at every checkpoint, so that one can watch a model learn to write.
PROMPTS = ("The meaning of life is", "The function returns", "In the beginning")


@dataclass(frozen=True)
class Size:
    """A row of the size table; from 124m up, rates follow GPT-3's table 2.1 (Brown et al. 2020)."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_tokens: int
    max_micro_batch: int  # sequences that a GPU gains from computing at once
    tokens: int
    lr: float
    val_interval: int = 250
    val_tokens: int = 10_485_760
    checkpoint_interval: int = 1000
    eval_interval: int = 250  # 0 where all of HellaSwag would take a CPU minutes every time


def _depth(depth: int, batch_tokens: int) -> Size:
    """Return a size of width 64 * depth, with 20 tokens for each parameter of its matrices."""
    width, tokens = 64 * depth, 20 * 12 * depth * (64 * depth) ** 2
    lr = 5e-4 * 128 / width  # nano's by width; fitted rates come later
    return Size(depth, depth, width, 256, batch_tokens, 128, tokens, lr, 200, 262_144, 500, 0)


EPOCH = 18_849 * 524_288  # tokens: the whole steps in one epoch of FineWeb-Edu sample-10BT

SIZES = {
    "d2": _depth(2, 4096),
    "d3": _depth(3, 8192),
    "d4": _depth(4, 16_384),
    "d6": _depth(6, 32_768),
    "d8": _depth(8, 65_536),
    "nano": Size(4, 4, 128, 256, 2048, 128, 1_024_000, 5e-4, 100, 65_536, 250, eval_interval=0),
    "124m": Size(12, 12, 768, 1024, 524_288, 64, EPOCH, 6e-4),
    "350m": Size(24, 16, 1024, 1024, 524_288, 32, EPOCH, 3e-4),
    "774m": Size(36, 20, 1280, 1024, 524_288, 16, EPOCH, 2.5e-4),
    "1558m": Size(48, 25, 1600, 1024, 1_048_576, 8, EPOCH, 2e-4),
}


def gpt2(config: Config) -> Config:
    """GPT-2 as OpenAI built it, with the settings of the gpt2_124m project, sequences shuffled.

    Peak rate 2e-3 at 124M, 3.3 times GPT-3's; warm-up over 750 of 18,850 steps, cosine to 10%.

    Command: `torchrun --standalone --nproc_per_node=8 main.py` (after `python load_fineweb.py`).
    Cost: 8.5e18 FLOP at 124M; by that, 1.6 hours on 8 A100s at 60% of their peak.
    Expected: that project reports validation loss 3.04 and HellaSwag 31.3% on FineWeb-Edu.
    """
    lr = config.optim.lr * (2e-3 / 6e-4)
    return replace(config, {"optim.lr": lr, "train.shuffle": "sequences"})


def modern(config: Config) -> Config:
    """The architecture of modern.py with Muon: the loss of GPT-2 for a fraction of its tokens.

    Muon with rising momentum for the matrices in the blocks, AdamW for the rest, sequences
    shuffled, no warm-up, a cool-down to zero over the last 60%. EXPERIMENTS.md has all parts.

    Command: `torchrun --standalone --nproc_per_node=8 main.py modern`.
    Cost: 8.4e18 FLOP at 124M, with 123,532,067 parameters; at nano 7.5 minutes on one CPU core.
    Expected: at nano, the final loss of `gpt2-baseline` at its best rate after a fifth of its
    tokens; not measured at 124M yet.
    """
    parts = ("qk_norm", "zero_init_proj", "x0_residual", "value_residual")
    changes = {f"model.{part}": True for part in parts}
    changes |= {"model.architecture": "modern", "model.bias": False, "model.pos_emb": "rope"}
    changes |= {"model.norm": "rmsnorm", "model.logit_softcap": 15.0}
    changes |= {"optim.optimizer": "muon", "optim.lr": 20 * config.optim.lr}
    changes |= {"optim.momentum_warmup": 0.1, "optim.warmup_frac": 0.0, "optim.cooldown_frac": 0.6}
    changes |= {"optim.schedule": "constant", "optim.final_lr_frac": 0.0}
    return replace(config, {**changes, "train.shuffle": "sequences"})


def modern_untied(config: Config) -> Config:
    """`modern` with an output head of its own, at a tenth of the embedding's rate.

    Command: `torchrun --standalone --nproc_per_node=8 main.py modern-untied`.
    Cost: as `modern`; 162,129,443 parameters at 124M, of which the second table has 38,597,376.
    Expected: at nano 0.39 worse than tied after half of its tokens; not measured at 124M yet.
    """
    config = modern(config)
    changes = {"model.tie_embeddings": False, "optim.lm_head_lr": config.optim.lr / 10}
    return replace(config, changes)


def quickstart(config: Config) -> Config:
    """GPT-2 trained with Muon on the embedded corpus: real English, no download.

    Muon for the blocks' matrices, AdamW for the rest, shuffled sequences, linear decay to zero.

    Command: `python main.py quickstart`.
    Cost: about four minutes on two CPU cores with AVX512-BF16.
    Expected: validation loss at most 4.4 nats a token, from 10.8.
    """
    # Only embeddings, norms and biases are left to AdamW, and they bear a high rate.
    changes = {"data": "pydocs", "optim.optimizer": "muon", "optim.lr": 20 * config.optim.lr}
    changes |= {"optim.schedule": "linear", "optim.warmup_frac": 0.05, "optim.final_lr_frac": 0.0}
    return replace(config, {**changes, "train.shuffle": "sequences"})


def shakespeare_char(config: Config) -> Config:
    """Tiny Shakespeare by character: the quickstart's optimizer, dropout, and fifteen epochs.

    Command: `python main.py shakespeare-char` (after `python shakespeare/shakespeare.py`).
    Cost: about 12 minutes on two CPU cores with AVX512-BF16.
    Expected: validation loss at most 1.52 nats a character on the last tenth, from 4.2.
    """
    # Masks for attention weights would cost a CPU half as much again; validation is all there is.
    changes = {"data": "shakespeare-char", "model.dropout": 0.1, "model.attention_dropout": 0.0}
    changes |= {"train.batch_tokens": 8192, "train.tokens": 15_000_000}
    changes |= {"train.val_tokens": 1 << 17, "train.val_interval": 250}
    return replace(quickstart(config), changes)


def gpt2_baseline(config: Config) -> Config:
    """GPT-2 at GPT-3's rates: 6e-4 at 124M, warm-up over 715 of 19,073 steps, cosine to 10%.

    The first of Garg's (2025) six experiments, each one thing away from the one before.

    Command: `torchrun --standalone --nproc_per_node=8 main.py gpt2-baseline`.
    Cost: 8.5e18 FLOP at 124M. Expected: loss 3.0658, HellaSwag 30.4% on FineWeb-Edu (Garg).
    """
    return replace(config, {"optim.warmup_frac": 715 / 19073, "train.shuffle": "none"})


def gpt2_periodicity_fix(config: Config) -> Config:
    """`gpt2-baseline`, with shards and the documents in each in a new order every epoch.

    Command: `torchrun --standalone --nproc_per_node=8 main.py gpt2-periodicity-fix`.
    Cost: as `gpt2-baseline`, and a random read a document. Expected: 3.0639 and 30.6% (Garg).
    """
    return replace(gpt2_baseline(config), {"train.shuffle": "documents"})


def gpt2_lr_inc(config: Config) -> Config:
    """`gpt2-periodicity-fix`, with three times the rate and a warm-up of 285 of 19,073 steps.

    Command: `torchrun --standalone --nproc_per_node=8 main.py gpt2-lr-inc`.
    Cost: as `gpt2-periodicity-fix`. Expected: 3.0210 and 31.5% (Garg).
    """
    changes = {"optim.lr": 3 * config.optim.lr, "optim.warmup_frac": 285 / 19073}
    return replace(gpt2_periodicity_fix(config), changes)


def gpt2_global_datafix(config: Config) -> Config:
    """`gpt2-lr-inc`, with all sequences of all shards in one new order every epoch.

    Command: `torchrun --standalone --nproc_per_node=8 main.py gpt2-global-datafix`.
    Cost: as `gpt2-baseline`, and a random read a sequence. Expected: 3.0045 and 31.7% (Garg).
    """
    return replace(gpt2_lr_inc(config), {"train.shuffle": "sequences"})


def gpt2_rope(config: Config) -> Config:
    """`gpt2-global-datafix`, with RoPE instead of learned positions: the best of the six.

    Command: `torchrun --standalone --nproc_per_node=8 main.py gpt2-rope`.
    Cost: as `gpt2-global-datafix`; 123,653,376 parameters. Expected: 2.9874 and 32.0% (Garg).
    """
    return replace(gpt2_global_datafix(config), {"model.pos_emb": "rope"})


def gpt2_swiglu(config: Config) -> Config:
    """`gpt2-rope`, with SwiGLU instead of GELU at the same number of parameters.

    Command: `torchrun --standalone --nproc_per_node=8 main.py gpt2-swiglu`.
    Cost: as `gpt2-rope`; 123,665,664 parameters at 124M.
    Expected: 3.0311 and 31.7% (Garg, who saw no gain) with `--train.stop-at-step 15000`.
    """
    return replace(gpt2_rope(config), {"model.activation": "swiglu"})


def gpt3_settings(config: Config) -> Config:
    """`gpt2-rope` with GPT-3's context, twice the size's, and four epochs.

    Command: `torchrun --standalone --nproc_per_node=8 main.py gpt3-settings`.
    Cost: 3.8e19 FLOP at 124M. Expected: not known; the last line of Garg's plans.
    """
    context, tokens = 2 * config.model.block_size, 4 * config.train.tokens
    return replace(gpt2_rope(config), {"model.block_size": context, "train.tokens": tokens})


RECIPES: dict[str, Callable[[Config], Config]] = {
    recipe.__name__.replace("_", "-"): recipe
    for recipe in (
        *(gpt2, gpt2_baseline, gpt2_periodicity_fix, gpt2_lr_inc, gpt2_global_datafix, gpt2_rope),
        *(gpt2_swiglu, gpt3_settings, modern, modern_untied, quickstart, shakespeare_char),
    )
}

DEFAULT_SIZES = {"quickstart": "nano", "shakespeare-char": "nano"}  # the others' is 124m


def build(recipe: str, size: str | None = None) -> Config:
    """Return the config of a recipe at a size; raises UserError suggesting the nearest name."""
    check_name(recipe, RECIPES, "recipe")
    size = size or DEFAULT_SIZES.get(recipe, "124m")
    check_name(size, SIZES, "size")
    row = {name: v for name, v in vars(SIZES[size]).items() if name != "max_micro_batch"}
    group = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size"), "model") | {"lr": "optim"}
    changes = {f"{group.get(name, 'train')}.{name}": value for name, value in row.items()}
    return RECIPES[recipe](replace(Config(recipe=recipe, size=size), changes))


def micro_batch_limit(config: Config, device_type: str = "cuda") -> int:
    """Return the sequences worth computing at once: the size's, fewer for a longer context."""
    size = SIZES[config.size]
    tokens = size.max_micro_batch * size.block_size // (4 if device_type == "cpu" else 1)
    return max(tokens // max(config.model.block_size, size.block_size), 1)


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: dense FLOP/s of matrix products in `dtype`, and GB of memory."""

    name: str
    flops: float
    memory: float
    pattern: str = ""  # in the driver's name of the device, where that is not `name`
    dtype: str = "bfloat16"


# Without sparsity, accumulating in float32; T4 and V100 have no bfloat16. The first match counts.
GPUS = (
    Gpu("T4", 65e12, 16, "T4", "float16"),
    Gpu("V100 16 GB", 125e12, 16, r"V100\S*16GB", "float16"),
    Gpu("V100 32 GB", 125e12, 32, "V100", "float16"),
    *(Gpu("RTX 3090", 71e12, 24), Gpu("RTX 4090", 165e12, 24), Gpu("A10G", 70e12, 24)),
    *(Gpu("L4", 121e12, 24), Gpu("L40", 181e12, 48), Gpu("L40S", 362e12, 48)),
    *(Gpu("A100 40 GB", 312e12, 40, r"A100\S*40GB"), Gpu("A100 80 GB", 312e12, 80, "A100")),
    *(Gpu("H100 PCIe", 756e12, 80), Gpu("H100 NVL", 835e12, 94), Gpu("H100", 989e12, 80)),
    *(Gpu("GH200", 989e12, 96), Gpu("H200 NVL", 835e12, 141), Gpu("H200", 989e12, 141)),
    Gpu("B200", 2250e12, 180),
)


def find_gpu(device_name: str) -> Gpu | None:
    """Return the row of a device, by the name its driver gives it; None where it is not known."""
    return next((g for g in GPUS if re.search(rf"\b{g.pattern or g.name}\b", device_name)), None)
