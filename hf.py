"""Weights from Hugging Face: OpenAI's GPT-2, or anything of exactly its architecture, into our GPT.

    load_gpt2("gpt2") -> GPT        from the hub: gpt2, gpt2-medium, gpt2-large, gpt2-xl
    load_gpt2("some/dir") -> GPT    a directory written by transformers' save_pretrained

The two implementations name their parameters alike. transformers stores its four matrices a block
as [in, out] (its Conv1D) where nn.Linear has [out, in], so those are transposed on the way.
Weights are read as safetensors, with no need of transformers; a pickle can run code and is never
loaded.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import ModelConfig, UserError
from model import GPT

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
WEIGHTS = "model.safetensors"

# Matrices that transformers keeps as [in, out].
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")

# Values of config.json that our GPT computes with; the first is what transformers assumes when a
# key is absent. gelu_new and gelu_pytorch_tanh are two names of one function.
ARCHITECTURE = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
    "add_cross_attention": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
}


def is_saved_model(directory: Path) -> bool:
    """Say whether a directory holds a model of transformers, by its config.json."""
    try:
        text = (directory / "config.json").read_text(encoding="utf-8")
        return "model_type" in json.loads(text)
    except (OSError, ValueError, TypeError):
        return False


def load_gpt2(name_or_dir: str) -> GPT:
    """Return the GPT, float32 on the CPU, of a name in HUB_NAMES or a save_pretrained directory.

    Its dropout is 0, whatever the model was trained with. Raises UserError for a model that is not
    there, cannot be downloaded, is of another architecture, or is not stored as safetensors.
    """
    directory = Path(name_or_dir)
    if not directory.is_dir():
        directory = _download(name_or_dir)
    config = _read_config(directory)
    # Built without memory first: initial weights would only be drawn to be overwritten.
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    try:
        model.load_state_dict(state_dict_from_transformers(_read_weights(directory), config))
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"The weights in {directory} do not fit its config: {reason}") from None
    return model


def state_dict_from_transformers(
    state_dict: dict[str, Tensor], config: ModelConfig
) -> dict[str, Tensor]:
    """Return our GPT's state dict from that of transformers' GPT2LMHeadModel or GPT2Model.

    Tensors are views where they can be. The head is dropped, being the token embedding once more,
    as are the causal masks that old versions saved; the embedding gets zero rows up to
    `config.padded_vocab_size`.
    """
    ours = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("transformer.")
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        ours[name] = tensor.T if name.endswith(TRANSPOSED) else tensor
    wte = ours["wte.weight"]
    padding = wte.new_zeros(config.padded_vocab_size - config.vocab_size, config.n_embd)
    return {**ours, "wte.weight": torch.cat([wte, padding])}


def _read_config(directory: Path) -> ModelConfig:
    """Return the sizes in a model's config.json; raises UserError unless the rest is GPT-2's."""
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind = raw["model_type"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a model's config.json ({error!r}).") from None
    if kind != "gpt2":
        raise UserError(f"{directory} holds a {kind} model; only gpt2 models can be loaded.")
    for key, allowed in ARCHITECTURE.items():
        _require(raw.get(key, allowed[0]) in allowed, path, key, raw.get(key), allowed[0])
    sizes = {key: raw.get(key) for key in ("n_layer", "n_head", "n_embd", "n_positions")}
    sizes["vocab_size"] = raw.get("vocab_size")
    for key, value in sizes.items():
        _require(type(value) is int and value >= 1, path, key, value, "a whole number")
    width, heads = sizes["n_embd"], sizes["n_head"]
    _require(width % heads == 0, path, "n_embd", width, f"a multiple of n_head {heads}")
    _require(
        raw.get("n_inner") in (None, 4 * width), path, "n_inner", raw.get("n_inner"), 4 * width
    )
    return ModelConfig(block_size=sizes.pop("n_positions"), **sizes)


def _require(condition: bool, path: Path, key: str, value: Any, wanted: Any) -> None:
    if not condition:
        raise UserError(
            f"{path} describes another architecture than GPT-2's: "
            f"{key} is {value!r} where this model has {wanted!r}."
        )


def _read_weights(directory: Path) -> dict[str, Tensor]:
    """Return every tensor of a directory's safetensors file, or of the files its index names."""
    index = directory / f"{WEIGHTS}.index.json"
    try:
        files = [WEIGHTS]
        if not (directory / WEIGHTS).exists() and index.exists():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        tensors = {}
        for file in files:
            tensors.update(load_file(directory / file))
        return tensors
    except FileNotFoundError as error:
        raise UserError(_missing_weights(directory, Path(error.filename or WEIGHTS).name)) from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        raise UserError(f"The weights in {directory} are damaged ({error}).") from None


def _missing_weights(directory: Path, file: str) -> str:
    pickles = sorted(path.name for path in directory.glob("pytorch_model*.bin"))
    if not pickles:
        return f"{directory} holds no {file}, so there are no weights to load."
    return (
        f"{directory} holds its weights only as a pickle ({pickles[0]}), which is never loaded "
        f"because it can run code; save it again with save_pretrained, which writes {WEIGHTS}."
    )


def _download(name: str) -> Path:
    """Return the directory of a hub model's files, from the local cache when they are there."""
    if name not in HUB_NAMES:
        raise UserError(
            f"There is no model '{name}': neither a directory saved by transformers "
            f"nor one of {', '.join(HUB_NAMES)}."
        )
    from huggingface_hub import model_info, snapshot_download

    files = ["config.json", WEIGHTS]
    try:
        cached = Path(snapshot_download(name, allow_patterns=files, local_files_only=True))
        if all((cached / file).exists() for file in files):
            return cached
    except OSError:
        # Nothing of it is cached yet.
        pass
    try:
        # The download itself would wait without limit for a network that swallows its packets.
        model_info(name, timeout=10)
        return Path(snapshot_download(name, allow_patterns=files))
    # Its error classes differ between versions of the client; for the reader they are all one.
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"'{name}' is not in the local Hugging Face cache, "
            f"and it could not be downloaded ({reason})."
        ) from None
