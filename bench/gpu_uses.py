"""What `bench.gpu` measures of a model in use: evaluation, sampling, and a short training."""

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.device import free_memory
from bench.gpu_job import Job, read_results
from bench.processes import alone
from bench.sample import measure
from config import UserError
from corpus.tokenizer import GPT2Tokenizer, gpt2_tokenizer
from evaluate import BATCH_TOKENS
from likelihood import Request
from model import GPT
from packing import plan
from scoring import Scorer
from tasks import open_task

ROOT = Path(__file__).parent.parent
# Points of a loss curve that are kept.
POINTS = 200


def evaluation(job: Job) -> None:
    """Record examples/s of HellaSwag, or of made-up requests like its, by arithmetic and mode."""
    device, config = alone(job.device).device, job.scale.model
    name, requests = requests_of(job)
    model = GPT(config).to(device)
    # float32 is what evaluate.py does by default.
    for dtype, mode in (("bfloat16", "off"), ("bfloat16", "on"), ("float32", "off")):
        if mode not in job.compile_modes:
            continue
        scorer = Scorer(model, alone(job.device), getattr(torch, dtype), mode)
        batch_tokens = BATCH_TOKENS[device.type]
        # The first time, whatever is compiled or chosen by measurement is.
        for first in (True, False):
            start = time.perf_counter()
            laid_out = plan(
                requests, config.block_size, batch_tokens, config.vocab_size, scorer.few_shapes
            )
            scorer.score(laid_out)
            seconds = time.perf_counter() - start
            details = {
                "task": name,
                "examples": len(requests),
                "dtype": dtype,
                "compile": mode,
                "pass": "first" if first else "second",
                "seconds": round(seconds, 3),
                "tokens": laid_out.tokens,
            }
            title = f"{name}, {dtype}, compile {mode}, {details['pass']} pass"
            job.record(title, len(requests) / seconds, "rows/s", details)


def requests_of(job: Job) -> tuple[str, list[Request]]:
    """Return HellaSwag's requests where its file is found and fits, else random ones."""
    count, config = job.scale.examples, job.scale.model
    if config.vocab_size == GPT2Tokenizer.vocab_size:
        try:
            task = open_task("hellaswag", gpt2_tokenizer(), limit=count, fetch=False)
            return task.name, task.requests
        except UserError:
            pass
    rng = np.random.default_rng(0)

    def text(low: int, high: int) -> np.ndarray:
        return rng.integers(0, config.vocab_size, rng.integers(low, high)).astype(np.int64)

    # HellaSwag's contexts have about 60 tokens, and its endings about 25.
    longest = config.block_size
    requests = [
        Request(
            text(2, min(120, longest // 2)), tuple(text(1, min(50, longest // 2)) for _ in "1234")
        )
        for _ in range(count)
    ]
    return "made-up requests", requests


def sampling(job: Job) -> None:
    """Record tokens/s of ours by rows that advance together, and of the usual ways with one row."""
    device, scale = alone(job.device).device, job.scale
    ways = [("no cache", "bfloat16", 1), ("transformers", "float32", 1)]
    ways += [("ours", "bfloat16", rows) for rows in scale.sample_rows]
    theirs = None
    for way, dtype, rows in ways:
        if way == "transformers" and not importlib.util.find_spec("transformers"):
            continue
        found = measure(way, dtype, rows, scale.sample_tokens, job.device, scale.model)
        details = {
            "way": way,
            "dtype": dtype,
            "rows": rows,
            "tokens a row": scale.sample_tokens,
            "prompt tokens/s": round(found.prefill),
            "peak GB": round(found.memory / 1e3, 3),
        }
        reference = theirs if way == "ours" and rows == 1 else None
        job.record(
            f"sampling, {way}, {dtype}, {rows} rows", found.speed, "tokens/s", details, reference
        )
        theirs = found.speed if way == "transformers" else theirs
        free_memory(device)


def training(job: Job) -> None:
    """Record a short run through main.py: its losses, tokens/s, and what it said at the end.

    It is as long as time allows, `training_seconds` at most.
    """
    scale = job.scale
    steps = steps_in(min(scale.training_seconds, job.left - 75), job)
    with tempfile.TemporaryDirectory() as runs:
        command = [sys.executable, str(ROOT / "main.py"), "gpt2", "--data", job.data]
        command += ["--name", "short", "--train.runs-dir", runs, "--train.device", job.device]
        command += options_of(job, steps)
        with open(Path(runs) / "output", "w+b") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
            try:
                process.wait(timeout=max(job.left - 20, 20))
            except subprocess.TimeoutExpired:
                # It saves and stops; what it has recorded until then is what there is.
                process.terminate()
                process.wait(timeout=20)
            output.seek(0)
            said = output.read().decode(errors="replace")
        record_curve(job, Path(runs) / "short" / "metrics.jsonl", steps, said)
        if process.returncode:
            raise RuntimeError(f"main.py ended with {process.returncode}: {said[-300:]}")


def options_of(job: Job, steps: int) -> list[str]:
    """Return the options that give a run of main.py the scale's size and as many steps."""
    model, tokens = job.scale.model, job.scale.training_batch * job.scale.model.block_size
    options = {
        **{f"model.{n}": getattr(model, n) for n in ("n_layer", "n_head", "n_embd", "block_size")},
        "train.steps": steps,
        "train.batch_tokens": tokens,
        "train.val_interval": max(steps // 8, 1),
        "train.val_tokens": 16 * tokens,
        "train.eval_interval": 0,
        "train.checkpoint_interval": 0,
        "train.shuffle": "sequences",
        # A step is an eighth of the recipe's, so the rate is less too.
        "optim.lr": 1e-3,
    }
    words = []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


def steps_in(seconds: float, job: Job) -> int:
    """Return how many steps fit, by the best speed that was measured; 6 in a test."""
    if job.scale.training_seconds == 0:
        return 6
    lines = read_results(job.results)
    speeds = [line["value"] for line in lines if line["section"] == "throughput" and line["value"]]
    tokens = job.scale.training_batch * job.scale.model.block_size
    # Where nothing is known, few. The program chooses its own micro-batch, and begins and validates
    # within that time.
    return max(int(0.85 * seconds * max(speeds, default=50_000.0) / tokens), 20)


def record_curve(job: Job, path: Path, steps: int, said: str) -> None:
    """Record the curve and the end of a run from its metrics; raises RuntimeError without any."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        lines = [
            json.loads(line)
            for line in path.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
    train = [line for line in lines if line["kind"] == "train"]
    val = [line for line in lines if line["kind"] == "val"]
    if len(train) < 2:
        raise RuntimeError(f"main.py has recorded nothing: {said[-300:]}")
    # The first half's seconds have those of compiling in them.
    middle, last = train[len(train) // 2 - 1], train[-1]
    tokens, seconds = (last[name] - middle[name] for name in ("tokens", "seconds"))
    share = last["mfu"] and last["mfu"] * tokens / seconds / last["tokens_per_second"]
    every = max(len(train) // POINTS, 1)
    details = {
        "steps": f"{last['step']} of {steps}",
        "tokens": last["tokens"],
        "seconds": round(last["seconds"], 2),
        "MFU": share and round(share, 4),
        "train loss": round(last["loss"], 4),
        "validation loss": round(val[-1]["loss"], 4) if val else None,
        "curve": {
            "train": [[line["tokens"], line["loss"]] for line in train[::every]],
            "val": [[line["tokens"], line["loss"]] for line in val],
        },
    }
    job.record("a short training, second half", tokens / seconds, "tokens/s", details)
