"""Weights from Hugging Face: OpenAI's GPT-2, our own exports, and what else has one of our shapes.

    load("gpt2") -> (GPT, Saved)             from the hub: HUB_NAMES, or owner/name
    load("some/dir") -> (GPT, Saved)         a directory that transformers or hf.py wrote
    open_model(MODEL) -> (model, tokenizer, ...)   any of these, a run or a checkpoint

Weights are read as safetensors, with no need of transformers. A pickle can run code, so one is only
read where a person asked for it, and then by `torch.load(weights_only=True)`, which runs none.
No modeling file is ever run: this project has the model itself.
"""

import json
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import hub
from config import ModelConfig, UserError
from corpus.tokenizer import Tokenizer, gpt2_tokenizer, read_tokenizer
from hf_configs import Saved, from_json
from hf_layouts import from_transformers
from hf_tokenizer import check_vocabulary
from model import GPT
from modern import build_model
from training import checkpoint
from utils import find_run

HUB_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# Of a repository, which may hold the same weights in other formats too.
PATTERNS = (CONFIG, "model*.safetensors", f"{WEIGHTS}.index.json", "vocab.json", "tokenizer.json")


def is_saved_model(directory: Path) -> bool:
    """Say whether a directory holds a model of transformers, by its config.json."""
    try:
        text = (directory / CONFIG).read_text(encoding="utf-8")
        return "model_type" in json.loads(text)
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def find_directory(name_or_dir: str) -> Path:
    """Return the directory of a model: the one given, or the cached one of a hub repository.

    Raises UserError when there is none, or it cannot be downloaded.
    """
    path = Path(name_or_dir)
    if path.is_dir():
        return path
    if path.is_file():
        refuse_file(path)
    if name_or_dir in HUB_NAMES:
        # These do not change.
        found = hub.cached(name_or_dir, "model", PATTERNS)
        if found is not None and (found / CONFIG).exists() and (found / WEIGHTS).exists():
            return found
    elif not names_repository(name_or_dir):
        raise UserError(
            f"There is no model '{name_or_dir}': neither a directory saved by transformers, nor a "
            f"repository OWNER/NAME of the hub, nor one of {', '.join(HUB_NAMES)}."
        )
    return hub.fetch(name_or_dir, "model", PATTERNS)


def names_repository(source: str) -> bool:
    """Say whether `source` is owner/name of a repository, rather than a path that is not there."""
    return hub.is_repository(source) and not Path(source).parent.exists()


def refuse_file(path: Path) -> None:
    """Raise UserError for a file given where a model's directory is wanted."""
    if path.suffix in PICKLES:
        raise UserError(
            f"{path} is a pickle, which is never loaded because it can run code; "
            f"{_conversion(path)}."
        )
    raise UserError(f"{path} is a file; name the directory that holds it and its {CONFIG}.")


def _conversion(path: Path) -> str:
    return f"`python hf.py {path} --out NEW --read-pickle` reads its tensors alone and converts it"


def load(name_or_dir: str, read_pickle: bool = False) -> tuple[GPT, Saved]:
    """Return a model, float32 on the CPU, and what its config.json says of it.

    With `read_pickle`, weights that are only there as a pickle are read, and a pickle's own path
    can be given, beside which lies its config.json. Raises UserError for a model that is not there,
    cannot be downloaded, is of another architecture, or whose tensors do not fit, naming the first.
    """
    path = Path(name_or_dir)
    file = path if read_pickle and path.is_file() and path.suffix in PICKLES else None
    directory = file.parent if file else find_directory(name_or_dir)
    saved = read_saved(directory)
    tensors, where = read_weights(directory, file, read_pickle)
    return build(saved.model, tensors, where), saved


def build(config: ModelConfig, tensors: dict[str, Tensor], where: str) -> GPT:
    """Return our model of transformers' tensors; raises UserError, naming one that does not fit."""
    state = from_transformers(tensors, config, where)
    # Built without memory first: initial weights would only be drawn to be overwritten.
    with torch.device("meta"):
        model = build_model(config)
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    return model


def read_saved(directory: Path) -> Saved:
    """Return what a directory's config.json says; raises UserError if that is no model of ours."""
    path = directory / CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw["model_type"]
    except FileNotFoundError:
        raise UserError(f"{directory} holds no model: there is no {CONFIG} in it.") from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is not a model's config.json ({error!r}).") from None
    return from_json(raw, path)


