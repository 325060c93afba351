"""The rungs by name: how large each is, how long it is trained, and how it is built."""

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from config import UserError
from makemore.bigram import Bigram
from makemore.data import Data
from makemore.gpt2 import GPT2
from makemore.layers import Init, Norm
from makemore.mlp import MLP
from makemore.nn_bigram import NNBigram
from makemore.transformer import Transformer
from makemore.wavenet import WaveNet

Rung = Literal["bigram", "nn_bigram", "mlp", "wavenet", "transformer", "gpt2"]
RUNGS: tuple[Rung, ...] = get_args(Rung)


@dataclass(frozen=True)
class Settings:
    """All that decides what a run computes; a rung without a size leaves it at 0."""

    rung: Rung
    data: str
    digest: str
    seed: int
    steps: int
    batch: int
    lr: float
    context: int
    weight_decay: float = 0.0
    dropout: float = 0.0
    init: Init = "scaled"
    norm: Norm = "none"
    width: int = 0
    hidden: int = 0
    n_layer: int = 0
    n_head: int = 0


# What differs by rung, on words; steps are `epochs` passes over them.
_WORDS = {
    "bigram": {"epochs": 1, "lr": 0.0},
    "nn_bigram": {"epochs": 8, "lr": 0.1},
    "mlp": {"epochs": 20, "lr": 1e-2, "dropout": 0.05, "width": 16, "hidden": 256},
    "wavenet": {"epochs": 20, "lr": 3e-3, "dropout": 0.1, "width": 24, "hidden": 192},
    "transformer": {"epochs": 24, "lr": 4e-3, "dropout": 0.1, "width": 64},
    "gpt2": {"epochs": 24, "lr": 6e-3, "dropout": 0.05, "width": 64},
}
# On running text, which differs in size more than in what there is to learn, steps are fixed.
_TEXT = {
    "bigram": {"steps": 1, "lr": 0.0},
    "nn_bigram": {"steps": 800, "lr": 0.1},
    "mlp": {"steps": 2400, "lr": 3e-3, "width": 24, "hidden": 256},
    "wavenet": {"steps": 2400, "lr": 3e-3, "width": 24, "hidden": 256},
    "transformer": {"steps": 2400, "lr": 3e-3, "width": 128},
    "gpt2": {"steps": 2400, "lr": 3e-3, "width": 128},
}
_SHAPES = {
    "wavenet": {"norm": "batch", "weight_decay": 0.1},
    "transformer": {"norm": "layer", "weight_decay": 0.3, "n_layer": 4, "n_head": 4},
    "gpt2": {"norm": "layer", "weight_decay": 0.3, "n_layer": 4, "n_head": 4},
}
# Rows of a step, and characters in a row, which are what transformers can see.
WORD_BATCH, TEXT_BATCH = 128, 32
WORD_CONTEXT, TEXT_CONTEXT = 16, 64


def settings_for(
    rung: Rung,
    data: Data,
    seed: int,
    steps: int | None = None,
    context: int | None = None,
    init: Init = "scaled",
    norm: Norm | None = None,
) -> Settings:
    """Return a rung's settings on `data`, with what a person chose in the place of its own.

    Raises UserError for a choice that the rung does not have, or that the data does not fit.
    """
    _check_choice(rung, context, init, norm)
    if data.kind == "words":
        chosen = {**_WORDS[rung], "batch": WORD_BATCH, "context": WORD_CONTEXT}
        chosen["steps"] = chosen.pop("epochs") * max(len(data.train) // WORD_BATCH, 1)
    else:
        chosen = {**_TEXT[rung], "batch": TEXT_BATCH, "context": TEXT_CONTEXT}
    chosen |= _SHAPES.get(rung, {})
    given = {"steps": steps, "context": context, "norm": norm}
    chosen |= {name: value for name, value in given.items() if value is not None}
    settings = Settings(rung, data.name, data.digest, seed, init=init, **chosen)
    _check_data(settings, data)
    return settings


def _check_choice(rung: Rung, context: int | None, init: Init, norm: Norm | None) -> None:
    if context is not None and (rung not in ("transformer", "gpt2") or context < 1):
        raise UserError(
            "--context is for transformer and gpt2, and at least 1; the other rungs' is part of "
            "what they are."
        )
    if init != "scaled" and rung == "bigram":
        raise UserError("bigram counts and begins with no weights; --init is for the other rungs.")
    if norm is not None and rung in ("bigram", "nn_bigram"):
        raise UserError(f"{rung} has no layers to normalise; --norm is for mlp and above.")
    if norm not in (None, "layer") and rung == "gpt2":
        raise UserError("gpt2 is the project's own, whose norm is layer; see transformer for none.")


def _check_data(settings: Settings, data: Data) -> None:
    """Raise UserError when the words do not fit the context, or the text does not fill it."""
    if settings.steps < 1:
        raise UserError(f"--steps {settings.steps} trains nothing; give at least 1.")
    if data.kind == "text":
        if len(data.train) <= settings.context:
            raise UserError(
                f"{data.name} has {len(data.train)} characters to train on, which do not fill a "
                f"row of {settings.context}; give more text."
            )
        return
    longest = data.longest + 1
    if settings.rung in ("transformer", "gpt2") and longest > settings.context:
        raise UserError(
            f"The longest word of {data.name} has {data.longest} characters, which with the "
            f"boundary before it is more than the context of {settings.context}; give "
            f"{settings.rung} --context {longest}, or leave it out."
        )


def build(settings: Settings, vocab_size: int) -> nn.Module:
    """Return a rung with its first weights, which the seed alone decides."""
    s = settings
    torch.manual_seed(s.seed)
    if s.rung == "bigram":
        return Bigram(vocab_size)
    if s.rung == "nn_bigram":
        return NNBigram(vocab_size, s.init)
    if s.rung in ("mlp", "wavenet"):
        kind = MLP if s.rung == "mlp" else WaveNet
        return kind(vocab_size, s.width, s.hidden, s.dropout, s.init, s.norm)
    sizes = (vocab_size, s.context, s.width, s.n_layer, s.n_head, s.dropout, s.init)
    return Transformer(*sizes, s.norm) if s.rung == "transformer" else GPT2(*sizes)


def parameter_count(model: nn.Module) -> int:
    """Return how many numbers a rung has learnt or counted, rows past the vocabulary left out."""
    count = sum(parameter.numel() for parameter in model.parameters())
    if isinstance(model, GPT2):
        config = model.gpt.config
        count -= (config.padded_vocab_size - config.vocab_size) * config.n_embd
    return count


def differences(old: dict[str, object], new: Settings) -> list[str]:
    """Name the settings in which a run on the disk differs from what is asked for."""
    return [
        f"{name} {old.get(name)} -> {value}"
        for name, value in dataclasses.asdict(new).items()
        if old.get(name) != value
    ]
