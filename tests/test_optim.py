"""The learning rate of each update, parameter groups, and Muon against a plain one."""

import math
from types import SimpleNamespace

import pytest
import torch

import muon
from config import ModelConfig, OptimConfig
from model import GPT
from muon import orthogonalise, orthogonalise_together
from optim import build_optimizers, lr_at, set_rates


def test_golden_rates_of_the_flagship():
    optim = OptimConfig(lr=2e-3, warmup=750 / 18850, schedule="cosine", final_lr=0.1)
    golden = {
        1: 2e-3 / 750,
        375: 1e-3,
        750: 2e-3,
        751: 1.999999986e-3,
        9800: 1.1e-3,
        18850: 2e-4,
    }
    for step, rate in golden.items():
        assert lr_at(step, 18850, optim) == pytest.approx(rate, rel=1e-6)


def test_linear_and_constant_schedules():
    linear = OptimConfig(lr=1.0, warmup=0.1, schedule="linear", final_lr=0.0)
    assert [lr_at(k, 20, linear) for k in (1, 2, 11, 20)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
    constant = OptimConfig(lr=1.0, warmup=0.1, schedule="constant", cooldown=0.4, final_lr=0.2)
    assert [lr_at(k, 20, constant) for k in (2, 3, 12, 16, 20)] == pytest.approx(
        [1, 1, 1, 0.6, 0.2]
    )


def test_no_warmup_begins_at_the_peak_and_a_run_of_one_update_is_fine():
    optim = OptimConfig(lr=1.0, warmup=0.0, schedule="linear", final_lr=0.5)
    assert lr_at(1, 1, optim) == pytest.approx(0.5)
    assert lr_at(1, 2, optim) == pytest.approx(0.75)
    assert lr_at(1, 1, OptimConfig(lr=1.0, warmup=1.0)) == 1.0


def tiny_model() -> GPT:
    torch.manual_seed(0)
    return GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=50))


def test_decay_is_for_matrices_and_embeddings_only():
    model = tiny_model()
    (adamw,) = build_optimizers(model, OptimConfig(), torch.float32)
    decay = {id(p): group["weight_decay"] for group in adamw.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.1 if parameter.dim() == 2 else 0.0), name


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = tiny_model()
    adamw, muon = build_optimizers(model, OptimConfig(optimizer="muon"), torch.float32)
    names = {id(p): n for n, p in model.named_parameters()}
    by_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    by_adamw = {names[id(p)] for group in adamw.param_groups for p in group["params"]}
    assert by_muon | by_adamw == set(names.values()) and not by_muon & by_adamw
    assert by_muon == {
        n for n in names.values() if n.startswith("h.") and "ln" not in n and "weight" in n
    }


def test_rates_reach_both_optimizers():
    optim = OptimConfig(optimizer="muon", lr=1e-3, muon_lr=0.02, warmup=0.1)
    optimizers = build_optimizers(tiny_model(), optim, torch.float32)
    # The fifth of ten updates of warm-up.
    set_rates(optimizers, 5, 100, optim)
    rates = [{group["lr"] for group in optimizer.param_groups} for optimizer in optimizers]
    assert rates == [{5e-4}, {0.01}]


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
    model = tiny_model()
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
def test_matrices_shared_out_over_processes_come_back_the_same(monkeypatch, count, size, dtype):
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

    monkeypatch.setattr(muon, "gather_over_ranks", gather)
    for own_rank in range(size):  # noqa: B007 - the lambda above reads it
        together = orthogonalise_together(matrices, dtype)
    # The last one has been sent what all the others have made.
    assert torch.equal(together, orthogonalise(matrices, dtype))
    assert all(own.dtype == dtype for own in sent.values())
