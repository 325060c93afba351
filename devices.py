"""Devices: where we compute, in which arithmetic, and how fast the maker says that is."""

import os
from pathlib import Path

import torch

from config import UserError
from hardware import find_gpu


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
    """Return the dtype of matrix products that a config names.

    auto is bfloat16 where the processor computes in it; else float16 on CUDA, whose older matrix
    units have that, and float32 elsewhere.
    """
    if name == "auto":
        if _has_bfloat16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return False
    # AVX512-BF16, AMX and Arm's bf16 each show up here; other systems than Linux say nothing.
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "bf16" in cpuinfo.read_text(errors="replace")


def share_cores() -> None:
    """Give each of several processes on a CPU its share of the cores.

    torchrun gives them one thread each, however many cores there are, unless OMP_NUM_THREADS is
    set; when that is more than 1, a person has chosen.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if processes > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(_cores() // processes, 1))


def _cores() -> int:
    """Return the cores that this process may use; two threads of one core count once."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    simultaneous = Path("/sys/devices/system/cpu/smt/active")
    doubled = simultaneous.exists() and simultaneous.read_text().strip() == "1"
    return max(count // 2, 1) if doubled else count


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return the context in which matrix products are computed in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def peak_flops(device: torch.device) -> float | None:
    """Return the peak in FLOP/s that the device's maker states, or None where it is not known."""
    if device.type != "cuda":
        return None
    gpu = find_gpu(torch.cuda.get_device_name(device))
    return gpu.flops if gpu else None


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
