"""torch.distributed: init, shutdown, devices, reductions, DDP, FSDP; for one process nothing."""

import contextlib
import dataclasses
import datetime
import os
import socket
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import recipes
from config import UserError
from modern import build_model
from training.launch import (
    connect,
    end_all_ranks,
    env_number,
    first_line,
    fresh_store,
    start_watching,
)

T = TypeVar("T")

_timeout = 600.0  # seconds a collective waits for its peers; set_timeout sets it


@dataclasses.dataclass(frozen=True)
class DistInfo:
    """Which process this is; rank 0 writes and prints."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextlib.contextmanager
def init_distributed(timeout: float = 600.0) -> Iterator[DistInfo]:
    """Join the processes torchrun started; the device is the CPU until choose_device.

    When a rank fails, its sentence (or traceback) is printed and all ranks end within seconds. The
    group is destroyed on success only: under NCCL that waits for peers, who may wait for us.
    """
    global _timeout
    _timeout = timeout
    rank, world_size = env_number("RANK", 0), env_number("WORLD_SIZE", 1)
    info = DistInfo(rank, env_number("LOCAL_RANK", 0), world_size, torch.device("cpu"))
    if world_size == 1:
        yield info
        return
    store = None
    try:
        store = fresh_store(rank, world_size, timeout)
        stop_watching = start_watching(store, timeout)
        connect(store, rank, world_size, timeout)
        yield info
        # Whoever left first would cut the others' connections.
        barrier()
    except BaseException as error:
        end_all_ranks(error, rank, store, _timeout)
    stop_watching()
    dist.destroy_process_group()


# --- devices ---


def choose_device(info: DistInfo, name: str) -> DistInfo:
    """Return `info` with the device a config names; auto is CUDA, then MPS, then the CPU.

    A GPU becomes the current one. UserError where the device is missing, and where auto finds
    NVIDIA GPUs that this PyTorch cannot use: training would take months on the CPU.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name in ("auto", "cuda") and not has_cuda:
        _require_no_gpus()
    if name == "auto":
        # Gloo has no collectives for MPS.
        name = "cuda" if has_cuda else "mps" if has_mps and info.world_size == 1 else "cpu"
    if not {"cuda": has_cuda, "mps": has_mps, "cpu": True}[name]:
        raise UserError(f"There is no {name} device here; choose auto or cpu instead.")
    if name == "mps" and info.world_size > 1:
        raise UserError("MPS trains in one process; start it without torchrun.")
    device = torch.device(name, info.local_rank) if name == "cuda" else torch.device(name)
    if name == "cuda":
        if info.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"This machine has {torch.cuda.device_count()} GPUs, fewer than the processes "
                "started on it; lower --nproc_per_node."
            )
        torch.cuda.set_device(device)
    elif name == "cpu":
        share_cores()
    first = broadcast(name) if info.world_size > 1 else name
    if name != first:
        raise UserError(
            f"Process {info.rank}, on {socket.gethostname()}, computes on {name} and process 0 on "
            f"{first}; give all nodes the same --train.device."
        )
    return dataclasses.replace(info, device=device)


