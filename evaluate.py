"""Scores of one model, or of several beside each other, on the benchmarks.

    python evaluate.py RUN|CHECKPOINT|HF_NAME ... --tasks hellaswag lambada cbt wikitext
    torchrun --standalone --nproc_per_node=8 evaluate.py ...

Every score says what was scored and how: `tasks.py` lists the names. Results are printed as a
table and kept in `evals.json` beside the checkpoint.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from benchmark import Task, sha256_of
from config import UserError
from corpus.tokenizer import Tokenizer
from evaluation import Result, evaluate
from likelihood import loses_context
from metrics import aligned, score_text
from model import GPT
from packing import plan
from published import published
from sample import find, load
from scoring import Scorer
from tasks import open_task
from training.distributed import DistInfo, barrier, choose_device, init_distributed, pick_dtype
from utils import parse, run_script, write_atomically

# Tokens in a batch where nothing is said.
BATCH_TOKENS = {"cpu": 2048, "mps": 8192, "cuda": 65536}


@dataclass(frozen=True)
class Options:
    """Score models on HellaSwag, LAMBADA, the Children's Book Test and WikiText."""

    sources: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN|CHECKPOINT|HF_NAME ...")
    ]
    """Runs, checkpoints, gpt2[-medium|-large|-xl], directories of transformers, or OWNER/NAME."""
    tasks: tuple[str, ...] = ("hellaswag", "lambada", "cbt", "wikitext")
    """hellaswag[-cleaned|-train|-test], lambada[-standard], cbt[-detokenized|-verbs|-prepositions],
    wikitext[-valid|-103|-103-valid]."""
    lm_eval: str = ""
    """Tasks of lm-evaluation-harness instead, with commas between them (pip install lm_eval)."""
    limit: int | None = None
    """Only the first N examples of each."""
    batch_tokens: int | None = None
    """Tokens in a forward pass; by default 2,048 on a CPU and 65,536 on a GPU."""
    max_length: int | None = None
    """Most tokens the model may read at once; by default its context."""
    dtype: Literal["float32", "tf32", "bfloat16", "auto"] = "float32"
    """Arithmetic of matrix products; bfloat16 is faster and flips a few near ties."""
    compile: Literal["on", "off"] = "off"
    """torch.compile; pays on a GPU where much is scored."""
    log_examples: bool = False
    """Also write what was found of each example to evals/TASK.jsonl beside evals.json."""
    device: Literal["cpu", "cuda", "mps", "auto"] = "auto"
    """Where to compute; auto takes CUDA, then MPS, then the CPU."""
    runs_dir: str = "runs"
    """Directory that holds the run directories."""


@dataclass(frozen=True)
class Source:
    """A model by what the person called it, and where its results belong."""

    given: str
    label: str
    # The file, and the key in it.
    evals: Path
    key: str


def main() -> None:
    """Score the models that the command line names, print a table and write evals.json."""
    options = parse(Options)
    check_options(options)
    with init_distributed() as info:
        info = choose_device(info, options.device)
        sources = [identify(source, options.runs_dir) for source in options.sources]
        for source in sources:
            # A damaged record shows before the work is done that it could not keep.
            read_evals(source)
        if options.lm_eval:
            by_harness(sources, options, info)
        else:
            by_our_tasks(sources, options, info)


def by_our_tasks(sources: list[Source], options: Options, info: DistInfo) -> None:
    """Score the models on our own benchmarks."""
    rows, tasks = [], {}
    for source in sources:
        model, tokenizer, _ = load(source.given, options.runs_dir)
        # Texts are turned into tokens once for all models.
        for name in dict.fromkeys(options.tasks):
            if (name, tokenizer.name) not in tasks:
                tasks[name, tokenizer.name] = open_together(name, tokenizer, options, info)
        mine = [tasks[name, tokenizer.name] for name in dict.fromkeys(options.tasks)]
        rows += score_model(source, model.to(info.device), mine, options, info)
    if info.is_main:
        print(table(rows))


