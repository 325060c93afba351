"""Progress bars: for training, for preparing data, and for evaluation."""

import contextlib
import time
from collections.abc import Iterator

from tqdm import tqdm


class PreparationBar(tqdm):
    """Tokens prepared, with rate and time left; `total` may be unknown (None)."""

    def __init__(self, description: str, total: int | None, initial: int = 0, disable=False):
        named = {"desc": description, "total": total, "initial": initial, "disable": disable}
        super().__init__(**named, unit="tok", unit_scale=True, dynamic_ncols=True, mininterval=0.5)


class DownloadBar(tqdm):
    """Bytes fetched of a file, whose size may be unknown (None); seen only if it takes a while."""

    def __init__(self, desc: str, total: int | None, disable: bool = False):
        super().__init__(None, desc, total, False, disable=disable, unit="B", unit_scale=1, delay=1)


class EvaluationBar(tqdm):
    """Examples or tokens scored, a second too; disappears when done."""

    def __init__(self, desc: str, total: int, unit: str, disable: bool = False):
        super().__init__(None, desc, total, False, disable=disable, unit=unit, dynamic_ncols=True)


class TrainingBar(tqdm):
    """Steps done, loss, tokens/s, MFU (100% is `peak_speed`, in tokens/s), time left, score."""

    def __init__(self, first: int, total: int, batch_tokens: int, peak_speed=None, disable=False):
        self.steps, self.batch_tokens, self.peak_speed = 0, batch_tokens, peak_speed
        self._counted, self._started, self._score = 0.0, None, ""
        named = {"total": total, "initial": first, "disable": disable, "dynamic_ncols": True}
        named["bar_format"] = "training {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
        super().__init__(**named)

    def start(self) -> None:
        """Start the training clock."""
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the training clock for what is not training and should not slow the figure."""
        self._counted, self._started = self.seconds, None
        yield
        self.start()

    @property
    def seconds(self) -> float:
        """Seconds this process has trained so far."""
        return self._counted + (time.perf_counter() - self._started if self._started else 0.0)

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second over those seconds; 0 before the first step."""
        return self.steps * self.batch_tokens / self.seconds if self.steps else 0.0

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization: the share of the device's peak that the model's FLOPs make."""
        return self.tokens_per_second / self.peak_speed if self.peak_speed else None

    def update(self, loss: float | None = None) -> None:
        """Count one step; with its loss, in nats a token, renew the figures beside the bar."""
        self.steps += 1
        if loss is not None:
            left = (self.total - self.n - 1) * self.seconds / self.steps
            mfu = "" if self.mfu is None else f", MFU {self.mfu:.1%}"
            shown = f"loss {loss:.3f}, {self.format_sizeof(self.tokens_per_second)} tokens/s{mfu}, "
            self.set_postfix_str(f"{shown}{self.format_interval(left)} left{self._score}", False)
        super().update()

    def show_score(self, score: str) -> None:
        """Show a benchmark's latest score beside the bar from the next step on."""
        self._score = f", {score}"

    def write(self, line: str) -> None:
        """Print a line above the bar."""
        if not self.disable:
            with self.external_write_mode():
                print(line, flush=True)
