"""Parameter groups, their optimizers, and the learning rate of a step.

Which rate a step uses is a pure function of (config, step): nothing here counts.
"""

import math

import torch
from torch import nn

from config import OptimConfig
from training.muon import Muon

MOMENTUM_START = 0.85


def lr_at(step: int, total: int, optim: OptimConfig) -> float:
    """Return AdamW's learning rate in step `step`, 1 <= step <= total."""
    return optim.lr * schedule(step, total, optim)


def schedule(step: int, total: int, optim: OptimConfig) -> float:
    """Return the fraction of the peak rates that step `step` uses, 1 <= step <= total.

    Linear warm-up over w = warmup_frac * total steps (1/w in step 1, 1 in step w); then cosine or
    linear decay to `final_lr_frac` in step `total`, or constant and then linear over the last
    `cooldown_frac * total` steps.
    """
    warmup = round(optim.warmup_frac * total)
    if step <= warmup:
        return step / warmup
    begin = warmup
    if optim.schedule == "constant":
        begin = max(warmup, total - round(optim.cooldown_frac * total))
    if step <= begin:
        return 1.0
    progress = (step - begin) / (total - begin)
    if optim.schedule == "cosine":
        progress = 0.5 * (1 - math.cos(math.pi * progress))
    return 1 - (1 - optim.final_lr_frac) * progress


def momentum_at(step: int, total: int, optim: OptimConfig) -> float:
    """Return Muon's momentum in step `step`, 1 <= step <= total.

    It rises linearly from MOMENTUM_START over the first `momentum_warmup * total` steps: early
    gradients are soon out of date (Jordan et al. 2024).
    """
    warmup = round(optim.momentum_warmup * total)
    if step > warmup:
        return optim.muon_momentum
    return MOMENTUM_START + (optim.muon_momentum - MOMENTUM_START) * step / warmup


def build_optimizers(
    model: nn.Module, optim: OptimConfig, dtype: torch.dtype
) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a run: AdamW alone, or Muon for the blocks' matrices and AdamW.

    Weight decay is for matrices and embeddings, not for biases and norms. `dtype` is that of the
    run's matrix products, which Muon's orthogonalisation follows.
    """
    named = dict(model.named_parameters())
    by_muon = {}
    if optim.optimizer == "muon":
        by_muon = {n: p for n, p in named.items() if n.startswith("h.") and p.dim() == 2}
    rest = {n: p for n, p in named.items() if n not in by_muon}
    head = [rest.pop(n) for n in list(rest) if n.startswith("lm_head.")]  # none where it is tied
    groups = [
        {
            "params": [p for p in rest.values() if p.dim() >= 2],
            "weight_decay": optim.weight_decay,
        },
        {"params": [p for p in rest.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    if head:
        peak = optim.lr if optim.lm_head_lr is None else optim.lm_head_lr
        groups.append({"params": head, "weight_decay": optim.weight_decay, "peak": peak})
    betas = (optim.beta1, optim.beta2)
    optimizers = [torch.optim.AdamW(groups, optim.lr, betas, optim.eps, fused=True)]
    if by_muon:
        optimizers.append(Muon(by_muon, optim, dtype))
    return optimizers


def set_lr(
    optimizers: list[torch.optim.Optimizer], step: int, total: int, optim: OptimConfig
) -> None:
    """Give every parameter group its learning rate in step `step`, and Muon its momentum."""
    factor = schedule(step, total, optim)
    for optimizer in optimizers:
        peak = optim.lr
        if isinstance(optimizer, Muon):
            peak, optimizer.momentum = optim.muon_lr, momentum_at(step, total, optim)
        for group in optimizer.param_groups:
            group["lr"] = group.get("peak", peak) * factor
