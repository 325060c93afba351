"""The settings of a run: three frozen groups, their checks, and the numbers that follow from them.

A `Config` and a step number are the whole position of a run. What stands beside or under a field is
its `--help` text. Nothing here imports torch, so that figures and cost estimates start at once.
"""

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=1, lt=2**48)]
CountOrZero = Annotated[int, Meta(ge=0, lt=2**48)]
Positive = Annotated[float, Meta(gt=0, lt=1e12)]
Amount = Annotated[float, Meta(ge=0, lt=1e12)]
Probability = Annotated[float, Meta(ge=0, lt=1)]
Fraction = Annotated[float, Meta(ge=0, le=1)]


class UserError(Exception):
    """A mistake a person can mend: shown as one plain sentence, without a traceback."""


def check_values(group: Any) -> None:
    """Raise UserError, naming the field, for a value that its type does not allow."""
    for name, kind in typing.get_type_hints(type(group), include_extras=True).items():
        try:
            msgspec.convert(getattr(group, name), kind)
        except msgspec.ValidationError as error:
            dotted = f"{type(group).__name__.removesuffix('Config').lower()}.{name}"
            reason = str(error).replace("Expected", "expected")
            raise UserError(f"{dotted} cannot be {getattr(group, name)!r}: {reason}.") from None


