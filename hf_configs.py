"""config.json of Hugging Face's transformers, from and to a model's config.

    architecture_of(ModelConfig) -> "gpt2", "gpt_neox", "llama" or OWN
    to_json(Saved) -> dict      from_json(dict, path) -> Saved

Three of transformers' own architectures are models of ours: its GPT-2; GPT-NeoX without parallel
branches, which is GPT-2 with rotary positions; and Llama, with as many key as query heads and a
tied head, which is rotary, RMSNorm and SwiGLU without biases. Anything else needs the modeling file
that is exported with it (assets/modeling_gpt.py).

What those keys do not say goes under one key more, KEY, so that an export comes back as exactly the
model it was. What a file says is only believed where all of it agrees.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import ModelConfig, UserError, decode

KEY = "gpt2_reproduction"
# The model type of what none of the stock architectures is.
OWN = "gpt2_reproduction"
MODELING_FILE = "modeling_gpt.py"

CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    OWN: "GPTForCausalLM",
}

# Where the sizes stand in each stock architecture's file.
SIZES = {
    "gpt2": {
        "n_layer": "n_layer",
        "n_head": "n_head",
        "n_embd": "n_embd",
        "block_size": "n_positions",
        "vocab_size": "vocab_size",
    },
    "llama": {
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_embd": "hidden_size",
        "block_size": "max_position_embeddings",
        "vocab_size": "vocab_size",
    },
}
SIZES["gpt_neox"] = SIZES["llama"]

# What these architectures are in our words.
PARTS = {
    "gpt2": {},
    "gpt_neox": {"pos_emb": "rope"},
    "llama": {"pos_emb": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False},
}

# Values that a stock file must have to be a model of ours, the first of them being the one that is
# written, and what transformers takes when the key is absent. gelu_new and gelu_pytorch_tanh are
# two names of one function.
FIXED = {
    "gpt2": {
        "activation_function": (("gelu_new", "gelu_pytorch_tanh"), "gelu_new"),
        "layer_norm_epsilon": ((1e-5,), 1e-5),
        "tie_word_embeddings": ((True,), True),
        "add_cross_attention": ((False,), False),
        "scale_attn_weights": ((True,), True),
        "scale_attn_by_inverse_layer_idx": ((False,), False),
        "reorder_and_upcast_attn": ((False,), False),
    },
    "gpt_neox": {
        "hidden_act": (("gelu_pytorch_tanh", "gelu_new"), "gelu"),
        "layer_norm_eps": ((1e-5,), 1e-5),
        "tie_word_embeddings": ((True,), False),
        "use_parallel_residual": ((False,), True),
        "attention_bias": ((True,), True),
    },
    "llama": {
        "hidden_act": (("silu", "swish"), "silu"),
        "rms_norm_eps": ((1e-5,), 1e-6),
        "tie_word_embeddings": ((True,), False),
        "attention_bias": ((False,), False),
        "mlp_bias": ((False,), False),
    },
}

# Rotary positions as ours, under the names of transformers 5 and, with their defaults, before it.
ROTARY = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
OLD_ROTARY = {
    "gpt_neox": {
        "rotary_emb_base": ("rope_theta", 10_000),
        "rotary_pct": ("partial_rotary_factor", 0.25),
    },
    "llama": {"rope_theta": ("rope_theta", 10_000.0)},
}


@dataclass(frozen=True)
class Saved:
    """What a directory of transformers holds, besides its weights."""

    model: ModelConfig
    # Whether every document it was trained on began with <|endoftext|>.
    begins_with_eot: bool = False
    # As in a checkpoint's state.json; None of a model that is not ours.
    tokenizer: dict[str, Any] | None = None
    recipe: str | None = None
    step: int | None = None


def architecture_of(model: ModelConfig) -> str:
    """Return the model type under which transformers knows such a model, or OWN."""
    for kind, parts in PARTS.items():
        if kind != "llama":
            # Biases that are not there are zeros there.
            parts = {**parts, "bias": model.bias}
        free = (*SIZES[kind], "dropout", "attention_dropout")
        plain = dataclasses.asdict(ModelConfig()) | {name: getattr(model, name) for name in free}
        if dataclasses.asdict(model) == plain | parts:
            return kind
    return OWN


def to_json(saved: Saved) -> dict[str, Any]:
    """Return what config.json is to say of a model."""
    model, kind = saved.model, architecture_of(saved.model)
    attention_dropout = model.dropout
    if model.attention_dropout is not None:
        attention_dropout = model.attention_dropout
    if kind == OWN:
        settings = {**dataclasses.asdict(model), "mlp_width": model.mlp_width}
        settings["tie_word_embeddings"] = model.tie_embeddings
        file = MODELING_FILE.removesuffix(".py")
        settings["auto_map"] = {
            "AutoConfig": f"{file}.GPTConfig",
            "AutoModelForCausalLM": f"{file}.{CLASSES[OWN]}",
        }
    else:
        settings = {name: getattr(model, field) for field, name in SIZES[kind].items()}
        settings |= {name: allowed[0] for name, (allowed, _) in FIXED[kind].items()}
    if kind == "gpt2":
        settings |= {"resid_pdrop": model.dropout, "embd_pdrop": model.dropout}
        settings["attn_pdrop"] = attention_dropout
    elif kind in OLD_ROTARY:
        settings |= {"intermediate_size": model.mlp_width, "attention_dropout": attention_dropout}
        settings["rope_parameters"] = dict(ROTARY)
    if kind == "gpt_neox":
        settings["hidden_dropout"] = model.dropout
    if kind == "llama":
        settings["num_key_value_heads"] = model.n_head
        settings["head_dim"] = model.n_embd // model.n_head
    eot = model.eot % model.vocab_size
    ends = {"bos_token_id": eot, "eos_token_id": eot}
    return {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        **settings,
        **ends,
        "dtype": "float32",
        KEY: dataclasses.asdict(saved),
    }


def from_json(raw: dict[str, Any], path: Path) -> Saved:
    """Return what a config.json says; `path` is for messages.

    Raises UserError, naming the first key, unless it describes a model of ours without saying two
    different things. A model that is not an export of ours has dropout 0, whatever its file says.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES or (kind == OWN and KEY not in raw):
        raise UserError(
            f"{path} describes a model of type {kind}; only gpt2, and gpt_neox and llama of the "
            "same shape, and what hf.py exported can be loaded."
        )
    described = None if kind == OWN else _stock_model(raw, kind, path)
    if KEY not in raw:
        return Saved(described)
    saved = _read_key(raw[KEY], path)
    if architecture_of(saved.model) != kind:
        raise _contradiction(path, "model_type", kind, architecture_of(saved.model))
    if kind == OWN:
        defaults = dataclasses.asdict(ModelConfig())
        _compare(path, {name: raw.get(name, value) for name, value in defaults.items()}, saved)
        _compare(path, {"tie_embeddings": raw.get("tie_word_embeddings", True)}, saved)
        _require_equal(path, kind, "mlp_width", raw.get("mlp_width"), saved.model.mlp_width)
    else:
        _compare(path, {field: raw.get(name) for field, name in SIZES[kind].items()}, saved)
    return saved


