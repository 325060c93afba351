"""The command line of the ladder.

    python -m makemore climb [--data words|names|shakespeare|FILE]
    python -m makemore RUNG  [--data ...] [--steps N] [--init naive|scaled]
                             [--norm none|batch|layer]

RUNG is bigram, nn_bigram, mlp, wavenet, transformer, or gpt2. The same command continues a run that
was interrupted; when it has ended, it only makes more words.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from config import UserError
from makemore.climb import climb
from makemore.data import Data, batch_at, load
from makemore.diagnostics import probe
from makemore.figures import draw_counts, draw_embedding, draw_insides
from makemore.rungs import build, settings_for
from makemore.sampling import sample
from makemore.train import Result, train
from train import StopSignal
from utils import parse, run_script

RUNS = Path("runs/makemore")
SEED = 1337


@dataclass(frozen=True)
class Options:
    """Climb the ladder from counting pairs of characters to GPT-2, or stay on one rung."""

    rung: Annotated[
        Literal["climb", "bigram", "nn_bigram", "mlp", "wavenet", "transformer", "gpt2"],
        tyro.conf.Positional,
    ]
    """climb trains every rung in turn."""
    data: Annotated[str, tyro.conf.arg(metavar="words|names|shakespeare|FILE")] = "words"
    """English words of Python's documentation, names or Shakespeare from the web, or a file."""
    kind: Literal["words", "text"] | None = None
    """Take a file for a list of words, or for running text, whatever it looks like."""
    name: str | None = None
    """Directory of the run under runs/makemore; by default after rung, data and seed."""
    seed: int = SEED
    """Seed of the split, the first weights, the batches and the samples."""
    steps: int | None = None
    """Optimizer steps; by default as many as the rung needs."""
    context: int | None = None
    """Characters that transformer or gpt2 can see."""
    init: Literal["naive", "scaled"] = "scaled"
    """First weights from N(0, 1), or of the size that keeps signals and gradients alive."""
    norm: Literal["none", "batch", "layer"] | None = None
    """What normalises hidden layers; by default as is best for the rung."""
    samples: int = 10
    """Words, or lines of running text, to make of a rung in the end."""


def main() -> None:
    """Do what the command line asks for."""
    options = parse(Options)
    data = load(options.data, options.seed, options.kind)
    print(_description(data))
    with StopSignal() as stop:
        train_rungs = _climb if options.rung == "climb" else _one
        done = train_rungs(options, data, lambda: stop.requested)
    if not done:
        print("Stopped; the same command goes on from here.")
        raise SystemExit(130)


def _description(data: Data) -> str:
    if data.kind == "text":
        count = len(data.train) + len(data.val) + len(data.test)
        what = f"running text, {count:,} characters"
    else:
        what = f"a list of {len(data.train) + len(data.val) + len(data.test):,} words"
    return f"{data.name}: {what}, with an alphabet of {len(data.alphabet)}."


def _climb(options: Options, data: Data, asked: Callable[[], bool]) -> bool:
    own = (options.context, options.norm, options.init)
    if own != (None, None, "scaled"):
        raise UserError(
            "climb takes every rung as it is; --context, --norm and --init go with a single rung."
        )
    name = options.name or _name("climb", options, data)
    done = climb(data, options.seed, name, RUNS, options.steps, asked)
    if done is not None:
        print(f"\nWritten to {RUNS / 'climb.json'} and {RUNS / 'climb.png'}.")
    return done is not None


def _one(options: Options, data: Data, asked: Callable[[], bool]) -> bool:
    o = options
    settings = settings_for(o.rung, data, o.seed, o.steps, o.context, o.init, o.norm)
    directory = RUNS / (o.name or _name(o.rung, o, data))
    result = train(data, settings, directory, asked)
    if not result.finished:
        return False
    train_loss, val_loss = result.losses
    how = "counted" if o.rung == "bigram" else f"{settings.steps:,} steps"
    print(
        f"{o.rung}: {result.parameters:,} parameters, {how}, training loss {train_loss:.4f}, "
        f"validation loss {val_loss:.4f} nats a character.\n"
    )
    for line in sample(result.model, data, o.samples, o.seed):
        mark = "" if data.kind == "text" else "  (seen)" if line in data.seen else "  (new)"
        print(f"{line}{mark}")
    paths = _draw(data, result, directory)
    print(f"\nDrawn: {', '.join(str(path) for path in paths)}.")
    return True


def _name(what: str, options: Options, data: Data) -> str:
    seed = "" if options.seed == SEED else f"-seed{options.seed}"
    return f"{what}-{data.name}{seed}"


def _draw(data: Data, result: Result, directory: Path) -> list[Path]:
    """Draw what there is to see of a rung, and return the paths."""
    settings, model, drawn = result.settings, result.model, []
    if settings.rung == "bigram":
        return [draw_counts(model.counts.numpy(), data.alphabet, directory / "counts")]
    if settings.rung == "mlp":
        table = model.embedding.weight.detach().numpy()
        drawn.append(draw_embedding(table, data.alphabet, directory / "embedding"))
    batch = batch_at(data, settings.batch, settings.context, settings.seed, 1)
    # The first weights follow from the seed, so they need not have been kept.
    first = probe(build(settings, data.vocab_size), *batch)
    title = f"{settings.rung} on {data.name}, --init {settings.init} --norm {settings.norm}"
    stem = directory / "insides"
    return [*drawn, draw_insides(title, first, probe(model, *batch), result.record.ratios, stem)]


if __name__ == "__main__":
    # What --help and complaints call it, instead of the path of this file.
    sys.argv[0] = "python -m makemore"
    run_script(main)
