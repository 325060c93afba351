"""The layers that keep less: numbers and gradients of the ordinary ones, and less memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lean
from config import ModelConfig
from cross_entropy import chunked_cross_entropy
from lean import Linear, SharedGradient, embedding, scratch
from modern import build_model
from tests.small_models import CONTEXT, VOCAB


def gradients(layer: nn.Linear, x: torch.Tensor, gelu: bool, dtype: torch.dtype):
    """Return output and gradients of a layer's input, weight and bias, under autocast or not."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        if isinstance(layer, Linear):
            y = layer(x, gelu=gelu)
        else:
            x16 = x.to(dtype)
            y = layer(F.gelu(x16, approximate="tanh") if gelu else x16)
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y, x.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lean_layer_is_the_ordinary_one_bit_for_bit(dtype, gelu, bias):
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias)
    layer = Linear(24, 40, bias=bias)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(3, 5, 24)
    expected, found = gradients(plain, x, gelu, dtype), gradients(layer, x, gelu, dtype)
    assert all(map(torch.equal, expected, found))
    with torch.no_grad():
        assert torch.equal(layer(x, gelu=gelu), plain(F.gelu(x, approximate="tanh") if gelu else x))


def test_layers_that_share_their_scratch_do_not_disturb_each_other():
    """Two layers one after the other, of the same and of other shapes, and again."""
    torch.manual_seed(0)
    layers = [Linear(16, 16), Linear(16, 48), Linear(48, 16)]
    x = torch.randn(7, 16)

    def passed():
        y = x
        for layer in layers:
            layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            for layer in layers:
                y = layer(y, gelu=True)
        y.float().square().sum().backward()
        return [p.grad.clone() for layer in layers for p in layer.parameters()]

    first = passed()
    scratch("gelu", (100, 100), torch.device("cpu"), torch.float32).fill_(torch.nan)
    assert all(map(torch.equal, first, passed()))


@pytest.mark.parametrize("with_loss", [True, False])
def test_the_shared_gradient_is_the_sum_of_both(with_loss):
    torch.manual_seed(0)
    weight = torch.randn(VOCAB, 8, requires_grad=True)
    idx = torch.randint(0, 50, (3, 4))
    idx[0] = idx[1]
    targets = torch.randint(0, VOCAB, (12,))
    got = {}
    for name in ("plain", "shared"):
        shared = SharedGradient() if name == "shared" else None
        x = embedding(idx, weight, shared) if shared else F.embedding(idx, weight)
        loss = x.square().sum()
        if with_loss:
            x = x.flatten(0, 1)
            loss = loss + chunked_cross_entropy(x, weight, targets, VOCAB, shared=shared)
        loss.backward()
        got[name], weight.grad = weight.grad, None
        assert shared is None or shared.matrix is None
    torch.testing.assert_close(got["plain"], got["shared"])


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
def test_a_model_has_the_gradients_it_had(architecture, monkeypatch):
    """Two micro-batches, with and without the lean layers: tied heads add up as before."""
    parts = {"architecture": architecture, "bias": architecture == "gpt2"}
    config = ModelConfig(2, 2, 32, CONTEXT, VOCAB, **parts)
    torch.manual_seed(0)
    model = build_model(config)
    idx = torch.randint(0, VOCAB, (4, CONTEXT + 1))
    got = []
    for lean_ones in (True, False):
        monkeypatch.setattr(lean, "applies_to", lambda x, on=lean_ones: on)
        model.zero_grad()
        for batch in idx.split(2):
            with torch.autocast("cpu", torch.bfloat16):
                model(batch[:, :-1], batch[:, 1:])[1].backward()
        got.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in got[0].items():
        if name == "wte.weight":
            torch.testing.assert_close(grad, got[1][name])
        else:
            assert torch.equal(grad, got[1][name]), name


def test_nothing_is_kept_that_can_be_made_again():
    """A layer under autocast keeps its input, and neither the rounded weight nor GELU's result."""
    layer, x = Linear(64, 256), torch.randn(100, 64, dtype=torch.bfloat16, requires_grad=True)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        layer(x, gelu=True)
    # The weight itself is a parameter, which is there anyway.
    pointers = {t.data_ptr() for t in kept}
    assert pointers == {x.data_ptr(), layer.weight.data_ptr()}


def test_the_loss_gradient_cannot_be_taken_twice():
    """It is scaled in place, so a second backward pass must not pass unnoticed."""
    weight = torch.randn(VOCAB, 8, requires_grad=True)
    x, targets = torch.randn(5, 8), torch.randint(0, VOCAB, (5,))
    loss = chunked_cross_entropy(x, weight, targets, VOCAB)
    (3 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (3 * loss).backward()
