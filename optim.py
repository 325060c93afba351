"""Parameter groups, AdamW, Muon, and the learning rate of an update.

Which rate an update uses is a pure function of (config, step): nothing here counts.
"""

import math

import torch
from torch import Tensor, nn

from config import OptimConfig

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


class Muon(torch.optim.Optimizer):
    """Momentum whose update is the nearest semi-orthogonal matrix (Jordan et al. 2024).

    Queries, keys and values share one stored matrix but are three maps, so each third of c_attn is
    orthogonalised by itself. Matrices of one shape are orthogonalised together.
    """

    def __init__(self, matrices: dict[str, nn.Parameter], optim: OptimConfig, dtype: torch.dtype):
        """Take the 2-D parameters by name; `dtype` is float32 or bfloat16, for the products."""
        # Parameters that are stacked together, with the number of matrices each holds.
        groups: dict[tuple, list] = {}
        for name, parameter in matrices.items():
            thirds = 3 if name.endswith("attn.c_attn.weight") else 1
            rows, columns = parameter.shape[0] // thirds, parameter.shape[1]
            key = (rows, columns)
            groups.setdefault(key, []).append(parameter)
        super().__init__(
            [{"params": params, "shape": shape} for shape, params in groups.items()],
            {"lr": optim.muon_lr},
        )
        self.momentum, self.weight_decay = optim.momentum, optim.muon_weight_decay
        self.dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix from its gradient."""
        for group in self.param_groups:
            params = group["params"]
            grads = [p.grad for p in params]
            buffers = [self._buffer(p) for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - self.momentum)
            # Nesterov: look one step ahead along the average.
            ahead = torch._foreach_lerp(grads, buffers, self.momentum)
            rows, columns = group["shape"]
            stacked = torch.cat([a.view(-1, rows, columns) for a in ahead])
            # The root of the aspect ratio makes tall matrices change their outputs as much as
            # square ones.
            scale = max(1, rows / columns) ** 0.5
            update = orthogonalise(stacked, self.dtype).mul_(-group["lr"] * scale)
            pieces = update.split([p.shape[0] // rows for p in params])
            torch._foreach_mul_(params, 1 - group["lr"] * self.weight_decay)
            torch._foreach_add_(
                params, [u.reshape(p.shape) for u, p in zip(pieces, params, strict=True)]
            )

    def _buffer(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return, float32, matrices (n, rows, columns) with all singular values brought near 1.

    Five Newton-Schulz steps of an odd quintic polynomial whose slope at zero is steep; singular
    values end between about 0.7 and 1.2 (Jordan et al. 2024). Products are computed in `dtype`.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    tall = x.size(1) > x.size(2)
    # The Gram matrix of the shorter side is the smaller one.
    x = (x.mT if tall else x).to(dtype)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).float()
