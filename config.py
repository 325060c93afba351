"""The settings of a run: three frozen groups, and the numbers that follow from them.

    Config = recipe, size, data, name + ModelConfig + OptimConfig + TrainConfig

A `Config` together with a step number is the whole position of a run: model, learning rate, data
order and intervals are all computed from it. The sentence under a field is also its `--help` text.
Nothing here imports torch, so that figures and cost estimates start at once.
"""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal


class UserError(Exception):
    """A mistake a person can mend: shown as one plain sentence, without a traceback."""


@dataclass(frozen=True)
class ModelConfig:
    n_layer: int = 12
    """Number of transformer blocks."""
    n_head: int = 12
    """Attention heads in each block; they share the width equally."""
    n_embd: int = 768
    """Width of the residual stream."""
    block_size: int = 1024
    """Context length in tokens, T."""
    vocab_size: int = 50257
    """Number of token ids; taken from the data."""
    dropout: float = 0.0
    """Probability of dropping an activation (GPT-2 pretraining over one epoch needs none)."""
    attention_dropout: float | None = None
    """The same for attention weights, which rules out the fused kernels; by default as dropout."""
    architecture: Literal["gpt2", "modern"] = "gpt2"
    """gpt2 is model.py's, modern is modern.py's, which alone has the six parts at the end."""
    positions: Literal["learned", "rotary"] = "learned"
    """A table of learned vectors, or queries and keys rotated by their place (RoPE)."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """LayerNorm, or RMSNorm, which leaves the mean where it is."""
    activation: Literal["gelu", "swiglu", "relu2"] = "gelu"
    """GELU, SwiGLU at the same number of parameters, or the square of ReLU."""
    bias: bool = True
    """Biases in linear layers and LayerNorms."""
    document_mask: bool = False
    """A token does not see the documents before its own in the same window."""
    qk_norm: bool = False
    """Modern: queries and keys of unit mean square."""
    zero_init: bool = False
    """Modern: projections onto the residual stream begin at zero, so every block as identity."""
    x0_shortcut: bool = False
    """Modern: every block is given a learnt mixture of the stream and the embedding."""
    value_residual: bool = False
    """Modern: values of later blocks are learnt mixtures with those of the first."""
    softcap: float = 0.0
    """Modern: logits are bent to stay within plus and minus this; 0 bends nothing."""
    tied: bool = True
    """The head is the token embedding; only modern can have one of its own."""

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in memory: a multiple of 128, which fast matrix products want."""
        return 128 * math.ceil(self.vocab_size / 128)

    @property
    def mlp_width(self) -> int:
        """Hidden units of a block's MLP: 4 times the width; for SwiGLU two thirds of that.

        SwiGLU has three matrices instead of two (Shazeer 2020), so the parameters are the same but
        for rounding to a multiple of 8, which matrix units want.
        """
        if self.activation == "swiglu":
            return 8 * max(round(self.n_embd / 3), 1)
        return 4 * self.n_embd


@dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for all, or muon for the matrices inside the blocks and adamw for the rest."""
    lr: float = 6e-4
    """Peak learning rate of AdamW."""
    head_lr: float | None = None
    """Peak learning rate of an untied head; by default lr."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon; follows the same schedule."""
    momentum: float = 0.95
    """Nesterov momentum of Muon."""
    momentum_warmup: float = 0.0
    """Fraction of the run over which Muon's momentum rises from 0.85."""
    beta1: float = 0.9
    """AdamW's averaging factor for gradients."""
    beta2: float = 0.95
    """AdamW's averaging factor for squared gradients."""
    eps: float = 1e-8
    """AdamW's guard against division by zero; smaller amplifies rounding noise of key biases."""
    weight_decay: float = 0.1
    """Decoupled weight decay of AdamW, for matrices and embeddings only."""
    muon_weight_decay: float = 0.0
    """Decoupled weight decay of Muon."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 clips nothing (the norm is logged all the same)."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up: cosine or linear decay, or constant and then a linear cool-down."""
    warmup: float = 750 / 18850
    """Fraction of the run over which the rate rises linearly from zero."""
    cooldown: float = 0.4
    """Fraction of the run, at its end, over which the constant schedule falls."""
    final_lr: float = 0.1
    """Fraction of the peak rate reached at the last update."""


