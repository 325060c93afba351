"""The learning rate of each step, parameter groups, and what reaches them."""

import pytest
import torch

from config import ModelConfig, OptimConfig
from model import GPT
from training.optim import build_optimizers, lr_at, set_lr


def test_golden_rates_of_the_flagship():
    optim = OptimConfig(lr=2e-3, warmup_frac=750 / 18850, schedule="cosine", final_lr_frac=0.1)
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
    linear = OptimConfig(lr=1.0, warmup_frac=0.1, schedule="linear", final_lr_frac=0.0)
    assert [lr_at(k, 20, linear) for k in (1, 2, 11, 20)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
    constant = OptimConfig(
        lr=1.0, warmup_frac=0.1, schedule="constant", cooldown_frac=0.4, final_lr_frac=0.2
    )
    assert [lr_at(k, 20, constant) for k in (2, 3, 12, 16, 20)] == pytest.approx(
        [1, 1, 1, 0.6, 0.2]
    )


def test_no_warmup_begins_at_the_peak_and_a_run_of_one_step_is_fine():
    optim = OptimConfig(lr=1.0, warmup_frac=0.0, schedule="linear", final_lr_frac=0.5)
    assert lr_at(1, 1, optim) == pytest.approx(0.5)
    assert lr_at(1, 2, optim) == pytest.approx(0.75)
    assert lr_at(1, 1, OptimConfig(lr=1.0, warmup_frac=1.0)) == 1.0


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
    optim = OptimConfig(optimizer="muon", lr=1e-3, muon_lr=0.02, warmup_frac=0.1)
    optimizers = build_optimizers(tiny_model(), optim, torch.float32)
    # The fifth of ten steps of warm-up.
    set_lr(optimizers, 5, 100, optim)
    rates = [{group["lr"] for group in optimizer.param_groups} for optimizer in optimizers]
    assert rates == [{5e-4}, {0.01}]
