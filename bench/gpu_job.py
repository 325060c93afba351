"""What every section of `bench.gpu` is told, how large it measures, and where its results go."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.record import result
from config import ModelConfig


@dataclass(frozen=True)
class Scale:
    """How large things are: on a GPU, or in a test."""

    model: ModelConfig
    # Sequences in a micro-batch: where claims are made, and those of the sweep, by their value.
    batch: int
    micro_batches: tuple[int, ...]
    ladder_batch: int
    # Batch, heads, tokens, head size.
    attention: tuple[int, int, int, int]
    loss_rows: int
    warm_up: int
    steps: int
    # Of HellaSwag, or made up.
    examples: int
    sample_rows: tuple[int, ...]
    sample_tokens: int
    # Seconds of training, and sequences in one of its steps.
    training_seconds: float
    training_batch: int


FULL = Scale(
    model=ModelConfig(),
    batch=64,
    micro_batches=(64, 16, 128, 32, 8, 4),
    ladder_batch=16,
    attention=(16, 12, 1024, 64),
    loss_rows=32_768,
    warm_up=3,
    steps=10,
    examples=10_042,
    sample_rows=(1, 8, 64),
    sample_tokens=256,
    training_seconds=120.0,
    training_batch=64,
)
TINY = Scale(
    model=ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32),
    batch=4,
    micro_batches=(4, 2),
    ladder_batch=2,
    attention=(2, 2, 16, 8),
    loss_rows=64,
    warm_up=1,
    steps=2,
    examples=8,
    sample_rows=(1, 2),
    sample_tokens=4,
    training_seconds=0.0,
    training_batch=4,
)


@dataclass(frozen=True)
class Job:
    """One section's part of a run."""

    section: str
    scale: Scale
    device: str
    # Directory of token shards.
    data: str
    # JSON lines, to which every section adds its own.
    results: Path
    # When the section has to be done, by `time.time`.
    deadline: float

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    @property
    def compile_modes(self) -> tuple[str, ...]:
        """With and without torch.compile; on a CPU, where it takes long, only without."""
        return ("off",) if self.device == "cpu" else ("on", "off")

    def record(
        self,
        name: str,
        value: float | None,
        unit: str,
        details: dict[str, Any],
        reference: float | None = None,
    ) -> None:
        """Write a result down at once, so that whatever comes after cannot lose it."""
        line = result(name, unit, value, reference, self.device)
        line = {"section": self.section, **line, "details": details}
        with open(self.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def fail(self, reason: str) -> None:
        """Write down that the section, or what is left of it, failed."""
        self.record(self.section, None, "", {"failed": reason})


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a results file, without one that was cut off in writing."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
