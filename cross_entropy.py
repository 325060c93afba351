"""The loss of a large vocabulary, a few hundred rows at a time."""

import functools

import torch
from torch import Tensor

# Targets of this value carry no loss; they fill up a validation batch to its fixed shape.
IGNORED = -1


def soft_capped(logits: Tensor, cap: float) -> Tensor:
    """Return logits bent to stay between -cap and cap: x / sqrt(1 + (x / cap)^2).

    Gemma 2 (2024) bends by a hyperbolic tangent; this curve costs a reciprocal root instead.
    """
    return logits * (logits / cap).square().add(1).rsqrt()


def chunked_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, softcap: float = 0.0
) -> Tensor:
    """Return the mean of -log softmax(x @ weight.T)[target], float32, over targets not IGNORED.

    x is (N, C), weight (at least vocab_size rows, C), targets (N,). Rows of `weight` past
    vocab_size take no part. Logits pass through `soft_capped` if `softcap` is not 0. Under autocast
    the products are in its dtype; the log-softmax is always float32. Logits exist for a few hundred
    rows at a time, and their gradient is taken in the same pass, so neither a matrix of N x 50,257
    is kept nor a product done twice.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        wants_grad = torch.is_grad_enabled()
        return _ChunkedCrossEntropy.apply(x, weight, targets, vocab_size, softcap, wants_grad)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, softcap, wants_grad):
        scored = targets != IGNORED
        scale = 1 / scored.sum().clamp(min=1)
        total = torch.zeros((), device=x.device)
        dx = torch.empty_like(x) if wants_grad else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if wants_grad else None
        chunk = 512 if x.device.type == "cpu" else 8192
        for rows in (slice(start, start + chunk) for start in range(0, len(x), chunk)):
            logp, dlogits = _log_softmax(
                x[rows], weight, targets[rows], vocab_size, softcap, wants_grad
            )
            total = total - torch.where(scored[rows], logp, 0).sum()
            if wants_grad:
                keep = scored[rows, None].to(x.dtype)
                dx[rows] = (dlogits @ weight) * (keep * scale).to(x.dtype)
                dweight += dlogits.T @ (x[rows] * keep)
        ctx.save_for_backward(dx, dweight, scale)
        return total * scale

    @staticmethod
    def backward(ctx, dloss):
        dx, dweight, scale = ctx.saved_tensors
        return dx * dloss.to(dx.dtype), dweight * (dloss * scale), None, None, None, None


def _log_softmax(x, weight, targets, vocab_size, softcap, wants_grad):
    """Return log p(target), float32 (rows,), and its negated gradient by the logits, or None."""
    on_cpu = x.device.type == "cpu"
    # On a CPU, 128 rows of 50,304 float32 still fit the last-level cache.
    step = min(128, len(x)) if on_cpu else len(x)
    buffer = _scratch("logits", step, weight, torch.float32)
    slope = _scratch("slope", step, weight, torch.float32) if softcap else None
    dlogits = _scratch("gradient", len(x), weight, weight.dtype) if wants_grad else None
    logps = []
    for rows in (slice(start, start + step) for start in range(0, len(x), step)):
        probs = buffer[: len(targets[rows])]
        probs.copy_(x[rows] @ weight.T)
        if softcap:
            _soft_cap_(probs, softcap, slope[: len(probs)])
        probs[:, vocab_size:] = -torch.inf
        target = targets[rows].clamp(min=0)[:, None]
        top = probs.amax(1, keepdim=True)
        above = probs.gather(1, target) - top
        torch.softmax(probs, 1, out=probs)
        # The likeliest id's probability is 1 / sum(exp(logit - top)), and never underflows.
        logp = (above + probs.amax(1, keepdim=True).log())[:, 0]
        logps.append(logp)
        if wants_grad:
            if softcap:
                probs *= slope[: len(probs)]
            dlogits[rows] = probs
            # Softmax minus one-hot; the difference at the target is taken before rounding.
            each = torch.arange(len(target), device=x.device)
            at_target = torch.expm1(logp)
            if softcap:
                at_target *= slope[each, target[:, 0]]
            dlogits[rows][each, target[:, 0]] = at_target.to(weight.dtype)
    return torch.cat(logps), dlogits


def _soft_cap_(logits, cap, slope):
    """Bend float32 logits in place as `soft_capped` does, and set `slope` to that of the bend."""
    one = logits.new_ones(())
    # A few passes over a few rows stay in a CPU core's own cache.
    step = 32 if logits.device.type == "cpu" else len(logits)
    for x, root in zip(logits.split(step), slope.split(step), strict=True):
        torch.addcmul(one, x, x, value=cap**-2, out=root)
        root.rsqrt_()
        x *= root
        root.pow_(3)


def _scratch(use, rows, weight, dtype):
    """Return memory for (rows, len(weight)) numbers; on a CPU the same one for the same `use`.

    A CPU program that gives tens of megabytes back to the system and asks for them again spends a
    tenth of its time on fresh pages.
    """
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return weight.new_empty(rows, len(weight), dtype=dtype)
    return _kept_memory(use, rows, len(weight), dtype)


# Three uses, each with another shape where the last rows do not fill a chunk.
@functools.lru_cache(maxsize=6)
@torch.inference_mode(False)
def _kept_memory(use, rows, columns, dtype):
    return torch.empty(rows, columns, dtype=dtype)
