"""Rung 2: the bigram's table, found by gradient descent (Rumelhart, Hinton and Williams 1986).

One linear layer reads the last character as a one-hot vector, so its product picks a row of the
weights: the logarithms of the bigram's counts, but for what softmax takes out. Following the
gradient of the loss leads to the same table as counting; unlike counting, it still works when there
is more to see than one character.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from makemore.layers import HEAD_GAIN, Init, cross_entropy, linear


class NNBigram(nn.Module):
    """`forward(idx, targets=None) -> (logits, loss)`, with a row of weights as logits."""

    block_size = 1

    def __init__(self, vocab_size: int, init: Init = "scaled"):
        super().__init__()
        self.vocab_size = vocab_size
        # Of a one-hot vector a single number is not 0, so one is what the layer reads.
        table = linear(1, vocab_size**2, init, HEAD_GAIN).weight
        self.table = nn.Parameter(table.detach().view(vocab_size, vocab_size))

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        one_hot = F.one_hot(idx, self.vocab_size).to(self.table.dtype)
        logits = one_hot @ self.table
        return logits, cross_entropy(logits, targets)
