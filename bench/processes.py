"""Measurements in processes of their own, and the most memory they held."""

import contextlib
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

STATUS = Path("/proc/self/status")


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
