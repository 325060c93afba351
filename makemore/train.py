"""One rung: optimizer steps, evaluations, checkpoints.

    train(data, settings, directory) -> Result

The directory holds settings.json, and checkpoint.safetensors with weights, moments and record.
Every evaluation ends with a checkpoint. Batches, learning rate and dropout noise are functions of
(seed, step), so the same command continues a run, and ends it with the same bits as if nothing had
happened. A finished run is read, not trained.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from tqdm import tqdm

from config import OptimConfig, UserError
from loss import IGNORE_INDEX
from makemore.data import Data, batch_at, examples
from makemore.rungs import Settings, build, differences, parameter_count
from training.optim import schedule
from utils import locked, write_atomically

EVALUATIONS = 20
RATIOS = 100
# Characters that an evaluation on the way reads of each split, and the one at the end.
QUICK, WHOLE = 25_000, 500_000
SCHEDULE = OptimConfig(warmup_frac=0.05, schedule="cosine", final_lr_frac=0.02)
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Record:
    """What a run has measured so far."""

    seconds: float = 0.0
    # Of each evaluation: step, seconds, training loss, validation loss, in nats a character.
    curve: list[list[float]] = field(default_factory=list)
    # Of each matrix: step, and log10 of what that step changes, relative to what is there.
    ratios: dict[str, list[list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A trained rung; `finished` is False where it was asked to stop."""

    settings: Settings
    model: nn.Module
    record: Record
    finished: bool

    @property
    def parameters(self) -> int:
        """How many numbers were learnt or counted."""
        return parameter_count(self.model)

    @property
    def losses(self) -> tuple[float, float]:
        """Training and validation loss of the last evaluation, nats a character."""
        _, _, train_loss, val_loss = self.record.curve[-1]
        return train_loss, val_loss


def train(
    data: Data,
    settings: Settings,
    directory: Path,
    asked: Callable[[], bool] | None = None,
    quiet: bool = False,
) -> Result:
    """Train a rung, or go on with it, or read it if it is finished.

    It ends after the step in hand when `asked()` is true. Raises UserError when the directory
    holds a run of other settings, or is not writable, or the loss is no longer finite.
    """
    _claim(directory, settings)
    with locked(directory / ".lock"):
        model = build(settings, data.vocab_size)
        if settings.rung == "bigram":
            return _count(data, settings, model)
        weights = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [
            {"params": weights, "weight_decay": settings.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, settings.lr, (0.9, 0.99), fused=True)
        path = directory / "checkpoint.safetensors"
        step, record = _load(path, model, optimizer) if path.exists() else (0, Record())
        run = _Run(data, settings, model, optimizer, path, record)
        return Result(settings, model, record, run.loop(step, asked, quiet))


def _claim(directory: Path, settings: Settings) -> None:
    """Make a run's directory, or find that it holds a run of the same settings."""
    path = directory / "settings.json"
    wanted = json.dumps(dataclasses.asdict(settings), indent=1) + "\n"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be used ({error}); give another --name.") from error
    if found is None:
        write_atomically(path, wanted.encode())
    elif changed := differences(found, settings):
        raise UserError(
            f"{directory} holds a run of other settings ({'; '.join(changed)}); give another "
            "--name, or remove it."
        )


def _count(data: Data, settings: Settings, model: nn.Module) -> Result:
    """Return the bigram, which takes less time to count than to read from the disk."""
    started = time.perf_counter()
    model.fit(examples(data, data.train, settings.context, settings.context, data.train.numel()))
    seconds = time.perf_counter() - started
    losses = losses_of(data, settings, model, WHOLE)
    return Result(settings, model, Record(seconds, [[1, seconds, *losses]]), True)


@dataclass
class _Run:
    """What the steps of one run share."""

    data: Data
    settings: Settings
    model: nn.Module
    optimizer: torch.optim.Optimizer
    path: Path
    record: Record

    def loop(self, step: int, asked: Callable[[], bool] | None, quiet: bool) -> bool:
        """Do the steps after `step`; return whether the last one has been done."""
        total, rung = self.settings.steps, self.settings.rung
        interval = math.ceil(total / EVALUATIONS)
        before, started = self.record.seconds, time.perf_counter()
        with tqdm(desc=rung, total=total, initial=step, dynamic_ncols=True, disable=quiet) as bar:
            while step < total:
                step += 1
                self.one_step(step)
                stopping = asked is not None and asked()
                if step % interval == 0 or step == total:
                    losses = losses_of(
                        self.data, self.settings, self.model, WHOLE if step == total else QUICK
                    )
                    seconds = before + time.perf_counter() - started
                    self.record.curve.append([step, seconds, *losses])
                    bar.set_postfix_str(f"val {losses[1]:.3f}", refresh=False)
                    _check_finite(losses, step)
                if step % interval == 0 or step == total or stopping:
                    self.record.seconds = before + time.perf_counter() - started
                    _save(self.path, step, self.model, self.optimizer, self.record)
                bar.update()
                if stopping:
                    break
        return step == total

    def one_step(self, step: int) -> None:
        """Do optimizer step `step`, counted from 1."""
        s = self.settings
        # Dropout noise is a function of the step as well.
        torch.manual_seed(s.seed + step)
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * schedule(step, s.steps, SCHEDULE)
        self.model.train()
        _, loss = self.model(*batch_at(self.data, s.batch, s.context, s.seed, step))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        watched = step % math.ceil(s.steps / RATIOS) == 0
        before = _matrices(self.model) if watched else {}
        self.optimizer.step()
        for name, after in (_matrices(self.model) if watched else {}).items():
            ratio = (after - before[name]).std() / after.std().clamp(min=1e-12)
            known = self.record.ratios.setdefault(name, [])
            known.append([step, math.log10(max(float(ratio), 1e-12))])


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 2}


def _check_finite(losses: tuple[float, float], step: int) -> None:
    if not all(map(math.isfinite, losses)):
        raise UserError(
            f"The loss after step {step} is not finite: the training diverged; try --init scaled "
            "or another --norm, with another --name."
        )


@torch.no_grad()
def losses_of(data: Data, settings: Settings, model: nn.Module, most: int) -> tuple[float, float]:
    """Return training and validation loss, nats a character, over `most` characters of each."""
    model.eval()
    means = []
    for split in (data.train, data.val):
        total = count = 0.0
        for idx, targets in examples(data, split, settings.context, model.block_size, most):
            scored = int((targets != IGNORE_INDEX).sum())
            total += float(model(idx, targets)[1]) * scored
            count += scored
        means.append(total / count)
    return means[0], means[1]


def _save(
    path: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, record: Record
) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": moments[name] for name in MOMENTS}
    facts = {"step": str(step), "record": json.dumps(dataclasses.asdict(record))}
    write_atomically(path, save({k: t.contiguous() for k, t in tensors.items()}, facts))


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, Record]:
    """Put a checkpoint into model and optimizer; return its step and record."""
    try:
        with safe_open(path, "pt") as file:
            facts, names = file.metadata(), file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
        weights = {k.removeprefix("model."): t for k, t in tensors.items() if k[:6] == "model."}
        model.load_state_dict(weights)
        groups = optimizer.state_dict()["param_groups"]
        state = {
            i: {name: tensors[f"optimizer.{i}.{name}"] for name in MOMENTS}
            for group in groups
            for i in group["params"]
        }
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        return int(facts["step"]), Record(**json.loads(facts["record"]))
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(
            f"{path} is damaged ({error}); remove its directory to begin again."
        ) from error