@dataclass(frozen=True)
class TrainConfig:
    updates: int | None = None
    """Number of weight updates; overrides epochs and tokens, and may run into a further epoch."""
    stop_at: int | None = None
    """End after this update already, with the schedule of the whole run; resuming can go on."""
    epochs: float | None = None
    """Passes over the training split; overrides tokens."""
    tokens: int = 9_882_304_512
    """Token budget, used when neither updates nor epochs is given."""
    tokens_per_update: int = 524_288
    """Tokens in one update over all processes and micro-batches: the global batch."""
    micro_batch: int | None = None
    """Windows in a forward pass of one process; by default what divides and fits."""
    order: Literal["sequential", "shuffle_documents", "shuffle_windows"] = "sequential"
    """Order of the windows: as stored, or documents or windows permuted anew every epoch."""
    rows: Literal["packed", "padded"] = "packed"
    """Windows cut from documents back to back, or a document, or a piece of one, in each."""
    val_interval: int = 250
    """Updates between validations; 0 validates only at the start and the end of the run."""
    val_tokens: int = 10_485_760
    """Tokens of the validation split that every validation reads, always the same ones."""
    eval_interval: int = 0
    """Updates between evaluations on benchmarks, also at both ends of the run; 0 makes none."""
    eval_tasks: tuple[str, ...] = ("hellaswag",)
    """Benchmarks to score then, by their names in tasks.py."""
    eval_limit: int | None = None
    """Score only the first so many examples of each benchmark, where time is short."""
    checkpoint_interval: int = 1000
    """Updates between checkpoints; 0 keeps only those at the ends of epochs and of the run."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay, besides the one with the least validation loss."""
    log_interval: int = 1
    """Updates between train lines in metrics.jsonl."""
    log_window_losses: bool = False
    """Also keep the loss of every window, update by update, in window_losses.bin."""
    trackers: tuple[Literal["wandb", "tensorboard"], ...] = ()
    """Show the record in Weights & Biases or TensorBoard, too."""
    sample_tokens: int = 48
    """Tokens sampled from each fixed prompt into samples.md at a checkpoint; 0 samples nothing."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto compiles on CUDA only."""
    dtype: Literal["float32", "tf32", "bfloat16", "float16", "auto"] = "auto"
    """Arithmetic of matrix products; auto is bfloat16, on older GPUs float16, on others float32."""
    loss_scale: float = 65536.0
    """First factor of the loss in float16, halved and doubled as gradients allow; 0 scales none."""
    attention: Literal["auto", "flash", "fa3", "cudnn", "efficient", "math"] = "auto"
    """Attention kernel on CUDA; auto measures those that are there and takes the fastest."""
    gradient_checkpointing: bool = False
    """Keep only the blocks' inputs and compute them again backward: less memory for more time."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several processes: each has the whole model (ddp), or a share of every matrix (fsdp)."""
    device: Literal["cpu", "cuda", "mps", "auto"] = "auto"
    """Where to compute; auto takes CUDA, then MPS, then the CPU."""
    timeout: float = 600.0
    """Seconds a process waits for the others before it takes them for lost and ends."""
    seed: int = 1337
    """Seed of the initial weights, the data order, dropout and the samples."""
    runs_dir: str = "runs"
    """Directory that holds the run directories."""


