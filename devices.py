"""Devices: where we compute, in which arithmetic, and how fast the maker says that is."""

from pathlib import Path

import torch

from config import UserError

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


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish, so that a clock read next is true."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
