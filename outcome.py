"""What came of an update: its loss and gradient norm, on their way from the device to the host.

A GPU works through what it is given while the host prepares what follows. A host that waits for the
loss of update k before it prepares update k + 1 leaves the GPU idle meanwhile, so there it reads it
one update late.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distributed import World, gather_over_ranks, sum_over_ranks


@dataclass
class Outcome:
    """Loss and norm of update `step`, and whether any process was asked to stop."""

    step: int
    # This rank's micro-batches, on the device.
    losses: Tensor
    # Float32 (3,): summed losses, requests to stop, norm; on the host once `arrived`.
    facts: Tensor
    arrived: torch.cuda.Event | None
    world_size: int
    # The losses of the update's windows in their order, float32 (G,), where they are asked for.
    window_losses: Tensor | None = None

    def read(self) -> tuple[float, float, bool]:
        """Wait for the figures and return them: loss in nats a token, norm, request to stop."""
        if self.arrived is not None:
            self.arrived.synchronize()
        total, asked, norm = self.facts.tolist()
        return total / self.world_size, norm, asked > 0


def outcome(
    step: int,
    losses: Tensor,
    norm: Tensor,
    asked: bool,
    world: World,
    window_losses: Tensor | None = None,
) -> Outcome:
    """Add up the losses and requests of all processes and send them to the host, waiting for none.

    One message carries all but `window_losses`, this rank's, if given.
    """
    if window_losses is not None:
        window_losses = gather_over_ranks(window_losses).flatten()
    # Filled on the device: a number copied there from the host would be waited for.
    request = torch.full((), float(asked), device=losses.device)
    facts = torch.stack([losses.mean(), request, norm])
    sum_over_ranks(facts[:2])
    if losses.device.type != "cuda":
        return Outcome(step, losses, facts, None, world.size, window_losses)
    host = torch.empty(3, pin_memory=True)
    host.copy_(facts, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return Outcome(step, losses, host, arrived, world.size, window_losses)


def updates_behind(device: torch.device, dtype: torch.dtype) -> int:
    """Return how many updates late outcomes are read: 1 on a GPU, else 0.

    Not in float16, where whether the weights change depends on the gradient norm.
    """
    return 1 if device.type == "cuda" and dtype != torch.float16 else 0
