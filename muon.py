"""Muon: momentum, orthogonalised (Jordan et al. 2024)."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import OptimConfig
from distributed import gather_over_ranks
from sharding import from_rows, local, rows_of, whole


class Muon(torch.optim.Optimizer):
    """Momentum whose update is the nearest semi-orthogonal matrix (Jordan et al. 2024).

    Queries, keys and values share one stored matrix but are three maps, so each third of c_attn is
    orthogonalised by itself. Matrices of one shape are orthogonalised together, and where there are
    several processes each does its share of them. Where the model is shared out too, so is the
    momentum, and only the matrices of one shape are whole at a time.
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
            own = [local(p) for p in params]
            grads = [local(p.grad) for p in params]
            buffers = [local(self._buffer(p)) for p in params]
            torch._foreach_lerp_(buffers, grads, 1 - self.momentum)
            # Nesterov: look one step ahead along the average.
            ahead = torch._foreach_lerp(grads, buffers, self.momentum)
            rows, columns = group["shape"]
            wholes = (whole(from_rows(a, p)) for a, p in zip(ahead, params, strict=True))
            stacked = torch.cat([matrix.view(-1, rows, columns) for matrix in wholes])
            # The root of the aspect ratio makes tall matrices change their outputs as much as
            # square ones.
            scale = max(1, rows / columns) ** 0.5
            update = orthogonalise_together(stacked, self.dtype).mul_(-group["lr"] * scale)
            pieces = update.split([p.shape[0] // rows for p in params])
            torch._foreach_mul_(own, 1 - group["lr"] * self.weight_decay)
            torch._foreach_add_(
                own, [rows_of(u.view(p.shape), p) for u, p in zip(pieces, params, strict=True)]
            )

    def _buffer(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def orthogonalise_together(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what `orthogonalise` does, each process having done its share of the matrices.

    All processes call this with the same matrices. Results travel in `dtype`, in which they were
    computed, so nothing is lost on the way.
    """
    if not dist.is_initialized():
        return orthogonalise(matrices, dtype)
    # All shares are as long as the longest, for equal messages; nobody waits longer for that.
    share = -(-len(matrices) // dist.get_world_size())
    first = dist.get_rank() * share
    mine = orthogonalise(matrices[first : first + share], dtype)
    padded = mine.new_zeros(share, *mine.shape[1:], dtype=dtype)
    padded[: len(mine)] = mine
    return gather_over_ranks(padded).flatten(0, 1)[: len(matrices)].float()


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
