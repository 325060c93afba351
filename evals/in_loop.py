"""Benchmarks scored while a model trains: no failure of one ends the run, on any rank."""

from collections.abc import Callable

import torch.distributed as dist

from benchmark import Task
from config import Config
from corpus.tokenizer import Tokenizer
from evaluation import Result, evaluate
from packing import Plan, plan
from scoring import ELSEWHERE, Scorer
from tasks import open_task
from training.distributed import DistInfo, all_reduce_any, barrier, print0


def open_benchmarks(
    config: Config, tokenizer: Tokenizer, scorer: Scorer, info: DistInfo
) -> list[tuple[Task, Plan]]:
    """Return the benchmarks a run scores, the same on every rank.

    Rank 0 fetches what is not here. One that any rank cannot have is left out, said in a line.
    """
    train, model, found = config.train, config.model, []
    for name in dict.fromkeys(train.eval_tasks):
        opened, why = None, ""
        for turn in (True, False):  # rank 0, then the others
            if info.is_main == turn:
                try:
                    task = open_task(name, tokenizer, train.eval_limit, fetch=turn, attempts=1)
                    tokens = train.micro_batch_size * model.block_size
                    layout = plan(
                        task.requests, model.block_size, tokens, model.vocab_size, scorer.few_shapes
                    )
                    opened = task, layout
                except Exception as error:
                    why = str(error) or type(error).__name__
            barrier()
        if all_reduce_any(opened is None):
            print0(f"{name} is not scored: {why or 'another rank cannot have it'}")
            continue
        print0(
            f"{name} every {train.eval_interval:,} steps: {len(task.examples):,} examples, "
            f"{task.protocol}"
        )
        found.append(opened)
    return found


def try_evaluate(
    scorer: Scorer, task: Task, layout: Plan, stop: Callable[[], bool]
) -> tuple[Result | None, str]:
    """Return a benchmark's result, or why there is none, the same on every rank; "" if stopped."""
    result, why = None, ""
    try:
        result = evaluate(scorer, task, layout, stop)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
    reasons = [why]
    if dist.is_initialized():
        reasons = [""] * dist.get_world_size()
        dist.all_gather_object(reasons, why)
    # The others only know that it failed elsewhere.
    reasons = sorted(filter(None, reasons), key=lambda reason: ELSEWHERE in reason)
    return (None, reasons[0]) if reasons else (result, "")
