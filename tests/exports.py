"""Models of every architecture there is, exported for transformers and opened by it."""

from pathlib import Path
from typing import Any

import torch

import hf_import
from config import ModelConfig
from corpus.tokenizer import Tokenizer
from hf_configs import Saved
from hf_export import write_export
from model import GPT
from recipes import RECIPES, build
from tests.small_models import config_of, shaken

LLAMA = {"pos_emb": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False}
MODERN = {
    "architecture": "modern",
    "bias": False,
    "pos_emb": "rope",
    "norm": "rmsnorm",
    "qk_norm": True,
    "x0_residual": True,
    "value_residual": True,
    "logit_softcap": 15.0,
}

# What transformers takes a model for, and its parts.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2 without biases": ("gpt2", {"bias": False}),
    "gpt2 with dropout": ("gpt2", {"dropout": 0.1, "attention_dropout": 0.0}),
    "rope": ("gpt_neox", {"pos_emb": "rope"}),
    "rotary without biases": ("gpt_neox", {"pos_emb": "rope", "bias": False}),
    "llama": ("llama", LLAMA),
    "swiglu with biases": (
        "gpt2_reproduction",
        {"pos_emb": "rope", "activation": "swiglu"},
    ),
    "relu2": ("gpt2_reproduction", {"activation": "relu2", "norm": "rmsnorm"}),
    "document mask": ("gpt2_reproduction", {"document_mask": True}),
    "document mask at 59": ("gpt2_reproduction", {"document_mask": True, "eot": 59}),
    "modern": ("gpt2_reproduction", MODERN),
    "modern untied": (
        "gpt2_reproduction",
        {**MODERN, "tie_embeddings": False, "zero_init_proj": True},
    ),
    "modern, plain": (
        "gpt2_reproduction",
        {"architecture": "modern", "bias": False, "norm": "layernorm"},
    ),
}


def small(name: str, **sizes: int) -> GPT:
    """Return a model of one of SHAPES, its weights far from those it would begin with."""
    return shaken(config_of(**SHAPES[name][1], **sizes))


def recipe_config(recipe: str, **sizes: int) -> ModelConfig:
    """Return the config of a recipe's model at a tiny size."""
    assert recipe in RECIPES
    model = build(recipe, "nano").model
    parts = {f: v for f, v in vars(model).items() if f not in ("n_layer", "n_head", "n_embd")}
    parts |= {"block_size": 64, "vocab_size": 61}
    return config_of(**{**parts, **sizes})


def exported(
    model: GPT, directory: Path, tokenizer: Tokenizer | None = None, recipe: str | None = None
) -> Path:
    """Export a model, as one of ours, and return the directory."""
    name, digest = (tokenizer.name, tokenizer.sha256) if tokenizer else ("gpt2", None)
    named = {"name": name, "sha256": digest}
    saved = Saved(model.config, True, named, recipe, 12)
    write_export(directory, model, saved, tokenizer, "# a card\n")
    return directory


def opened(directory: Path) -> Any:
    """Return the model that transformers makes of an export."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True
    ).eval()


def assert_same_weights(directory: Path, model: GPT) -> None:
    """Check that a directory loads here as exactly `model`: the same config, bits and no more."""
    ours, saved = hf_import.load(str(directory))
    assert ours.config == saved.model == model.config
    found, wanted = ours.state_dict(), model.state_dict()
    assert found.keys() == wanted.keys()
    rows = model.config.vocab_size
    for name, tensor in wanted.items():
        real = slice(rows) if name in ("wte.weight", "lm_head.weight") else slice(None)
        assert torch.equal(found[name][real], tensor[real]), name
        assert (found[name][rows:] == 0).all() or real == slice(None), name
