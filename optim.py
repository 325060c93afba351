"""Parameter groups, their optimizers, and the learning rate of an update.

Which rate an update uses is a pure function of (config, step): nothing here counts.
"""

import math

import torch
from torch import nn

from config import OptimConfig
from muon import Muon

MOMENTUM_START = 0.85
# The parameter of a head that is not the token embedding.
HEAD = "lm_head."


def lr_at(step: int, total: int, optim: OptimConfig) -> float:
    """Return the learning rate of AdamW in update `step`, 1 <= step <= total."""
    return optim.lr * schedule(step, total, optim)


def schedule(step: int, total: int, optim: OptimConfig) -> float:
    """Return the fraction of the peak rates that update `step` uses, 1 <= step <= total.

    Linear warm-up over w = warmup * total updates (1/w in update 1, 1 in update w); then cosine or
    linear decay to `final_lr` in update `total`, or constant and then linear over the last
    `cooldown * total` updates.
    """
    warmup = round(optim.warmup * total)
    if step <= warmup:
        return step / warmup
    begin = warmup
    if optim.schedule == "constant":
        begin = max(warmup, total - round(optim.cooldown * total))
    if step <= begin:
        return 1.0
    progress = (step - begin) / (total - begin)
    if optim.schedule == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return 1 - (1 - optim.final_lr) * progress


def momentum_at(step: int, total: int, optim: OptimConfig) -> float:
    """Return Muon's momentum in update `step`, 1 <= step <= total.

    It rises linearly from MOMENTUM_START to `momentum` over the first `momentum_warmup * total`
    updates; early gradients are soon out of date (Jordan et al. 2024).
    """
    warmup = round(optim.momentum_warmup * total)
    if step > warmup:
        return optim.momentum
    return MOMENTUM_START + (optim.momentum - MOMENTUM_START) * step / warmup


def build_optimizers(
    model: nn.Module, optim: OptimConfig, dtype: torch.dtype
) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a run: AdamW alone, or Muon for the blocks' matrices and AdamW.

    Weight decay is for matrices and embeddings, not for biases and norms. `dtype` is the run's
    arithmetic, which Muon's orthogonalisation follows.
    """
    named = list(model.named_parameters())
    blocks = {n: p for n, p in named if n.startswith("h.") and p.dim() == 2}
    taken = set(blocks) if optim.optimizer == "muon" else set()
    rest = {n: p for n, p in named if n not in taken}
    heads = [p for n, p in rest.items() if n.startswith(HEAD)]
    matrices = [p for n, p in rest.items() if p.dim() >= 2 and not n.startswith(HEAD)]
    groups = [
        {"params": matrices, "weight_decay": optim.weight_decay},
        {"params": [p for p in rest.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    if heads:
        peak = optim.lr if optim.head_lr is None else optim.head_lr
        groups.append({"params": heads, "weight_decay": optim.weight_decay, "peak": peak})
    betas = (optim.beta1, optim.beta2)
    optimizers = [torch.optim.AdamW(groups, optim.lr, betas, optim.eps, fused=True)]
    if taken:
        optimizers.append(Muon(blocks, optim, dtype))
    return optimizers


def set_rates(
    optimizers: list[torch.optim.Optimizer], step: int, total: int, optim: OptimConfig
) -> None:
    """Give every parameter group its rate in update `step`, and Muon its momentum."""
    factor = schedule(step, total, optim)
    for optimizer in optimizers:
        peak = optim.lr
        if isinstance(optimizer, Muon):
            peak, optimizer.momentum = optim.muon_lr, momentum_at(step, total, optim)
        for group in optimizer.param_groups:
            group["lr"] = group.get("peak", peak) * factor
