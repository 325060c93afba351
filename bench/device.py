"""What a benchmark asks of the device it runs on, and the only place here that calls torch.cuda."""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.processes import peak, reset_peak
from bench.record import device_name
from training.distributed import peak_flops, synchronize


def begin_memory(device: torch.device) -> int:
    """Begin to measure the peak anew; returns the bytes in use: of the GPU, or of the process."""
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return reset_peak()


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use since `begin_memory`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak()


def free_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more, compiled code included."""
    # Importing the compiler takes seconds, which is too much for forgetting nothing.
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error is the GPU's that it has no memory left."""
    return isinstance(error, torch.OutOfMemoryError)


def seconds_of(run: Callable[[], Any], device: torch.device, times: int, warm_up: int = 2) -> float:
    """Return the mean seconds of `times` calls, after some that are not counted."""
    for _ in range(warm_up):
        run()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / times


def kernel_seconds(
    run: Callable[[], Any], device: torch.device, times: int
) -> tuple[list[tuple[str, float]], float]:
    """Profile `times` calls; return (name, seconds) of every kernel, and the seconds a call took.

    Both are for one call. On a CPU the operators stand for kernels. The time is that of a stretch
    without the profiler, which slows down what it looks at.
    """
    wall = seconds_of(run, device, times)
    on_gpu = device.type == "cuda"
    with profile(
        activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    ) as profiler:
        for _ in range(times):
            run()
        synchronize(device)
    found = []
    for event in profiler.key_averages():
        if event.is_user_annotation:
            continue
        # Where operators are listed too, they are charged with their kernels' time once more.
        if event.device_type != (DeviceType.CUDA if on_gpu else DeviceType.CPU):
            continue
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        found.append((event.key, spent / 1e6 / times))
    return sorted(found, key=lambda item: -item[1]), wall


def facts(device: torch.device) -> dict[str, Any]:
    """Return what tells one machine from another: names, memory, cores, versions."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    found = {
        "device": device_name(device.type),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory GB": round(pages * page / 1e9, 1),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found |= {
            "GPU memory GB": round(gpu.total_memory / 1e9, 1),
            "multiprocessors": gpu.multi_processor_count,
            "compute capability": f"{gpu.major}.{gpu.minor}",
            "GPUs": torch.cuda.device_count(),
            "CUDA": torch.version.cuda,
            "cuDNN": torch.backends.cudnn.version(),
            **_driver(),
        }
    peak_speed = peak_flops(device)
    if peak_speed:
        found["datasheet TFLOP/s"] = round(peak_speed / 1e12)
    return found


def _driver() -> dict[str, str]:
    """Return what the driver's own program says of the first GPU; nothing where there is none."""
    names = ("driver_version", "power.limit", "clocks.max.sm", "persistence_mode")
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, found.stdout.strip().split(", "), strict=False))
