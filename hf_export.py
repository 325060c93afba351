"""A model as a directory that `from_pretrained` of transformers opens.

    write_export(out, model, saved, tokenizer, card)

    OUT/  config.json  generation_config.json  model.safetensors  README.md  tokenizer files
          modeling_gpt.py, where the model is none of transformers' own

The directory is written beside its place and appears by one rename, so one that is present is
complete. transformers itself is not needed for it.
"""

import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from config import UserError
from corpus.tokenizer import Tokenizer
from hf_configs import KEY, MODELING_FILE, OWN, Saved, architecture_of, to_json
from hf_layouts import to_transformers
from hf_tokenizer import tokenizer_files
from model import GPT
from utils import sync_directory

MODELING = Path(__file__).parent / "assets" / MODELING_FILE
# What an export consists of, and what evaluate.py adds.
FILES = {
    *("config.json", "generation_config.json", "model.safetensors", "README.md", MODELING_FILE),
    *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "evals.json", "evals"),
}


def write_export(
    out: Path, model: GPT, saved: Saved, tokenizer: Tokenizer | None, card: str
) -> None:
    """Write `model` to `out`, with its tokenizer's files if given and `card` as its README.md.

    Weights are stored in float32, a tied head once. Raises UserError when `out` is something else
    than an earlier export, which would be replaced, or cannot be written.
    """
    check_replaceable(out)
    # `out` may be given with a slash or dots at its end.
    out = Path(os.path.abspath(out))
    temporary, old = out.with_name(f".{out.name}.tmp"), out.with_name(f".{out.name}.old.tmp")
    tensors = to_transformers(model.state_dict(), saved.model)
    try:
        for leftover in (temporary, old):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, text in _texts(saved, tokenizer, card).items():
            (temporary / name).write_text(text, encoding="utf-8")
        # Copies, because some are parts of one tensor or lie in memory in another order.
        tensors = {name: tensor.detach().float().cpu().clone() for name, tensor in tensors.items()}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        if out.exists():
            os.replace(out, old)
        os.replace(temporary, out)
        sync_directory(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"{out} could not be written ({error}); make room, or name another place with --out."
        ) from error


def check_replaceable(out: Path) -> None:
    """Raise UserError, naming what is in the way, unless `out` is free or an earlier export."""
    if not out.exists():
        return
    if not out.is_dir() or not is_export(out):
        raise UserError(
            f"{out} exists and is not an earlier export; name another directory with --out."
        )
    others = sorted(path.name for path in out.iterdir() if path.name not in FILES)
    if others:
        raise UserError(
            f"{out} holds {others[0]}, which is no part of an export and would be lost; name "
            "another directory with --out."
        )


def is_export(directory: Path) -> bool:
    """Say whether a directory's config.json is one that was written here."""
    try:
        return KEY in json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def _texts(saved: Saved, tokenizer: Tokenizer | None, card: str) -> dict[str, str]:
    """Return all files of an export but its weights."""
    settings = to_json(saved)
    ends = {name: settings[name] for name in ("bos_token_id", "eos_token_id")}
    # Rows of a batch that have ended are filled up with it.
    ends["pad_token_id"] = settings["eos_token_id"]
    texts = {
        "config.json": json.dumps(settings, indent=2) + "\n",
        "generation_config.json": json.dumps(ends, indent=2) + "\n",
        "README.md": card,
    }
    if tokenizer is not None:
        texts |= tokenizer_files(tokenizer, saved.model.block_size)
    if architecture_of(saved.model) == OWN:
        texts[MODELING_FILE] = MODELING.read_text(encoding="utf-8")
    return texts
