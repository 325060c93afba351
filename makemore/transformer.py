"""Rung 5: attention, written out in matrix products (Vaswani et al. 2017).

"Attention Is All You Need". Every rung before this fuses fixed places; here each place asks
(query), all places up to it answer (key), and it takes what they offer (value) in proportion.
Residual connections (He et al. 2016) carry gradients straight to every layer, and LayerNorm (Ba et
al. 2016) keeps their inputs in range; it stands before the layers, as in GPT-2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from makemore.layers import GELU_GAIN, HEAD_GAIN, Init, Norm, build_norm, cross_entropy, linear


class Transformer(nn.Module):
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
        norm: Norm = "layer",
    ):
        """Build `n_layer` blocks of `width` channels, which `n_head` heads share."""
        super().__init__()
        self.block_size = block_size
        std = 1.0 if init == "naive" else 0.1
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(block_size, width)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=std)
        self.drop = nn.Dropout(dropout)
        # Each block adds twice to the residual stream, which is to keep its variance.
        residual_gain = (2 * n_layer) ** -0.5
        self.blocks = nn.ModuleList(
            Block(width, n_head, dropout, init, norm, residual_gain) for _ in range(n_layer)
        )
        self.norm = build_norm(norm, width)
        self.head = linear(width, vocab_size, init, HEAD_GAIN)

    activation = staticmethod(F.gelu)

    def hidden_layers(self) -> dict[str, nn.Module]:
        """Return, by name, the modules whose outputs go into `activation`."""
        return {f"block {i}": block.expand for i, block in enumerate(self.blocks, 1)}

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        x = self.tokens(idx) + self.positions(torch.arange(idx.size(1)))
        x = self.drop(x)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits, cross_entropy(logits, targets)


class Block(nn.Module):
    """Attention, in which places speak to each other, and an MLP, in which each thinks alone."""

    def __init__(
        self,
        width: int,
        n_head: int,
        dropout: float,
        init: Init,
        norm: Norm,
        residual_gain: float,
    ):
        super().__init__()
        self.n_head = n_head
        self.norm_1, self.norm_2 = build_norm(norm, width), build_norm(norm, width)
        self.query, self.key, self.value = (linear(width, width, init) for _ in range(3))
        self.project = linear(width, width, init, residual_gain)
        self.expand = linear(width, 4 * width, init)
        self.contract = linear(4 * width, width, init, GELU_GAIN * residual_gain)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attend(self.norm_1(x)))
        hidden = Transformer.activation(self.expand(self.norm_2(x)))
        return x + self.drop(self.contract(hidden))

    def attend(self, x: Tensor) -> Tensor:
        """Return what each place takes from itself and those before it, (B, T, C)."""
        T = x.size(1)
        # (B, n_head, T, C / n_head) each.
        q, k, v = (
            layer(x).unflatten(2, (self.n_head, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        # (B, n_head, T, T): how well the key of each column answers the query of each row.
        scores = q @ k.transpose(2, 3) * q.size(3) ** -0.5
        visible = torch.ones(T, T, dtype=torch.bool).tril()
        weights = scores.masked_fill(~visible, -torch.inf).softmax(3)
        return self.project((self.drop(weights) @ v).transpose(1, 2).flatten(2))
