"""modern.py, each part on and off, against plain formulas; and what its optimizers do with it."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import ModelConfig, OptimConfig
from model import GPT
from modern import ModernGPT, build_model
from sample import generate
from tests.small_models import (
    CONTEXT,
    VOCAB,
    assert_sound,
    config_of,
    largest_difference,
    random_ids,
    shaken,
)
from training.muon import Muon
from training.optim import build_optimizers, momentum_at, set_lr

ALL = {
    "architecture": "modern",
    "bias": False,
    "pos_emb": "rope",
    "norm": "rmsnorm",
    "activation": "relu2",
    "qk_norm": True,
    "zero_init_proj": True,
    "x0_residual": True,
    "value_residual": True,
    "logit_softcap": 4.0,
}
NONE = {"architecture": "modern", "bias": False}
VARIANTS = {
    "all": {},
    "untied": {"tie_embeddings": False},
    "learned positions": {"pos_emb": "learned"},
    "layernorm": {"norm": "layernorm"},
    "gelu": {"activation": "gelu"},
    "swiglu": {"activation": "swiglu"},
    "no qk_norm": {"qk_norm": False},
    "no zero_init_proj": {"zero_init_proj": False},
    "no x0_residual": {"x0_residual": False},
    "no value_residual": {"value_residual": False},
    "no softcap": {"logit_softcap": 0.0},
    "document mask": {"document_mask": True},
    "three layers, untied, masked": {"n_layer": 3, "tie_embeddings": False, "document_mask": True},
}
each_variant = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def plain_modern(model: ModernGPT, idx: Tensor) -> Tensor:
    """Return the logits (B, T, V) by formulas as they stand in the papers."""
    c, w = model.config, dict(model.named_parameters())
    batch, length = idx.shape
    size = c.n_embd // c.n_head

    def norm(x, eps=1e-5):
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()

    def rotate(x):
        angles = torch.arange(length)[:, None] / 10_000 ** (torch.arange(0, size, 2) / size)
        pairs = torch.complex(x[..., : size // 2], x[..., size // 2 :])
        pairs = pairs * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], -1)

    sees = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, 1, -1, -1)
    if c.document_mask:
        document = (idx == c.vocab_size - 1).cumsum(1)
        sees = sees & (document[:, None, :, None] == document[:, None, None, :])
    x = w["wte.weight"][idx]
    if c.pos_emb == "learned":
        x = x + w["wpe.weight"][:length]
    x = x0 = norm(x)
    for i in range(c.n_layer):
        if c.x0_residual:
            kept, again = w[f"h.{i}.mix"]
            x = kept * x + again * x0
        q, k, v = (
            (norm(x) @ part.T).view(batch, length, c.n_head, size).transpose(1, 2)
            for part in w[f"h.{i}.attn.c_attn.weight"].chunk(3)
        )
        if i == 0:
            first = v
        elif c.value_residual:
            v = v + w[f"h.{i}.attn.value_mix"] * (first - v)
        if c.qk_norm:
            q, k = (heads / heads.square().mean(-1, keepdim=True).sqrt() for heads in (q, k))
        if c.pos_emb == "rope":
            q, k = rotate(q), rotate(k)
        weights = (q @ k.mT / math.sqrt(size)).masked_fill(~sees, -torch.inf).softmax(-1)
        found = (weights @ v).transpose(1, 2).reshape(batch, length, c.n_embd)
        x = x + found @ w[f"h.{i}.attn.c_proj.weight"].T
        hidden = norm(x) @ w[f"h.{i}.mlp.c_fc.weight"].T
        if c.activation == "relu2":
            hidden = hidden.clamp(min=0) ** 2
        elif c.activation == "swiglu":
            hidden = hidden * F.silu(norm(x) @ w[f"h.{i}.mlp.c_gate.weight"].T)
        else:
            hidden = F.gelu(hidden, approximate="tanh")
        x = x + hidden @ w[f"h.{i}.mlp.c_proj.weight"].T
    head = w["wte.weight"] if c.tie_embeddings else w["lm_head.weight"]
    logits = norm(x) @ head[: c.vocab_size].T
    return logits / torch.sqrt(1 + (logits / c.logit_softcap) ** 2) if c.logit_softcap else logits


@torch.no_grad()
@each_variant
def test_logits_and_loss_are_those_of_the_plain_model(changes):
    model = shaken(config_of(**{**ALL, **changes}))
    idx, targets = random_ids(3, CONTEXT, eots=(0, 6)), random_ids(3, CONTEXT, seed=1)
    expected = plain_modern(model, idx)
    assert largest_difference(model(idx)[0], expected) < 2e-5
    plain_loss = F.cross_entropy(expected.mT, targets)
    torch.testing.assert_close(model(idx, targets)[1], plain_loss)


@each_variant
def test_every_variant_is_sound(changes):
    assert_sound(shaken(config_of(**{**ALL, **changes})))


def test_with_no_part_on_it_is_sound():
    assert_sound(shaken(config_of(**NONE)))


@pytest.mark.parametrize("part", ["qk_norm", "x0_residual", "value_residual", "logit_softcap"])
def test_every_part_changes_the_logits(part):
    """Both models have the same matrices; numbers of their own are drawn after these."""
    model = shaken(config_of(**{**ALL, "logit_softcap": 1.0}))
    config = config_of(
        **{**ALL, "logit_softcap": 1.0, part: 0.0 if part == "logit_softcap" else False}
    )
    without = build_model(config).eval()
    without.load_state_dict({n: model.state_dict()[n] for n, _ in without.named_parameters()})
    idx = random_ids(2, CONTEXT)
    assert largest_difference(model(idx)[0], without(idx)[0]) > 1e-2


@torch.no_grad()
def test_with_zero_init_proj_every_block_begins_as_the_identity():
    idx = random_ids(2, CONTEXT)
    for zero_init_proj in (True, False):
        torch.manual_seed(0)
        model = build_model(config_of(**{**ALL, "zero_init_proj": zero_init_proj}))
        embedded = model.norm(model.norm(model.wte(idx)))
        assert (largest_difference(model.hidden(idx), embedded) < 1e-6) == zero_init_proj


@pytest.mark.parametrize("zero_init_proj", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_initial_weights_have_their_scales(zero_init_proj, tied):
    torch.manual_seed(0)
    sizes = {"n_layer": 3, "n_embd": 128, "n_head": 4, "vocab_size": 300}
    model = build_model(
        config_of(**{**ALL, **sizes, "zero_init_proj": zero_init_proj, "tie_embeddings": tied})
    )
    for name, parameter in model.named_parameters():
        if name.endswith(("mix", "value_mix")):
            assert parameter.tolist() == ([0.5] if name.endswith("value_mix") else [1, 0])
            continue
        if name == "wte.weight":
            assert (parameter[300:] == 0).all()
            parameter, std = parameter[:300], 0.02
        elif name == "lm_head.weight":
            std = 0.0
        else:
            std = 0.5 / math.sqrt(parameter.size(1))
            if name.endswith("c_proj.weight"):
                std *= 0.0 if zero_init_proj else 1 / math.sqrt(6)
        assert parameter.std().item() == pytest.approx(std, rel=0.03), name


# Muon and AdamW with rates of a run; the head and the embedding have rates of their own.
OPTIM = OptimConfig(
    optimizer="muon", lr=0.01, lm_head_lr=0.005, warmup_frac=0.0, momentum_warmup=0.5, beta2=0.9
)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"zero_init_proj": False}])
def test_a_few_steps_reach_every_parameter_and_leave_padding_alone(changes):
    torch.manual_seed(0)
    model = build_model(config_of(**{**ALL, **changes}))
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = build_optimizers(model, OPTIM, torch.float32)
    idx, losses = random_ids(4, CONTEXT + 1, eots=(0,)), []
    for step in range(1, 9):
        set_lr(optimizers, step, 8, OPTIM)
        _, loss = model(idx[:, :-1], idx[:, 1:])
        loss.backward()
        losses.append(loss.item())
        if step == 4:
            # What begins at zero holds back the gradients of what lies before it only at first.
            assert all((p.grad != 0).any() for _, p in model.named_parameters())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.15
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, initial[name]), name
    for weight in (model.wte.weight, model.head_weight):
        assert weight.shape == (128, 16) and (weight[VOCAB:] == 0).all()
    drawn = torch.stack(list(generate(model, idx[:, :3], 30, temperature=3.0)))
    assert drawn.max() < VOCAB


def test_a_tied_model_has_no_head():
    assert type(build_model(config_of())) is GPT
    model = build_model(config_of(**ALL))
    assert type(model) is ModernGPT
    assert model.head_weight is model.wte.weight
    names = [name for name, _ in model.named_parameters()]
    assert not any("head" in name for name in [*names, *model.state_dict()])
    untied = build_model(config_of(**ALL, tie_embeddings=False))
    assert untied.head_weight is untied.lm_head.weight


# The embedding, and the head; 4 + 8 squares of the width a layer; 2 numbers of every layer's mix,
# and one of every layer's values but the first.
@pytest.mark.parametrize(
    ("sizes", "tied", "expected"),
    [
        ((12, 12, 768), True, 50257 * 768 + 12 * 12 * 768**2 + 24 + 11),
        ((12, 12, 768), False, 2 * 50257 * 768 + 12 * 12 * 768**2 + 24 + 11),
        ((4, 4, 128), True, 50257 * 128 + 4 * 12 * 128**2 + 8 + 3),
        ((4, 4, 128), False, 2 * 50257 * 128 + 4 * 12 * 128**2 + 8 + 3),
    ],
)
def test_parameter_counts(sizes, tied, expected):
    config = ModelConfig(*sizes, **ALL, tie_embeddings=tied)
    with torch.device("meta"):
        model = build_model(config)
    in_memory = sum(parameter.numel() for parameter in model.parameters())
    padding = (config.padded_vocab_size - 50257) * config.n_embd * (1 if tied else 2)
    assert in_memory - padding == config.num_params == expected
    golden = {True: 123_532_067, False: 162_129_443}
    assert config.n_embd != 768 or expected == golden[tied]


def test_muon_takes_the_matrices_of_the_blocks_only():
    model = build_model(config_of(**ALL, tie_embeddings=False))
    names = {p: name for name, p in model.named_parameters()}
    adamw, muon = build_optimizers(model, OPTIM, torch.float32)
    assert isinstance(muon, Muon)
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    expected = {f"h.{layer}.{matrix}.weight" for layer in range(2) for matrix in matrices}
    assert {names[p] for group in muon.param_groups for p in group["params"]} == expected
    set_lr([adamw, muon], 8, 8, OPTIM)
    decay, rate = {}, {}
    for group in adamw.param_groups:
        for parameter in group["params"]:
            decay[names[parameter]] = group["weight_decay"]
            rate[names[parameter]] = group["lr"]
    mixes = {"h.0.mix", "h.1.mix", "h.1.attn.value_mix"}
    assert decay == {"wte.weight": 0.1, "lm_head.weight": 0.1, **dict.fromkeys(mixes, 0.0)}
    # The last step has a tenth of the peak rate.
    peaks = {"wte.weight": 0.01, "lm_head.weight": 0.005, **dict.fromkeys(mixes, 0.01)}
    assert rate == pytest.approx({name: peak / 10 for name, peak in peaks.items()})
    assert all(group["lr"] == pytest.approx(0.002) for group in muon.param_groups)


def test_a_head_has_the_embeddings_rate_unless_it_is_given():
    optim = OptimConfig(lr=0.01, warmup_frac=0.0)
    optimizers = build_optimizers(
        build_model(config_of(**ALL, tie_embeddings=False)), optim, torch.float32
    )
    set_lr(optimizers, 1, 1, optim)
    assert all(group["lr"] == pytest.approx(0.001) for group in optimizers[0].param_groups)


def test_momentum_rises_and_then_stays():
    optim = OptimConfig(optimizer="muon", muon_momentum=0.95, momentum_warmup=0.1)
    golden = {1: 0.852, 25: 0.9, 50: 0.95, 51: 0.95, 500: 0.95}
    for step, momentum in golden.items():
        assert momentum_at(step, 500, optim) == pytest.approx(momentum)
    assert momentum_at(1, 500, OptimConfig(muon_momentum=0.9)) == 0.9
    assert momentum_at(1, 1, optim) == 0.95
    _, muon = optimizers = build_optimizers(build_model(config_of(**ALL)), optim, torch.float32)
    set_lr(optimizers, 25, 500, optim)
    assert muon.momentum == pytest.approx(0.9)


@torch.no_grad()
def test_bfloat16_is_close_to_float32_and_a_cache_of_it_to_the_whole():
    model, idx = shaken(config_of(**ALL)), random_ids(2, CONTEXT, eots=(0,))
    exact, _ = model(idx)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded, _ = model(idx)
        drawn = list(generate(model, idx[:, :5], 8, temperature=0))
    assert 0 < largest_difference(rounded.float(), exact) < 0.2
    assert len(drawn) == 8


def test_compiled_is_eager():
    """Traced, differentiated and run without a C++ compiler, which would take most of a minute."""
    idx = random_ids(2, CONTEXT + 1)
    model = shaken(config_of(**ALL, tie_embeddings=False))
    grads = []
    for module in (model, torch.compile(model, dynamic=False, backend="aot_eager")):
        model.zero_grad()
        _, loss = module(idx[:, :-1], idx[:, 1:])
        loss.backward()
        grads.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for eager, compiled in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)
