"""Models to Hugging Face's transformers, and data directories to its hub.

    python hf.py RUN|CHECKPOINT|HF_NAME|DIR [--out DIR] [--push REPO] [--private]
    python hf.py DATA_DIR --push REPO
    python hf.py DIR|FILE --out NEW --read-pickle

A checkpoint becomes a directory that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer`
open, and that sample.py and evaluate.py read like a run. A model of transformers, or of the hub, is
converted to the same form; with --read-pickle also one whose weights are a pickle.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import hf_import
import hub
from config import UserError
from corpus.shards import MANIFEST, Manifest, find_data, manifest_sha256, read_manifest
from corpus.tokenizer import Tokenizer
from evaluate import identify, read_evals
from hf_card import Training, model_card
from hf_configs import OWN, Saved, architecture_of
from hf_export import check_replaceable, write_export
from metrics import newest_scores
from model import GPT
from training import checkpoint
from utils import load_config, parse, run_script

EXPORTS = Path("exports")


@dataclass(frozen=True)
class Options:
    """Export a model for transformers, or publish it or a data directory on the hub."""

    source: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|CHECKPOINT|HF_NAME|DIR|DATA_DIR")
    ]
    """A run, a checkpoint, gpt2, OWNER/NAME of the hub, a directory of transformers, or shards."""
    out: Path | None = None
    """Directory to write; by default exports/NAME-step."""
    push: str | None = None
    """Repository of the hub, OWNER/NAME, to publish it in; it is made if there is none."""
    private: bool = False
    """Make that repository a private one."""
    read_pickle: bool = False
    """Read weights that are only there as a pickle: its tensors, and nothing else in it."""
    runs_dir: str = "runs"
    """Directory that holds the run directories."""


@dataclass(frozen=True)
class Exportable:
    """A model and all that an export says of it."""

    name: str
    model: GPT
    saved: Saved
    # None where its tokens are not those of a tokenizer of ours.
    tokenizer: Tokenizer | None
    training: Training | None = None
    # That of the directory it was read from, where it says more than we know.
    card: str | None = None


def main() -> None:
    """Export what the command line names, or publish it, and say how it is opened."""
    options = parse(Options)
    path = Path(options.source)
    if (path / MANIFEST).is_file():
        publish_data(path, options)
        return
    if options.read_pickle:
        if options.out is None:
            raise UserError("--read-pickle converts into a new directory; name it with --out.")
        made = from_transformers(options.source, read_pickle=True)
    else:
        made = collect(options.source, options.runs_dir)
    out = options.out or EXPORTS / made.name
    check_replaceable(out)
    card = made.card or model_card(made.name, made.saved, made.training)
    write_export(out, made.model, made.saved, made.tokenizer, card)
    print(description(out, made))
    if options.push is not None:
        print(f"Published as {hub.push(out, options.push, 'model', options.private)}")


def publish_data(directory: Path, options: Options) -> None:
    """Publish a data directory, and say how it is fetched; raises UserError without --push."""
    if options.push is None:
        raise UserError(
            f"{directory} is a directory of token shards; add --push OWNER/NAME to publish it."
        )
    print(f"Published as {hub.push_shards(directory, options.push, options.private)}")
    print(f"Fetch it with `python load_fineweb.py --source shards:{options.push}`.")


def collect(source: str, runs_dir: str) -> Exportable:
    """Return a model by any of its names; raises UserError when there is no such model."""
    found = hf_import.find_model(source, runs_dir)
    if isinstance(found, Path) and not hf_import.is_saved_model(found):
        return from_checkpoint(found, runs_dir)
    return from_transformers(str(found))


def from_checkpoint(path: Path, runs_dir: str) -> Exportable:
    """Return the model of a checkpoint, and what is known of its training."""
    model, tokenizer, begins_with_eot = hf_import.open_model(str(path), runs_dir)
    run, state = path.resolve().parent.parent, checkpoint.read_state(path)
    config = load_config(run)
    saved = Saved(
        model.config,
        begins_with_eot,
        {"name": tokenizer.name, "sha256": tokenizer.sha256},
        config.recipe,
        state["step"],
    )
    source = identify(str(path), runs_dir)
    evals = read_evals(source).get(source.key, {})
    manifest = training_data(config.data, state.get("data_sha256"))
    training = Training(config, state, evals, newest_scores(run, state["step"]), manifest)
    return Exportable(f"{run.name}-{path.name}", model, saved, tokenizer, training)


def training_data(data: str, digest: str | None) -> Manifest | None:
    """Return the manifest of a run's data, or None when that is not here, or is another now."""
    try:
        directory = find_data(data)
        return read_manifest(directory) if manifest_sha256(directory) == digest else None
    except UserError:
        return None


def from_transformers(source: str, read_pickle: bool = False) -> Exportable:
    """Return a model of transformers, by its directory or its name on the hub, to be converted."""
    path = Path(source)
    if not path.exists():
        # A hub model is fetched once, and read from where it lies.
        path = hf_import.find_directory(source)
    directory = path.parent if path.is_file() else path
    model, saved = hf_import.load(str(path), read_pickle)
    try:
        tokenizer = hf_import.tokenizer_of(saved, source, directory)
    except UserError as error:
        print(f"Without a tokenizer: {error}", file=sys.stderr)
        tokenizer = None
    named = Path(source).parent if Path(source).is_file() else Path(source)
    name = named.resolve().name
    card = None
    if saved.tokenizer is not None and (directory / "README.md").is_file():
        card = (directory / "README.md").read_text(encoding="utf-8", errors="replace")
    return Exportable(name, model, saved, tokenizer, card=card)


def description(out: Path, made: Exportable) -> str:
    """Return what was written, and how it is opened in transformers and here."""
    kind = architecture_of(made.saved.model)
    trust = ", trust_remote_code=True" if kind == OWN else ""
    named = f"a {kind} of transformers" if kind != OWN else "a model with its own modeling file"
    return (
        f"{out}: {named}, {made.saved.model.num_params:,} parameters.\n"
        f'Open it with AutoModelForCausalLM.from_pretrained("{out}"{trust}), or here with '
        f"`python sample.py {out} --prompt TEXT`."
    )


if __name__ == "__main__":
    run_script(main)
