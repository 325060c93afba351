"""Whether our benchmarks give what lm-evaluation-harness gives, example by example.

    GPT2_DATA=DIR python -m tests.against_lm_eval MODEL|random-124m [--rows N] [--documents N]

The harness builds requests by its own task definitions from the rows that our tasks read, turns
them into tokens with a Hugging Face tokenizer, and asks transformers' GPT-2 with our weights, in
float32 on the CPU. Compared are each ending's log-probability and whether it is the likeliest, the
choice between endings, and the metrics in the end. The exit status is 1 if anything differs,
log-probabilities by more than 1e-3 nats. It needs lm_eval and transformers.
"""

import contextlib
import importlib.util
import io
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import datasets
import numpy as np
import torch
import tyro
from lm_eval import evaluate as evaluate_by_harness
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml

import hellaswag
import lambada
import wikitext
from benchmark import Task
from config import ModelConfig, UserError
from corpus.tokenizer import gpt2_tokenizer
from likelihood import Scores
from model import GPT
from packing import plan
from sample import load
from scoring import Scorer
from tests.lm_eval_model import harness_model
from training.distributed import DistInfo
from utils import parse, run_script

ALONE = DistInfo(0, 0, 1, torch.device("cpu"))
TOLERANCE = 1e-3
# What an example has besides log-probabilities, under the names of a fact and of the harness.
COUNTS = {"word_perplexity": "words", "byte_perplexity": "bytes"}


@dataclass(frozen=True)
class Options:
    """Compare our scores with lm-evaluation-harness's."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL|random-124m")]
    """A run, a checkpoint, gpt2, a directory of transformers, or a 124M that knows nothing."""
    raw_rows: int = 100
    """Rows of HellaSwag as published, under both protocols; there are 100."""
    rows: int = 1000
    """Rows of the complete HellaSwag file, evenly spread."""
    passages: int = 500
    """Passages of LAMBADA, evenly spread."""
    documents: int | None = None
    """Articles of WikiText's test; by default all of them."""
    runs_dir: str = "runs"
    """Directory that holds the run directories."""


@dataclass(frozen=True)
class Pair:
    """One of our tasks, the harness's task of the same rows, and the metrics both have."""

    name: str
    ours: Task
    theirs: ConfigurableTask
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """What came of one pair; metrics and seconds are (ours, theirs)."""

    name: str
    examples: int
    # Of log-probabilities, in nats.
    largest: float
    # Examples in which a choice, a greedy match or a count differs.
    differing: int
    metrics: dict[str, tuple[float, float]]
    seconds: tuple[float, float]

    @property
    def agrees(self) -> bool:
        """Whether nothing differs by more than the rounding of the metrics."""
        close = all(abs(a - b) <= TOLERANCE * max(abs(b), 1) for a, b in self.metrics.values())
        return self.largest <= TOLERANCE and not self.differing and close


def main() -> None:
    """Compare on all tasks, print a table, and exit with status 1 if anything differs."""
    options = parse(Options)
    if not os.environ.get("GPT2_DATA"):
        raise UserError("GPT2_DATA must name the directory of evaluation data.")
    if options.source == "random-124m":
        model = random_124m()
    else:
        model = load(options.source, options.runs_dir)[0]
    with silent():
        harness = harness_model(model, softmax_dtype="float64")
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for pair in pairs(Path(os.environ["GPT2_DATA"]), Path(scratch), options):
            results.append(compare(pair, model, harness))
            print(f"{pair.name}: {'agrees' if results[-1].agrees else 'DIFFERS'}", flush=True)
    print("\n" + table(results))
    if not all(result.agrees for result in results):
        raise SystemExit(1)


def pairs(data: Path, scratch: Path, options: Options) -> Iterator[Pair]:
    """Yield all that is compared; files of chosen rows go to `scratch`."""
    yield from hellaswag_pairs(data, scratch, options.raw_rows, options.rows)
    yield lambada_pair(data, scratch, options.passages)
    yield wikitext_pair(data, options.documents)


