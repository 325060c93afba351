"""The training step against the loops that are usually written for it: speed, MFU and memory.

    python -m bench.train_step [--sizes 124m nano] [--dtype bfloat16 float32] [--compile off on]

Ours is all that a run does between two validations: batches from shards through the background
thread, the step of `train.train`, the bar and the record. The references are written out below:
GPT-2 of transformers with its own loss and fused AdamW, and this project's model with whole logits,
float32 cross-entropy and the AdamW of one tensor at a time. All start from the same seed, read the
same sequences and clip gradients at norm 1. Every measurement has a process of its own, and they
take turns; the first steps are not timed. Memory is that beyond the process with its imports (on
CUDA, of tensors). The last line of a size is what reading a step's sequences would take if training
waited for it, in a shuffled order, against the whole step.
"""

import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import recipes
import train
from bench.device import begin_memory, peak_memory
from bench.processes import alone, in_fresh_process
from bench.record import report
from config import Config, ModelConfig, OptimConfig, UserError, replace
from corpus.shards import Manifest, ShardWriter
from corpus.tokenizer import GPT2Tokenizer, gpt2_tokenizer
from fineweb import Batch, FineWebEdu, load_batch, prefetch
from modern import build_model
from training.distributed import autocast, peak_flops, synchronize
from training.logger import create_run

# Sequences in a step, and whose loop a size is compared with, where nothing is said.
BATCHES = {"124m": 4, "nano": 8}
REFERENCES = {"124m": ("transformers",), "nano": ("plain",)}
LABELS = {"transformers": "transformers", "plain": "the same model in a plain loop"}
FIGURES = (
    ("tokens_per_second", "speed", "tokens/s"),
    ("seconds", "a step", "s"),
    ("megabytes", "peak memory", "MB"),
    ("mfu", "MFU", "of the peak"),
)
SEED = 1337
OPTIM = OptimConfig()


@dataclass(frozen=True)
class Options:
    """Measure the training step."""

    sizes: tuple[Literal["124m", "nano"], ...] = ("124m", "nano")
    """How big, as in recipes.py."""
    dtype: tuple[Literal["bfloat16", "float32"], ...] = ("bfloat16", "float32")
    """Arithmetic of matrix products; the first one of ours is also held against float32."""
    references: tuple[Literal["transformers", "plain"], ...] = ()
    """Whose loop to compare with; transformers at 124m and the plain loop at nano by default."""
    batch: int | None = None
    """Sequences in a step, which is one micro-batch; 4 at 124m and 8 at nano by default."""
    context: int = 256
    """Tokens in a sequence."""
    compile: tuple[Literal["off", "on"], ...] = ("off",)
    """Whether torch.compile is used, by ours and the references alike."""
    warm_up: int = 2
    """Steps before the clock starts."""
    steps: int = 5
    """Steps that are timed."""
    repeats: int = 3
    """Measurements of each, taken in turn; their medians are compared."""
    device: Literal["cpu", "cuda", "mps", "auto"] = "auto"
    """Where to compute."""


@dataclass(frozen=True)
class Case:
    """One measurement: whose loop, on which model, data and device, in which arithmetic."""

    loop: Literal["ours", "transformers", "plain"]
    model: ModelConfig
    data: str
    batch: int
    dtype: str = "bfloat16"
    compile: str = "off"
    device: str = "auto"
    warm_up: int = 2
    steps: int = 5


@dataclass(frozen=True)
class Figures:
    """What came of a measurement; `mfu` only where the device's peak is known."""

    tokens_per_second: float
    seconds: float
    megabytes: float
    mfu: float | None
    loss: float


def main() -> None:
    """Print JSON lines: every figure of every size, dtype and mode against every reference."""
    options = parse(Options)
    wanted = {name for size in options.sizes for name in options.references or REFERENCES[size]}
    if "transformers" in wanted and not importlib.util.find_spec("transformers"):
        raise UserError("transformers is not installed; `pip install transformers` brings it.")
    with tempfile.TemporaryDirectory() as directory:
        for size, mode in itertools.product(options.sizes, options.compile):
            batch = options.batch or BATCHES[size]
            model = replace(
                recipes.build("gpt2", size), {"model.block_size": options.context}
            ).model
            data = Path(directory) / f"{size}-{mode}"
            steps = options.warm_up + options.steps + 1
            write_tokens(data, batch * options.context * steps, model.vocab_size)
            ours = Case(
                *("ours", model, str(data), batch, options.dtype[0], mode, options.device),
                *(options.warm_up, options.steps),
            )
            compare(size, ours, options.references or REFERENCES[size], options)