def _require_no_gpus() -> None:
    """Raise UserError when there are NVIDIA GPUs that this CUDA build of PyTorch cannot use."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if torch.version.cuda is None or hidden or not any(Path("/dev").glob("nvidia[0-9]*")):
        return
    try:
        reason = torch.cuda.init() or "torch.cuda.is_available() is False"
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
    raise UserError(
        f"There are NVIDIA GPUs here, but PyTorch {torch.__version__}, made for CUDA "
        f"{torch.version.cuda}, cannot use them ({reason}); update the driver, install the PyTorch "
        "wheel that fits it, or give --train.device cpu to train on the CPU."
    )


def share_cores() -> None:
    """Give each of several processes on a CPU its share of the cores."""
    # torchrun sets OMP_NUM_THREADS to 1 unless it is set; if it is more, a person has chosen.
    processes = env_number("LOCAL_WORLD_SIZE", 1)
    if processes > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        simultaneous = Path("/sys/devices/system/cpu/smt/active")
        if simultaneous.exists() and simultaneous.read_text().strip() == "1":
            cores //= 2  # two threads of one core count once
        torch.set_num_threads(max(cores // processes, 1))


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products that a config names.

    auto is bfloat16 where the processor computes in it; else float16 on CUDA, float32 elsewhere.
    """
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16
    # AVX512-BF16, AMX and Arm's bf16 each show up here; other systems than Linux say nothing.
    info = Path("/proc/cpuinfo")
    has_bfloat16 = device.type == "cpu" and info.exists() and "bf16" in info.read_text()
    return torch.bfloat16 if has_bfloat16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which matrix products are computed in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_flops(device: torch.device) -> float | None:
    """Return the peak in FLOP/s that the device's maker states, or None where it is not known."""
    gpu = recipes.find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.flops if gpu else None


# --- collectives ---


def set_timeout(seconds: float) -> None:
    """Let collectives wait for their peers this long before they take them for lost."""
    global _timeout
    _timeout = seconds
    setter = getattr(dist.distributed_c10d, "_set_pg_timeout", None)  # not a public name
    if dist.is_initialized() and setter is not None:
        setter(datetime.timedelta(seconds=seconds))


def broadcast(value: T) -> T:
    """Return rank 0's value on every rank."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def on_rank0(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 and return its result on every rank; so is a UserError raised."""
    result = error = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = function()
        except UserError as raised:
            error = raised
    result, error = broadcast((result, error))
    if error is not None:
        raise error
    return result


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place, and return it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def all_reduce_any(flag: bool) -> bool:
    """Say whether `flag` is true on any rank."""
    return all_reduce_sum(torch.tensor(int(flag))).item() > 0


def all_gather(tensor: Tensor) -> Tensor:
    """Return every rank's tensor, all of one shape, stacked: (world size, ...)."""
    if not dist.is_initialized():
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


def barrier() -> None:
    """Wait until every rank has come this far."""
    all_reduce_any(False)


def print0(*lines: str) -> None:
    """Print lines, on rank 0."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*lines, sep="\n", flush=True)


# --- models on several devices ---


def wrap_ddp(model: nn.Module, info: DistInfo) -> nn.Module:
    """Return the model behind DDP, which averages gradients over ranks; itself when alone."""
    if info.world_size == 1:
        return model
    devices = [info.device] if info.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)


def apply_fsdp(model: nn.Module, info: DistInfo) -> None:
    """Shard the model's parameters over all ranks, in place and block by block (ZeRO, FSDP2).

    They become DTensors, split by rows, on the ranks' devices; optimizers are made afterwards. All
    ranks must call `model(...)` equally often. Weights travel in float32 and autocast rounds them
    on arrival, so that the arithmetic is DDP's and a run may change between the two.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # A modern block returns its values as a view, which nobody writes to.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(info.device.type, (info.world_size,))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    # Embeddings, last norm and head stay gathered until the backward pass is done.
    fully_shard(model, mesh=mesh)


@torch.no_grad()
def unsharded_copy(model: nn.Module) -> nn.Module:
    """Return the model itself or, where it is sharded, a plain copy on its device; all call."""
    if not is_sharded(next(model.parameters())):
        return model
    with torch.device("meta"):  # nothing is drawn or computed
        copy = build_model(model.config)
    copy = copy.to_empty(device=to_local(next(model.parameters())).device)
    for mine, theirs in zip(copy.parameters(), model.parameters(), strict=True):
        mine.copy_(full_tensor(theirs))
    return copy.train(model.training)


def is_sharded(tensor: Tensor) -> bool:
    """Say whether a tensor is a DTensor, whose module takes seconds to import."""
    return hasattr(tensor, "full_tensor")


def to_local(tensor: Tensor) -> Tensor:
    """Return this rank's rows of a tensor, or all of one that is not sharded; memory is shared."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor: gathered from all ranks, all of which call this; or itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor
