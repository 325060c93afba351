"""The preflight: does this machine, or do these machines together, train at all?

torchrun --standalone --nproc_per_node=8 train.py
"""

import os
import socket
import time

import torch
import torch.distributed as dist

from config import Config, ModelConfig, TrainConfig, UserError
from modern import build_model
from training.distributed import (
    DistInfo,
    all_gather,
    all_reduce_any,
    all_reduce_sum,
    autocast,
    pick_dtype,
    print0,
    synchronize,
    wrap_ddp,
)
from training.optim import build_optimizers

P2P_ADVICE = (
    "On GPUs without NVLink, peer-to-peer copies are a common cause: "
    "try again with NCCL_P2P_DISABLE=1 in front of the command."
)
TINY = ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=256)


def check(info: DistInfo, config: Config | None = None) -> None:
    """Print a line for each thing that training needs; raises UserError, with advice, without one.

    Devices and dtype, the all-reduce, a training step of a tiny model, and the compiler.
    """
    config = config or Config()
    dtype = pick_dtype(config.train.dtype, info.device)
    try:
        _print_devices(info, dtype)
        _check_all_reduce(info)
        _check_step(info, config, dtype)
        _check_compiler(info, config.train)
    except (RuntimeError, dist.DistError) as error:
        reason = str(error).splitlines()[0]
        advice = P2P_ADVICE if info.world_size > 1 else "See that nothing else uses the device."
        raise UserError(f"This machine cannot train ({reason}). {advice}") from error
    print0("all is well")


def _print_devices(info: DistInfo, dtype: torch.dtype) -> None:
    """Print every rank's device, where it is, and its dtype."""
    name, on_gpu = str(info.device), info.device.type == "cuda"
    if on_gpu:
        gpu = torch.cuda.get_device_properties(info.device)
        name += f" {gpu.name}, {gpu.total_memory / 1e9:.0f} GB"
    has_bfloat16 = pick_dtype("auto", info.device) == torch.bfloat16
    name += f", {'has' if has_bfloat16 else 'no'} bfloat16 units"
    name += f", computes in {str(dtype).removeprefix('torch.')}"
    names = [f"{name} ({socket.gethostname()}, process {os.getpid()})"]
    if info.world_size > 1:
        names, mine = [""] * info.world_size, names[0]
        dist.all_gather_object(names, mine)
    print0(*(f"rank {rank}: {each}" for rank, each in enumerate(names)))


def _check_all_reduce(info: DistInfo) -> None:
    """Add up over all ranks, and print latency and bus bandwidth as in NCCL's own tests."""
    world_size, on_gpu = info.world_size, info.device.type == "cuda"
    if world_size == 1:
        print0("all-reduce: one process; torchrun --nproc_per_node=N train.py starts several")
        return
    total = all_reduce_sum(torch.full((1000,), info.rank + 1.0, device=info.device))
    expected = world_size * (world_size + 1) / 2
    if not torch.equal(total, torch.full_like(total, expected)):
        raise UserError(f"The all-reduce gave {total[0]:g} instead of {expected:g}. {P2P_ADVICE}")
    latency = _time_all_reduce(info, 2**12)
    size = 2**28 if on_gpu else 2**22
    # Each byte crosses the bus 2 (n - 1) / n times in a ring.
    bandwidth = 2 * (world_size - 1) / world_size * size / _time_all_reduce(info, size) / 1e9
    print0(
        f"all-reduce: the sum over {world_size} processes is right; 4 KB take "
        f"{latency * 1e6:,.0f} us, {size >> 20} MB have {bandwidth:.2f} GB/s of bus bandwidth"
    )
    if on_gpu and bandwidth < 10:
        print0(f"warning: {bandwidth:.1f} GB/s is slow for GPUs. {P2P_ADVICE}")


def _time_all_reduce(info: DistInfo, size: int, repeats: int = 10) -> float:
    """Return the seconds of an all-reduce of `size` bytes."""
    message = torch.zeros(size // 4, device=info.device)
    for repeat in range(3 + repeats):
        if repeat == 3:
            synchronize(info.device)
            started = time.perf_counter()
        dist.all_reduce(message)
    synchronize(info.device)
    return (time.perf_counter() - started) / repeats


def _check_step(info: DistInfo, config: Config, dtype: torch.dtype) -> None:
    """Train a tiny model for a step, through DDP, and compare the ranks' weights."""
    torch.manual_seed(0)
    model = build_model(TINY).to(info.device)
    forward, optimizers = wrap_ddp(model, info), build_optimizers(model, config.optim, dtype)
    torch.manual_seed(info.rank)
    tokens = torch.randint(TINY.vocab_size, (4, TINY.block_size + 1)).to(info.device)
    with autocast(info.device, dtype):
        _, loss = forward(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    weights = all_gather(torch.cat([p.detach().flatten() for p in model.parameters()]))
    if not weights.isfinite().all() or not loss.isfinite():
        raise UserError(f"A training step in {dtype} gave numbers that are not finite.")
    if not torch.equal(weights, weights[:1].expand_as(weights)):
        raise UserError(f"After a training step the processes' weights differ. {P2P_ADVICE}")
    mean = all_reduce_sum(loss.detach()) / info.world_size
    print0(f"training step: loss {mean:.3f}, the same weights on {info.world_size} process(es)")


def _check_compiler(info: DistInfo, train: TrainConfig) -> None:
    """Compile a small function where training would compile the model."""
    if train.compile == "off" or (train.compile == "auto" and info.device.type != "cuda"):
        print0(f"torch.compile: not used ({info.device.type}, --train.compile {train.compile})")
        return
    reason, started = "", time.perf_counter()
    try:
        x = torch.randn(64, 64, device=info.device)
        torch.compile(lambda x: (x.square() + 1).sum(), dynamic=False)(x)
        synchronize(info.device)
    # Whatever is missing, a C compiler, Triton or a header, has an error of its own.
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    # A rank that fails does not leave the others waiting in the training step.
    if all_reduce_any(bool(reason)):
        raise UserError(
            f"torch.compile does not work here ({reason or 'on another process'}): install a C "
            "compiler (gcc, g++) and Triton, or train without it by --train.compile off."
        )
    print0(f"torch.compile: works ({time.perf_counter() - started:.1f} s for a small function)")