def by_harness(sources: list[Source], options: Options, info: DistInfo) -> None:
    """Score the models on tasks of lm-evaluation-harness, and print its own tables."""
    import lm_eval_adapter

    tasks = lm_eval_adapter.load_tasks(options.lm_eval, info)
    for source in sources:
        model, tokenizer, _ = load(source.given, options.runs_dir)
        max_length, batch_tokens = lengths(source, model, options, info)
        scorer, computed = make_scorer(model.to(info.device), max_length, options, info)
        language_model = lm_eval_adapter.as_language_model(
            scorer, tokenizer, max_length, batch_tokens
        )
        results = lm_eval_adapter.run_harness(language_model, tasks, options.limit)
        if info.is_main:
            for name, facts in lm_eval_adapter.kept_results(results).items():
                keep(source, setting(f"lm-eval {name}", options), facts | computed)
            print(f"{source.label}\n\n{lm_eval_adapter.results_table(results)}", flush=True)


def check_options(options: Options) -> None:
    """Raise UserError, naming the option, for a number that cannot be used."""
    if not options.sources:
        raise UserError("Name at least one model: a run, a checkpoint, gpt2, or a directory.")
    for name in ("limit", "batch_tokens", "max_length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1.")


def identify(source: str, runs_dir: str) -> Source:
    """Return where a model's results belong; raises UserError when there is no such model."""
    found = find(source, runs_dir)
    if isinstance(found, str):
        # A repository's name has a slash in it.
        file = f"evals-{source.replace('/', '--')}.json"
        return Source(source, source, Path(runs_dir) / file, source)
    if (found / "state.json").is_file():
        run = found.resolve().parent.parent
        label = f"{run.name} {found.name}"
        return Source(str(found), label, found.parent.parent / "evals.json", found.name)
    return Source(source, found.resolve().name, found / "evals.json", found.resolve().name)


def open_together(name: str, tokenizer: Tokenizer, options: Options, info: DistInfo) -> Task:
    """Return a task on every rank; one of them fetches its file if it is not here."""
    task = open_task(name, tokenizer, options.limit) if info.is_main else None
    barrier()
    return task or open_task(name, tokenizer, options.limit, fetch=False)


def score_model(
    source: Source, model: GPT, tasks: list[Task], options: Options, info: DistInfo
) -> list[dict[str, str]]:
    """Score one model on the tasks; write its evals.json and return its rows of the table."""
    max_length, batch_tokens = lengths(source, model, options, info)
    scorer, computed = make_scorer(model, max_length, options, info)
    rows, vocab_size = [], model.config.vocab_size
    # All that could be wrong with a plan shows before the first one is scored.
    plans = [
        plan(task.requests, max_length, batch_tokens, vocab_size, scorer.few_shapes)
        for task in tasks
    ]
    for task, laid_out in zip(tasks, plans, strict=True):
        result = evaluate(scorer, task, laid_out)
        shortened = sum(loses_context(request, max_length) for request in task.requests)
        if info.is_main:
            facts = record(task, result, shortened) | computed
            keep(source, setting(task.name, options), facts)
            if options.log_examples:
                log_examples(source, setting(task.name, options), result)
            print(summary(source, task, facts), flush=True)
            rows += table_rows(source, task, result)
    return rows


def lengths(source: Source, model: GPT, options: Options, info: DistInfo) -> tuple[int, int]:
    """Return the most tokens that the model reads at once, and those in a batch."""
    context = model.config.block_size
    if options.max_length is not None and options.max_length > context:
        raise UserError(
            f"--max-length {options.max_length} is more than the {context} tokens that "
            f"{source.label} reads at once; lower it or leave it out."
        )
    batch_tokens = options.batch_tokens or BATCH_TOKENS[info.device.type]
    return options.max_length or context, batch_tokens