@dataclass(frozen=True)
class ModelConfig:
    n_layer: Count = 12  # Number of transformer blocks.
    n_head: Count = 12  # Attention heads in each block; they share the width equally.
    n_embd: Count = 768  # Width of the residual stream.
    block_size: Count = 1024  # Context length in tokens, T.
    vocab_size: Annotated[int, Meta(ge=1, le=65536)] = 50257  # Token ids; taken from the data.
    eot: Annotated[int, Meta(ge=-1, lt=65536)] = -1  # Id of <|endoftext|>; -1 is the last.
    dropout: Probability = 0.0  # Probability of dropping an activation; one epoch needs none.
    attention_dropout: Probability | None = None  # Its own for attention weights; else dropout.
    architecture: Literal["gpt2", "modern"] = "gpt2"  # model.py's, or modern.py's with more parts.
    pos_emb: Literal["learned", "rope"] = "learned"  # A table, or rotated queries and keys (RoPE).
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # RMSNorm leaves the mean where it is.
    activation: Literal["gelu", "swiglu", "relu2"] = "gelu"  # SwiGLU at GELU's parameters, ReLU^2.
    bias: bool = True  # Biases in linear layers and LayerNorms.
    document_mask: bool = False  # Hide earlier documents in the same sequence from a token.
    qk_norm: bool = False  # Modern: RMSNorm on queries and keys.
    zero_init_proj: bool = False  # Modern: projections onto the residual stream start at zero.
    x0_residual: bool = False  # Modern: blocks read a learned mixture of stream and embedding.
    value_residual: bool = False  # Modern: values are learned mixtures with the first block's.
    logit_softcap: Amount = 0.0  # Modern: logits bent to stay within plus and minus this; 0 is off.
    tie_embeddings: bool = True  # The output head is the token embedding; optional in modern.

    def __post_init__(self) -> None:
        check_values(self)
        if self.n_embd % self.n_head:
            raise UserError(f"model.n_embd must be a multiple of model.n_head {self.n_head}.")
        if self.pos_emb == "rope" and self.head_size % 2:
            raise UserError(f"model.pos_emb rope needs an even head size, not {self.head_size}.")
        parts = ("qk_norm", "zero_init_proj", "x0_residual", "value_residual", "logit_softcap")
        asked = [n for n in (*parts, "tie_embeddings") if getattr(self, n) != (n not in parts)]
        if self.architecture == "gpt2" and asked:
            modern = "--model.architecture modern --model.no-bias"
            raise UserError(f"model.{asked[0]} can only be set with {modern}.")
        if self.architecture == "modern" and self.bias:
            raise UserError("model.architecture modern has no biases; add --model.no-bias.")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in memory: a multiple of 128, which fast matrix products want."""
        return 128 * math.ceil(self.vocab_size / 128)

    @property
    def head_size(self) -> int:
        """Channels of an attention head."""
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        """Hidden units of a block's MLP: 4 * width, or two thirds for SwiGLU's third matrix."""
        swiglu = 8 * max(round(self.n_embd / 3), 1)  # matrix units want multiples of 8
        return swiglu if self.activation == "swiglu" else 4 * self.n_embd

    @property
    def num_params(self) -> int:
        """Trainable parameters, without padding (124,439,808 for GPT-2 124M)."""
        width, hidden, mlp_matrices = self.n_embd, self.mlp_width, 2 + (self.activation == "swiglu")
        block = 4 * width**2 + mlp_matrices * width * hidden
        if self.bias:
            block += 4 * width + (mlp_matrices - 1) * hidden + width
        if self.architecture == "modern":  # no gains; 2 numbers a block for x0, 1 for values
            other = 2 * self.n_layer * self.x0_residual + (self.n_layer - 1) * self.value_residual
        else:  # two norms a block, one at the end
            norm = 2 * width if self.norm == "layernorm" and self.bias else width
            other = (2 * self.n_layer + 1) * norm
        return self.vocab_size * width + self._lookup_params + self.n_layer * block + other

    @property
    def flops_per_token(self) -> float:
        """FLOPs of a training token: 6 a multiplied parameter, and attention (PaLM, appendix B)."""
        attention = 12 * self.n_layer * self.n_embd * self.block_size
        return 6 * (self.num_params - self._lookup_params) + attention

    @property
    def _lookup_params(self) -> int:
        """Parameters of tables that multiply nothing: positions, and an untied embedding."""
        positions = self.block_size if self.pos_emb == "learned" else 0
        return (positions + (0 if self.tie_embeddings else self.vocab_size)) * self.n_embd


@dataclass(frozen=True)
class OptimConfig:
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: only for the matrices in the blocks.
    lr: Positive = 6e-4  # Peak learning rate of AdamW.
    lm_head_lr: Positive | None = None  # Peak rate of an untied output head; by default lr.
    muon_lr: Positive = 0.02  # Peak learning rate of Muon; follows the same schedule.
    muon_momentum: Probability = 0.95  # Nesterov momentum of Muon.
    momentum_warmup: Fraction = 0.0  # Fraction of the run over which it rises from 0.85.
    beta1: Probability = 0.9  # AdamW's averaging factor for gradients.
    beta2: Probability = 0.95  # AdamW's averaging factor for squared gradients.
    eps: Positive = 1e-8  # AdamW's guard against division by zero; smaller amplifies noise.
    weight_decay: Amount = 0.1  # Decoupled decay of AdamW, for matrices and embeddings only.
    muon_weight_decay: Amount = 0.0  # Decoupled weight decay of Muon.
    grad_clip: Amount = 1.0  # Largest global gradient norm; 0 clips nothing (it is still logged).
    schedule: Literal["cosine", "linear", "constant"] = "cosine"  # After the warm-up.
    warmup_frac: Fraction = 750 / 18850  # Fraction of the run of a linear rise from zero.
    cooldown_frac: Fraction = 0.4  # Fraction, at the end, over which the constant schedule falls.
    final_lr_frac: Fraction = 0.1  # Fraction of the peak rate reached at the last step.

    __post_init__ = check_values


@dataclass(frozen=True)
class TrainConfig:
    steps: CountOrZero | None = None  # Number of optimizer steps; overrides epochs and tokens.
    stop_at_step: CountOrZero | None = None  # Stop here, with the whole schedule; can be resumed.
    epochs: Positive | None = None  # Passes over the training split; overrides tokens.
    tokens: Count = 9_882_304_512  # Token budget, where neither steps nor epochs is given.
    batch_tokens: Count = 524_288  # Tokens in a step over all GPUs and micro-batches.
    micro_batch_size: Count | None = None  # Sequences per forward pass and GPU; or all that fit.
    shuffle: Literal["none", "documents", "sequences"] = "none"  # What is permuted every epoch.
    val_interval: CountOrZero = 250  # Steps between validations; 0: only at start and end.
    val_tokens: Count = 10_485_760  # Validation tokens of every validation, always the same.
    eval_interval: CountOrZero = 0  # Steps between benchmarks, also at both ends; 0 runs none.
    eval_tasks: tuple[str, ...] = ("hellaswag",)  # Benchmarks to score then, by name.
    eval_limit: Count | None = None  # Score only the first so many examples of each benchmark.
    checkpoint_interval: CountOrZero = 1000  # Steps between checkpoints; 0: at ends of epochs only.
    keep_checkpoints: Count = 2  # How many of the newest stay, besides the best validation loss.
    log_interval: Count = 1  # Steps between train lines in metrics.jsonl.
    log_sequence_losses: bool = False  # Keep every sequence's losses in sequence_losses.bin.
    trackers: tuple[
        Literal["wandb", "tensorboard", "trackio"], ...
    ] = ()  # Show metrics there, too.
    sample_tokens: CountOrZero = 48  # Tokens sampled from each prompt at a checkpoint; 0 is none.
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto compiles on CUDA only.
    dtype: Literal["float32", "tf32", "bfloat16", "float16", "auto"] = "auto"
    """Arithmetic of matrix products; auto is bfloat16, on older GPUs float16, on others float32."""
    loss_scale: Amount = 65536.0  # First factor of the loss in float16; 0 scales none.
    attention: Literal["auto", "flash", "fa3", "cudnn", "efficient", "math"] = "auto"
    """Attention kernel on CUDA; auto is PyTorch's choice."""
    gradient_checkpointing: bool = False  # Recompute blocks backward: less memory, more time.
    parallel: Literal["ddp", "fsdp"] = "ddp"  # A model on each GPU, or a shard of every matrix.
    device: Literal["cpu", "cuda", "mps", "auto"] = "auto"  # auto: CUDA, then MPS, then the CPU.
    timeout: Annotated[float, Meta(gt=0, lt=1e8)] = 600.0  # Seconds to wait for a silent rank.
    seed: CountOrZero = 1337  # Of initial weights, data order, dropout and samples.
    runs_dir: str = "runs"  # Directory that holds the run directories.

    __post_init__ = check_values