def compare(size: str, ours: Case, references: tuple[str, ...], options: Options) -> None:
    """Measure ours and the references in turn, and print a line for each figure and pair."""
    pairs = pairs_of(ours, references, options.dtype)
    found: dict[Case, list[Figures]] = {case: [] for pair in pairs for case in pair}
    for _ in range(options.repeats):
        for case, figures in found.items():
            figures.append(in_fresh_process(measure, case))
    for mine, other in pairs:
        for field, figure, unit in FIGURES:
            values, others = ([getattr(f, field) for f in found[c]] for c in (mine, other))
            if None not in values:
                name = f"train step, {size}, {title(mine)}, {figure}, against {title(other)}"
                report(name, unit, values, others, options.device)
    reads = [in_fresh_process(seconds_to_read, ours) for _ in range(options.repeats)]
    name = f"train step, {size}, {title(ours)}, reading of its sequences, against a step"
    report(name, "s", reads, [figures.seconds for figures in found[ours]], options.device)


def pairs_of(
    ours: Case, references: tuple[str, ...], dtypes: tuple[str, ...]
) -> list[tuple[Case, Case]]:
    """Return what is compared: ours with each reference of the same dtype, and with float32."""
    pairs = []
    for loop in references:
        theirs = dataclasses.replace(ours, loop=loop)
        for dtype in dtypes:
            mine, other = (dataclasses.replace(case, dtype=dtype) for case in (ours, theirs))
            pairs.append((mine, other))
        if "float32" in dtypes and ours.dtype != "float32":
            pairs.append((ours, dataclasses.replace(theirs, dtype="float32")))
    return pairs


def title(case: Case) -> str:
    """Return whose loop a case is and how it computes, in words."""
    arithmetic = f"{case.dtype}{' compiled' if case.compile == 'on' else ''}"
    if case.loop == "ours":
        return f"{arithmetic}, B={case.batch}, T={case.model.block_size}"
    return f"{LABELS[case.loop]}, {arithmetic}"


def measure(case: Case) -> Figures:
    """Return the figures of one case; raises ArithmeticError when its loss is not finite."""
    device = alone(case.device).device
    # What is imported late is no part of the step's memory: torch.optim does so for its compiler.
    importlib.import_module("torch._dynamo")
    if case.loop == "transformers":
        importlib.import_module("transformers.models.gpt2.modeling_gpt2")
    before = begin_memory(device)
    with contextlib.closing(LOOPS[case.loop](case, device)) as losses:
        deque(itertools.islice(losses, case.warm_up), maxlen=0)
        synchronize(device)
        start = time.perf_counter()
        (loss,) = deque(itertools.islice(losses, case.steps), maxlen=1)
        synchronize(device)
        seconds = (time.perf_counter() - start) / case.steps
        memory = peak_memory(device) - before
    if not math.isfinite(loss):
        raise ArithmeticError(f"the loss of {title(case)} is {float(loss)}")
    speed, peak = case.batch * case.model.block_size / seconds, peak_flops(device)
    mfu = speed * case.model.flops_per_token / peak if peak else None
    return Figures(speed, seconds, memory / 1e6, mfu, float(loss))


def ours(case: Case, device: torch.device) -> Iterator[float]:
    """Yield the loss after every step of `train.train`, which waits in between in a thread.

    Where a GPU's losses are read late, it is that of the step before.
    """
    config, asks, answers = config_of(case), SimpleQueue(), SimpleQueue()

    def one_at_a_time(*args: Any) -> Iterator[Batch]:
        with contextlib.closing(prefetch(*args)) as batches:
            for batch in batches:
                asks.put(None)
                if not answers.get():
                    raise SystemExit
                yield batch

    def run_training(run: Path) -> None:
        try:
            train.train(config, run, alone(device.type))
        except BaseException as error:
            asks.put(error)

    def wait() -> None:
        if error := asks.get():
            raise error

    # A bar that takes its time, as in any run, but does not show among the results.
    silenced = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as directory, silenced[0], silenced[1]:
        run = Path(directory) / "run"
        create_run(run, config)
        thread = threading.Thread(target=run_training, args=(run,))
        train.prefetch = one_at_a_time
        thread.start()
        try:
            wait()
            for _ in range(case.warm_up + case.steps):
                answers.put(True)
                wait()
                yield _last_loss(run / "metrics.jsonl")
        finally:
            answers.put(False)
            thread.join()
            train.prefetch = prefetch


def _last_loss(metrics: Path) -> float:
    lines = metrics.read_text().splitlines()
    losses = (json.loads(line)["loss"] for line in reversed(lines) if '"train"' in line)
    return next(losses, 0.0)


