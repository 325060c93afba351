"""Measurements in processes of their own, on which device, and the most memory they held."""

import contextlib
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from training.distributed import DistInfo

T = TypeVar("T")

STATUS = Path("/proc/self/status")


def alone(device: str) -> "DistInfo":
    """Return what a process by itself is, on the device of a name as in train.device."""
    import torch

    from training.distributed import DistInfo, choose_device

    return choose_device(DistInfo(0, 0, 1, torch.device("cpu")), device)


def in_fresh_process(function: Callable[..., T], *args: Any) -> T:
    """Return what `function` returns in a process that has done nothing else."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def reset_peak() -> int:
    """Begin to measure the peak anew, where the system can; returns the memory in use, bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def peak() -> int:
    """Return the most memory this process has had resident, bytes."""
    return status("VmHWM")


def status(field: str) -> int:
    """Return a figure of the process's memory, bytes; 0 where the system tells none."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(found[0]) if found else 0
