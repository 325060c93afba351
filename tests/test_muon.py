"""Muon against one written plainly, and its work shared out over ranks."""

import math
from types import SimpleNamespace

import pytest
import torch

from config import ModelConfig, OptimConfig
from model import GPT
from training import muon
from training.muon import orthogonalise, orthogonalise_together
from training.optim import build_optimizers


@pytest.mark.parametrize("shape", [(16, 16), (64, 16), (16, 64)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.linalg.svdvals(orthogonalise(matrices, dtype))
        # Values that are tiny at first do not quite get there, by design.
        assert values.median() > 0.7 and values.max() < 1.3
    assert orthogonalise(torch.zeros(1, 4, 4), torch.float32).isfinite().all()


def plain_muon_update(grad, momentum, decay_factor, weight, lr):
    """One matrix at a time, straight from the description; returns weight and momentum."""
    momentum = 0.95 * momentum + 0.05 * grad
    g = 0.05 * grad + 0.95 * momentum
    x = g / g.norm()
    transposed = x.shape[0] > x.shape[1]
    x = x.T if transposed else x
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x.T if transposed else x
    scale = math.sqrt(max(1, x.shape[0] / x.shape[1]))
    return weight * decay_factor - lr * scale * x, momentum


def test_batched_muon_equals_one_matrix_at_a_time():
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=50))
    optim = OptimConfig(optimizer="muon", muon_lr=0.02, muon_weight_decay=0.1)
    _, muon = build_optimizers(model, optim, torch.float32)
    matrices = {n: p for n, p in model.named_parameters() if n.startswith("h.") and p.dim() == 2}
    expected = {n: p.detach().clone() for n, p in matrices.items()}
    momenta = {n: torch.zeros_like(p) for n, p in matrices.items()}
    for _ in range(3):
        for name, parameter in matrices.items():
            parameter.grad = torch.randn_like(parameter)
            thirds = 3 if "c_attn" in name else 1
            pieces = zip(
                parameter.grad.chunk(thirds),
                momenta[name].chunk(thirds),
                expected[name].chunk(thirds),
                strict=True,
            )
            done = [plain_muon_update(g, m, 1 - 0.02 * 0.1, w, 0.02) for g, m, w in pieces]
            expected[name] = torch.cat([weight for weight, _ in done])
            momenta[name] = torch.cat([momentum for _, momentum in done])
        muon.step()
    for name, parameter in matrices.items():
        assert torch.allclose(parameter, expected[name], atol=2e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("count", "size"), [(6, 2), (5, 2), (3, 4), (1, 3), (5, 4)])
def test_matrices_shared_out_over_ranks_come_back_the_same(monkeypatch, count, size, dtype):
    """Also where a process has fewer than others, or none; all messages are of one size."""
    torch.manual_seed(0)
    matrices, sent, own_rank = torch.randn(count, 24, 16), {}, 0
    monkeypatch.setattr(
        muon,
        "dist",
        SimpleNamespace(
            is_initialized=lambda: True, get_world_size=lambda: size, get_rank=lambda: own_rank
        ),
    )

    def gather(own):
        sent[own_rank] = own
        return torch.stack([sent.get(r, torch.full_like(own, torch.nan)) for r in range(size)])

    monkeypatch.setattr(muon, "all_gather", gather)
    for own_rank in range(size):  # noqa: B007 - the lambda above reads it
        together = orthogonalise_together(matrices, dtype)
    # The last one has been sent what all the others have made.
    assert torch.equal(together, orthogonalise(matrices, dtype))
    assert all(own.dtype == dtype for own in sent.values())
