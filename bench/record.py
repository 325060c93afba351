"""One benchmark result: a value, an honest plain reference from the same run, and their ratio."""

import importlib.metadata
import json
import platform
import statistics
import subprocess
from pathlib import Path


def report(name: str, unit: str, values: list[float], references: list[float]) -> None:
    """Print the medians of interleaved measurements and their ratio as one JSON line."""
    value, reference = statistics.median(values), statistics.median(references)
    line = {
        "name": name,
        "value": _rounded(value),
        "unit": unit,
        "reference": _rounded(reference),
        "ratio": round(value / reference, 3),
        "device": _device(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "numpy", "tiktoken")},
        },
        "commit": _commit(),
    }
    print(json.dumps(line), flush=True)


def _rounded(value: float) -> float:
    """Return a value without figures that say nothing."""
    return round(value) if abs(value) >= 1000 else float(f"{value:.4g}")


def _device() -> str:
    """Return the processor's name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)}x {names[0]}" if names else platform.machine()


def _commit() -> str | None:
    result = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None