def _compare(path: Path, found: dict[str, Any], saved: Saved) -> None:
    """Raise UserError unless the fields found elsewhere in the file are those under KEY."""
    for field, value in found.items():
        if value != getattr(saved.model, field):
            raise _contradiction(path, field, value, getattr(saved.model, field))


def _contradiction(path: Path, key: str, value: Any, other: Any) -> UserError:
    return UserError(
        f"{path} contradicts itself: {key} is {value!r}, and {other!r} under {KEY}; restore it, or "
        f"remove {KEY} from it to load it as somebody else's model."
    )


def _read_key(raw: Any, path: Path) -> Saved:
    """Return what KEY says, with every name and type checked; raises UserError."""
    where = f"{path}: {KEY}"
    names = [field.name for field in dataclasses.fields(Saved)]
    if not isinstance(raw, dict) or sorted(raw) != sorted(names):
        raise UserError(f"{where} should be an object of {', '.join(names)}.")
    kinds = {"begins_with_eot": (bool,), "recipe": (str, type(None)), "step": (int, type(None))}
    for name, allowed in kinds.items():
        # Compared exactly, because Python counts True among the integers.
        if type(raw[name]) not in allowed:
            raise UserError(f"{where}.{name} cannot be {raw[name]!r}.")
    tokenizer = raw["tokenizer"]
    fits = isinstance(tokenizer, dict) and set(tokenizer) == {"name", "sha256"}
    if tokenizer is not None and not (
        fits and isinstance(tokenizer["name"], str) and isinstance(tokenizer["sha256"], str | None)
    ):
        raise UserError(f"{where}.tokenizer cannot be {str(tokenizer)[:80]}.")
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    stored = raw["model"] if isinstance(raw["model"], dict) else {}
    unknown = [name for name in stored if name not in known]
    if unknown:
        raise UserError(f"{where}.model has a field this version does not know: {unknown[0]}.")
    return Saved(**{**raw, "model": decode(json.dumps(raw["model"]), ModelConfig, where)})