def read_weights(
    directory: Path, file: Path | None = None, read_pickle: bool = False
) -> tuple[dict[str, Tensor], str]:
    """Return every tensor of a directory, or of a pickle in it, and the file's name for messages.

    Raises UserError when there are none, or they are damaged, or a pickle that nobody asked for.
    """
    index = directory / f"{WEIGHTS}.index.json"
    if file is None and (directory / WEIGHTS).exists():
        return _read_safetensors(directory, WEIGHTS), str(directory / WEIGHTS)
    if file is None and index.exists():
        tensors = {}
        for name in _named_by(index):
            tensors |= _read_safetensors(directory, name)
        return tensors, str(index)
    pickles = [file] if file else sorted(directory.glob("pytorch_model*.bin"))
    if not pickles:
        raise UserError(f"{directory} holds no {WEIGHTS}, so there are no weights to load.")
    if not read_pickle:
        raise UserError(
            f"{directory} holds its weights only as a pickle ({pickles[0].name}), which is never "
            f"loaded because it can run code; {_conversion(directory)}."
        )
    tensors = {}
    for path in pickles:
        tensors |= _read_pickle(path)
    return tensors, str(pickles[0])


def _named_by(index: Path) -> list[str]:
    """Return the files that hold the weights, of which none lies elsewhere."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if any(not isinstance(n, str) or Path(n).name != n for n in names):
            raise ValueError("it names a file that is not beside it")
        return sorted(names)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{index} is damaged ({error}).") from None


def _read_safetensors(directory: Path, name: str) -> dict[str, Tensor]:
    try:
        return load_file(directory / name)
    except FileNotFoundError:
        raise UserError(f"{directory} holds no {name}, in which its index says weights.") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"The weights in {directory / name} are damaged ({error}).") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a pickle, by a reader that knows nothing but tensors."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0][:200].rstrip(".")
        raise UserError(
            f"{path} holds more than tensors, or is damaged, and was not loaded ({reason})."
        ) from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, not tensors by their names.")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(
                f"{path} holds more than tensors ({name!r} is a {type(tensor).__name__}), and was "
                "not loaded; save the model's state_dict alone."
            )
    return found


# --- models by name ---


def open_model(source: str, runs_dir: str = "runs") -> tuple[nn.Module, Tokenizer, bool]:
    """Return (model on the CPU, its tokenizer, whether its documents begin with <|endoftext|>).

    Raises UserError when there is no such model, as `find_model` does, or it cannot be read.
    """
    found = find_model(source, runs_dir)
    if isinstance(found, Path) and not is_saved_model(found):
        return *checkpoint.load_run_model(found), True
    # A hub model is fetched once, and read from where it lies.
    directory = find_directory(str(found))
    model, saved = load(str(directory))
    return model, tokenizer_of(saved, source, directory), saved.begins_with_eot


def find_model(source: str, runs_dir: str = "runs") -> Path | str:
    """Return the directory of a checkpoint or of a transformers model, or the name of a hub model.

    A run, by path or name, stands for its newest checkpoint and comes before a hub model of the
    same name. Raises UserError when there is no such model.
    """
    path = Path(source)
    if (path / "state.json").is_file() or is_saved_model(path):
        return path
    try:
        run = find_run(source, runs_dir)
    except UserError as error:
        if path.is_file():
            refuse_file(path)
        # The name of a run that is not there should not set out for the network.
        on_hub = names_repository(source) and path.parent != Path(runs_dir)
        if on_hub or source in HUB_NAMES:
            return source
        raise UserError(
            f"{error} Nor is it a checkpoint, a directory saved by transformers, "
            f"or one of {', '.join(HUB_NAMES)}."
        ) from None
    newest = checkpoint.newest(run)
    if newest is None:
        raise UserError(f"The run {run} has no complete checkpoint yet.")
    return newest


def tokenizer_of(saved: Saved, source: str, directory: Path) -> Tokenizer:
    """Return the tokenizer of a model of transformers that `source` names, in `directory`.

    That of a model that is not ours is GPT-2's. Raises UserError when it has another vocabulary,
    so that its tokens cannot be turned into text.
    """
    ours = saved.tokenizer
    tokenizer = read_tokenizer(directory=directory, **ours) if ours else gpt2_tokenizer()
    if saved.model.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{source} has {saved.model.vocab_size} token ids, but its tokenizer, "
            f"{tokenizer.name}, has {tokenizer.vocab_size}, so its tokens cannot be turned into "
            "text."
        )
    if tokenizer.name == "gpt2":
        check_vocabulary(directory)
    return tokenizer
