"""GPT-2, exactly (Radford et al. 2019): learned positions, pre-norm blocks, GELU, tied head.

Four switches of the config change one part each, and any of them go together: `positions` rotary,
`norm` rmsnorm, `activation` swiglu or relu2, `bias` off.

Shapes: B windows, T tokens in a window, C = n_embd channels, V = vocab_size ids.
Parameter names are OpenAI's own, so weights travel to and from other implementations by name.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lean
from config import ModelConfig
from cross_entropy import IGNORED, mean_and_losses, soft_capped
from lean import SharedGradient


class GPT(nn.Module):
    """`forward(idx, targets=None) -> (logits, loss)`; one of the two is None."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # Blocks keep their inputs alone for the backward pass, and are computed again there.
        self.gradient_checkpointing = False
        # Losses are given window by window, too.
        self.gives_window_losses = False
        # Rows past vocab_size make the matrix products fast; no id ever selects them.
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        if config.positions == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.build_blocks()
        self.init_weights()

    def build_blocks(self) -> None:
        """Make all modules after the embedding."""
        config = self.config
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = build_norm(config)

    @property
    def head_weight(self) -> Tensor:
        """The matrix (padded V, C) that turns states into logits: the token embedding."""
        return self.wte.weight

    def init_weights(self) -> None:
        """Draw the weights from N(0, 0.02); projections onto the residual stream are scaled down.

        2 * n_layer of them add up there, so a factor 1 / sqrt(2 * n_layer) keeps its variance.
        """
        residual_std = 0.02 * (2 * self.config.n_layer) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = residual_std if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        with torch.no_grad():
            self.wte.weight[self.config.vocab_size :].zero_()

    def forward(
        self, idx: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return `(logits, None)`, or with targets `(None, loss)`.

        idx and targets are int64 (B, T); logits are (B, T, V); the loss is the mean over all
        targets that are not IGNORED, in nats, computed without ever holding all logits. With
        `gives_window_losses` there are the means of the windows (B,), without gradient, for None.
        """
        if targets is None:
            return self.logits(self.hidden(idx)), None
        # Where the head is the embedding, so are their gradients.
        shared = SharedGradient() if self.config.tied and lean.applies_to(idx) else None
        mean, losses = self.losses(self.hidden(idx, shared=shared), targets, shared)
        if not self.gives_window_losses:
            return None, mean
        return losses.sum(1) / (targets != IGNORED).sum(1).clamp(min=1), mean

    def hidden(
        self,
        idx: Tensor,
        cache: "KVCache | None" = None,
        shared: SharedGradient | None = None,
    ) -> Tensor:
        """Return the final normalised states (B, T, C) of ids (B, T) that follow `cache`.

        What follows a cache is taken for the same document, whatever `document_mask` says. A loss
        that follows has the same `shared`, if any.
        """
        start = 0 if cache is None else cache.length
        stop = start + idx.size(1)
        if stop > self.config.block_size:
            raise ValueError(f"{stop} tokens do not fit the context of {self.config.block_size}")
        positions = torch.arange(start, stop, device=idx.device)
        mask = None
        if self.config.document_mask and cache is None:
            mask = same_document(idx, self.config.vocab_size - 1)
        x = self._states(idx, positions, mask, cache, shared)
        if cache is not None:
            cache.length = stop
        return x

    def packed_hidden(self, idx: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Return the final normalised states (B, T, C) of rows that hold several texts.

        `positions`, int64 (B, T), are the tokens' places in their own texts; `mask`, (B, 1, T, T),
        is 0 where a token (second last dimension) sees another (last), and -inf elsewhere.
        """
        return self._states(idx, positions, mask)

    def _states(
        self,
        idx: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: "KVCache | None" = None,
        shared: SharedGradient | None = None,
    ) -> Tensor:
        x, rotation = self.embed(idx, positions, shared)
        x = self.drop(x)
        for block in self.h:
            x = self.run(block, x, rotation, mask, cache)
        return self.ln_f(x)

    def run(self, block: nn.Module, *inputs: Any) -> Any:
        """Return what a block gives, keeping what the backward pass needs, or only `inputs`."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def embed(
        self, idx: Tensor, positions: Tensor, shared: SharedGradient | None
    ) -> tuple[Tensor, "Rotation | None"]:
        """Return the token embeddings, with their positions added, or how to rotate by them."""
        x = self.wte(idx) if shared is None else lean.embedding(idx, self.wte.weight, shared)
        if self.config.positions == "learned":
            return x + self.wpe(positions), None
        return x, rotation_of(positions, self.config.n_embd // self.config.n_head)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (..., V) of states (..., C)."""
        logits = F.linear(x, self.head_weight)[..., : self.config.vocab_size]
        return soft_capped(logits, self.config.softcap) if self.config.softcap else logits

    def losses(
        self, x: Tensor, targets: Tensor, shared: SharedGradient | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy in nats, float32, of states (B, T, C) and targets (B, T).

        It is the mean, and without gradient that of every target (B, T).
        """
        c, flat = self.config, (x.flatten(0, 1), self.head_weight, targets.flatten())
        mean, losses = mean_and_losses(*flat, c.vocab_size, c.softcap, shared)
        return mean, losses.view(targets.shape)


class Block(nn.Module):
    """Attention and MLP, each reading the normalised residual stream and adding to it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.ln_1 = build_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = build_norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rotation: "Rotation | None",
        mask: Tensor | None,
        cache: "KVCache | None",
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), rotation, mask, cache)
        return x + self.mlp(self.ln_2(x))


