"""How many windows go through the model at once: as many as fit, and divide.

The run's result does not depend on it, so unless it is given it is chosen for the machine: on a GPU
the largest that should fit by memory.py's estimate, tried out, and halved for as long as it does
not fit.
"""

import torch
from torch import nn

import recipes
from config import Config, UserError, divisors, replace, windows_per_process
from devices import autocast, pick_dtype
from distributed import World, any_over_ranks, from_main, say
from memory import Where, largest_micro_batch, optimizer_state
from plan import USABLE


def choose_micro_batch(config: Config, world: World) -> Config:
    """Return the config with a micro-batch: the given one, or what should fit this machine.

    Raises UserError when the processes do not divide the update.
    """
    if config.train.micro_batch is not None or world.device.type != "cuda":
        return recipes.fit_micro_batch(config, world.size)
    dtype = str(pick_dtype(config.train.dtype, world.device)).removeprefix("torch.")
    free, _ = torch.cuda.mem_get_info(world.device)
    # One window is tried where none should fit: an estimate is no reason not to.
    fitting = largest_micro_batch(config, Where("cuda", dtype, world.size), USABLE * free) or 1
    return replace(config, {"train.micro_batch": from_main(fitting, world)})


def largest_that_fits(
    config: Config, model: nn.Module, optimizer_is_new: bool, world: World
) -> Config:
    """Try one micro-batch out, halve it while it does not fit, and return the config that does.

    `model` is the one that trains, without DDP: processes may differ in what fits, and agree on the
    least. Memory for optimizer state that is not there yet is left free. Raises UserError when not
    even one window fits.
    """
    while not _fits(config, model, optimizer_is_new, world):
        size = config.train.micro_batch
        if size == 1:
            raise UserError(
                "Not even one window fits this device's memory; try "
                "--train.gradient-checkpointing, --train.parallel fsdp on several GPUs, or a "
                "smaller --size."
            )
        shares = divisors(windows_per_process(config, world.size))
        smaller = max(n for n in shares if n <= size // 2)
        say(world, f"a micro-batch of {size} does not fit: going on with {smaller}")
        config = replace(config, {"train.micro_batch": smaller})
    return config


def _fits(config: Config, model: nn.Module, optimizer_is_new: bool, world: World) -> bool:
    """Say whether a forward and a backward pass fit, on all processes."""
    fits = True
    try:
        _try(config, model, optimizer_is_new, world.device)
    except RuntimeError as error:
        # MPS has no class of its own for it.
        if not (isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)):
            raise
        fits = False
    model.zero_grad(set_to_none=True)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return not any_over_ranks(not fits, world)


def _try(
    config: Config, model: nn.Module, optimizer_is_new: bool, device: torch.device
) -> torch.Tensor:
    """Compute the gradients of one micro-batch, beside what the optimizer will need."""
    to_come = int(optimizer_state(config)) if optimizer_is_new else 0
    reserved = torch.empty(to_come, dtype=torch.uint8, device=device)
    shape = (config.train.micro_batch, config.model.block_size)
    tokens = torch.zeros(shape, dtype=torch.int64, device=device)
    with autocast(device, pick_dtype(config.train.dtype, device)):
        _, loss = model(tokens, tokens)
    loss.backward()
    return reserved
