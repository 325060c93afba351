"""A GPT that needs fewer tokens than GPT-2, in a block of its own.

Always on: no biases, norms without gains, the embedding normalised before the first block. The
other parts are switches of the config; recipes.py says which are on, EXPERIMENTS.md what each is
worth.
The selection of parts is that of modded-nanogpt (Jordan et al. 2024). Shapes as in model.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from config import ModelConfig
from loss import softcap
from model import (
    GPT,
    MLP,
    KVCache,
    Rope,
    apply_rope,
    build_norm,
    causal_attention,
    lm_loss,
    positions_and_mask,
    rope_cos_sin,
    split_heads,
)


class ModernGPT(nn.Module):
    """The same calls as `model.GPT`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        if config.pos_emb == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(ModernBlock(config, layer) for layer in range(config.n_layer))
        self.norm = build_norm(config, gain=False)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.init_weights()

    @property
    def head_weight(self) -> Tensor:
        """The matrix (padded V, C) that turns states into logits."""
        return self.wte.weight if self.config.tie_embeddings else self.lm_head.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw matrices from N(0, 0.25 / columns), tables from N(0, 0.02).

        An untied head begins at zero, and with `zero_init_proj` so do projections onto the residual
        stream; else these are scaled down as GPT-2's.
        """
        residual = 0.0 if self.config.zero_init_proj else (2 * self.config.n_layer) ** -0.5
        for name, p in self.named_parameters():
            if name.startswith(("wte", "wpe")):
                p.normal_(std=0.02)
            elif p.dim() == 2:
                p.normal_(std=0.5 * p.size(1) ** -0.5)
                p.mul_(residual if name.endswith("c_proj.weight") else 1.0)
        if not self.config.tie_embeddings:
            self.lm_head.weight.zero_()
        self.wte.weight[self.config.vocab_size :] = 0

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, return_token_losses: bool = False
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return `(logits, None)` or `(None or token losses, mean loss)`; see `model.GPT`."""
        x = self.hidden(idx)
        if targets is None:
            return self.logits(x), None
        return lm_loss(x, self.head_weight, targets, self.config, return_token_losses)

    def hidden(self, idx: Tensor, cache=None, positions=None, mask=None) -> Tensor:
        """Return the final normalised states (B, T, C) of ids (B, T); see `model.GPT`."""
        positions, mask = positions_and_mask(idx, self.config, cache, positions, mask)
        x = self.wte(idx)  # (B, T, C)
        rope = None
        if self.config.pos_emb == "learned":
            x = x + self.wpe(positions)
        else:
            rope = rope_cos_sin(positions, self.config.head_size)
        x = x0 = self.drop(self.norm(x))
        v0 = None  # values of the first block, for the value residual
        for block in self.h:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, v0 = checkpoint(block, x, x0, v0, rope, mask, use_reentrant=False)
            else:
                x, v0 = block(x, x0, v0, rope, mask, cache)
        if cache is not None:
            cache.length += idx.size(1)
        return self.norm(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (..., V) of states (..., C)."""
        logits = F.linear(x, self.head_weight)[..., : self.config.vocab_size]
        cap = self.config.logit_softcap
        return softcap(logits, cap) if cap else logits


class ModernBlock(nn.Module):
    """Attention and MLP on a stream into which the embedding is mixed anew (`x0_residual`)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.norm = build_norm(config, gain=False)
        self.attn = ModernAttention(config, layer)
        self.mlp = MLP(config)
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0])) if config.x0_residual else None

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        v0: Tensor | None,
        rope: Rope | None,
        mask: Tensor | None,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the stream (B, T, C) and the values of the first block (B, H, T, head size)."""
        if self.mix is not None:
            x = self.mix[0] * x + self.mix[1] * x0
        y, v0 = self.attn(self.norm(x), v0, rope, mask, cache)
        x = x + y
        return x + self.mlp(self.norm(x)), v0


class ModernAttention(nn.Module):
    """Causal attention with normalised queries and keys, and values that remember the first."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.n_head, self.qk_norm = layer, config.n_head, config.qk_norm
        self.dropout = config.dropout
        if config.attention_dropout is not None:
            self.dropout = config.attention_dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=False)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.resid_drop = nn.Dropout(config.dropout)
        mixes = config.value_residual and layer > 0
        self.value_mix = nn.Parameter(torch.tensor([0.5])) if mixes else None

    def forward(
        self,
        x: Tensor,
        v0: Tensor | None,
        rope: Rope | None,
        mask: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor]:
        """Return what attention adds to the stream (B, T, C), and the first block's values."""
        q, k, v = split_heads(self.c_attn(x), self.n_head)
        v0 = v if v0 is None else v0
        if self.value_mix is not None:  # Zhou et al. 2024
            v = torch.lerp(v, v0, self.value_mix.to(v.dtype))
        if self.qk_norm:
            # Henry et al. 2020, with the root mean square; the rotation keeps it.
            q, k = (F.rms_norm(heads, (heads.size(-1),)) for heads in (q, k))
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = causal_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.resid_drop(self.c_proj(y.transpose(1, 2).flatten(2))), v0


def build_model(config: ModelConfig) -> GPT | ModernGPT:
    """Return a new model, its weights drawn from PyTorch's generator, of either architecture."""
    return ModernGPT(config) if config.architecture == "modern" else GPT(config)
