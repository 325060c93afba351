"""Muon: momentum, orthogonalised (Jordan et al. 2024)."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from config import OptimConfig
from training.distributed import all_gather, full_tensor, is_sharded, to_local


class Muon(torch.optim.Optimizer):
    """Momentum whose update is the nearest semi-orthogonal matrix (Jordan et al. 2024).

    Queries, keys and values share one stored matrix but are three maps, so each third of c_attn is
    orthogonalised by itself. Matrices of one shape are orthogonalised together, and each of several
    ranks does its share of them. Under FSDP the momentum is sharded as the parameters are, and only
    the matrices of one shape are gathered at a time.
    """

    def __init__(self, matrices: dict[str, nn.Parameter], optim: OptimConfig, dtype: torch.dtype):
        """Take the 2-D parameters by name; products are in bfloat16 if `dtype` is, or float32."""
        groups: dict[tuple[int, int], list[nn.Parameter]] = {}  # by the shape of their matrices
        for name, parameter in matrices.items():
            thirds = 3 if name.endswith("attn.c_attn.weight") else 1
            shape = (parameter.shape[0] // thirds, parameter.shape[1])
            groups.setdefault(shape, []).append(parameter)
        super().__init__(
            [{"params": params, "shape": shape} for shape, params in groups.items()],
            {"lr": optim.muon_lr},
        )
        self.momentum, self.weight_decay = optim.muon_momentum, optim.muon_weight_decay
        self.dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32

    @torch.no_grad()
    def step(self) -> None:
        """Update every matrix from its gradient."""
        for group in self.param_groups:
            params, (rows, columns) = group["params"], group["shape"]
            weights = [to_local(p) for p in params]  # of FSDP, this rank's rows
            grads = [to_local(p.grad) for p in params]
            momenta = [to_local(self._momentum(p)) for p in params]
            torch._foreach_lerp_(momenta, grads, 1 - self.momentum)
            # Nesterov: look one step ahead along the average.
            ahead = torch._foreach_lerp(grads, momenta, self.momentum)
            full = [full_tensor(_from_rows(a, p)) for a, p in zip(ahead, params, strict=True)]
            stacked = torch.cat([matrix.view(-1, rows, columns) for matrix in full])
            # The root of the aspect ratio makes tall matrices change their outputs as much as
            # square ones.
            scale = max(1, rows / columns) ** 0.5
            update = orthogonalise_together(stacked, self.dtype).mul_(-group["lr"] * scale)
            updates = update.split([p.shape[0] // rows for p in params])
            torch._foreach_mul_(weights, 1 - group["lr"] * self.weight_decay)
            torch._foreach_add_(
                weights, [_rows(u.view(p.shape), p) for u, p in zip(updates, params, strict=True)]
            )

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]


def _from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Return the DTensor, sharded as `like`, of which `rows` are this rank's; no copy."""
    if not is_sharded(like):
        return rows
    from torch.distributed.tensor import DTensor

    layout = {"shape": like.shape, "stride": like.stride(), "run_check": False}
    return DTensor.from_local(rows, like.device_mesh, like.placements, **layout)


def _rows(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the rows of a full tensor that are this rank's of `like`, as a view."""
    if not is_sharded(like):
        return tensor
    # As torch.chunk divides: the last ranks may have fewer rows than others, or none.
    first = dist.get_rank() * -(-len(tensor) // dist.get_world_size())
    return tensor[first : first + len(to_local(like))]


def orthogonalise_together(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what `orthogonalise` does, each rank having done its share of the matrices.

    All ranks call this with the same matrices. Results travel in `dtype`, in which they were
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
    return all_gather(padded).flatten(0, 1)[: len(matrices)].float()


def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return, float32, matrices (n, rows, columns) with all singular values brought near 1.

    Five Newton-Schulz steps of an odd quintic polynomial whose slope at zero is steep; singular
    values end between about 0.7 and 1.2 (Jordan et al. 2024). Products are computed in `dtype`.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / matrices.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    is_tall = x.size(1) > x.size(2)
    x = (x.mT if is_tall else x).to(dtype)  # the Gram matrix of the shorter side is the smaller
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if is_tall else x).float()
