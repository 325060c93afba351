"""What `bench.gpu` measures of training: machine, sweep, transformers, attention, losses."""

import contextlib
import dataclasses
import importlib.util
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.device import (
    begin_memory,
    facts,
    free_memory,
    is_out_of_memory,
    peak_memory,
    seconds_of,
)
from bench.gpu_job import Job
from bench.gpu_ladder import RUNGS, plain_step
from bench.processes import alone
from bench.train_step import LOOPS, Case, measure
from loss import cross_entropy
from training.distributed import autocast, peak_flops, synchronize

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def machine(job: Job) -> None:
    """Record what machine this is, and the speed of one large product in bfloat16."""
    device = alone(job.device).device
    size = 8192 if device.type == "cuda" else 256
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    seconds = seconds_of(lambda: a @ b, device, times=20, warm_up=5)
    details = {"size": size, **facts(device)}
    job.record("matrix product in bfloat16", 2 * size**3 / seconds / 1e12, "TFLOP/s", details)


def case_of(job: Job, loop: str, micro_batch_size: int, mode: str) -> Case:
    """Return the case of a loop at a micro-batch, with or without torch.compile."""
    scale = job.scale
    return Case(
        *(loop, scale.model, job.data, micro_batch_size, "bfloat16", mode, job.device),
        *(scale.warm_up, scale.steps),
    )


def throughput(job: Job) -> None:
    """Record tokens/s, MFU and peak memory of ours, compiled and not, by micro-batch."""
    device, longest = alone(job.device).device, {"on": 0.0, "off": 0.0}
    first, *others = job.scale.micro_batches
    wanted = [(first, mode) for mode in job.compile_modes]
    wanted += [(size, mode) for mode in job.compile_modes for size in others]
    for size, mode in wanted:
        details = {"micro-batch": size, "compile": mode}
        name = f"training, micro-batch {size}, compile {mode}"
        # The others should not have to wait for one that will not be done.
        if job.left < 1.3 * longest[mode]:
            job.record(name, None, "tokens/s", details | {"note": "no time left"})
            continue
        began = time.perf_counter()
        try:
            found = measure(case_of(job, "ours", size, mode))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            job.record(name, None, "tokens/s", details | {"note": "out of memory"})
        else:
            details["ms a step"] = round(1e3 * found.seconds, 3)
            details["MFU"] = found.mfu and round(found.mfu, 4)
            details["peak GB"] = round(found.megabytes / 1e3, 3)
            job.record(name, found.tokens_per_second, "tokens/s", details)
        free_memory(device)
        longest[mode] = max(longest[mode], time.perf_counter() - began)


def against_transformers(job: Job) -> None:
    """Record tokens/s of ours and of a plain loop around transformers' GPT-2, taking turns."""
    device, size = alone(job.device).device, job.scale.batch
    mode = job.compile_modes[0]
    if not importlib.util.find_spec("transformers"):
        note = "transformers is not installed"
        job.record("training, against transformers", None, "tokens/s", {"note": note})
        return
    while True:
        try:
            ours, theirs = by_turns(
                [case_of(job, loop, size, mode) for loop in ("ours", "transformers")], device
            )
            break
        except Exception as error:
            if not is_out_of_memory(error) or size == 1:
                raise
            size //= 2
        finally:
            free_memory(device)
    details = {"micro-batch": size, "compile": mode, "reference": "transformers, plain loop"}
    peak = peak_flops(device)
    if peak:
        share = job.scale.model.flops_per_token / peak
        details |= {"MFU": round(ours * share, 4), "its MFU": round(theirs * share, 4)}
    job.record("training, against transformers", ours, "tokens/s", details, theirs)


def by_turns(cases: list[Case], device: torch.device, rounds: int = 3) -> list[float]:
    """Return each case's median tokens/s over `rounds` stretches, while the others wait."""
    with contextlib.ExitStack() as stack:
        loops: list[Iterator] = []
        for case in cases:
            whole = dataclasses.replace(case, steps=rounds * case.steps)
            loop = stack.enter_context(contextlib.closing(LOOPS[case.loop](whole, device)))
            for _ in range(case.warm_up):
                next(loop)
            loops.append(loop)
        speeds: list[list[float]] = [[] for _ in cases]
        for _ in range(rounds):
            for case, loop, found in zip(cases, loops, speeds, strict=True):
                synchronize(device)
                start = time.perf_counter()
                for _ in range(case.steps):
                    next(loop)
                synchronize(device)
                tokens = case.steps * case.batch * case.model.block_size
                found.append(tokens / (time.perf_counter() - start))
    return [statistics.median(found) for found in speeds]


