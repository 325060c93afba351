"""Processes: who we are, what we add up, and a clean end.

One process alone needs no process group; under torchrun there is one per process, NCCL on CUDA and
gloo elsewhere.
"""

import contextlib
import datetime
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import TrainConfig, UserError
from devices import pick_device, share_cores
from roll_call import check_same, fresh_store, rank_and_size, together

# A module, or a function.
Compilable = TypeVar("Compilable", bound=Callable)

LOST = (
    "Another process of this run died, or did not answer for {seconds:g} s, so this one ends too "
    "({reason}); the newest checkpoint is where --resume continues."
)

UNCONNECTED = (
    "The processes of this run cannot connect to each other ({reason}); where nodes have several "
    "networks, {name}_SOCKET_IFNAME in front of the command names the one between them."
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
    rank, size = rank_and_size()
    # A node that lacks a device must not leave the others waiting for it.
    device = together("device", lambda: _own_device(device_name), timeout)
    check_same("kind of device", {"device": device.type}, timeout)
    try:
        if size > 1:
            _connect(rank, size, device, timeout)
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


def _own_device(name: str) -> torch.device:
    """Return this process's device, which becomes the current one where it is a GPU."""
    device = pick_device(name)
    if device.type == "cuda":
        device = torch.device("cuda", _local_rank())
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        share_cores()
    return device


def _connect(rank: int, size: int, device: torch.device, timeout: float) -> None:
    """Make the process group; raises UserError when the processes cannot reach each other."""
    wait = datetime.timedelta(seconds=timeout)
    store = fresh_store(timeout)
    store.set_timeout(wait)
    backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    try:
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=wait, device_id=bound
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(UNCONNECTED.format(reason=reason, name=backend.upper())) from error


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


def compile_module(module: Compilable, mode: str, world: World) -> Compilable:
    """Return a module or function compiled if `mode` (auto, on, off) says so and it can be."""
    if mode == "off" or (mode == "auto" and world.device.type != "cuda"):
        return module
    if not _has_compiler(world.device):
        say(
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


def say(world: World, *lines: str) -> None:
    """Print lines, on one process."""
    if world.is_main:
        print(*lines, sep="\n", flush=True)
