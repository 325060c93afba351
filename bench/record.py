"""One benchmark result: a value, an honest plain reference from the same run, and their ratio."""

import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

# Whichever of these are installed had a part in a result, or may have had.
PACKAGES = ("torch", "numpy", "tiktoken", "transformers", "triton")


def report(
    name: str, unit: str, values: list[float], references: list[float], device: str = "auto"
) -> None:
    """Print the medians of interleaved measurements and their ratio as one JSON line.

    `device` is where they were made, as on the command line: auto, cpu, cuda or mps.
    """
    value, reference = statistics.median(values), statistics.median(references)
    print(json.dumps(result(name, unit, value, reference, device)), flush=True)


def result(
    name: str, unit: str, value: float | None, reference: float | None = None, device: str = "auto"
) -> dict[str, Any]:
    """Return what a line says: the figures, their ratio, and what made them."""
    return {
        "name": name,
        "value": _rounded(value),
        "unit": unit,
        "reference": _rounded(reference),
        "ratio": round(value / reference, 3) if value and reference else None,
        "device": device_name(device),
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
    }


def device_name(device: str = "auto") -> str:
    """Return the processor's name where the system tells it, after the GPU's if that computes."""
    torch = sys.modules.get("torch")
    if device in ("auto", "cuda") and torch is not None and torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {_processor()}"
    return _processor()


def _rounded(value: float | None) -> float | None:
    """Return a value without figures that say nothing."""
    if value is None:
        return None
    return round(value) if abs(value) >= 1000 else float(f"{value:.4g}")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)}x {names[0]}" if names else platform.machine()


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str | None:
    """Return this source tree's commit, marked when files differ from it; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return found.stdout.strip() or None