def config_of(case: Case) -> Config:
    """Return the config of a run that trains as a case says, its sequences in their own order."""
    config = dataclasses.replace(recipes.build("gpt2"), model=case.model, data=case.data)
    return replace(
        config,
        {
            # The last step, with its validation and checkpoint, is never taken.
            "train.steps": case.warm_up + case.steps + 1,
            "train.batch_tokens": case.batch * case.model.block_size,
            "train.micro_batch_size": case.batch,
            "train.shuffle": "none",
            "train.val_interval": 0,
            "train.val_tokens": case.model.block_size,
            "train.eval_interval": 0,
            "train.checkpoint_interval": 0,
            "train.sample_tokens": 0,
            "train.compile": case.compile,
            "train.dtype": case.dtype,
            "train.seed": SEED,
        },
    )


def seconds_to_read(case: Case) -> float:
    """Return the seconds a step's sequences take, read in this thread and in a shuffled order."""
    config = replace(config_of(case), {"train.shuffle": "sequences"})
    data = FineWebEdu(case.data, "train", config.model.block_size)
    start = time.perf_counter()
    steps = case.warm_up + case.steps
    for step in range(1, steps + 1):
        load_batch(data, config, step, 0, 1)
    return (time.perf_counter() - start) / steps


def transformers_loop(case: Case, device: torch.device) -> Iterator[Tensor]:
    """Yield the loss after every step of GPT-2 of transformers, in the loop of its manuals."""
    model = transformers_model(case.model).to(device).train()
    forward = torch.compile(model) if case.compile == "on" else model
    optimizer = torch.optim.AdamW(
        model.parameters(), OPTIM.lr, (OPTIM.beta1, OPTIM.beta2), weight_decay=0.1, fused=True
    )
    for batch in sequences_of(case, device):
        idx = batch[:, :-1]
        with autocast(device, getattr(torch, case.dtype)):
            loss = forward(idx, labels=idx).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


def transformers_model(model: ModelConfig) -> Any:
    """Return GPT-2 of transformers, of a model's size, with random weights of the same seed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    sizes = {name: getattr(model, name) for name in ("n_layer", "n_head", "n_embd")}
    config = GPT2Config(
        vocab_size=model.vocab_size,
        n_positions=model.block_size,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        # Nobody reads on from a training batch.
        use_cache=False,
        **sizes,
    )
    return GPT2LMHeadModel(config)


def plain_loop(case: Case, device: torch.device) -> Iterator[Tensor]:
    """Yield the loss after every step of this project's model in a loop as it is often seen."""
    torch.manual_seed(SEED)
    model = build_model(case.model).to(device)
    forward = torch.compile(model) if case.compile == "on" else model
    optimizer = torch.optim.AdamW(
        model.parameters(),
        *(OPTIM.lr, (OPTIM.beta1, OPTIM.beta2)),
        weight_decay=0.1,
        foreach=False,
        fused=False,
    )
    for batch in sequences_of(case, device):
        with autocast(device, getattr(torch, case.dtype)):
            logits, _ = forward(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.detach()


LOOPS: dict[str, Callable[[Case, torch.device], Iterator[Tensor | float]]] = {
    "ours": ours,
    "transformers": transformers_loop,
    "plain": plain_loop,
}


def sequences_of(case: Case, device: torch.device) -> Iterator[Tensor]:
    """Yield the sequences that each step of ours reads, int64 (batch, T + 1), on the device."""
    data = FineWebEdu(case.data, "train", case.model.block_size)
    for step in range(case.warm_up + case.steps):
        places = np.arange(step * case.batch, (step + 1) * case.batch) % len(data)
        yield data.sequences(places).to(device)


def write_tokens(directory: Path, count: int, vocab_size: int = GPT2Tokenizer.vocab_size) -> None:
    """Write shards of at least `count` random tokens for training."""
    directory.mkdir()
    tokenizer, rng = gpt2_tokenizer(), np.random.default_rng(SEED)
    tokens = rng.integers(0, vocab_size, count + 1, dtype=np.uint16)
    manifest = Manifest("random", "gpt2", vocab_size, vocab_size - 1, {"kind": "random"})
    writer = ShardWriter(directory, manifest, tokenizer, len(tokens))
    for split, part in (("val", tokens[:4096]), ("train", tokens)):
        writer.add(part, 0, split, (0, 0))
        writer.flush(split, (0, 0, 0))
    writer.record(complete=True)


if __name__ == "__main__":
    # Not at the top: spawned processes import this module again, and have no command line.
    from utils import parse, run_script

    run_script(main)
