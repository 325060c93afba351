"""One benchmark with one model, from its requests to its metrics, behind a bar.

    evaluate(scorer, task, plan) -> Result(metrics, facts, seconds)

Training does this every so often, and evaluate.py for a model that is done.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmark import Task
from likelihood import Scores
from metrics import is_share, score_text
from packing import Plan
from scoring import Scorer
from tqdm_bars import EvaluationBar

# Seconds between two looks at the running score.
RENEWAL = 0.5


@dataclass(frozen=True)
class Result:
    """What came of a benchmark; `facts` has what was found of each example, in their order."""

    task: str
    metrics: dict[str, float]
    facts: list[dict[str, Any]]
    seconds: float

    @property
    def examples(self) -> int:
        """How many examples were scored: all that the task has."""
        return len(self.facts)


def evaluate(
    scorer: Scorer, task: Task, plan: Plan, asked: Callable[[], bool] | None = None
) -> Result | None:
    """Score a task's requests, laid out in `plan`; the same result on every rank.

    Where `asked` is given, it is called between batches, and None is returned on every rank when it
    was true on one.
    """
    began = shown = time.perf_counter()
    found: list[dict[str, Any]] = []
    size, count = scorer.info.world_size, len(task.requests)
    with EvaluationBar(task.name, count, "example", not scorer.info.is_main) as bar:

        def progress(done: list[int], scores: list[Scores]) -> bool:
            nonlocal shown
            if scorer.info.is_main:
                found.extend(map(task.judge, [task.examples[i] for i in done], scores))
                if found and time.perf_counter() - shown > RENEWAL:
                    shown = time.perf_counter()
                    bar.set_postfix_str(headline(task, task.summarize(found)), refresh=False)
                # The other ranks are about as far with their examples.
                bar.update(min(len(done) * size, count - bar.n))
            return asked() if asked is not None else False

        scores = scorer.score(plan, task.excluded, progress)
    if scores is None:
        return None
    facts = [task.judge(e, s) for e, s in zip(task.examples, scores, strict=True)]
    return Result(task.name, task.summarize(facts), facts, time.perf_counter() - began)


def headline(task: Task, metrics: dict[str, float]) -> str:
    """Return the metric to watch in a few characters, such as "acc_norm 29.4%"; or ""."""
    value = metrics.get(task.headline)
    if value is None:
        return ""
    return f"{task.headline} " + (f"{value:.1%}" if is_share(task.headline) else f"{value:.4g}")


def describe(task: Task, metrics: dict[str, float], limit: int | None) -> str:
    """Return all metrics in words, the one to watch first; `limit` as in train.eval_limit."""
    names = [name for name in metrics if not name.endswith("_stderr")]
    names.sort(key=lambda name: name != task.headline)
    shown = [
        f"{name} {score_text(name, metrics[name], metrics.get(f'{name}_stderr', 0.0))}"
        for name in names
    ]
    # A limit may be more than there is, and counts for each part of a task that has several.
    count = len(task.examples)
    limited = limit is not None and count >= limit
    only = f" (only {count:,} examples)" if limited else ""
    return f"{task.name}{only} {', '.join(shown)}"
