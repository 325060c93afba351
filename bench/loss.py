"""The chunked loss against the ordinary one: whole logits, then `F.cross_entropy`.

    python -m bench.loss [--width 128 768] [--dtype bfloat16]

Forward and backward over 4,096 rows and GPT-2's vocabulary, in the same arithmetic.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.processes import alone
from bench.record import report
from loss import cross_entropy
from training.distributed import autocast, synchronize
from utils import parse, run_script

VOCAB_SIZE, PADDED = 50257, 50304


@dataclass(frozen=True)
class Options:
    width: tuple[int, ...] = (128, 768)
    """Channels of the states."""
    rows: int = 4096
    """Tokens in the batch."""
    repeats: int = 5
    """Measurements of each, taken in turn; their medians are compared."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Arithmetic of the products."""
    device: Literal["cpu", "cuda", "mps", "auto"] = "auto"
    """Where to compute."""


def main() -> None:
    """Print one JSON line a width."""
    options = parse(Options)
    device, dtype = alone(options.device).device, getattr(torch, options.dtype)
    for width in options.width:
        x = torch.randn(options.rows, width, device=device, requires_grad=True)
        weight = (0.02 * torch.randn(PADDED, width, device=device)).requires_grad_()
        targets = torch.randint(VOCAB_SIZE, (options.rows,), device=device)
        ours, plain = [], []
        for _ in range(options.repeats + 1):
            with autocast(device, dtype):
                ours.append(rows_per_second(chunked, x, weight, targets))
                plain.append(rows_per_second(whole, x, weight, targets))
        # The first of each warms up.
        report(f"loss, width {width}, {options.dtype}", "rows/s", ours[1:], plain[1:])


def chunked(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the loss as this project computes it."""
    return cross_entropy(x, weight, targets, VOCAB_SIZE)[0]


def whole(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the loss as it is usually written."""
    return F.cross_entropy(F.linear(x, weight)[:, :VOCAB_SIZE].float(), targets)


def rows_per_second(loss: Callable[..., Tensor], x: Tensor, weight: Tensor, t: Tensor) -> float:
    """Return the speed of one forward and backward pass."""
    synchronize(x.device)
    start = time.perf_counter()
    loss(x, weight, t).backward()
    synchronize(x.device)
    seconds = time.perf_counter() - start
    x.grad = weight.grad = None
    return len(x) / seconds


if __name__ == "__main__":
    run_script(main)
