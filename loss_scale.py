"""Loss scaling: float16 training without gradients that vanish (Micikevicius et al. 2018).

The least number of float16 is 6e-8 and many gradients are smaller. The loss is multiplied before
the backward pass by a factor that is as large as gradients allow, and gradients are divided by it
afterwards. When one overflows, the update is left out and the factor halved.
"""

from typing import Any

import torch
from torch import nn

from config import UserError
from sharding import local

# Updates without an overflow after which the factor is doubled.
PATIENCE = 2000
LEAST, MOST = 2.0**-10, 2.0**24


class LossScale:
    """The factor, and for how many updates it has been right; part of a run's checkpoint."""

    def __init__(self, factor: float, lasted: int = 0):
        self.factor, self.lasted = factor, lasted

    def unscale(self, model: nn.Module) -> None:
        """Divide all gradients by the factor, in place."""
        grads = [local(p.grad) for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(grads, 1 / self.factor)

    def overflowed(self) -> None:
        """Halve the factor; raises UserError when it has become useless."""
        self.factor, self.lasted = self.factor / 2, 0
        if self.factor < LEAST:
            raise UserError(
                "Gradients overflow float16 whatever the loss is multiplied by: the weights have "
                "diverged. Start again with a lower --optim.lr, or with --train.dtype float32."
            )

    def held(self) -> None:
        """Count an update without an overflow, and double the factor when it is time."""
        self.lasted += 1
        if self.lasted >= PATIENCE:
            self.factor, self.lasted = min(2 * self.factor, MOST), 0

    def state(self) -> dict[str, Any]:
        """Return what `LossScale(**state)` is made from, for state.json."""
        return {"factor": self.factor, "lasted": self.lasted}


def loss_scale(
    dtype: torch.dtype, factor: float, state: dict[str, Any] | None = None
) -> LossScale | None:
    """Return the loss scale of a run in `dtype`: none but in float16, nor if `factor` is 0.

    It goes on from the `state` of a checkpoint, if that has one.
    """
    if dtype != torch.float16 or factor == 0:
        return None
    return LossScale(**state) if state else LossScale(factor)