@dataclass(frozen=True)
class Config:
    recipe: str = "gpt2"  # What differs from the defaults, by its name in recipes.py.
    size: str = "124m"  # How big, by its name in the size table of recipes.py.
    data: str = "fineweb-edu"  # Directory of token shards, or its name under data/.
    name: str = ""  # Name of the run directory.
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    init_from: str = ""  # Model whose weights it begins with: a run, a checkpoint, gpt2, ...

    def __post_init__(self) -> None:
        tokens, length = self.train.batch_tokens, self.model.block_size
        if tokens % length:
            near = max(tokens // length, 1) * length
            whole = f"a multiple of model.block_size {length}, as {near} and {near + length} are"
            raise UserError(f"train.batch_tokens {tokens} is not {whole}.")

    @property
    def sequences_per_step(self) -> int:
        """G, the sequences of one step over all ranks."""
        return self.train.batch_tokens // self.model.block_size

    def sequences_per_rank(self, world_size: int) -> int:
        """Return the sequences of one rank in a step; raises UserError, listing what divides."""
        step = self.sequences_per_step
        return _divide(step, world_size, f"{world_size} processes cannot share a step of")

    def accumulation_steps(self, world_size: int) -> int:
        """Return the micro-batches of a rank in a step; raises UserError, listing what divides."""
        share, size = self.sequences_per_rank(world_size), self.train.micro_batch_size
        return _divide(share, size, f"train.micro_batch_size {size} does not divide a process's")

    def total_steps(self, n_sequences: int) -> int:
        """Return the length of the run; raises UserError when the split holds less than a step."""
        train, per_epoch = self.train, n_sequences // self.sequences_per_step
        if per_epoch == 0:
            step = f"less than a step of {self.sequences_per_step}; lower train.batch_tokens"
            raise UserError(f"The training split holds {n_sequences} sequences, {step}.")
        if train.steps is not None:
            return train.steps
        wanted = (
            round(train.epochs * per_epoch) if train.epochs else train.tokens // train.batch_tokens
        )
        return max(1, wanted)


# Of `train`, what makes a run what it is; the rest may change on resume, as may the name.
FIXED = {"steps", "epochs", "tokens", "batch_tokens", "shuffle", "val_tokens", "seed"}


def flatten(config: Config | dict[str, Any]) -> dict[str, Any]:
    """Return `{"train.seed": 1337, ...}`: every leaf of the config under its dotted name."""
    tree, flat = config if isinstance(config, dict) else dataclasses.asdict(config), {}
    for name, value in tree.items():
        nested = isinstance(value, dict)
        flat |= {f"{name}.{k}": v for k, v in value.items()} if nested else {name: value}
    return flat


def replace(config: Config, changes: dict[str, Any]) -> Config:
    """Return a copy with `{"optim.lr": 1e-3, ...}` applied together, and checked once."""
    new = {name: value for name, value in changes.items() if "." not in name}
    for group in {name.split(".")[0] for name in changes.keys() - new.keys()}:
        leaves = {n.split(".")[1]: v for n, v in changes.items() if n.startswith(f"{group}.")}
        new[group] = dataclasses.replace(getattr(config, group), **leaves)
    return dataclasses.replace(config, **new)


def changed_fields(old: Config, new: Config) -> list[str]:
    """Return the fields in which a resumed run must not differ and does: "train.seed 1 -> 2"."""
    before, after, mutable = flatten(old), flatten(new), {"name"}
    mutable |= {f"train.{name}" for name in vars(old.train) if name not in FIXED}
    names = [n for n in before if n not in mutable and before[n] != after[n]]
    return [f"{name} {before[name]} -> {after[name]}" for name in names]


def to_json(config: Config) -> str:
    """Return the config as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, where: str = "config.json") -> Config:
    """Return the config in JSON; a missing field has its default, an unknown one is refused."""
    config = decode(text, Config, where)
    for name in flatten(msgspec.json.decode(text)).keys() - flatten(config).keys():
        raise UserError(f"{where} has a field this version does not know: {name}.")
    return config


def decode(content: bytes | str, cls: type, where: str) -> Any:
    """Return the dataclass in a JSON text; raises UserError naming `where` and the misfit."""
    try:
        return msgspec.json.decode(content, type=cls)
    except (msgspec.MsgspecError, ValueError, RecursionError, UserError) as error:
        raise UserError(f"{where}: {str(error).rstrip('.')}.") from error


def _divide(sequences: int, parts: int, refusal: str) -> int:
    if sequences % parts:
        valid = ", ".join(map(str, divisors(sequences)))
        raise UserError(f"{refusal} {sequences} sequences; valid are {valid}.")
    return sequences // parts


def divisors(n: int) -> list[int]:
    """Return the divisors of a positive number, ascending."""
    low = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return low + [n // i for i in reversed(low) if i * i != n]
