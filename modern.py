"""A GPT that needs fewer tokens than GPT-2: one block, and what lies around it.

Always on: no biases, norms without gains, the embedding normalised before the first block. The
other parts are switches of the config; recipes.py says which are on, and EXPERIMENTS.md what each
is worth. The selection of parts is that of modded-nanogpt (Jordan et al. 2024).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig
from lean import SharedGradient
from model import GPT, MLP, CausalSelfAttention, KVCache, Rotation, build_norm, rotated


class Modern(GPT):
    """As `GPT` from outside; `head_weight` is a matrix of its own unless `config.tied`."""

    def build_blocks(self) -> None:
        """Make all modules after the embedding."""
        config = self.config
        self.h = nn.ModuleList(ModernBlock(config, layer) for layer in range(config.n_layer))
        self.norm = build_norm(config, gain=False)
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The matrix (padded V, C) that turns states into logits."""
        return self.wte.weight if self.config.tied else self.lm_head.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw matrices from N(0, 0.25 / columns), tables from N(0, 0.02).

        A head of its own begins at zero, and so do projections onto the stream with `zero_init`;
        else these are scaled down as GPT-2's.
        """
        residual = 0.0 if self.config.zero_init else (2 * self.config.n_layer) ** -0.5
        for name, parameter in self.named_parameters():
            if name.startswith(("wte", "wpe")):
                parameter.normal_(std=0.02)
            elif parameter.dim() == 2:
                factor = residual if name.endswith("c_proj.weight") else 1.0
                parameter.normal_(std=0.5 * parameter.size(1) ** -0.5).mul_(factor)
        if not self.config.tied:
            self.lm_head.weight.zero_()
        for weight in (self.wte.weight, self.head_weight):
            weight[self.config.vocab_size :].zero_()

    def _states(
        self,
        idx: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        shared: SharedGradient | None = None,
    ) -> Tensor:
        x, rotation = self.embed(idx, positions, shared)
        x = x0 = self.drop(self.norm(x))
        first_values = None
        for block in self.h:
            x, first_values = self.run(block, x, x0, first_values, rotation, mask, cache)
        return self.norm(x)


class ModernBlock(nn.Module):
    """Attention and MLP on a stream into which the embedding is mixed anew (`x0_shortcut`)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.norm = build_norm(config, gain=False)
        self.attn = ModernAttention(config, layer)
        self.mlp = MLP(config)
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0])) if config.x0_shortcut else None

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        first_values: Tensor | None,
        rotation: Rotation | None,
        mask: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the stream (B, T, C) and the values of the first block (B, n_head, T, size)."""
        if self.mix is not None:
            x = self.mix[0] * x + self.mix[1] * x0
        found, first_values = self.attn(self.norm(x), first_values, rotation, mask, cache)
        x = x + found
        return x + self.mlp(self.norm(x)), first_values


class ModernAttention(CausalSelfAttention):
    """Causal attention with normalised queries and keys, and values that remember the first."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        self.qk_norm = config.qk_norm
        remembers = config.value_residual and layer > 0
        self.value_mix = nn.Parameter(torch.tensor([0.5])) if remembers else None

    def forward(
        self,
        x: Tensor,
        first_values: Tensor | None,
        rotation: Rotation | None,
        mask: Tensor | None,
        cache: KVCache | None,
    ) -> tuple[Tensor, Tensor]:
        """Return what attention adds to the stream (B, T, C), and the first block's values."""
        q, k, v = self.heads(x)
        first_values = v if first_values is None else first_values
        if self.value_mix is not None:
            # Zhou et al. 2024.
            v = torch.lerp(v, first_values, self.value_mix.to(v.dtype))
        if self.qk_norm:
            # Henry et al. 2020; with the root mean square, and before the rotation, which keeps it.
            q, k = (F.rms_norm(heads, (heads.size(-1),)) for heads in (q, k))
        if rotation is not None:
            q, k = rotated(q, rotation), rotated(k, rotation)
        return self.attend(q, k, v, mask, cache), first_values


def build_model(config: ModelConfig) -> GPT:
    """Return a new model, its weights drawn from PyTorch's generator, of either architecture."""
    return Modern(config) if config.architecture == "modern" else GPT(config)
