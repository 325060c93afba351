"""The estimate of an update's memory (memory.py) against what is measured.

    python -m bench.memory [--kinds counted resident mapped] [--cases TEXT]

`counted` adds up the storages that are alive, at the moment of an update when they are most: exact,
and nothing is computed, for the tensors are fakes that have only shapes. `resident` is what a
person sees: what two real updates add to the memory of a process, beyond what PyTorch itself takes;
`mapped` is the same where glibc maps every block of a megabyte by itself and gives it back at once,
so that there are no gaps. One JSON line each: the value is the estimate, the reference what is
measured. Gaps are part of the estimate for `resident` alone.
"""

import contextlib
import io
import itertools
import os
import tempfile
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lean
import recipes
from bench.processes import in_fresh_process, peak, reset_peak
from bench.record import report
from bench.train_step import write_tokens
from config import Config, replace
from devices import autocast
from distributed import World
from fineweb import training_batches
from memory import Where, memory
from modern import build_model
from optim import build_optimizers, set_rates
from train import update
from trainer import begin

# Recipe, size, micro-batch, context, dtype, and what else is set.
CASES: dict[str, tuple[str, str, int, int, str, dict[str, Any]]] = {
    f"{recipe} {size} B={batch} T={length} {dtype}{label}": (
        *(recipe, size, batch, length, dtype),
        changes,
    )
    for recipe, (size, batch, length), dtype, (label, changes) in itertools.product(
        ("gpt2", "modern"),
        (("nano", 32, 256), ("124m", 4, 256), ("124m", 1, 1024)),
        ("bfloat16", "float32"),
        (("", {}), (" checkpointing", {"train.gradient_checkpointing": True})),
    )
}


Kind = Literal["counted", "resident", "mapped"]
# Read by glibc when a process begins.
MAPPED_BYTES = "MALLOC_MMAP_THRESHOLD_"


@dataclass(frozen=True)
class Options:
    """Compare the estimate of memory with measurements."""

    kinds: tuple[Kind, ...] = ("counted", "resident", "mapped")
    """What is measured."""
    cases: str = ""
    """Only cases whose names contain this."""


def main(options: Options) -> None:
    """Print one JSON line a case and kind."""
    measures = {"counted": counted, "resident": resident, "mapped": mapped}
    for case in CASES:
        config = case_config(case)
        for kind in options.kinds if options.cases in case else ():
            measured = measures[kind](config) / 1e6
            value = estimated(config, kind) / 1e6
            report(f"memory {kind}, {case}", "MB", [value], [measured])


class LiveBytes(TorchDispatchMode):
    """Adds up the bytes of all storages that operations have made and that are still alive."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known: dict[int, int] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.known:
            self.known[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.known.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # A sparse tensor's parts have been made by operations of their own.
            if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
                self.add(leaf)
        self.most = max(self.most, self.now)
        return result


def case_config(case: str) -> Config:
    """Return the config of one of CASES, its update being one micro-batch."""
    recipe, size, batch, length, dtype, changes = CASES[case]
    fixed = {
        "model.block_size": length,
        "train.micro_batch": batch,
        "train.tokens_per_update": batch * length,
        "train.dtype": dtype,
        "train.updates": 2,
        "train.eval_interval": 0,
    }
    return replace(recipes.build(recipe, size), fixed | changes)


def estimated(config: Config, kind: Kind = "counted") -> float:
    """Return the bytes memory.py says: of tensors or, of a process as it is, with gaps."""
    held = memory(config, config.train.micro_batch, Where("cpu", config.train.dtype))
    return held.total - (held.gaps if kind != "resident" else 0)


def counted(config: Config, fake: bool = True) -> int:
    """Return the most bytes of tensors alive in the second of two updates on the CPU."""
    # What is kept for the next time (lean.scratch) was made for others, and these may be fakes.
    lean._memory.clear()
    with FakeTensorMode() if fake else contextlib.nullcontext():
        most = _most_alive(config)
    lean._memory.clear()
    return most


def _most_alive(config: Config) -> int:
    dtype, cpu = getattr(torch, config.train.dtype), torch.device("cpu")
    model = build_model(config.model)
    model.gradient_checkpointing = config.train.gradient_checkpointing
    optimizers = build_optimizers(model, config.optim, dtype)
    windows = config.train.tokens_per_update // config.model.block_size
    ids = torch.randint(config.model.vocab_size, (windows, config.model.block_size + 1))
    live = LiveBytes()
    for parameter in model.parameters():
        live.add(parameter)
    with live:
        for step in (1, 2):
            live.most = 0
            set_rates(optimizers, step, 2, config.optim)
            for batch in ids.split(config.train.micro_batch):
                with autocast(cpu, dtype):
                    _, loss = model(batch[:, :-1], batch[:, 1:])
                loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return live.most


def resident(config: Config) -> int:
    """Return the most bytes that two updates on the CPU add to a fresh process."""
    return in_fresh_process(_added, config)


def mapped(config: Config) -> int:
    """Return the same where glibc leaves no gaps."""
    before = os.environ.get(MAPPED_BYTES)
    os.environ[MAPPED_BYTES] = str(1 << 20)
    try:
        return resident(config)
    finally:
        os.environ.pop(MAPPED_BYTES)
        if before is not None:
            os.environ[MAPPED_BYTES] = before


def _added(config: Config) -> int:
    """Return the most bytes that two updates add to this process, after smaller ones.

    By then PyTorch has loaded whatever it loads when it is first used.
    """
    smaller = {"model.n_layer": 1, "model.n_head": 1, "model.n_embd": 16}
    _make_updates(replace(config, smaller))
    # Nor is what was kept for the next time (lean.scratch).
    lean._memory.clear()
    before = reset_peak()
    _make_updates(config)
    return peak() - before


def _make_updates(config: Config) -> None:
    """Train as main.py does, on random tokens."""
    world, updates = World(0, 1, torch.device("cpu")), config.train.updates
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        run, data = Path(folder) / "run", Path(folder) / "data"
        run.mkdir()
        write_tokens(data, updates * config.train.tokens_per_update)
        config = replace(config, {"data": str(data)})
        trainer, start = begin(config, run, world, None, threading.Event())
        trainer.model.gradient_checkpointing = config.train.gradient_checkpointing
        batches = training_batches(trainer.data, config, world, start + 1, updates)
        with contextlib.closing(batches), contextlib.closing(trainer.bar):
            trainer.bar.start()
            for step, windows in enumerate(batches, start=1):
                update(trainer, windows, step)


if __name__ == "__main__":
    # Not at the top: spawned processes import this module again, and have no command line.
    from command_line import parse, run_script

    run_script(lambda: main(parse(Options)))
