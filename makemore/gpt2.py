"""Rung 6: GPT-2 (Radford et al. 2019), "Language Models are Unsupervised Multitask Learners".

This is the project's own `GPT`, the one that `main.py` trains, made small. To the transformer of
the rung before it adds no idea but one: the table of embeddings is the last layer, too. What it has
on top is speed: one product for queries, keys and values, fused attention, and whatever else makes
it fit to be a thousand times larger.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from makemore.layers import Init, cross_entropy
from model import GPT


class GPT2(nn.Module):
    """`forward(idx, targets=None) -> (logits, loss)`, seeing up to `block_size` characters."""

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        width: int,
        n_layer: int,
        n_head: int,
        dropout: float = 0.0,
        init: Init = "scaled",
    ):
        """Build `n_layer` blocks of `width` channels, which `n_head` heads share."""
        super().__init__()
        self.block_size = block_size
        self.gpt = GPT(
            ModelConfig(
                n_layer=n_layer,
                n_head=n_head,
                n_embd=width,
                block_size=block_size,
                vocab_size=vocab_size,
                dropout=dropout,
            )
        )
        with torch.no_grad():
            # The stream of so few blocks is mostly embedding, and a head that is the same table
            # would begin by expecting the present character once more.
            self.gpt.wte.weight.mul_(0.5)
            for parameter in self.parameters() if init == "naive" else ():
                if parameter.dim() == 2:
                    parameter.normal_()

    @staticmethod
    def activation(x: Tensor) -> Tensor:
        """Return GELU as GPT-2 approximates it."""
        return F.gelu(x, approximate="tanh")

    def hidden_layers(self) -> dict[str, nn.Module]:
        """Return, by name, the modules whose outputs go into `activation`."""
        return {f"block {i}": block.mlp.c_fc for i, block in enumerate(self.gpt.h, 1)}

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits, _ = self.gpt(idx)
        return logits, cross_entropy(logits, targets)
