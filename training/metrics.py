"""Loss and gradient norm of a step, on their way from the devices to the record."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from config import Config, TrainConfig, UserError
from fineweb import sequence_indices
from training.distributed import DistInfo, all_gather, all_reduce_sum
from utils import write_atomically


@dataclass
class StepMetrics:
    """The mean loss over the global batch, requests to stop on any rank, and the gradient norm."""

    step: int
    losses: Tensor  # of this rank's micro-batches, on the device
    sequence_losses: Tensor | None  # (G,) in the order of the global batch, where asked for
    numbers: Tensor  # float32 (3,), on the host once `arrived`
    arrived: torch.cuda.Event | None = None

    @classmethod
    def collect(
        cls,
        step: int,
        losses: list[Tensor],
        norm: Tensor,
        stop_requested: bool,
        info: DistInfo,
        sequence_losses: list[Tensor],
    ) -> "StepMetrics":
        """Average over ranks in one message, and send to the host without waiting for it."""
        stacked = torch.stack(losses)
        # Filled on the device: a number copied there from the host would be waited for.
        request = torch.full((), float(stop_requested), device=stacked.device)
        numbers = torch.stack([stacked.mean(), request, norm])
        all_reduce_sum(numbers[:2])
        numbers[0] /= info.world_size
        gathered = all_gather(torch.cat(sequence_losses)).flatten() if sequence_losses else None
        if stacked.device.type != "cuda":
            return cls(step, stacked, gathered, numbers)
        host = torch.empty(3, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(step, stacked, gathered, host, arrived)

    def read(self) -> tuple[float, float, bool]:
        """Wait for the loss in nats a token, the norm, and whether any rank was asked to stop."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, requests, norm = self.numbers.tolist()
        return loss, norm, requests > 0


def check_finite(
    metrics: StepMetrics, config: Config, run: Path, n_sequences: int, info: DistInfo, scales: bool
) -> None:
    """Raise UserError, and list the step's sequences in non_finite.json, unless all is finite.

    With loss scaling the norm may overflow: that step is left out.
    """
    loss, norm, _ = metrics.read()
    if math.isfinite(loss) and (scales or math.isfinite(norm)):
        return
    indices = sequence_indices(config, metrics.step, n_sequences)
    bad = ~torch.isfinite(all_gather(metrics.losses)).flatten().cpu().numpy()
    suspects = indices.reshape(len(bad), -1)[bad].flatten().tolist() or indices.tolist()
    path = run / "non_finite.json"
    if info.is_main:
        facts = {"step": metrics.step, "loss": str(loss), "grad_norm": str(norm)}
        facts |= {"suspects": suspects, "sequences": indices.tolist()}
        write_atomically(path, json.dumps(facts).encode())
    more = f" and {len(suspects) - 8} more" if len(suspects) > 8 else ""
    raise UserError(
        f"Step {metrics.step} has a loss of {loss:g} and a gradient norm of {norm:g}, from "
        f"sequences {', '.join(map(str, suspects[:8]))}{more} ({path} lists them). No checkpoint "
        "has seen it: --resume continues before it, perhaps with --train.dtype float32; or start "
        "again with a lower --optim.lr."
    )


def build_scaler(
    train: TrainConfig, dtype: torch.dtype, device: torch.device, state: dict | None
) -> torch.amp.GradScaler:
    """Return the loss scaling of float16, whose least number is 6e-8; it does nothing elsewhere."""
    enabled = dtype == torch.float16 and train.loss_scale > 0
    scaler = torch.amp.GradScaler(device.type, init_scale=train.loss_scale or 1.0, enabled=enabled)
    if enabled and state:
        scaler.load_state_dict(state)
    return scaler


def update_scale(scaler: torch.amp.GradScaler) -> None:
    """Halve the loss scale after an overflow, double it in time; raises UserError at the end."""
    if not scaler.is_enabled():
        return
    scaler.update()
    if scaler.get_scale() < 2.0**-10:
        raise UserError(
            "Gradients overflow float16 whatever the loss is scaled by: the weights have diverged. "
            "Start again with a lower --optim.lr, or with --train.dtype float32."
        )
