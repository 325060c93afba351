"""The tensors of a model under the names and in the shapes of transformers, and back.

    to_transformers(state_dict, ModelConfig) -> state_dict
    from_transformers(state_dict, ModelConfig, where) -> state_dict

Which of transformers' architectures that is follows from the config (`hf_configs.architecture_of`).
GPT-2 there keeps four matrices a block as [in, out] (its Conv1D) where nn.Linear has [out, in].
GPT-NeoX has queries, keys and values of one head beside each other, ours those of all heads. Llama
has a matrix of its own for each, and for SwiGLU calls `gate_proj` what goes through the SiLU, our
c_gate, and `up_proj` our c_fc. The modeling file of our own has our own names.

No padding there: the embedding has exactly the rows of the vocabulary. A tied head is not stored.
"""

import dataclasses
import re

import torch
from torch import Tensor

from config import ModelConfig, UserError
from hf_configs import OWN, architecture_of
from modern import build_model

# Matrices that GPT-2 of transformers keeps as [in, out].
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# Matrices with a row an id, and in memory a few more.
PADDED = ("wte.weight", "lm_head.weight")

NAMES = {
    "gpt_neox": {
        "wte": ("embed_in",),
        "ln_f": ("final_layer_norm",),
        "ln_1": ("input_layernorm",),
        "ln_2": ("post_attention_layernorm",),
        "attn.c_attn": ("attention.query_key_value",),
        "attn.c_proj": ("attention.dense",),
        "mlp.c_fc": ("mlp.dense_h_to_4h",),
        "mlp.c_proj": ("mlp.dense_4h_to_h",),
    },
    "llama": {
        "wte": ("embed_tokens",),
        "ln_f": ("norm",),
        "ln_1": ("input_layernorm",),
        "ln_2": ("post_attention_layernorm",),
        "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.c_proj": ("self_attn.o_proj",),
        "mlp.c_fc": ("mlp.up_proj",),
        "mlp.c_gate": ("mlp.gate_proj",),
        "mlp.c_proj": ("mlp.down_proj",),
    },
}
# What all names but the head's begin with; a model saved without its head lacks it.
PREFIX = {"gpt2": "transformer.", "gpt_neox": "gpt_neox.", "llama": "model.", OWN: ""}

# A tied head, and causal masks and frequencies that old versions saved.
IGNORED = re.compile(
    r"lm_head\.weight|embed_out\.weight|.*\.(attn|attention)\.(masked_)?bias|.*rotary_emb\.inv_freq"
)


