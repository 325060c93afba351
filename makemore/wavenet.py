"""Rung 4: eight characters, fused two by two (van den Oord et al. 2016, "WaveNet").

The MLP squeezes all it sees through one layer at once. Here three layers fuse pairs: characters to
pairs, pairs to fours, fours to eights. Layer by layer the two halves that are fused lie 1, 2 and 4
places apart, a causal convolution with that dilation, so one pass gives every place its own tree,
and what neighbouring trees share is computed once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from makemore.layers import HEAD_GAIN, TANH_GAIN, Init, Norm, build_norm, cross_entropy, linear

DILATIONS = (1, 2, 4)


class WaveNet(nn.Module):
    """`forward(idx, targets=None) -> (logits, loss)`, seeing eight characters."""

    block_size = 1 + sum(DILATIONS)

    def __init__(
        self,
        vocab_size: int,
        width: int,
        hidden: int,
        dropout: float = 0.0,
        init: Init = "scaled",
        norm: Norm = "batch",
    ):
        """Build it with embeddings of `width` numbers and `hidden` units a layer."""
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        inputs = (width, hidden, hidden)
        self.fusions = nn.ModuleList(
            nn.Sequential(linear(2 * n, hidden, init, TANH_GAIN), build_norm(norm, hidden))
            for n in inputs
        )
        self.drop = nn.Dropout(dropout)
        self.head = linear(hidden, vocab_size, init, HEAD_GAIN)

    activation = staticmethod(torch.tanh)

    def hidden_layers(self) -> dict[str, nn.Module]:
        """Return, by name, the modules whose outputs go into `activation`."""
        return {f"fusion of {2 * d}": m for d, m in zip(DILATIONS, self.fusions, strict=True)}

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        # Boundaries before the beginning, so that the first place has a whole tree, too.
        x = self.embedding(F.pad(idx, (self.block_size - 1, 0)))
        for dilation, fusion in zip(DILATIONS, self.fusions, strict=True):
            # The older half of each pair beside the newer; `dilation` places fewer come out.
            x = torch.cat([x[:, :-dilation], x[:, dilation:]], dim=2)
            x = self.drop(self.activation(fusion(x)))
        logits = self.head(x)
        return logits, cross_entropy(logits, targets)
