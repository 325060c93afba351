"""Cross-entropy of a large vocabulary, a few hundred tokens at a time.

Logits of a whole micro-batch would be the largest tensor of a training step: 64 x 1,024 tokens x
50,304 ids x 4 bytes = 13 GB. Here they exist for one chunk of tokens, and their gradient is taken
in the same pass, so they are neither kept nor computed twice. The test has the plain twin.
"""

import torch
from torch import Tensor

# Targets of this value carry no loss; they fill up a validation batch to its fixed shape.
IGNORE_INDEX = -100


def softcap(logits: Tensor, cap: float) -> Tensor:
    """Return logits bent to stay within +-cap: x / sqrt(1 + (x / cap)^2).

    Gemma 2 (2024) bends by a hyperbolic tangent; this curve costs a reciprocal root instead.
    """
    return logits * (logits / cap).square().add(1).rsqrt()


def cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, logit_softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the mean loss over targets that are not IGNORE_INDEX, and each token's, in nats.

    x (N, C), weight (at least vocab_size rows, C), targets (N,). Rows of `weight` past vocab_size
    are padding and take no part. The token losses (N,) carry no gradient and are 0 at IGNORE_INDEX.
    Under autocast the products are in its dtype; the log-softmax is always float32.
    """
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        # autograd.Function always runs forward without grad mode, so it has to be told.
        return _ChunkedCrossEntropy.apply(
            x, weight, targets, vocab_size, logit_softcap, dtype, torch.is_grad_enabled()
        )


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, cap, dtype, wants_grad):
        ctx.input_dtypes = x.dtype, weight.dtype
        x, weight = x.to(dtype), weight.to(dtype)
        scored = targets != IGNORE_INDEX
        scale = 1 / scored.sum().clamp(min=1)
        # A CPU takes the softmax of 32 rows at a time, which stay in its cache for all passes.
        on_cpu = x.device.type == "cpu"
        chunk, block = (256, 32) if on_cpu else (8192, 8192)
        dx = torch.empty_like(x) if wants_grad else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if wants_grad else None
        # One buffer for all chunks: fresh pages for each would cost a CPU a tenth of the step.
        buffer = None
        if on_cpu and not torch.compiler.is_compiling():
            buffer = x.new_empty(min(chunk, len(x)), len(weight))
        total, token_losses = torch.zeros((), device=x.device), []
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            out = None if buffer is None else buffer[: len(x[rows])]
            logits = torch.mm(x[rows], weight.T, out=out)  # (chunk, padded V)
            parts = zip(logits.split(block), targets[rows].split(block), strict=True)
            logp = torch.cat([_log_prob_(*part, vocab_size, cap, wants_grad) for part in parts])
            token_losses.append(-torch.where(scored[rows], logp, 0))
            total = total + token_losses[-1].sum()
            if wants_grad:
                dlogits, keep = logits, scored[rows, None].to(x.dtype)
                dx[rows] = (dlogits @ weight) * keep
                _add_product_(dweight, dlogits, x[rows] * keep)
        ctx.save_for_backward(dx, dweight, scale)
        token_losses = torch.cat(token_losses)
        ctx.mark_non_differentiable(token_losses)
        return total * scale, token_losses

    @staticmethod
    def backward(ctx, dloss, _):
        dx, dweight, scale = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.input_dtypes
        # The mean's and the caller's factor come in float32 and last: in float16, gradients of a
        # mean over thousands of tokens would vanish before the caller's loss scale lifts them.
        factor = dloss * scale
        # In place: a second matrix as large is a tenth of a step's memory.
        dweight = dweight.mul_(factor).to(weight_dtype)
        return (dx.float() * factor).to(x_dtype), dweight, *[None] * 5


def _log_prob_(logits, targets, vocab_size, cap, wants_grad):
    """Return log p(target), float32 (rows,); logits become the gradient of -log p if wanted."""
    probs = logits.float()  # the same memory in float32
    if cap:
        # The slope of the bend is the cube of its factor.
        factor = torch.addcmul(probs.new_ones(()), probs, probs, value=cap**-2).rsqrt_()
        probs = probs.mul_(factor)
        slope = factor.pow_(3)
    probs[:, vocab_size:] = -torch.inf
    target = targets.clamp(min=0)[:, None]
    top = probs.amax(1, keepdim=True)
    above = probs.gather(1, target) - top
    torch.softmax(probs, 1, out=probs)
    # The likeliest id's probability is 1 / sum(exp(logit - top)), and never underflows.
    logp = (above + probs.amax(1, keepdim=True).log())[:, 0]
    if wants_grad:
        # Softmax minus one-hot; the difference at the target is taken before rounding.
        probs.scatter_(1, target, torch.expm1(logp)[:, None])
        if cap:
            probs *= slope
        if probs.dtype != logits.dtype:
            logits.copy_(probs)
    return logp


def _add_product_(dweight, dlogits, x):
    """Add dlogits.T @ x to `dweight` (float32)."""
    if dlogits.dtype == dweight.dtype:
        dweight.addmm_(dlogits.T, x)
        return
    # Adding a matrix of another dtype copies it first, so on a CPU a few thousand ids at a time.
    step = 2048 if x.device.type == "cpu" else len(dweight)
    for start in range(0, len(dweight), step):
        ids = slice(start, start + step)
        dweight[ids] += dlogits[:, ids].T @ x
