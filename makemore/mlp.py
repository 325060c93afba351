"""Rung 3: embeddings and a hidden layer over the last three characters (Bengio et al. 2003).

"A Neural Probabilistic Language Model". A table of counts over three characters would have V^4
entries, most of them never seen. Here each character is a learnt vector instead; those of
characters that are used alike come to lie near each other, so what is learnt of one holds for the
others, too. The three vectors, side by side, go through one layer of tanh units.
"""

import torch
from torch import Tensor, nn

from makemore.layers import (
    HEAD_GAIN,
    TANH_GAIN,
    Init,
    Norm,
    build_norm,
    cross_entropy,
    linear,
    past,
)


class MLP(nn.Module):
    """`forward(idx, targets=None) -> (logits, loss)`, seeing three characters."""

    block_size = 3

    def __init__(
        self,
        vocab_size: int,
        width: int,
        hidden: int,
        dropout: float = 0.0,
        init: Init = "scaled",
        norm: Norm = "none",
    ):
        """Build it with embeddings of `width` numbers and `hidden` units."""
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        # They begin near one another, so that where they end is what has been learnt.
        nn.init.normal_(self.embedding.weight, std=1.0 if init == "naive" else 0.1)
        self.layer = nn.Sequential(
            linear(self.block_size * width, hidden, init, TANH_GAIN), build_norm(norm, hidden)
        )
        self.drop = nn.Dropout(dropout)
        self.head = linear(hidden, vocab_size, init, HEAD_GAIN)

    activation = staticmethod(torch.tanh)

    def hidden_layers(self) -> dict[str, nn.Module]:
        """Return, by name, the modules whose outputs go into `activation`."""
        return {"hidden": self.layer}

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        # (B, T, 3) ids to (B, T, 3 * width).
        x = self.embedding(past(idx, self.block_size)).flatten(2)
        x = self.activation(self.layer(x))
        logits = self.head(self.drop(x))
        return logits, cross_entropy(logits, targets)