@dataclass(frozen=True)
class Config:
    recipe: str = "gpt2"
    """What differs from the defaults, by its name in recipes.py."""
    size: str = "124m"
    """How big, by its name in the size table of recipes.py."""
    data: str = "fineweb-edu"
    """Directory of token shards, or its name under data/."""
    name: str = ""
    """Name of the run directory."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    init: str = ""
    """Model whose weights it begins with: a run, a checkpoint, gpt2, or one of transformers."""


# Fields that may change between a run and its resumption: they decide how and where it is computed
# and what is written down, not what is computed.
MUTABLE_FIELDS = {
    "name",
    *("train.micro_batch", "train.compile", "train.dtype", "train.device", "train.runs_dir"),
    *("train.val_interval", "train.checkpoint_interval", "train.log_interval"),
    *("train.eval_interval", "train.eval_tasks", "train.eval_limit"),
    *("train.keep_checkpoints", "train.sample_tokens", "train.timeout", "train.stop_at"),
    *("train.loss_scale", "train.attention", "train.gradient_checkpointing", "train.parallel"),
    *("train.log_window_losses", "train.trackers"),
}

# Fields that came later. At their defaults they change nothing, so that a run begun before them has
# the same identity, and can be continued.
LATER_FIELDS = (
    *("model.architecture", "model.positions", "model.norm", "model.activation", "model.bias"),
    *("model.document_mask", "model.qk_norm", "model.zero_init", "model.x0_shortcut"),
    *("model.value_residual", "model.softcap", "model.tied"),
    *("optim.head_lr", "optim.momentum_warmup", "train.rows", "init"),
)


def flatten(config: Config) -> dict[str, Any]:
    """Return `{"train.seed": 1337, ...}`: every leaf of the config under its dotted name."""
    flat = {}
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": leaf for key, leaf in value.items()})
        else:
            flat[name] = value
    return flat


def replace(config: Config, changes: dict[str, Any]) -> Config:
    """Return a copy of `config` with `{"optim.lr": 1e-3, ...}` applied."""
    for dotted, value in changes.items():
        group, _, leaf = dotted.rpartition(".")
        if group:
            value = dataclasses.replace(getattr(config, group), **{leaf: value})
        config = dataclasses.replace(config, **{group or leaf: value})
    return config


def identity_digest(config: Config) -> str:
    """Return a short digest of the fields that make the run what it is."""
    default = flatten(Config())
    fixed = {
        name: value
        for name, value in flatten(config).items()
        if name not in MUTABLE_FIELDS and not (name in LATER_FIELDS and value == default[name])
    }
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def changed_identity(old: Config, new: Config) -> list[str]:
    """Name the fields of the run's identity in which two configs differ, each with both values."""
    before, after = flatten(old), flatten(new)
    return [
        f"{name} {before[name]} -> {after[name]}"
        for name in before
        if name not in MUTABLE_FIELDS and before[name] != after[name]
    ]


def windows_per_update(config: Config) -> int:
    """Return G, the windows of one update; raises UserError unless whole windows fill it."""
    tokens, length = config.train.tokens_per_update, config.model.block_size
    if tokens < length or tokens % length:
        below = max(tokens // length, 1) * length
        raise UserError(
            f"train.tokens_per_update {tokens} is not a multiple of model.block_size {length}; "
            f"{below} and {below + length} are the nearest that are."
        )
    return tokens // length


def windows_per_process(config: Config, world_size: int) -> int:
    """Return the windows each process has in an update; raises UserError, listing what divides."""
    windows = windows_per_update(config)
    if windows % world_size:
        raise UserError(
            f"An update of {windows} windows cannot be shared by {world_size} processes; "
            f"valid process counts are {_listing(divisors(windows))}."
        )
    return windows // world_size


def accumulation_steps(config: Config, world_size: int) -> int:
    """Return the micro-batches each process computes for one update.

    Raises UserError, listing the valid ones, unless world_size * micro_batch divides G.
    """
    share, micro_batch = windows_per_process(config, world_size), config.train.micro_batch
    if share % micro_batch:
        raise UserError(
            f"train.micro_batch {micro_batch} does not divide the {share} windows that each of "
            f"{world_size} processes has in an update; valid choices are "
            f"{_listing(divisors(share))}."
        )
    return share // micro_batch


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _listing(numbers: list[int]) -> str:
    return ", ".join(str(number) for number in numbers)


def total_updates(config: Config, windows: int) -> int:
    """Return the length of the run in updates, given the number of training windows."""
    train, per_epoch = config.train, windows // windows_per_update(config)
    if per_epoch == 0:
        raise UserError(
            f"The training split holds {windows} windows of {config.model.block_size} tokens, less "
            f"than one update of {windows_per_update(config)}; lower train.tokens_per_update."
        )
    if train.updates is not None:
        return train.updates
    if train.epochs is not None:
        return max(1, round(train.epochs * per_epoch))
    return max(1, train.tokens // train.tokens_per_update)


def last_update(config: Config, start: int = 0) -> int:
    """Return the step at which a run that stands at `start` ends: its last, or train.stop_at.

    The number of updates is known, as it is once the data is.
    """
    train = config.train
    if train.stop_at is None:
        return train.updates
    return max(start, min(train.stop_at, train.updates))
