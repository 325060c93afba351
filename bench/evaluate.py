"""Scoring against the loops that are usually written for it: examples a second, and memory.

    python -m bench.evaluate [--tasks hellaswag wikitext] [--dtype bfloat16 float32]

GPT-2 (124M) with random weights, as fast as with trained ones. HellaSwag's reference takes one
example at a time: four rows, padded to the longest ending, all logits, the mean loss of each.
WikiText's takes one of the same windows of up to 1,024 tokens at a time, all logits, their
log-softmax and their argmax, for ours says too whether tokens are the likeliest; the unit is tokens
scored, of which an article's last window has fewer. Both are run with this project's model, which
leaves only the way of scoring to differ, and with that of transformers. Every measurement has a
process of its own, and they take turns.

The examples lie evenly over the whole file that is found as for evaluate.py. Of HellaSwag ours are
those of evenly chosen batches of its plan, so that they are packed as in a whole evaluation; of
WikiText all have the same articles.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.processes import alone, in_fresh_process, peak, reset_peak
from bench.record import report
from benchmark import Task
from config import ModelConfig
from corpus.tokenizer import gpt2_tokenizer
from evaluate import BATCH_TOKENS
from likelihood import Request, windows
from model import GPT
from packing import Plan, plan
from scoring import Scorer
from tasks import open_task
from training.distributed import autocast

CONTEXT = 1024
UNITS = {"hellaswag": "examples/s", "wikitext": "tokens/s"}
REFERENCES = ("the same model, whole logits", "transformers, whole logits")


@dataclass(frozen=True)
class Options:
    """Measure HellaSwag and WikiText."""

    tasks: tuple[Literal["hellaswag", "wikitext"], ...] = ("hellaswag", "wikitext")
    """What to score."""
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("bfloat16", "float32")
    """Arithmetic of the products, the same for ours and the references."""
    examples: int = 60
    """Examples of HellaSwag that a reference scores; ours scores about five times as many."""
    articles: int = 6
    """Articles of WikiText, of about five windows each."""
    repeats: int = 3
    """Measurements of each, taken in turn; their medians are compared."""
    device: Literal["cpu", "cuda", "mps", "auto"] = "auto"
    """Where to compute."""


Figures = tuple[float, float]


def main() -> None:
    """Print JSON lines: speed and memory of each task, in each dtype, against each reference."""
    options = parse(Options)
    for dtype in options.dtype:
        for task in options.tasks:
            unit, count = UNITS[task], options.examples
            if task == "wikitext":
                count = options.articles
            found: dict[str, list[Figures]] = {name: [] for name in ("ours", *REFERENCES)}
            for _ in range(options.repeats):
                for name in found:
                    args = (measure, name, task, dtype, count, options.device)
                    found[name].append(in_fresh_process(*args))
            for i, (figure, shown) in enumerate((("speed", unit), ("peak memory", "MB"))):
                ours = [figures[i] for figures in found["ours"]]
                for name in REFERENCES:
                    reference = [figures[i] for figures in found[name]]
                    report(f"{task}, {dtype}, {figure}, against {name}", shown, ours, reference)


def measure(name: str, task_name: str, dtype_name: str, count: int, device_name: str) -> Figures:
    """Return the speed, and the peak memory beyond the process with its model, MB."""
    device, dtype = alone(device_name).device, getattr(torch, dtype_name)
    torch.manual_seed(0)
    task = open_task(task_name, gpt2_tokenizer())
    if task_name == "wikitext":
        task = replace(task, requests=task.requests[:: len(task.requests) // count])
    run = _ours(task, count, device, dtype)
    if name != "ours":
        model = GPT(ModelConfig()) if name == REFERENCES[0] else _transformers_model()
        loop = hellaswag_loop if task_name == "hellaswag" else wikitext_loop
        run = _plain(loop, model.to(device).eval(), task, count, dtype)
    run(warm_up=True)
    before = reset_peak()
    start = time.perf_counter()
    scored = run(warm_up=False)
    seconds = time.perf_counter() - start
    return scored / seconds, (peak() - before) / 1e6


def _transformers_model() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config())


def _ours(
    task: Task, count: int, device: torch.device, dtype: torch.dtype
) -> Callable[[bool], float]:
    """Return what scores evenly chosen batches of the task's whole plan."""
    scorer = Scorer(GPT(ModelConfig()).to(device), alone(device.type), dtype)
    batch_tokens = BATCH_TOKENS[device.type]
    whole = plan(task.requests, CONTEXT, batch_tokens, 50257, scorer.few_shapes)
    batches = whole.batches
    if task.name == "hellaswag":
        # An example takes about 160 tokens.
        batches = batches[:: max(whole.tokens // (5 * 160 * count), 1)]

    def run(warm_up: bool) -> float:
        some = batches[:2] if warm_up else batches
        scorer.score(Plan(some, whole.first_slots))
        if task.name == "wikitext":
            return float(sum(len(batch.targets) for batch in some))
        return float(sum(len(batch.requests) for batch in some))

    return run


def _plain(
    loop: Callable, model: Any, task: Task, count: int, dtype: torch.dtype
) -> Callable[[bool], float]:
    """Return what scores evenly chosen requests in a reference's loop."""
    parts: list[Any] = task.requests[:: max(len(task.requests) // count, 1)]
    if task.name == "wikitext":
        texts = [np.concatenate((r.context, r.endings[0])) for r in task.requests]
        parts = [
            (text[start:stop], stop - first)
            for text in texts
            for start, first, stop in windows(len(text), 1, CONTEXT)
        ]

    def run(warm_up: bool) -> float:
        with torch.no_grad(), autocast(next(model.parameters()).device, dtype):
            return float(sum(loop(model, part) for part in (parts[:2] if warm_up else parts)))

    return run


def _logits(model: Any, tokens: Tensor) -> Tensor:
    found = model(tokens.to(next(model.parameters()).device))
    return found[0] if isinstance(found, tuple) else found.logits


def hellaswag_loop(model: Any, request: Request) -> int:
    """Find the ending with the least mean loss: four padded rows, whole logits. Returns 1."""
    context, endings = request.context, request.endings
    length = len(context) + max(map(len, endings))
    tokens = torch.zeros(len(endings), length, dtype=torch.long)
    scored = torch.zeros(len(endings), length)
    for i, ending in enumerate(endings):
        stop = len(context) + len(ending)
        tokens[i, :stop] = torch.from_numpy(np.concatenate((context, ending)))
        scored[i, len(context) : stop] = 1
    logits = _logits(model, tokens)[:, :-1].contiguous()
    targets, scored = tokens[:, 1:].contiguous(), scored[:, 1:].to(logits.device)
    losses = F.cross_entropy(
        logits.view(-1, logits.size(-1)), targets.view(-1).to(logits.device), reduction="none"
    )
    means = (losses.view(targets.shape) * scored).sum(1) / scored.sum(1)
    means.argmin().item()
    return 1


def wikitext_loop(model: Any, window: tuple[np.ndarray, int]) -> int:
    """Find what a window's last tokens, as many as it says, have for log-likelihood, and whether
    each is the likeliest, as lm-evaluation-harness does; returns how many they are.
    """
    text, count = window
    tokens = torch.from_numpy(text)[None]
    logps = F.log_softmax(_logits(model, tokens[:, :-1]), dim=-1, dtype=torch.float32)[:, -count:]
    targets = tokens[:, -count:].to(logps.device)
    logps.gather(2, targets[..., None]).sum().item()
    (logps.argmax(dim=-1) == targets).all().item()
    return count


if __name__ == "__main__":
    # Not at the top: spawned processes import this module again, and have no command line.
    from utils import parse, run_script

    run_script(main)
