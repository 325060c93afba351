"""GPT-2, exactly (Radford et al. 2019): learned positions, pre-norm blocks, GELU, tied head.

Four switches of the config change one part each: `pos_emb` rope, `norm` rmsnorm, `activation`
swiglu or relu2, `bias` off. Any of them go together.

Shapes: B sequences, T tokens, C = n_embd channels, V = vocab_size ids, H heads of size C / H.
Parameter names are OpenAI's own, so weights travel to and from other implementations by name.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import ModelConfig
from loss import cross_entropy

# Cosines and sines of rotary angles, (T, head size / 2) or (B, 1, T, head size / 2) each.
Rope = tuple[Tensor, Tensor]


class GPT(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        # Rows past vocab_size make the matrix products fast; no id ever selects them.
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        if config.pos_emb == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = build_norm(config)
        self.init_weights()

    @property
    def head_weight(self) -> Tensor:
        """The matrix (padded V, C) that turns states into logits: the token embedding itself."""
        return self.wte.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw weights from N(0, 0.02); projections onto the residual stream are scaled down.

        2 * n_layer of them add up there, so a factor 1 / sqrt(2 * n_layer) keeps its variance.
        """
        residual_std = 0.02 * (2 * self.config.n_layer) ** -0.5
        for name, p in self.named_parameters():
            if p.dim() == 2:
                p.normal_(std=residual_std if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                p.zero_()
        self.wte.weight[self.config.vocab_size :] = 0

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, return_token_losses: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return `(logits (B, T, V), None)`, or with targets (B, T) `(None, mean loss)` in nats.

        With targets no logits are kept. `return_token_losses` gives each token's loss (B, T),
        without gradient, in the place of None. Targets of IGNORE_INDEX do not count.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.logits(x), None
        return lm_loss(x, self.head_weight, targets, self.config, return_token_losses)

    def hidden(self, idx: Tensor, cache=None, positions=None, mask=None) -> Tensor:
        """Return the final normalised states (B, T, C) of ids (B, T).

        With a `KVCache` the ids follow what it holds: it is empty, or they are one token.
        `positions` (B, T) and `mask` (B, 1, T, T) are for rows that hold several texts.
        """
        positions, mask = positions_and_mask(idx, self.config, cache, positions, mask)
        x = self.wte(idx)  # (B, T, C)
        rope = None
        if self.config.pos_emb == "learned":
            x = x + self.wpe(positions)
        else:
            rope = rope_cos_sin(positions, self.config.head_size)
        x = self.drop(x)
        for block in self.h:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                # Keep the block's input only, and compute the rest again in the backward pass.
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
        if cache is not None:
            cache.length += idx.size(1)
        return self.ln_f(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (..., V) of states (..., C)."""
        return F.linear(x, self.head_weight)[..., : self.config.vocab_size]


class Block(nn.Module):
    """Attention and MLP, each reading the normalised residual stream and adding to it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.ln_1 = build_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = build_norm(config)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None, cache=None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rope, mask, cache)
        return x + self.mlp(self.ln_2(x))


class CausalSelfAttention(nn.Module):
    """Multi-head attention over the past."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        dropout = config.attention_dropout
        self.dropout = config.dropout if dropout is None else dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rope: Rope | None, mask: Tensor | None, cache) -> Tensor:
        q, k, v = split_heads(self.c_attn(x), self.n_head)  # (B, H, T, head size) each
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = causal_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.resid_drop(self.c_proj(y.transpose(1, 2).flatten(2)))  # (B, T, C)


class MLP(nn.Module):
    """Two layers with GPT-2's tanh-approximated GELU between them, or one of its successors."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = config.activation
        self.c_fc = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        if config.activation == "swiglu":
            self.c_gate = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)  # (B, T, mlp_width)
        if self.activation == "gelu":
            h = F.gelu(h, approximate="tanh")
        elif self.activation == "swiglu":  # Shazeer 2020
            h = F.silu(self.c_gate(x)) * h
        else:  # ReLU^2, So et al. 2021
            h = F.relu(h).square()
        return self.drop(self.c_proj(h))


def build_norm(config: ModelConfig, gain: bool = True) -> nn.Module:
    """Return LayerNorm, or RMSNorm (Zhang and Sennrich 2019), over C channels."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=1e-5, elementwise_affine=gain)
    return nn.LayerNorm(config.n_embd, elementwise_affine=gain, bias=config.bias)


def split_heads(qkv: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, (B, n_head, T, head size) each, of (B, T, 3 C)."""
    B, T, width = qkv.shape
    return qkv.view(B, T, 3, n_head, width // 3 // n_head).permute(2, 0, 3, 1, 4).unbind()


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Return the attention output (B, H, T, head size), causal unless `mask` says otherwise."""
    causal = mask is None and q.size(2) > 1  # a single query follows a cache and sees all of it
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)


def positions_and_mask(
    idx: Tensor, config: ModelConfig, cache, positions: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the tokens' positions, (T,) unless given, and the mask of their documents, if any."""
    if positions is None:
        start = 0 if cache is None else cache.length
        stop = start + idx.size(1)
        if stop > config.block_size:
            raise ValueError(f"{stop} tokens do not fit the context of {config.block_size}")
        positions = torch.arange(start, stop, device=idx.device)
        if config.document_mask and cache is None:  # a cache holds one document
            mask = same_document(idx, config.eot % config.vocab_size)
    return positions, mask


def same_document(idx: Tensor, eot: int) -> Tensor:
    """Return the mask (B, 1, T, T), bool, of what tokens see: their own document up to themselves.

    A document begins with its <|endoftext|>, whose id is `eot`.
    """
    document = (idx == eot).cumsum(dim=1)
    return (document[:, :, None] == document[:, None, :]).tril()[:, None]


def rope_cos_sin(positions: Tensor, head_size: int) -> Rope:
    """Return cosines and sines for tokens at `positions`, (T,) or (B, T) (RoPE, Su et al. 2021).

    Channel i of a head's first half is paired with channel i of its second half, as GPT-NeoX and
    Llama do, and turns by 10,000^(-2i / head size) a token.
    """
    steps = torch.arange(0, head_size, 2, device=positions.device) / head_size
    angles = positions[..., None] * 10_000.0**-steps
    angles = angles[:, None] if positions.dim() == 2 else angles  # room for the heads
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Return queries or keys (B, H, T, head size), rotated, in their own dtype."""
    cos, sin = rope
    # A position of 1,000 has no room in bfloat16's eight bits, so this is done in float32.
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


def lm_loss(
    x: Tensor, weight: Tensor, targets: Tensor, config: ModelConfig, return_token_losses: bool
) -> tuple[Tensor | None, Tensor]:
    """Return `(None or token losses (B, T), mean loss)` of states (B, T, C) and targets (B, T)."""
    flat = x.flatten(0, 1), weight, targets.flatten()
    mean, losses = cross_entropy(*flat, config.vocab_size, config.logit_softcap)
    return losses.view_as(targets) if return_token_losses else None, mean


class KVCache:
    """Keys and values of the tokens read so far, in memory for all that can come from the start."""

    def __init__(self, config: ModelConfig, batch: int, device, dtype, tokens: int | None = None):
        room = config.block_size if tokens is None else min(tokens, config.block_size)
        shape = (config.n_layer, 2, batch, config.n_head, room, config.head_size)
        self.store = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, H, T, head size) and return those of all tokens so far."""
        stop = self.length + k.size(2)
        keys, values = self.store[layer]
        keys[:, :, self.length : stop] = k
        values[:, :, self.length : stop] = v
        return keys[:, :, :stop], values[:, :, :stop]
