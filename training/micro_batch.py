"""The largest micro-batch that fits, and eager where torch.compile fails: both found by trying."""

import contextlib

import torch
from torch import Tensor, nn

from config import Config, UserError, divisors, replace
from training.distributed import DistInfo, all_reduce_any, autocast, print0, to_local


def fit_micro_batch(
    config: Config,
    model: nn.Module,
    forward: nn.Module,
    tokens: Tensor,
    info: DistInfo,
    dtype: torch.dtype,
    halves: bool,
    reserves: bool,
) -> Config:
    """Return the config with a micro-batch that fits, halved if it may be, the same on all ranks.

    `tokens` (n, T + 1) are real sequences, `forward` is what training calls (behind DDP or FSDP),
    so that what is compiled here is used later. `reserves` leaves room for AdamW's two moments,
    which come with the first step. Where compiling fails the model goes on eager, in a line.
    """
    # Every size that is tried is a graph, and so is evaluation; past 8 Dynamo would go eager.
    torch._dynamo.config.recompile_limit = 64
    reserve = 8 * sum(to_local(p).numel() for p in model.parameters()) if reserves else 0
    while True:
        part = tokens[: config.train.micro_batch_size]
        error = _try(config, model, forward, part, info, dtype, reserve)
        # MPS has no class of its own for it.
        full = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
        if all_reduce_any(error is not None and not full):
            modules = [model, *model.h]
            if all(module._compiled_call_impl is None for module in modules):
                raise error or RuntimeError("another rank could not compute a micro-batch")
            why = str(error).strip().splitlines()[0] if error else "it failed on another rank"
            print0(f"torch.compile does not work here ({why}): going on without it")
            for module in modules:
                module._compiled_call_impl = None
        elif all_reduce_any(full):
            size = config.train.micro_batch_size
            if size == 1 or not halves:
                raise UserError(
                    f"A micro-batch of {size} does not fit this device's memory; try a smaller "
                    "--train.micro-batch-size, --train.gradient-checkpointing, --train.parallel "
                    "fsdp on several GPUs, or a smaller --size."
                )
            share = config.sequences_per_rank(info.world_size)
            smaller = max(n for n in divisors(share) if n <= size // 2)
            print0(f"a micro-batch of {size} does not fit: going on with {smaller}")
            config = replace(config, {"train.micro_batch_size": smaller})
        else:
            return config


def _try(
    config: Config,
    model: nn.Module,
    forward: nn.Module,
    tokens: Tensor,
    info: DistInfo,
    dtype: torch.dtype,
    reserve: int,
) -> Exception | None:
    """Compute the gradients of a micro-batch; return what went wrong, if anything did."""
    try:
        tokens = tokens.to(info.device)
        reserved = torch.empty(reserve, dtype=torch.uint8, device=info.device)
        # A rank that fails leaves the others waiting in a collective, so DDP makes none here.
        with forward.no_sync() if forward is not model else contextlib.nullcontext():
            with autocast(info.device, dtype):
                logs = config.train.log_sequence_losses
                _, loss = forward(tokens[:, :-1], tokens[:, 1:], logs)
            loss.backward()
        del reserved
    except Exception as error:
        # Its traceback would hold the tensors that did not fit.
        return error.with_traceback(None)
    finally:
        model.zero_grad(set_to_none=True)
        if info.device.type == "cuda":
            torch.cuda.empty_cache()
    return None