def to_transformers(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return a model's tensors as transformers names and shapes them.

    `state` holds our names, with or without rows past the vocabulary; nothing in it is changed.
    Biases that a stock architecture has and the model lacks are zeros.
    """
    kind, theirs = architecture_of(config), {}
    biases = {} if config.bias else _absent_biases(config, kind)
    for name, tensor in {**state, **biases}.items():
        if name in PADDED:
            tensor = tensor[: config.vocab_size]
        names = _their_names(name, kind)
        pieces = _to_their_shape(name, tensor, kind, config)
        theirs.update(zip(names, pieces, strict=True))
    return theirs


def from_transformers(
    tensors: dict[str, Tensor], config: ModelConfig, where: str
) -> dict[str, Tensor]:
    """Return our state dict, padding rows and all, from the tensors of a model of transformers.

    They may be views of the given ones. Raises UserError, naming `where` and the tensor, for one
    that is missing, that should not be there, or that has another shape or no such numbers.
    """
    kind = architecture_of(config)
    if config.n_layer > len(tensors):
        # A config.json can say anything, and all blocks are about to be made.
        raise UserError(
            f"{where} holds {len(tensors)} tensors, too few for the {config.n_layer} blocks of its "
            "config.json."
        )
    found = _checked(tensors, config, kind, where)
    ours = {}
    for name in our_shapes(config, with_biases=kind != OWN):
        pieces = [found[other] for other in _their_names(name, kind)]
        tensor = _to_our_shape(name, pieces, kind, config)
        if name.endswith("bias") and not config.bias:
            _require_zero(tensor, _their_names(name, kind)[0], where)
            continue
        if name in PADDED:
            missing = config.padded_vocab_size - config.vocab_size
            tensor = torch.cat([tensor, tensor.new_zeros(missing, config.n_embd)])
        ours[name] = tensor
    return ours


def our_shapes(config: ModelConfig, with_biases: bool = False) -> dict[str, torch.Size]:
    """Return the shape of every tensor of our model, without rows past the vocabulary.

    `with_biases` adds those that transformers has in any case: in GPT-2 and GPT-NeoX.
    """
    if with_biases and architecture_of(config) != "llama":
        config = dataclasses.replace(config, bias=True)
    # Built without memory: only shapes are wanted.
    with torch.device("meta"):
        state = build_model(config).state_dict()
    return {n: (t[: config.vocab_size] if n in PADDED else t).shape for n, t in state.items()}


def _absent_biases(config: ModelConfig, kind: str) -> dict[str, Tensor]:
    if kind == OWN:
        return {}
    there, wanted = our_shapes(config), our_shapes(config, with_biases=True)
    return {name: torch.zeros(shape) for name, shape in wanted.items() if name not in there}


def _checked(
    tensors: dict[str, Tensor], config: ModelConfig, kind: str, where: str
) -> dict[str, Tensor]:
    """Return the tensors that the model has, under their full names; raises UserError as above."""
    shapes = our_shapes(config, with_biases=kind != OWN)
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    wanted = {}
    for name, tensor in meta.items():
        names = _their_names(name, kind)
        pieces = _to_their_shape(name, tensor, kind, config)
        wanted |= {n: piece.shape for n, piece in zip(names, pieces, strict=True)}
    named = {}
    for name in tensors:
        whole = name if name in wanted else PREFIX[kind] + name
        if whole in wanted:
            named[whole] = name
        elif not IGNORED.fullmatch(name):
            raise UserError(
                f"{where} holds a tensor {name}, which a model of its config.json does not have."
            )
    for name, shape in wanted.items():
        if name not in named:
            raise UserError(f"{where} holds no tensor {name}, which its config.json asks for.")
        _check_tensor(named[name], tensors[named[name]], shape, where)
    return {name: tensors[stored] for name, stored in named.items()}


def _check_tensor(name: str, tensor: Tensor, shape: torch.Size, where: str) -> None:
    if tensor.shape != shape:
        raise UserError(
            f"{where} does not fit its config.json: the tensor {name} has shape "
            f"{tuple(tensor.shape)} where that makes it {tuple(shape)}."
        )
    if not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise UserError(f"{where} holds the tensor {name} as {kind}, which are not its weights.")


def _require_zero(tensor: Tensor, name: str, where: str) -> None:
    if tensor.any():
        raise UserError(
            f"{where} has been trained further: the tensor {name} is not zero, though the model "
            "under gpt2_reproduction in its config.json has no biases; remove that key to load it."
        )


def _their_names(name: str, kind: str) -> tuple[str, ...]:
    """Return the names in transformers of one of our tensors: one, or several to cut it into."""
    if kind in ("gpt2", OWN):
        return (PREFIX[kind] + name,)
    block, module, leaf = re.fullmatch(r"(?:h\.(\d+)\.)?(.+)\.(\w+)", name).groups()
    place = PREFIX[kind] + (f"layers.{block}." if block else "")
    return tuple(f"{place}{other}.{leaf}" for other in NAMES[kind][module])


def _to_their_shape(name: str, tensor: Tensor, kind: str, config: ModelConfig) -> list[Tensor]:
    if kind == "gpt2" and name.endswith(TRANSPOSED):
        return [tensor.T]
    if "attn.c_attn." in name and kind == "gpt_neox":
        heads = tensor.unflatten(0, (3, config.n_head, -1))
        return [heads.transpose(0, 1).flatten(0, 2)]
    if "attn.c_attn." in name and kind == "llama":
        return list(tensor.chunk(3))
    return [tensor]


def _to_our_shape(name: str, pieces: list[Tensor], kind: str, config: ModelConfig) -> Tensor:
    if kind == "gpt2" and name.endswith(TRANSPOSED):
        return pieces[0].T
    if "attn.c_attn." in name and kind == "gpt_neox":
        heads = pieces[0].unflatten(0, (config.n_head, 3, -1))
        return heads.transpose(0, 1).flatten(0, 2)
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]
