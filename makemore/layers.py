"""What several rungs are built of: linear layers, norms, the sight of the past, the loss.

How weights begin decides whether a deep model learns at all. `scaled` keeps the variance of what
flows through a layer (He et al. 2015), and makes the last layer so small that all characters begin
as equally likely; `naive` draws every number from N(0, 1), to show what then goes wrong.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from loss import IGNORE_INDEX

Init = Literal["naive", "scaled"]
Norm = Literal["none", "batch", "layer"]
# Gains with which unit variance comes back as unit variance through what follows the layer; that of
# the last layer makes the first loss that of a uniform guess.
TANH_GAIN, GELU_GAIN, HEAD_GAIN = 5 / 3, 2**0.5, 0.1


def linear(inputs: int, outputs: int, init: Init, gain: float = 1.0) -> nn.Linear:
    """Return a linear layer with weights from N(0, gain^2 / inputs) and no bias yet, or naive."""
    layer = nn.Linear(inputs, outputs)
    naive = init == "naive"
    nn.init.normal_(layer.weight, std=1.0 if naive else gain * inputs**-0.5)
    nn.init.normal_(layer.bias, std=1.0 if naive else 0.0)
    return layer


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm (Ioffe and Szegedy 2015) of channels that come last, over all places of a batch.

    In training the places of a batch see each other through its mean and variance; what is measured
    and sampled uses the running ones, and sees nothing to come.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, 1)).view_as(x)


def build_norm(norm: Norm, width: int) -> nn.Module:
    """Return what normalises states (B, T, width): nothing, BatchNorm, or LayerNorm."""
    if norm == "none":
        return nn.Identity()
    return BatchNorm(width) if norm == "batch" else nn.LayerNorm(width)


def past(idx: Tensor, count: int) -> Tensor:
    """Return what each place sees, (B, T, count): the `count` ids up to its own, oldest first.

    Before the beginning stands the boundary, id 0.
    """
    return F.pad(idx, (count - 1, 0)).unfold(1, count, 1)


def cross_entropy(logits: Tensor, targets: Tensor | None) -> Tensor | None:
    """Return the mean of -log p(target) in nats over targets not IGNORE_INDEX, or None without any.

    Logits are (B, T, V), targets (B, T).
    """
    if targets is None:
        return None
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
