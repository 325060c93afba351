"""Progress bars: for training, for preparing data, and for evaluation.

The training bar counts tokens per second and time left over training time alone: validation,
sampling and checkpoints take their time, but they do not slow the figure down.
"""

import contextlib
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm


class PreparationBar(tqdm):
    """Tokens prepared, with rate and time left; `total` may be unknown (None)."""

    def __init__(
        self, description: str, total: int | None, initial: int = 0, disable: bool = False
    ):
        super().__init__(
            desc=description,
            total=total,
            initial=initial,
            disable=disable,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            smoothing=0.1,
            mininterval=0.5,
        )


class EvaluationBar(tqdm):
    """Examples or windows scored; disappears when done."""

    def __init__(self, description: str, total: int, unit: str, disable: bool = False):
        super().__init__(
            desc=description,
            total=total,
            unit=unit,
            leave=False,
            disable=disable,
            dynamic_ncols=True,
        )


class TrainingBar:
    """Updates done, with loss, tokens per second, MFU where the peak is known, and time left.

    The clock runs from `start` on, except inside `paused`; one process only draws the bar.
    """

    def __init__(self, first: int, total: int, tokens_per_update: int, disable: bool = False):
        """Begin at update `first` of `total`."""
        self._updates = 0
        self._tokens_per_update = tokens_per_update
        self._counted = 0.0
        self._started: float | None = None
        self._bar = tqdm(
            desc="training",
            total=total,
            initial=first,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            disable=disable,
        )

    def start(self) -> None:
        """Start the training clock."""
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the training clock for something that is not training."""
        self._counted, self._started = self.seconds, None
        try:
            yield
        finally:
            self.start()

    @property
    def seconds(self) -> float:
        """Seconds this process has trained so far."""
        running = 0.0 if self._started is None else time.perf_counter() - self._started
        return self._counted + running

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second over those seconds; 0 before the first update."""
        tokens = self._updates * self._tokens_per_update
        return tokens / self.seconds if tokens else 0.0

    def update(self) -> None:
        """Count one update."""
        self._updates += 1
        self._bar.update()

    def show(self, loss: float, mfu: float | None) -> None:
        """Refresh the figures beside the bar; the loss is in nats a token."""
        left = (self._bar.total - self._bar.n) * self.seconds / max(self._updates, 1)
        shown = [f"loss {loss:.3f}", f"{tqdm.format_sizeof(self.tokens_per_second)} tokens/s"]
        shown += [f"MFU {mfu:.1%}"] if mfu is not None else []
        shown += [f"{tqdm.format_interval(left)} left"]
        self._bar.set_postfix_str(", ".join(shown))

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        if not self._bar.disable:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
