"""The soft-cap: in the chunked loss, in logits, and in scores, against plain PyTorch."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cross_entropy import IGNORED, chunked_cross_entropy, soft_capped
from distributed import World
from packing import plan
from scoring import Scorer
from tests.small_models import CONTEXT, VOCAB, config_of, random_ids, shaken
from tests.test_scoring import VOCAB as SCORED_VOCAB
from tests.test_scoring import assert_same, mixed_requests, plain, score

IDS, PADDED, WIDTH = 61, 128, 24
SOFTCAPPED = {"architecture": "modern", "bias": False, "softcap": 5.0}


def plain_loss(x, weight, targets, cap: float) -> torch.Tensor:
    """All logits of the real vocabulary at once, in float32, and PyTorch's own derivatives."""
    logits = (x @ weight[:IDS].T).float()
    if cap:
        logits = logits / torch.sqrt(1 + (logits / cap) ** 2)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED)


def example(rows: int, ignored: float = 0.0):
    """Return states (rows, WIDTH), a head (PADDED, WIDTH) and targets whose logits reach 20."""
    torch.manual_seed(rows)
    x = torch.randn(rows, WIDTH, requires_grad=True)
    weight = (1.2 * torch.randn(PADDED, WIDTH)).requires_grad_()
    targets = torch.randint(IDS, (rows,))
    targets[torch.rand(rows) < ignored] = IGNORED
    return x, weight, targets


# A chunk is 512 rows, a piece of it 128. 256 and 768 rows leave half a chunk of two pieces.
@pytest.mark.parametrize("rows", [1, 65, 128, 129, 256, 384, 512, 700, 768])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("cap", [0.0, 5.0, 15.0])
def test_loss_and_gradients_equal_the_plain_ones(rows, ignored, cap):
    x, weight, targets = example(rows, ignored)
    if rows > 1:
        targets[0], targets[-1] = 0, IDS - 1
    expected = plain_loss(x, weight, targets, cap)
    expected_grads = torch.autograd.grad(expected, [x, weight])
    loss = chunked_cross_entropy(x, weight, targets, IDS, cap)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    # Scaled as an accumulated loss is.
    grads = torch.autograd.grad(loss / 3, [x, weight])
    for grad, plain_grad in zip(grads, expected_grads, strict=True):
        difference = (3 * grad - plain_grad).abs().max()
        assert difference <= 1e-7 + 1e-5 * plain_grad.abs().max()
    with torch.no_grad():
        assert chunked_cross_entropy(x, weight, targets, IDS, cap).item() == loss.item()


def test_no_cap_is_as_if_there_were_none_bit_for_bit():
    x, weight, targets = example(700, 0.3)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            losses = [chunked_cross_entropy(x, weight, targets, IDS, *cap) for cap in ((), (0.0,))]
        assert torch.equal(*losses)
        if grad:
            a, b = (torch.autograd.grad(loss, [x, weight]) for loss in losses)
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_padding_takes_no_part(cap):
    x, weight, targets = example(300)
    losses, grads = [], []
    for filling in (0.0, 1e3, 1e30):
        with torch.no_grad():
            weight[IDS:] = filling
        losses.append(chunked_cross_entropy(x, weight, targets, IDS, cap))
        grads.append(torch.autograd.grad(losses[-1], [x, weight]))
    assert losses[0].item() == losses[1].item() == losses[2].item()
    for dx, dweight in grads:
        assert (dweight[IDS:] == 0).all() and torch.equal(dweight, grads[0][1])
        assert torch.equal(dx, grads[0][0])


def test_bfloat16_is_close_to_float32():
    x, weight, targets = example(300, 0.3)
    expected = plain_loss(x, weight, targets, 5.0)
    expected_grads = torch.autograd.grad(expected, [x, weight])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(x, weight, targets, IDS, 5.0)
    assert loss.dtype == torch.float32 and loss.item() != expected.item()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    grads = torch.autograd.grad(loss, [x, weight])
    for grad, plain_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - plain_grad).norm() < 0.02 * plain_grad.norm()


def test_capped_logits_keep_their_order_and_their_bounds():
    x = torch.linspace(-400, 400, 801)
    bent = soft_capped(x, 15.0)
    assert (bent.diff() >= 0).all() and bent.abs().max() < 15.0 + 1e-5
    assert torch.equal(bent, -bent.flip(0))
    torch.testing.assert_close(soft_capped(x / 1e4, 15.0), x / 1e4, rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_models_logits_and_loss_are_capped_alike(tied):
    model, idx = shaken(config_of(**SOFTCAPPED, tied=tied)), random_ids(4, CONTEXT)
    head = (model.wte if tied else model.lm_head).weight
    head *= 4
    logits, _ = model(idx)
    raw = model.hidden(idx) @ head[:VOCAB].T
    assert raw.abs().max() > 5 > logits.abs().max()
    torch.testing.assert_close(logits, raw / torch.sqrt(1 + (raw / 5) ** 2))
    _, loss = model(idx, idx.flip(1))
    torch.testing.assert_close(loss, F.cross_entropy(logits.mT, idx.flip(1)))


@pytest.mark.parametrize(
    "parts",
    [
        {**SOFTCAPPED, "tied": True},
        {**SOFTCAPPED, "tied": False},
        {**SOFTCAPPED, "tied": False, "softcap": 0.0},
        {**SOFTCAPPED, "positions": "rotary", "qk_norm": True, "value_residual": True},
    ],
)
def test_scores_are_those_of_the_capped_logits(parts):
    config = config_of(**parts, n_embd=32, block_size=64, vocab_size=SCORED_VOCAB)
    model, requests = shaken(config), mixed_requests(30)
    model.head_weight.data *= 4
    expected = [plain(model, request) for request in requests]
    assert_same(score(model, requests), expected, 1e-4)
    # Numbers of ordinary size, that a cap has moved.
    assert -20 < np.mean([np.mean(s.logprobs / s.tokens) for s in expected]) < -3
    laid_out = plan(requests, 64, 512, SCORED_VOCAB)
    rounded = Scorer(model, World(0, 1, torch.device("cpu")), torch.bfloat16).score(laid_out)
    for a, b in zip(rounded, expected, strict=True):
        assert (np.abs(a.logprobs - b.logprobs) / a.tokens).max() < 0.25