def random_124m() -> GPT:
    """Return a GPT-2 of 124M parameters before its training, always the same one."""
    torch.manual_seed(0)
    return GPT(ModelConfig()).eval()


def compare(pair: Pair, model: GPT, harness: Any) -> Comparison:
    """Compare on one pair; `harness` is the model from `harness_model`."""
    task, began = pair.ours, time.perf_counter()
    config = model.config
    laid_out = plan(task.requests, config.block_size, 2048, config.vocab_size)
    scores = Scorer(model, ALONE, torch.float32).score(laid_out, task.excluded)
    facts = [task.judge(e, s) for e, s in zip(task.examples, scores, strict=True)]
    metrics, between = task.summarize(facts), time.perf_counter()
    found, samples = by_harness(pair.theirs, harness)
    seconds = between - began, time.perf_counter() - between
    assert len(samples) == len(facts), (len(samples), len(facts))
    largest, differing = 0.0, 0
    for example, ours, fact, sample in zip(task.examples, scores, facts, samples, strict=True):
        theirs = as_scores(sample, ours)
        largest = max(largest, float(np.abs(ours.logprobs - theirs.logprobs).max()))
        differing += _differs(pair, fact, task.judge(example, theirs), sample)
        differing += not np.array_equal(ours.greedy, theirs.greedy)
    both = {name: (metrics[name], found[f"{name},none"]) for name in pair.metrics}
    return Comparison(pair.name, len(facts), largest, differing, both, seconds)


def as_scores(sample: dict[str, Any], ours: Scores) -> Scores:
    """Return the harness's answers to one example in our form; what it lacks is taken from ours."""
    answers = sample["filtered_resps"]
    if not isinstance(answers[0], tuple | list):
        # Of a whole text it says nothing but the sum.
        return Scores(np.array(answers, float), ours.tokens, ours.greedy, ours.greedy_filtered)
    logprobs, greedy = (np.array(part) for part in zip(*answers, strict=True))
    return Scores(logprobs.astype(float), ours.tokens, greedy, ours.greedy_filtered)


def _differs(pair: Pair, fact: dict, judged: dict, sample: dict[str, Any]) -> bool:
    """Say whether choices or counts differ, by our judgement and by the harness's."""
    if any(fact[key] != judged[key] for key in fact if key != "nats"):
        return True
    for name in pair.metrics:
        if name in COUNTS:
            if sample[name][1] != fact[COUNTS[name]]:
                return True
        elif name in fact and sample[name] != fact[name]:
            return True
    return False