def build_norm(config: ModelConfig, gain: bool = True) -> nn.Module:
    """Return LayerNorm, or RMSNorm (Zhang and Sennrich 2019), over C channels."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=1e-5, elementwise_affine=gain)
    return nn.LayerNorm(config.n_embd, elementwise_affine=gain, bias=config.bias)


class CausalSelfAttention(nn.Module):
    """Multi-head attention over the past, through PyTorch's fused kernels."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        if config.attention_dropout is not None:
            self.dropout = config.attention_dropout
        self.c_attn = lean.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = lean.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotation: "Rotation | None",
        mask: Tensor | None,
        cache: "KVCache | None",
    ) -> Tensor:
        q, k, v = self.heads(x)
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        return self.attend(q, k, v, mask, cache)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, each (B, n_head, T, head size), of states (B, T, C)."""
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        return q, k, v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: "KVCache | None"
    ) -> Tensor:
        """Return what the heads find, projected onto the residual stream (B, T, C)."""
        T = q.size(2)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        # A cache is either empty or followed by one token, which sees all of it.
        causal, dropout = mask is None and T > 1, self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        return self.resid_drop(self.c_proj(y.transpose(1, 2).flatten(2)))


# Cosines and sines of the angles of tokens, each (..., T, head size / 2).
Rotation = tuple[Tensor, Tensor]


def rotation_of(positions: Tensor, head_size: int) -> Rotation:
    """Return the rotation of tokens at `positions`, (T,) or (B, T) (RoPE, Su et al. 2021).

    Channel i of a head's first half is paired with channel i of its second half, as GPT-NeoX and
    Llama do, and turns by 10,000^(-2i / head size) a token.
    """
    steps = torch.arange(0, head_size, 2, device=positions.device) / head_size
    angles = positions[..., None] * 10_000.0**-steps
    # Rows of their own positions have heads between row and token.
    angles = angles[:, None] if positions.dim() == 2 else angles
    return angles.cos(), angles.sin()


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """Return queries or keys (B, n_head, T, head size), turned, in their own dtype."""
    cos, sin = rotation
    # A position of 1,000 has no room in bfloat16's eight bits, so this is done in float32.
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


def same_document(idx: Tensor, eot: int) -> Tensor:
    """Return the mask (B, 1, T, T), bool, of what tokens see: their own document up to themselves.

    A document begins with its <|endoftext|>, which is the last id of both tokenizers.
    """
    document = (idx == eot).cumsum(dim=1)
    same = document[:, :, None] == document[:, None, :]
    return same.tril()[:, None]


class MLP(nn.Module):
    """Two layers with GPT-2's tanh-approximated GELU between them, or one of its successors."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width, hidden = config.n_embd, config.mlp_width
        self.activation = config.activation
        self.c_fc = lean.Linear(width, hidden, bias=config.bias)
        if self.activation == "swiglu":
            self.c_gate = lean.Linear(width, hidden, bias=config.bias)
        self.c_proj = lean.Linear(hidden, width, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.c_fc(x)
        if self.activation == "gelu":
            return self.drop(self.c_proj(hidden, gelu=True))
        # SwiGLU (Shazeer 2020) or ReLU^2 (So et al. 2021).
        gated = self.activation == "swiglu"
        hidden = F.silu(self.c_gate(x)) * hidden if gated else F.relu(hidden).square()
        return self.drop(self.c_proj(hidden))


class KVCache:
    """Keys and values of the tokens read so far, in memory for all that can come from the start."""

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        tokens: int | None = None,
    ):
        """Make room for `tokens` tokens in each of `batch` rows, or for a whole context."""
        head_size = config.n_embd // config.n_head
        room = config.block_size if tokens is None else min(tokens, config.block_size)
        shape = (config.n_layer, 2, batch, config.n_head, room, head_size)
        self.store = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, n_head, T, head size) and return those of all tokens so far."""
        stop = self.length + k.size(2)
        keys, values = self.store[layer]
        keys[:, :, self.length : stop] = k
        values[:, :, self.length : stop] = v
        return keys[:, :, :stop], values[:, :, :stop]
