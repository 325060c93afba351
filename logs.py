"""The written record of a run: config.json, environment.json, metrics.jsonl, samples.md.

On resume, whatever was recorded after the resumed step is dropped before anything is appended, so
the record is that of one uninterrupted run.
"""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from config import Config, UserError
from config_file import from_json, to_json
from files import write_atomically

METRICS = "metrics.jsonl"
SAMPLES = "samples.md"
PACKAGES = ("torch", "numpy", "tiktoken", "safetensors")


def run_directory(run: str, runs_dir: str = "runs") -> Path:
    """Return the directory of a run given by path or by name; raises UserError if there is none."""
    for path in (Path(run), Path(runs_dir) / run):
        if (path / "config.json").is_file():
            return path
    raise UserError(
        f"There is no run '{run}': neither a run directory nor a name under {runs_dir}/."
    )


def read_config(run: Path) -> Config:
    """Read a run's config.json; raises UserError when it is missing or damaged."""
    path = run / "config.json"
    try:
        return from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from error


def create_run(run: Path, config: Config) -> None:
    """Make a new run directory with its config.json; raises UserError when it cannot be written.

    It appears by a rename, so that one without its config never stands in the way of the name.
    """
    temporary = run.with_name(f".{run.name}.tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        write_atomically(temporary / "config.json", to_json(config).encode())
        os.replace(temporary, run)
    except UserError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"The run directory {run} cannot be made ({error.strerror}).") from error


def write_environment(run: Path, step: int, facts: dict[str, Any]) -> None:
    """Record versions, command line, git commit, and `facts` of the process (device, ranks)."""
    environment = {
        "started_at_step": step,
        "command": shlex.join(sys.argv),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        **facts,
    }
    write_atomically(run / "environment.json", (json.dumps(environment, indent=2) + "\n").encode())


def _git_commit() -> str | None:
    """Return this source tree's commit, marked when files differ from it; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        result = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def append_metrics(run: Path, line: dict[str, Any]) -> None:
    """Add one JSON object to metrics.jsonl; raises UserError when the disk is full."""
    _append(run / METRICS, json.dumps(line) + "\n")


def append_samples(run: Path, step: int, prompts: list[str], texts: list[str]) -> None:
    """Add what the model wrote at `step` to samples.md."""
    parts = [f"## Step {step}\n"]
    for prompt, text in zip(prompts, texts, strict=True):
        # An indented block shows the text as it is, whatever Markdown it contains.
        block = (prompt + text).replace("\n", "\n    ")
        parts.append(f"**{prompt}** ...\n\n    {block}\n")
    _append(run / SAMPLES, "\n".join(parts) + "\n")


def rewind(run: Path, step: int, measured: bool = True) -> None:
    """Drop what was recorded after `step`, and what was cut off in writing.

    With `measured` false, the measurements at `step` go too, since they will be made again.
    """
    last_measured = step if measured else step - 1
    metrics, samples = run / METRICS, run / SAMPLES
    if metrics.exists():
        lines = metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if _belongs(line, step, last_measured)]
        write_atomically(metrics, "".join(kept).encode())
    if samples.exists():
        # A text may hold characters that would be read as ends of lines.
        text = samples.read_bytes().decode("utf-8", errors="replace")
        # A heading that was cut off could be taken for that of an earlier step.
        text = re.sub(r"(?m)^#.*\Z", "", text)
        sections = re.split(r"(?m)^(?=## Step \d+$)", text)
        kept = [s for s in sections if s and int(s.split(None, 3)[2]) <= last_measured]
        write_atomically(samples, "".join(kept).encode())


def _belongs(line: str, step: int, last_measured: int) -> bool:
    """Say whether a metric line is whole, and not later than it may be."""
    try:
        record = json.loads(line)
        last = step if record["kind"] == "train" else last_measured
        return line.endswith("\n") and float(record["step"]) <= last
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def _append(path: Path, text: str) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror}); the checkpoints are intact, so "
            f"`python main.py --resume {path.parent.name}` continues once there is room."
        ) from error
