"""The chunked cross-entropy is PyTorch's plain one in float64: values, gradients, padding, cap."""

import pytest
import torch
import torch.nn.functional as F

from loss import IGNORE_INDEX, cross_entropy, softcap
from tests.small_models import CONTEXT, VOCAB, config_of, random_ids, shaken

IDS, PADDED, WIDTH = 61, 128, 24


def plain(x, weight, targets, cap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """All logits of the real vocabulary at once, in float64, and PyTorch's own derivatives."""
    logits = x.double() @ weight[:IDS].double().T
    if cap:
        logits = logits / torch.sqrt(1 + (logits / cap) ** 2)
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    return losses.sum() / (targets != IGNORE_INDEX).sum().clamp(min=1), losses


def example(rows: int, ignored: float = 0.0):
    """Return states (rows, WIDTH), a head (PADDED, WIDTH) and targets whose logits reach 20."""
    torch.manual_seed(rows)
    x = torch.randn(rows, WIDTH, requires_grad=True)
    weight = (1.2 * torch.randn(PADDED, WIDTH)).requires_grad_()
    targets = torch.randint(IDS, (rows,))
    targets[0], targets[-1] = 0, IDS - 1
    targets[torch.rand(rows) < ignored] = IGNORE_INDEX
    return x, weight, targets


# A chunk is 256 rows on a CPU, a block of it 32: whole ones, one more, one less.
@pytest.mark.parametrize("rows", [1, 33, 255, 256, 257, 700])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
@pytest.mark.parametrize("cap", [0.0, 5.0, 15.0])
def test_loss_and_gradients_equal_plain_cross_entropy_in_float64(rows, ignored, cap):
    x, weight, targets = example(rows, ignored)
    expected, expected_losses = plain(x, weight, targets, cap)
    expected_grads = torch.autograd.grad(expected, [x, weight])
    loss, token_losses = cross_entropy(x, weight, targets, IDS, cap)
    assert loss.dtype == token_losses.dtype == torch.float32 and not token_losses.requires_grad
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(token_losses.double(), expected_losses, atol=1e-5, rtol=1e-5)
    # Scaled as an accumulated loss is, to see that the incoming gradient counts.
    grads = torch.autograd.grad(loss / 3, [x, weight])
    for grad, plain_grad in zip(grads, expected_grads, strict=True):
        difference = (3 * grad - plain_grad).abs().max()
        assert difference <= 1e-7 + 1e-5 * plain_grad.abs().max()
    with torch.no_grad():
        again = cross_entropy(x, weight, targets, IDS, cap)
    assert again[0].item() == loss.item() and torch.equal(again[1], token_losses)


def test_loss_of_only_ignored_targets_is_zero():
    x, weight, targets = example(40, ignored=1.0)
    targets[:] = IGNORE_INDEX
    loss, token_losses = cross_entropy(x, weight, targets, IDS)
    loss.backward()
    assert loss.item() == token_losses.abs().max() == 0
    assert (x.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_padding_takes_no_part(cap):
    x, weight, targets = example(300)
    found = []
    for filling in (0.0, 1e3, 1e30):
        with torch.no_grad():
            weight[IDS:] = filling
        loss, _ = cross_entropy(x, weight, targets, IDS, cap)
        found.append([loss.detach(), *torch.autograd.grad(loss, [x, weight])])
    for loss, dx, dweight in found:
        assert (dweight[IDS:] == 0).all() and (dweight[:IDS] != 0).any(dim=1).all()
        assert all(map(torch.equal, (loss, dx, dweight), found[0]))


@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_and_float32_inside(dtype, cap):
    x, weight, targets = example(300, 0.3)
    expected, _ = plain(x, weight, targets, cap)
    expected_grads = torch.autograd.grad(expected, [x, weight])
    with torch.autocast("cpu", dtype=dtype):
        loss, _ = cross_entropy(x, weight, targets, IDS, cap)
    assert loss.dtype == torch.float32 and loss.item() != expected.item()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    # A loss scale comes before anything is rounded to half precision.
    grads = torch.autograd.grad(1024 * loss, [x, weight])
    for grad, plain_grad in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.float32
        assert (grad / 1024 - plain_grad).norm() < 0.02 * plain_grad.norm()


def test_the_gradient_cannot_be_taken_twice():
    """It is scaled in place, so a second backward pass must not pass unnoticed."""
    x, weight, targets = example(5)
    loss, _ = cross_entropy(x, weight, targets, IDS)
    (3 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (3 * loss).backward()


def test_capped_logits_keep_their_order_and_their_bounds():
    x = torch.linspace(-400, 400, 801)
    bent = softcap(x, 15.0)
    assert (bent.diff() >= 0).all() and bent.abs().max() < 15.0 + 1e-5
    assert torch.equal(bent, -bent.flip(0))
    torch.testing.assert_close(softcap(x / 1e4, 15.0), x / 1e4, rtol=1e-5, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_a_models_logits_and_losses_are_capped_alike(tied):
    parts = {"architecture": "modern", "bias": False, "logit_softcap": 5.0}
    model = shaken(config_of(**parts, tie_embeddings=tied))
    idx = random_ids(4, CONTEXT)
    model.head_weight.mul_(4)
    logits, _ = model(idx)
    raw = model.hidden(idx) @ model.head_weight[:VOCAB].T
    assert raw.abs().max() > 5 > logits.abs().max()
    torch.testing.assert_close(logits, raw / torch.sqrt(1 + (raw / 5) ** 2))
    targets = idx.flip(1)
    targets[0, :3] = IGNORE_INDEX
    token_losses, loss = model(idx, targets, return_token_losses=True)
    expected = F.cross_entropy(logits.mT, targets, reduction="none")
    torch.testing.assert_close(token_losses, expected)
    torch.testing.assert_close(loss, expected.sum() / (targets != IGNORE_INDEX).sum())
