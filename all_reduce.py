"""The all-reduce check: every process is there, a sum over all is right, and how fast it is."""

import os
import time

import torch
import torch.distributed as dist

from config import UserError
from devices import synchronize
from distributed import World, say, sum_over_ranks


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
        say(world, *(f"rank {rank}: {one}" for rank, one in enumerate(names)))
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
    say(world, f"sum over {world.size} process(es): {total[0]:g}, as it should be")


def _measure(world: World) -> None:
    """Time all-reduces of 4 KB to 256 MB (16 MB on a CPU), bus bandwidth as in NCCL's tests."""
    if world.size == 1:
        say(world, "one process: start several with torchrun --nproc_per_node=N train.py")
        return
    say(world, f"{'message':>10} {'latency':>12} {'bus bandwidth':>15}")
    bandwidth = 0.0
    for exponent in range(12, 29 if world.device.type == "cuda" else 25, 4):
        seconds = _time_all_reduce(world, 2**exponent)
        # Each byte crosses the bus 2 (n - 1) / n times in a ring.
        bandwidth = 2 * (world.size - 1) / world.size * 2**exponent / seconds / 1e9
        size = f"{2 ** (exponent - 10):,} KB"
        say(world, f"{size:>10} {seconds * 1e6:>9,.0f} us {bandwidth:>10.2f} GB/s")
    if world.device.type == "cuda" and bandwidth < 10:
        say(world, f"warning: {bandwidth:.1f} GB/s is slow for GPUs. {P2P_ADVICE}")


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
