"""Benchmarks scored while a model trains ("in-loop" evaluation).

    open_benchmarks(config, tokenizer, scorer) -> list[Benchmark]

A benchmark is tokenised and packed once, at the start of a run, and kept. One that cannot be had is
left out, said in one line: it is no reason not to train.
"""

from dataclasses import dataclass

from benchmark import Task
from config import Config, UserError
from distributed import any_over_ranks, from_main
from metrics import score_text
from packing import Plan, plan
from scoring import Scorer
from tasks import open_task
from tokenizer import Tokenizer


@dataclass(frozen=True)
class Benchmark:
    """A task laid out for the model that trains; `limit` as in train.eval_limit."""

    task: Task
    plan: Plan
    limit: int | None


def open_benchmarks(config: Config, tokenizer: Tokenizer, scorer: Scorer) -> list[Benchmark]:
    """Return the benchmarks that this run scores, the same ones on every process.

    The main process fetches what is not here, in one attempt, while the others wait.
    """
    names = dict.fromkeys(config.train.eval_tasks)
    opened = [_open_everywhere(name, config, tokenizer, scorer) for name in names]
    return [benchmark for benchmark in opened if benchmark is not None]


def _open_everywhere(
    name: str, config: Config, tokenizer: Tokenizer, scorer: Scorer
) -> Benchmark | None:
    """Return a benchmark, or on every process None where one of them cannot have it."""
    world, few_shapes = scorer.world, scorer.few_shapes
    found = _open(name, config, tokenizer, few_shapes, fetch=True) if world.is_main else ""
    # Here the others wait for the file.
    on_main = from_main(int(isinstance(found, Benchmark)), world)
    if on_main and not world.is_main:
        found = _open(name, config, tokenizer, few_shapes, fetch=False)
    missing = any_over_ranks(isinstance(found, str), world)
    if world.is_main:
        print(_announcement(name, found, missing, config.train.eval_interval), flush=True)
    return None if missing else found


def _announcement(name: str, found: Benchmark | str, missing: bool, interval: int) -> str:
    """Return the line that says how a benchmark will be scored, or why it will not."""
    if isinstance(found, str):
        return f"{name} is not scored: {found}"
    if missing:
        return f"{name} is not scored: put {found.task.path} on every machine of this run."
    task = found.task
    return f"{name} every {interval:,} updates: {len(task.examples):,} examples, {task.protocol}"


def _open(
    name: str, config: Config, tokenizer: Tokenizer, few_shapes: bool, fetch: bool
) -> Benchmark | str:
    """Return a benchmark, or the sentence that says why there is none."""
    train, model = config.train, config.model
    try:
        task = open_task(name, tokenizer, train.eval_limit, fetch, attempts=1)
        batch_tokens = train.micro_batch * model.block_size
        layout = plan(task.requests, model.block_size, batch_tokens, model.vocab_size, few_shapes)
    except UserError as error:
        return str(error)
    return Benchmark(task, layout, train.eval_limit)


def sentence(benchmark: Benchmark, metrics: dict[str, float]) -> str:
    """Return all metrics in words, the one to watch first."""
    task = benchmark.task
    names = [name for name in metrics if not name.endswith("_stderr")]
    names.sort(key=lambda name: name != task.headline)
    shown = [
        f"{name} {score_text(name, metrics[name], metrics.get(f'{name}_stderr', 0.0))}"
        for name in names
    ]
    # A limit may be more than there is, and counts for each part of a task that has several.
    count = len(task.examples)
    limited = benchmark.limit is not None and count >= benchmark.limit
    only = f" (only {count:,} examples)" if limited else ""
    return f"{task.name}{only} {', '.join(shown)}"
