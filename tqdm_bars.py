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


class DownloadBar(tqdm):
    """Bytes fetched of a file, whose size may be unknown (None); seen only if it takes a while."""

    def __init__(self, description: str, total: int | None, disable: bool = False):
        super().__init__(
            desc=description,
            total=total,
            disable=disable,
            unit="B",
            unit_scale=True,
            leave=False,
            dynamic_ncols=True,
            delay=0.5,
        )

    def place(self, done: int, total: int | None) -> None:
        """Count on from `done` bytes of `total`, as when a download starts or starts over."""
        self.n, self.last_print_n, self.total = done, done, total


class EvaluationBar(tqdm):
    """Examples or windows scored, a second too; disappears when done."""

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
    """Updates done, with loss, tokens per second, MFU where the peak is known, time left, score.

    The clock runs from `start` on, except inside `paused`; one process only draws the bar.
    """

    def __init__(
        self,
        first: int,
        total: int,
        tokens_per_update: int,
        peak_speed: float | None = None,
        disable: bool = False,
    ):
        """Begin at update `first` of `total`; `peak_speed` is what 100% MFU would be, tokens/s."""
        self._updates = 0
        self._tokens_per_update = tokens_per_update
        self._peak_speed = peak_speed
        self._counted = 0.0
        self._started: float | None = None
        self._score = ""
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

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization: the share of the device's peak that the model's FLOPs make."""
        return self.tokens_per_second / self._peak_speed if self._peak_speed else None

    def update(self, loss: float | None = None) -> None:
        """Count one update; with its loss, in nats a token, renew the figures beside the bar."""
        self._updates += 1
        if loss is not None:
            left = (self._bar.total - self._bar.n - 1) * self.seconds / self._updates
            shown = [f"loss {loss:.3f}", f"{tqdm.format_sizeof(self.tokens_per_second)} tokens/s"]
            shown += [f"MFU {self.mfu:.1%}"] if self.mfu is not None else []
            shown += [f"{tqdm.format_interval(left)} left"]
            shown += [self._score] if self._score else []
            self._bar.set_postfix_str(", ".join(shown), refresh=False)
        self._bar.update()

    def show_score(self, score: str) -> None:
        """Show a benchmark's latest score beside the bar from the next update on."""
        self._score = score

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        if not self._bar.disable:
            self._bar.write(line, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()
