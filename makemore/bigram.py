"""Rung 1: a table of how often each character follows each other (Shannon 1948).

"A Mathematical Theory of Communication" approximates English by drawing each letter from those that
followed the last one. Nothing is trained: the counts of pairs, each row divided by its sum, are the
most likely table there is.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from loss import IGNORE_INDEX
from makemore.layers import cross_entropy

# Added to every count, so that a pair that was never seen is improbable, not impossible (Laplace).
SMOOTHING = 0.1


class Bigram(nn.Module):
    """`forward(idx, targets=None) -> (logits, loss)`, as all rungs.

    idx and targets are int64 (B, T); logits are (B, T, V), at every place those of the next
    character given what is up to there; the loss is in nats a character.
    """

    block_size = 1

    def __init__(self, vocab_size: int):
        super().__init__()
        # A row for the character that is seen, a column for the one that follows.
        self.counts = nn.Parameter(torch.zeros(vocab_size, vocab_size), requires_grad=False)

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Count the pairs in batches of (idx, targets)."""
        vocab_size = len(self.counts)
        total = torch.zeros(vocab_size**2, dtype=torch.int64)
        for idx, targets in batches:
            counted = targets != IGNORE_INDEX
            pairs = idx[counted] * vocab_size + targets[counted]
            total += torch.bincount(pairs, minlength=vocab_size**2)
        self.counts.copy_(total.view(vocab_size, vocab_size))

    @property
    def probabilities(self) -> Tensor:
        """The table (V, V) of p(column follows row)."""
        smoothed = self.counts + SMOOTHING
        return smoothed / smoothed.sum(1, keepdim=True)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.probabilities.log()[idx]
        return logits, cross_entropy(logits, targets)