def attention(job: Job) -> None:
    """Record ms and TFLOP/s of causal attention, forward and backward, by backend."""
    device = alone(job.device).device
    B, H, T, D = job.scale.attention
    qkv = torch.randn(B, T, 3, H, D, device=device, dtype=torch.bfloat16)
    q, k, v = (part.detach().requires_grad_() for part in qkv.permute(2, 0, 3, 1, 4))
    dy = torch.randn(B, T, H, D, device=device, dtype=torch.bfloat16).transpose(1, 2)
    # Four products of 2 B H T^2 D forward and backward, and the scores once more, of which a causal
    # mask leaves half: 3.5 times the two forward ones (Dao 2023).
    flops = 3.5 * 4 * B * H * T * T * D / 2

    def run() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(dy)
        q.grad = k.grad = v.grad = None

    # Of a CPU's two, flash is another one than a GPU's.
    for name in [*BACKENDS, "fa3"] if device.type == "cuda" else ("flash", "math"):
        details = {"backend": name, "B": B, "H": H, "T": T, "D": D}
        try:
            with backend(name):
                seconds = seconds_of(run, device, times=20)
        except (RuntimeError, ImportError, ValueError) as error:
            # A backend that this GPU or this build does not have.
            note = str(error).splitlines()[0][:100]
            job.record(f"attention, {name}", None, "ms", details | {"note": note})
            continue
        details["TFLOP/s"] = round(flops / seconds / 1e12, 2)
        job.record(f"attention, {name}", 1e3 * seconds, "ms", details)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Compute attention by one backend only; raises ImportError where there is no FA3."""
    if name != "fa3":
        with sdpa_kernel(BACKENDS[name]):
            yield
        return
    torch.nn.attention.activate_flash_attention_impl("FA3")
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            yield
    finally:
        torch.nn.attention.restore_flash_attention_impl()


def losses(job: Job) -> None:
    """Record ms and peak memory of the loss, forward and backward, in every way it can be had."""
    device, model = alone(job.device).device, job.scale.model
    x = torch.randn(job.scale.loss_rows, model.n_embd, device=device, requires_grad=True)
    weight = (0.02 * torch.randn(model.padded_vocab_size, model.n_embd, device=device)).detach()
    weight.requires_grad_()
    targets = torch.randint(model.vocab_size, (len(x),), device=device)
    for name, loss in ways(model.vocab_size, "on" in job.compile_modes).items():

        def run(loss: Callable[..., Tensor] = loss) -> None:
            with autocast(device, torch.bfloat16):
                value = loss(x, weight, targets)
            value.backward()
            x.grad = weight.grad = None

        details = {"way": name, "rows": len(x)}
        before = begin_memory(device)
        try:
            seconds = seconds_of(run, device, job.scale.steps)
        except RuntimeError as error:
            note = str(error).splitlines()[0][:100]
            job.record(f"loss, {name}", None, "ms", details | {"note": note})
            continue
        details["peak GB"] = round((peak_memory(device) - before) / 1e9, 3)
        job.record(f"loss, {name}", 1e3 * seconds, "ms", details)
        free_memory(device)


def ways(vocab_size: int, compiles: bool) -> dict[str, Callable[..., Tensor]]:
    """Return functions of (x, weight, targets) that compute the mean cross-entropy, by name."""

    def ours(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(x, weight, targets, vocab_size)[0]

    def whole(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight)[:, :vocab_size].float(), targets)

    found = {"ours, eager": ours, "whole logits, eager": whole}
    if compiles:
        found |= {
            "ours, compiled": torch.compile(ours, dynamic=False),
            "whole logits, compiled": torch.compile(whole, dynamic=False),
        }
    if hasattr(F, "linear_cross_entropy"):

        def fused(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            dtype = torch.get_autocast_dtype(x.device.type)
            return F.linear_cross_entropy(x.to(dtype), weight[:vocab_size].to(dtype), targets)

        found["F.linear_cross_entropy"] = fused
    return found


def host_reads(job: Job) -> None:
    """Record tokens/s of a loop that reads every loss back at once, or one step late.

    A program that reads a loss waits for the GPU, which then waits for the program; one step
    later the loss is long there.
    """
    device, scale = alone(job.device).device, job.scale
    for batch in sorted({min(scale.micro_batches), scale.ladder_batch}):
        step = plain_step(frozenset(RUNGS) - {"compile"}, scale.model, batch, device)
        for late in (False, True):
            seconds = seconds_of(reading(step, late), device, 2 * scale.steps)
            details = {"micro-batch": batch, "read": "one step late" if late else "at once"}
            name = f"micro-batch {batch}, losses read {details['read']}"
            job.record(name, batch * scale.model.block_size / seconds, "tokens/s", details)
        free_memory(device)


def reading(step: Callable[[], Tensor], late: bool) -> Callable[[], float]:
    """Return what makes a step and reads its loss, or the loss of the one before."""
    waiting = deque([step()] if late else [])

    def run() -> float:
        waiting.append(step())
        return waiting.popleft().item()

    return run
