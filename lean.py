"""Layers that keep less for the backward pass, on a CPU; their numbers are the ordinary layers'.

A linear layer under autocast keeps its weights twice, and GELU both what it reads and what it
writes. Here the second of each is made again when it is needed, which costs less than fetching
memory for it. The gradients of a head and an embedding that share one matrix are summed in it.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def applies_to(x: Tensor) -> bool:
    """Say whether these layers are to be used: on a CPU, where a backward pass may follow."""
    return x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling()


class Linear(nn.Linear):
    """`nn.Linear`, by a name of its own so that it can also apply GELU to what it reads."""

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """Return x (..., in) or its GELU, tanh-approximated, times the weight's transpose."""
        if applies_to(x):
            dtype = x.dtype
            if torch.is_autocast_enabled("cpu"):
                dtype = torch.get_autocast_dtype("cpu")
            return _Linear.apply(x.to(dtype), self.weight, self.bias, gelu)
        return F.linear(F.gelu(x, approximate="tanh") if gelu else x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.gelu, ctx.has_bias = gelu, bias is not None
        bias = None if bias is None else bias.to(x.dtype)
        with torch.autocast("cpu", enabled=False):
            return F.linear(_read(x, gelu), _in(x.dtype, weight), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        rows, inputs = dy.flatten(0, -2), _read(x, ctx.gelu).flatten(0, -2)
        dweight = torch.empty_like(weight)
        if dy.dtype == weight.dtype:
            torch.mm(rows.T, inputs, out=dweight)
        else:
            product = scratch("product", weight.shape, dy.device, dy.dtype)
            dweight.copy_(torch.mm(rows.T, inputs, out=product))
        dbias = rows.sum(0).to(weight.dtype) if ctx.has_bias else None
        dx = dy @ _in(dy.dtype, weight)
        if ctx.gelu:
            torch.ops.aten.gelu_backward.grad_input(dx, x, approximate="tanh", grad_input=dx)
        return dx, dweight, dbias, None


def _read(x: Tensor, gelu: bool) -> Tensor:
    """Return what the layer multiplies: its input, or the GELU of that, until the next call."""
    if not gelu:
        return x
    return torch.ops.aten.gelu.out(
        x, approximate="tanh", out=scratch("gelu", x.shape, x.device, x.dtype)
    )


def _in(dtype: torch.dtype, weight: Tensor) -> Tensor:
    """Return the weight in the dtype of the products, until the next call."""
    if dtype == weight.dtype:
        return weight
    return scratch("weight", weight.shape, weight.device, dtype).copy_(weight)


# Bytes by use.
_memory: dict[str, Tensor] = {}


@torch.inference_mode(False)
def scratch(use: str, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return memory for a tensor; on a CPU the same for the same `use`, the next time too.

    A CPU program that gives megabytes back to the system and asks for them again spends much of its
    time on fresh pages, and what it leaves between those that stay is too small for others.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return torch.empty(shape, device=device, dtype=dtype)
    size = math.prod(shape) * dtype.itemsize
    if use not in _memory or _memory[use].nbytes < size:
        _memory[use] = torch.empty(size, dtype=torch.uint8)
    return _memory[use][:size].view(dtype).view(*shape)


class SharedGradient:
    """Where a head leaves the gradient of its matrix for the embedding that shares it."""

    matrix: Tensor | None = None


def embedding(idx: Tensor, weight: Tensor, shared: SharedGradient) -> Tensor:
    """Return rows (B, T, C) of `weight`, whose gradient is added to the one that `shared` holds.

    The backward pass comes to the embedding last. Two gradients of their own, of which this one is
    zero in all but a few rows, would have to be cleared, fetched and added up.
    """
    return _Embedding.apply(idx, weight, shared)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, idx: Tensor, weight: Tensor, shared: SharedGradient) -> Tensor:
        ctx.save_for_backward(idx, weight)
        ctx.shared = shared
        return F.embedding(idx, weight)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple:
        idx, weight = ctx.saved_tensors
        dweight, ctx.shared.matrix = ctx.shared.matrix, None
        if dweight is None:
            dweight = torch.zeros_like(weight)
        dweight.index_add_(0, idx.flatten(), dx.flatten(0, -2))
        return None, dweight, None
