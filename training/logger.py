"""The record of a run: what it was started with, measured and wrote.

    runs/NAME/  config.json  environment.jsonl  metrics.jsonl  samples.md  sequence_losses.bin

On resume, what was recorded after the resumed step is dropped before anything is appended, so the
record is that of one uninterrupted run.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from config import Config, UserError, to_json
from corpus.shards import find_data
from corpus.tokenizer import TOKENIZER_FILE
from training.trackers import Tracker, open_tracker
from utils import printable, sync_directory, write_atomically

ENVIRONMENT, METRICS, SAMPLES = "environment.jsonl", "metrics.jsonl", "samples.md"
SEQUENCE_LOSSES = "sequence_losses.bin"
# 16 bytes a sequence a step; a sequence's number is its place in the data (fineweb.py).
RECORD = np.dtype([("step", "<i4"), ("sequence", "<i8"), ("loss", "<f4")])
PACKAGES = ("torch", "numpy", "tiktoken", "safetensors")


def create_run(run: Path, config: Config) -> None:
    """Make a new run directory with its config.json, and the data's tokenizer.json if it has one.

    It appears by a rename, so that a directory without a config never takes the name. Raises
    UserError when it cannot be written.
    """
    temporary, tokenizer = run.with_name(f".{run.name}.{secrets.token_hex(4)}.tmp"), None
    with contextlib.suppress(UserError):  # data that is not here is told by who opens it
        tokenizer = find_data(config.data) / TOKENIZER_FILE
    try:
        temporary.mkdir(parents=True)
        write_atomically(temporary / "config.json", to_json(config).encode())
        if tokenizer and tokenizer.is_file():
            write_atomically(temporary / TOKENIZER_FILE, tokenizer.read_bytes())
        os.replace(temporary, run)
        sync_directory(run.parent)
    except OSError as error:
        raise UserError(f"The run directory {run} cannot be made ({error.strerror}).") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def append_environment(run: Path, step: int, facts: dict[str, Any]) -> str:
    """Add a line to environment.jsonl: versions, command line, git commit, and `facts`.

    Returns what differs from the start before: "dtype bfloat16 -> float32, ..."; "" for nothing.
    """
    line = {
        "started_at_step": step,
        "command": shlex.join(sys.argv),
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        **facts,
    }
    path, text = run / ENVIRONMENT, json.dumps(line).encode() + b"\n"
    content = _read(path)
    # What was cut off in writing stays on a line of its own.
    _append(path, b"\n" * bool(content and not content.endswith(b"\n")) + text)
    starts = [found for _, found in _objects(content)] or [{}]
    before, now = (_flat(start) for start in (starts[-1], json.loads(text)))
    told = [name for name in now if name in before and before[name] != now[name]]
    return printable(", ".join(f"{name} {before[name]} -> {now[name]}" for name in told))


def _flat(start: dict[str, Any]) -> dict[str, Any]:
    """Return what may be compared of two starts, versions one by one."""
    versions = start.get("versions")
    flat = {**start, **(versions if isinstance(versions, dict) else {})}
    return {k: v for k, v in flat.items() if k not in ("started_at_step", "command", "versions")}


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


def read_sequence_losses(run: Path) -> np.ndarray:
    """Return what is kept, shape (n,) with fields step, sequence and loss; (0,) for nothing."""
    data = _read(run / SEQUENCE_LOSSES)
    return np.frombuffer(data, RECORD, len(data) // RECORD.itemsize)


class Logger:
    """Appends to the record of a run that stands at `step`; a disabled one writes nothing."""

    def __init__(self, run: Path, config: Config, step: int, enabled: bool = True):
        """Rewind the record to `step`, and open the trackers, whose failures cost a line each."""
        self.run, self.enabled = run, enabled
        self.trackers: list[Tracker] = []
        self.rewind(step)
        for name in dict.fromkeys(config.train.trackers if enabled else ()):
            with self._left_out_if_it_fails(name):
                tracker = open_tracker(name, run, config, step)
                self.trackers.append(tracker)
                for _, line in self._lines():
                    tracker.send(line)

    def log(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl and show it in the trackers; UserError when the disk is full.

        A tracker that fails says so in one line and is left out from there on.
        """
        if not self.enabled:
            return
        _append(self.run / METRICS, json.dumps(line).encode() + b"\n")
        for tracker in list(self.trackers):
            with self._left_out_if_it_fails(tracker.name):
                tracker.send(line)

    def samples(self, step: int, prompts: list[str], texts: list[str]) -> None:
        """Add what the model wrote at `step` to samples.md."""
        parts = [f"## Step {step}\n"]
        for prompt, text in zip(prompts, texts, strict=True):
            # An indented block shows the text as it is, whatever Markdown it contains.
            block = (prompt + text).replace("\n", "\n    ")
            parts.append(f"**{prompt}** ...\n\n    {block}\n")
        if self.enabled:
            # Two empty lines end a section; those of a text are indented.
            _append(self.run / SAMPLES, "\n".join(parts).encode("utf-8", "replace") + b"\n\n")

    def sequence_losses(self, step: int, indices: np.ndarray, losses: np.ndarray) -> None:
        """Add the losses of a step's sequences, in nats a token, to sequence_losses.bin."""
        records = np.empty(len(indices), RECORD)
        records["step"], records["sequence"], records["loss"] = step, indices, losses
        if self.enabled:
            _append(self.run / SEQUENCE_LOSSES, records.tobytes())

    def sync(self) -> None:
        """Make durable what is recorded so far, before a checkpoint that relies on it."""
        for tracker in list(self.trackers):
            with self._left_out_if_it_fails(tracker.name):
                tracker.flush()
        for name in (METRICS, SAMPLES, SEQUENCE_LOSSES):
            if self.enabled and (self.run / name).is_file():
                with _told(self.run / name), open(self.run / name, "ab") as file:
                    os.fsync(file.fileno())

    def recorded(self, step: int) -> set[str]:
        """Return what is recorded of `step`: of "train", "val", "eval/TASK" and "sample"."""
        lines = [line for _, line in self._lines() if line["step"] == step]
        found = {f"eval/{x['task']}" if x["kind"] == "eval" else x["kind"] for x in lines}
        return found | {"sample" for at, _ in self._sections(step) if at == step}

    def rewind(self, step: int) -> None:
        """Drop what was recorded after `step`, and what was cut off in writing."""
        if not self.enabled:
            return
        lines = (raw for raw, line in self._lines() if line["step"] <= step)
        _replace(self.run / METRICS, b"".join(lines))
        _replace(self.run / SAMPLES, b"".join(text for _, text in self._sections(step)))
        steps, path = read_sequence_losses(self.run)["step"], self.run / SEQUENCE_LOSSES
        # A power cut may leave zeros at the end.
        kept = np.append(np.flatnonzero((steps > step) | (steps <= 0)), len(steps))[0]
        if path.exists():
            with _told(path):
                os.truncate(path, int(kept) * RECORD.itemsize)

    def close(self) -> None:
        """Let the trackers finish what they were sent."""
        for tracker in list(self.trackers):
            with self._left_out_if_it_fails(tracker.name):
                tracker.close()
        self.trackers.clear()

    @contextlib.contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, SystemExit) as error:
            reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
            told = f"{name} is left out from here on ({reason}); {METRICS} has everything."
            tqdm.write(printable(told), file=sys.stderr)
            self.trackers = [tracker for tracker in self.trackers if tracker.name != name]

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Return the lines of metrics.jsonl that are metric lines, raw and parsed."""
        lines = _objects(_read(self.run / METRICS))
        lines = [(raw, x) for raw, x in lines if isinstance(x.get("kind"), str)]
        lines = [(raw, x) for raw, x in lines if x["kind"] != "eval" or "task" in x]
        return [(raw, x) for raw, x in lines if type(x.get("step")) is int]

    def _sections(self, step: int) -> list[tuple[int, bytes]]:
        """Return the sections of samples.md up to `step`, each with its step.

        What stands on top of them counts as of step -1. A section of `step` itself may have been
        cut off, and is left out then; earlier ones were synced before the checkpoint.
        """
        # Half a heading at the end, or the zeros that a power cut leaves.
        content = re.sub(rb"(?m)^#[# Step\d]*\Z|\0+\Z", b"", _read(self.run / SAMPLES))
        found = []
        for text in re.split(rb"(?m)^(?=## Step \d{1,15}\r?$)", content):
            heading = re.match(rb"## Step (\d+)\r?\n", text)
            at = int(heading[1]) if heading else -1
            if at < step or (at == step and b"\n\n\n" in text):
                found.append((at, text))
        return found


def _objects(content: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """Return the whole lines of a file that are JSON objects, raw and parsed."""
    found = []
    for raw in content.splitlines(keepends=True):
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(raw)
            if isinstance(line, dict) and raw.endswith(b"\n"):
                found.append((raw, line))
    return found


def _read(path: Path) -> bytes:
    """Return the content of a file, b"" if there is none; raises UserError if it is unreadable."""
    try:
        return path.read_bytes() if path.is_file() else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error


def _replace(path: Path, content: bytes) -> None:
    """Write a file anew where that makes a difference."""
    if content != _read(path):
        write_atomically(path, content)


def _append(path: Path, content: bytes) -> None:
    """Add `content` to a file at once, or nothing of it; raises UserError when the disk is full."""
    with _told(path), open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(end)
            raise


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn a failure to write into a UserError that says how the run goes on."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} could not be written ({error.strerror}); the checkpoints are intact, so "
            f"`python main.py --resume {path.parent.name}` continues once there is room."
        ) from error
