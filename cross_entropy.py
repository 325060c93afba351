"""The loss of a large vocabulary, a few hundred rows at a time."""

import torch
from torch import Tensor

from lean import SharedGradient, scratch

# Targets of this value carry no loss; they fill up a validation batch to its fixed shape.
IGNORED = -1


def soft_capped(logits: Tensor, cap: float) -> Tensor:
    """Return logits bent to stay between -cap and cap: x / sqrt(1 + (x / cap)^2).

    Gemma 2 (2024) bends by a hyperbolic tangent; this curve costs a reciprocal root instead.
    """
    return logits * (logits / cap).square().add(1).rsqrt()


def chunked_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    softcap: float = 0.0,
    shared: SharedGradient | None = None,
) -> Tensor:
    """Return the mean of -log softmax(x @ weight.T)[target], float32, over targets not IGNORED.

    x is (N, C), weight (at least vocab_size rows, C), targets (N,). Rows of `weight` past
    vocab_size take no part. Logits pass through `soft_capped` if `softcap` is not 0. Under autocast
    the products are in its dtype; the log-softmax is always float32. Logits exist for a few hundred
    rows at a time, and their gradient is taken in the same pass, so neither a matrix of N x 50,257
    is kept nor a product done twice. The gradient of `weight` is left in `shared`, if given, for
    the embedding that shares it.
    """
    return mean_and_losses(x, weight, targets, vocab_size, softcap, shared)[0]


def mean_and_losses(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    vocab_size: int,
    softcap: float = 0.0,
    shared: SharedGradient | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `chunked_cross_entropy`'s mean and, without gradient, every target's loss (N,).

    That of an IGNORED target is 0.
    """
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        wants_grad = torch.is_grad_enabled()
        return _ChunkedCrossEntropy.apply(
            x, weight, targets, vocab_size, softcap, shared, dtype, wants_grad
        )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, softcap, shared, dtype, wants_grad):
        ctx.shared = shared
        ctx.input_dtypes = x.dtype, weight.dtype
        x, weight = x.to(dtype), weight.to(dtype)
        scored = targets != IGNORED
        scale = 1 / scored.sum().clamp(min=1)
        total = torch.zeros((), device=x.device)
        losses = []
        dx = torch.empty_like(x) if wants_grad else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if wants_grad else None
        chunk = 256 if x.device.type == "cpu" else 8192
        for rows in (slice(start, start + chunk) for start in range(0, len(x), chunk)):
            logp, dlogits = _log_softmax(
                x[rows], weight, targets[rows], vocab_size, softcap, wants_grad
            )
            losses.append(-torch.where(scored[rows], logp, 0))
            total = total + losses[-1].sum()
            if wants_grad:
                keep = scored[rows, None].to(x.dtype)
                dx[rows] = (dlogits @ weight) * keep
                _add_product(dweight, dlogits, x[rows] * keep)
        ctx.save_for_backward(dx, dweight, scale)
        losses = torch.cat(losses)
        ctx.mark_non_differentiable(losses)
        return total * scale, losses

    @staticmethod
    def backward(ctx, dloss, _):
        dx, dweight, scale = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.input_dtypes
        # The mean's and the caller's factor come in float32 and last: in float16, gradients of a
        # mean over thousands of tokens would vanish before the caller's loss scale lifts them.
        factor = dloss * scale
        # In place, for nothing else needs this matrix and a second one as large is a tenth of a
        # step's memory.
        dweight = dweight.mul_(factor).to(weight_dtype)
        if ctx.shared is not None:
            ctx.shared.matrix, dweight = dweight, None
        return (dx.float() * factor).to(x_dtype), dweight, *[None] * 6


def _add_product(dweight, dlogits, x):
    """Add dlogits.T @ x to `dweight`, on a CPU two thousand ids at a time.

    Adding matrices of two dtypes makes a copy of the one in the other's dtype first.
    """
    step = 2048 if x.device.type == "cpu" else len(dweight)
    for start in range(0, len(dweight), step):
        ids = slice(start, start + step)
        dweight[ids] += dlogits[:, ids].T @ x


def _log_softmax(x, weight, targets, vocab_size, softcap, wants_grad):
    """Return log p(target), float32 (rows,), and its negated gradient by the logits, or None.

    The gradient takes the place of the logits in memory.
    """
    on_cpu = x.device.type == "cpu"
    # On a CPU, the products of 128 rows still fit the last-level cache, and 32 of them in float32
    # the cores' own, through which several passes go.
    step, pass_rows = (128, 32) if on_cpu else (len(x), len(x))
    logits = scratch("logits", (len(x), len(weight)), x.device, x.dtype)
    logps = []
    for start in range(0, len(x), step):
        stop = min(start + step, len(x))
        torch.mm(x[start:stop], weight.T, out=logits[start:stop])
        for first in range(start, stop, pass_rows):
            rows = slice(first, min(first + pass_rows, stop))
            logps.append(
                _softmax_rows(logits[rows], targets[rows], vocab_size, softcap, wants_grad)
            )
    return torch.cat(logps), logits if wants_grad else None


def _softmax_rows(logits, targets, vocab_size, softcap, wants_grad):
    """Return log p(target) of rows; if wanted, put its negated gradient in their logits' place."""
    probs = scratch("probs", logits.shape, logits.device, torch.float32)
    slope = scratch("slope", logits.shape, logits.device, torch.float32) if softcap else None
    probs.copy_(logits)
    if softcap:
        _soft_cap_(probs, softcap, slope)
    probs[:, vocab_size:] = -torch.inf
    target = targets.clamp(min=0)[:, None]
    top = probs.amax(1, keepdim=True)
    above = probs.gather(1, target) - top
    torch.softmax(probs, 1, out=probs)
    # The likeliest id's probability is 1 / sum(exp(logit - top)), and never underflows.
    logp = (above + probs.amax(1, keepdim=True).log())[:, 0]
    if wants_grad:
        if softcap:
            probs *= slope
        logits.copy_(probs)
        # Softmax minus one-hot; the difference at the target is taken before rounding.
        each = torch.arange(len(target), device=logits.device)
        at_target = torch.expm1(logp)
        if softcap:
            at_target *= slope[each, target[:, 0]]
        logits[each, target[:, 0]] = at_target.to(logits.dtype)
    return logp


def _soft_cap_(logits, cap, slope):
    """Bend float32 logits in place as `soft_capped` does, and set `slope` to that of the bend."""
    torch.addcmul(logits.new_ones(()), logits, logits, value=cap**-2, out=slope)
    slope.rsqrt_()
    logits *= slope
    slope.pow_(3)
