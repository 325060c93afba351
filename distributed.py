"""Processes and devices: who we are, where we compute, what we add up, and a clean end.

One process alone needs no process group; under torchrun there is one per process, NCCL on CUDA and
gloo elsewhere.
"""

import contextlib
import datetime
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import TrainConfig, UserError

# A module, or a function.
Compilable = TypeVar("Compilable", bound=Callable)

# Dense bfloat16 peaks in TFLOP/s from the makers' data sheets, by a part of the device's name.
PEAK_TFLOPS = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "B200": 2250,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "A10G": 70,
    "4090": 165,
    "3090": 71,
}

LOST = (
    "Another process of this run died, or did not answer for {seconds:g} s, so this one ends too "
    "({reason}); the newest checkpoint is where --resume continues."
)


@dataclass(frozen=True)
class World:
    """One process among `size`; rank 0 is the one that writes and prints."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def join_world(device_name: str, timeout: float = TrainConfig.timeout) -> Iterator[World]:
    """Join the processes torchrun started (or be alone), and leave them cleanly at the end.

    Raises UserError when another one dies, or keeps the others waiting for `timeout` seconds. (NCCL
    says so itself, and ends the process.)
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = pick_device(device_name)
    if device.type == "cuda":
        device = torch.device("cuda", _local_rank())
        torch.cuda.set_device(device)
    if size > 1:
        wait = datetime.timedelta(seconds=timeout)
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=wait, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=wait)
    try:
        yield World(rank, size, device)
        # Whoever leaves first would cut the others' connections.
        barrier()
    except RuntimeError as error:
        if size == 1 or not _is_lost_peer(error):
            raise
        reason = str(error).splitlines()[0]
        raise UserError(LOST.format(seconds=timeout, reason=reason)) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _is_lost_peer(error: RuntimeError) -> bool:
    """Say whether a collective failed; gloo tells so by nothing but its name in the message."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _local_rank() -> int:
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"This machine has {torch.cuda.device_count()} GPUs, fewer than the processes "
            "started on it; lower --nproc_per_node."
        )
    return local_rank


def pick_device(name: str) -> torch.device:
    """Return the device a config names; auto is CUDA, then MPS, then the CPU. Raises UserError."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(device for device, usable in available.items() if usable)
    if not available[name]:
        raise UserError(f"There is no {name} device here; choose auto or cpu instead.")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products; auto is bfloat16 where the processor computes in it."""
    if name == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return False
    # AVX512-BF16, AMX and Arm's bf16 each show up here; other systems than Linux say nothing.
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "bf16" in cpuinfo.read_text(errors="replace")


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which matrix products are computed in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_flops(device: torch.device) -> float | None:
    """Return the device's bfloat16 peak in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)


def compile_module(module: Compilable, mode: str, world: World) -> Compilable:
    """Return a module or function compiled if `mode` (auto, on, off) says so and it can be."""
    if mode == "off" or (mode == "auto" and world.device.type != "cuda"):
        return module
    if not _has_compiler(world.device):
        _say(
            world, "torch.compile needs Triton (CUDA) or g++ (CPU), not found: going on without it."
        )
        return module
    # Shapes are few and fixed wherever something is compiled; one for all shapes would be slower.
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(module, dynamic=False)


def _has_compiler(device: torch.device) -> bool:
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def distribute(module: nn.Module, world: World) -> nn.Module:
    """Return the module behind DDP, which averages gradients over processes, unless alone."""
    if world.size == 1:
        return module
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(module, device_ids=devices, gradient_as_bucket_view=True)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add up a tensor over all processes, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def from_main(number: int, world: World) -> int:
    """Return the main process's `number` on every process."""
    if not dist.is_initialized():
        return number
    tensor = torch.tensor(number, device=world.device)
    dist.broadcast(tensor, src=0)
    return int(tensor)


def gather_over_ranks(tensor: Tensor) -> Tensor:
    """Return every process's tensor, all of one shape, stacked by rank: (world size, ...)."""
    if not dist.is_initialized():
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


def any_over_ranks(flag: bool, world: World) -> bool:
    """Say whether `flag` is true on any process."""
    return sum_over_ranks(torch.tensor(float(flag), device=world.device)).item() > 0


def barrier() -> None:
    """Wait until every process has come this far."""
    if dist.is_initialized():
        dist.barrier()


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def check_all_reduce(world: World) -> None:
    """Print every rank's device, verify a sum over all, and print latency and bus bandwidth by
    size.

    Raises UserError with advice when the sum is wrong or the collective fails.
    """
    name = world.device.type
    if world.device.type == "cuda":
        name = f"{world.device} {torch.cuda.get_device_name(world.device)}"
    try:
        names = [name]
        if world.size > 1:
            names = [""] * world.size
            dist.all_gather_object(names, f"{name} (process {os.getpid()})")
        _say(world, *(f"rank {rank}: {one}" for rank, one in enumerate(names)))
        _verify_sum(world)
        _measure(world)
    except (RuntimeError, dist.DistError) as error:
        raise UserError(
            f"The all-reduce failed ({str(error).splitlines()[0]}). {P2P_ADVICE}"
        ) from error


P2P_ADVICE = (
    "On GPUs without NVLink, peer-to-peer copies are a common cause: "
    "try again with NCCL_P2P_DISABLE=1 in front of the command."
)


def _verify_sum(world: World) -> None:
    total = sum_over_ranks(torch.full((1000,), world.rank + 1.0, device=world.device))
    expected = world.size * (world.size + 1) / 2
    if not torch.equal(total, torch.full_like(total, expected)):
        raise UserError(f"The all-reduce gave {total[0]:g} instead of {expected:g}. {P2P_ADVICE}")
    _say(world, f"sum over {world.size} process(es): {total[0]:g}, as it should be")


def _measure(world: World) -> None:
    """Time all-reduces of 4 KB to 256 MB (16 MB on a CPU), bus bandwidth as in NCCL's tests."""
    if world.size == 1:
        _say(world, "one process: start several with torchrun --nproc_per_node=N train.py")
        return
    _say(world, f"{'message':>10} {'latency':>12} {'bus bandwidth':>15}")
    bandwidth = 0.0
    for exponent in range(12, 29 if world.device.type == "cuda" else 25, 4):
        seconds = _time_all_reduce(world, 2**exponent)
        # Each byte crosses the bus 2 (n - 1) / n times in a ring.
        bandwidth = 2 * (world.size - 1) / world.size * 2**exponent / seconds / 1e9
        size = f"{2 ** (exponent - 10):,} KB"
        _say(world, f"{size:>10} {seconds * 1e6:>9,.0f} us {bandwidth:>10.2f} GB/s")
    if world.device.type == "cuda" and bandwidth < 10:
        _say(world, f"warning: {bandwidth:.1f} GB/s is slow for GPUs. {P2P_ADVICE}")


def _time_all_reduce(world: World, size: int, repeats: int = 10) -> float:
    message = torch.zeros(size // 4, device=world.device)
    for _ in range(3):
        dist.all_reduce(message)
    synchronize(world.device)
    started = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(message)
    synchronize(world.device)
    return (time.perf_counter() - started) / repeats


def _say(world: World, *lines: str) -> None:
    if world.is_main:
        print(*lines, sep="\n", flush=True)