def _stock_model(raw: dict[str, Any], kind: str, path: Path) -> ModelConfig:
    """Return the model of a stock architecture; raises UserError unless it is of our shape."""
    sizes = {}
    for field, name in SIZES[kind].items():
        value = raw.get(name)
        _require(type(value) is int and value >= 1, path, kind, name, value, "a whole number")
        sizes[field] = value
    width, heads = sizes["n_embd"], sizes["n_head"]
    name = SIZES[kind]["n_embd"]
    _require(width % heads == 0, path, kind, name, width, f"a multiple of its {heads} heads")
    # Rotary positions turn pairs of channels.
    even = kind == "gpt2" or width // heads % 2 == 0
    _require(even, path, kind, name, width, f"an even number for each of its {heads} heads")
    for key, (allowed, default) in FIXED[kind].items():
        value = raw.get(key, default)
        _require(value in allowed, path, kind, key, value, allowed[0])
    model = ModelConfig(**sizes, **PARTS[kind])
    if kind == "gpt2":
        _require_equal(path, kind, "n_inner", raw.get("n_inner") or 4 * width, 4 * width)
        return model
    wanted = model.mlp_width
    _require_equal(path, kind, "intermediate_size", raw.get("intermediate_size"), wanted)
    if kind == "llama":
        groups, size = raw.get("num_key_value_heads"), raw.get("head_dim")
        _require_equal(path, kind, "num_key_value_heads", groups or heads, heads)
        _require_equal(path, kind, "head_dim", size or width // heads, width // heads)
    _check_rotary(raw, kind, path)
    return model


def _check_rotary(raw: dict[str, Any], kind: str, path: Path) -> None:
    """Raise UserError unless positions rotate all channels, as ours, and nothing is rescaled."""
    found = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: rope_parameters cannot be {found!r}.")
    found = dict(found)
    for old, (name, default) in OLD_ROTARY[kind].items():
        found.setdefault(name, raw.get(old, default))
    for name, wanted in ROTARY.items():
        _require_equal(path, kind, name, found.pop(name, wanted), wanted)
    for name, value in found.items():
        raise _unlike(path, kind, f"rope_parameters.{name}", value, "no such key")


def _require_equal(path: Path, kind: str, key: str, value: Any, wanted: Any) -> None:
    _require(value == wanted, path, kind, key, value, wanted)


def _require(condition: bool, path: Path, kind: str, key: str, value: Any, wanted: Any) -> None:
    if not condition:
        raise _unlike(path, kind, key, value, wanted)


def _unlike(path: Path, kind: str, key: str, value: Any, wanted: Any) -> UserError:
    return UserError(
        f"{path} describes a {kind} model of another shape than this project's: {key} is "
        f"{value!r} where ours has {wanted!r}."
    )