def make_scorer(
    model: GPT, max_length: int, options: Options, info: DistInfo
) -> tuple[Scorer, dict[str, Any]]:
    """Return a model made ready, and what evals.json says of how its scores are computed."""
    torch.set_float32_matmul_precision("high" if options.dtype == "tf32" else "highest")
    dtype = pick_dtype(options.dtype, info.device)
    named = str(dtype).removeprefix("torch.") if options.dtype == "auto" else options.dtype
    computed = {
        "limit": options.limit,
        "max_length": max_length,
        "dtype": named,
        "device": info.device.type,
        "world_size": info.world_size,
        "torch": torch.__version__,
    }
    return Scorer(model, info, dtype, options.compile), computed


def record(task: Task, result: Result, shortened: int) -> dict[str, Any]:
    """Return what evals.json keeps of a result besides how it was computed."""
    return {
        "metrics": result.metrics,
        "examples": result.examples,
        "shortened": shortened,
        "protocol": task.protocol,
        "file": str(task.path),
        "file_sha256": sha256_of(task.path),
        "published_file": task.published,
        "seconds": round(result.seconds, 3),
        "examples_per_second": round(result.examples / result.seconds, 3),
    }


def setting(task: str, options: Options) -> str:
    """Return the key of a result: the task, and what makes its number another one."""
    settings = {"limit": options.limit, "max_length": options.max_length}
    if options.dtype != "float32":
        settings["dtype"] = options.dtype
    given = (f" {name}={value}" for name, value in settings.items() if value is not None)
    return task + "".join(given)


def read_evals(source: Source) -> dict[str, Any]:
    """Return what evals.json holds so far; raises UserError when it is damaged."""
    if not source.evals.exists():
        return {}
    try:
        evals = json.loads(source.evals.read_text(encoding="utf-8"))
        evals.setdefault(source.key, {}).items()
        return evals
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{source.evals} is damaged ({error}); move it away and evaluate again."
        ) from None


def keep(source: Source, key: str, facts: dict[str, Any]) -> None:
    """Add one result to evals.json; raises UserError when that is damaged or cannot be written."""
    evals = read_evals(source)
    source.evals.parent.mkdir(parents=True, exist_ok=True)
    evals[source.key] = evals.get(source.key, {}) | {key: facts}
    write_atomically(source.evals, (json.dumps(evals, indent=1) + "\n").encode())


def log_examples(source: Source, key: str, result: Result) -> None:
    """Write the facts of every example, one JSON object a line, in the order of the file."""
    path = source.evals.with_suffix("") / source.key / f"{key.replace(' ', '-')}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(fact) + "\n" for fact in result.facts).encode())


def summary(source: Source, task: Task, facts: dict[str, Any]) -> str:
    """Return one line on what was scored, of what, how fast."""
    shortened = ""
    if facts["shortened"]:
        shortened = (
            f"; {facts['shortened']:,} of them do not fit {facts['max_length']} tokens, and were "
            "read without the beginning of their context or in windows"
        )
    return (
        f"{source.label}, {task.name}: {facts['examples']:,} examples of {task.path} in "
        f"{facts['seconds']:,.1f} s, {facts['examples_per_second']:,.1f} a second{shortened}. "
        f"{task.protocol}"
    )


def table_rows(source: Source, task: Task, result: Result) -> list[dict[str, str]]:
    """Return a row for each metric of a result, with what others publish for that model."""
    rows = []
    for name, value in result.metrics.items():
        if name.endswith("_stderr") or not isinstance(value, float):
            continue
        reports = published(source.key, task.name, name)
        rows.append(
            {
                "task": task.name,
                "metric": name,
                "model": source.label,
                "score": score_text(name, value, result.metrics.get(f"{name}_stderr", 0.0)),
                "examples": f"{result.examples:,}",
                "published": "; ".join(f"{figure.value:g} ({figure.source})" for figure in reports),
            }
        )
    return rows


def table(rows: list[dict[str, str]]) -> str:
    """Return all models' rows as a Markdown table, those of one metric beside each other."""
    metrics = list(dict.fromkeys((row["task"], row["metric"]) for row in rows))
    ordered = sorted(rows, key=lambda row: metrics.index((row["task"], row["metric"])))
    return "\n" + aligned(ordered)


if __name__ == "__main__":
    run_script(main)