def by_harness(task: ConfigurableTask, model: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the harness's metrics of one task and its record of every example, in order."""
    name = task.config.task
    with silent():
        tasks = {"tasks": {name: task}}
        results = evaluate_by_harness(model, tasks, bootstrap_iters=0, log_samples=True)
    return results["results"][name], sorted(results["samples"][name], key=lambda s: s["doc_id"])


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep back what the harness says, and its bars."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def harness_task(folder: str, name: str, rows: list[dict], **changes: Any) -> ConfigurableTask:
    """Return one of the harness's own tasks over rows in memory; `changes` are to its settings."""
    root = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    settings = load_yaml(root / folder / f"{name}.yaml", resolve_func=True)
    split = settings.get("test_split") or settings["validation_split"]
    data = datasets.DatasetDict({split: datasets.Dataset.from_list(rows)})
    settings |= {"training_split": None, "validation_split": None, "test_split": split}
    # The rows take the place of a download; nothing else of the task is touched.
    settings |= {"custom_dataset": lambda **_: data, "metadata": {}, **changes}
    settings.pop("tag", None)
    with silent():
        return ConfigurableTask(config=settings)


def hellaswag_pairs(data: Path, scratch: Path, raw: int, cleaned: int) -> list[Pair]:
    """Return the raw rows under both protocols, and rows of the complete file as cleaned ones."""
    folder, tokenizer = data / "hellaswag", gpt2_tokenizer()
    raw_rows = spread(folder / "hellaswag_val_raw_100.jsonl", raw)
    complete = spread(folder / "hellaswag_val.jsonl", cleaned)
    raw_path, path = scratch / "raw.jsonl", scratch / "cleaned.jsonl"
    _write(raw_path, raw_rows)
    _write(path, complete)
    as_it_is = {"process_docs": None, "doc_to_text": "{{ctx}}", "doc_to_choice": "endings"}
    # The complete file has the context in one piece.
    pieces = [{**row, "ctx_a": row["ctx"], "ctx_b": ""} for row in complete]
    return [
        Pair(
            "hellaswag, raw rows",
            hellaswag.task(tokenizer, path=raw_path),
            harness_task("hellaswag", "hellaswag", raw_rows, **as_it_is),
            # The harness has no accuracy by the mean log-probability of a token.
            ("acc",),
        ),
        Pair(
            "hellaswag-cleaned, raw rows",
            hellaswag.task(tokenizer, cleaned=True, path=raw_path),
            harness_task("hellaswag", "hellaswag", raw_rows),
            ("acc", "acc_norm"),
        ),
        Pair(
            "hellaswag-cleaned, from ctx",
            hellaswag.task(tokenizer, cleaned=True, path=path),
            harness_task("hellaswag", "hellaswag", pieces),
            ("acc", "acc_norm"),
        ),
    ]


def lambada_pair(data: Path, scratch: Path, count: int) -> Pair:
    """Return passages of OpenAI's LAMBADA."""
    rows, path = spread(data / "lambada" / "lambada_test.jsonl", count), scratch / "lambada.jsonl"
    _write(path, rows)
    ours = lambada.task(gpt2_tokenizer(), path=path)
    return Pair(
        "lambada", ours, harness_task("lambada", "lambada_openai", rows), ("acc", "perplexity")
    )


def wikitext_pair(data: Path, count: int | None) -> Pair:
    """Return the first articles of WikiText's test."""
    path = data / "wikitext" / "wiki.test.raw"
    rows = [{"page": page} for page in pages(path.read_text(encoding="utf-8"))][:count]
    ours = wikitext.task(gpt2_tokenizer(), limit=count, path=path)
    metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    return Pair("wikitext", ours, harness_task("wikitext", "wikitext", rows), metrics)


def pages(text: str) -> list[str]:
    """Cut WikiText into articles by the rule of the harness's data set on the hub, in our words."""
    found: list[list[str]] = [[]]
    for line in text.split("\n"):
        heading = line.replace("= = =", "===").replace("= =", "==").strip()
        if heading.startswith("= ") and heading.endswith(" ="):
            found.append([])
        found[-1].append(line)
    return [page for page in ("\n".join(lines) for lines in found) if page.strip()]


def spread(path: Path, count: int) -> list[dict[str, Any]]:
    """Return `count` rows of a .jsonl file at even distances, or all it has if those are fewer."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    count = min(count, len(rows))
    return [rows[i * len(rows) // count] for i in range(count)]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def table(results: list[Comparison]) -> str:
    """Return the comparisons as a table, a line a metric."""
    head = ("task", "rows", "largest", "differ", "metric", "ours", "lm-eval", "s", "s lm-eval")
    lines = [head]
    for result in results:
        numbers = (f"{result.examples:,}", f"{result.largest:.1e}", str(result.differing))
        first = (result.name, *numbers)
        seconds = tuple(f"{value:.1f}" for value in result.seconds)
        for name, values in result.metrics.items():
            lines.append((*first, name, *(f"{value:.6f}" for value in values), *seconds))
            first, seconds = ("",) * 4, ("",) * 2
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    run_script(main)
