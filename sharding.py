"""A model shared out over processes (FSDP): each holds a part of every tensor, and all when in use.

    shard(model, compile_mode, world)    the model's parameters become shares, split by rows
    whole_model(model)                   a plain copy, for what cannot be done with shares
    local, whole, rows_of, from_rows     a tensor's share and the whole of it

Weights, gradients and optimizer state take 16 bytes a parameter; here each process holds its share
of them and, while computing, the weights of a block or two, the embeddings and the last norm (ZeRO,
Rajbhandari et al. 2020; FSDP, Zhao et al. 2023). PyTorch's `fully_shard` gathers a block before its
forward and its backward pass and drops it after them, while the block before is being computed.

Weights travel in float32 and autocast rounds them on arrival, so that the arithmetic is DDP's and
a run may change between the two. That costs 12 bytes a parameter and micro-batch, with the sum of
the gradients, where bfloat16 on the way would cost 8; and what was rounded is kept until the
backward pass, 2 bytes a parameter, unless train.gradient_checkpointing is on.
"""

import types
import warnings

import torch
import torch.distributed as dist
from torch import Tensor

from config import UserError
from distributed import World, compile_module
from model import GPT
from modern import build_model


def shard(model: GPT, compile_mode: str, world: World) -> None:
    """Share the model out over all processes, from the CPU to their devices, a block at a time.

    Its parameters become DTensors, of which each process holds some rows; `model(...)` must then be
    called by all processes equally often, and is the only way in. Gradients are averaged over the
    processes in every backward pass: keeping them whole until the last micro-batch would save
    messages, and take the memory that this is for. Blocks and the loss are compiled each for itself
    where `compile_mode` says so: gathering cannot be part of a graph. Raises UserError on MPS.
    """
    if world.device.type == "mps":
        raise UserError("MPS cannot share a model out; leave --train.parallel fsdp out.")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # A modern block returns its values as a view, which nobody writes to.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    _compile_parts(model, compile_mode, world)
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in model.h:
        fully_shard(block, mesh=mesh)
    # All that is left. The root is kept from the forward to the backward pass, which begins there.
    fully_shard(model, mesh=mesh)


def _compile_parts(model: GPT, mode: str, world: World) -> None:
    """Compile what the hooks of `fully_shard` lie around."""
    block = type(model.h[0])
    for name, cls, modules in (("forward", block, model.h), ("losses", type(model), [model])):
        plain = getattr(cls, name)
        compiled = compile_module(plain, mode, world)
        if compiled is plain:
            # The reason, if there is one, has been said once.
            return
        for module in modules:
            setattr(module, name, types.MethodType(compiled, module))


def put_away(model: GPT) -> None:
    """Drop what a forward pass that no backward pass follows has left gathered.

    Until then the root's parameters are whole ones, which no optimizer and no checkpoint knows.
    """
    if hasattr(model, "reshard"):
        model.reshard()


@torch.no_grad()
def whole_model(model: GPT) -> GPT:
    """Return the model itself or, where it is shared out, a plain copy on the same device.

    Every process must call it and gets one: 4 bytes a parameter until it is dropped again.
    """
    if not is_shared(next(model.parameters())):
        return model
    # Nothing is drawn or computed on the meta device.
    with torch.device("meta"):
        copy = build_model(model.config)
    copy = copy.to_empty(device=local(next(model.parameters())).device)
    for mine, theirs in zip(copy.parameters(), model.parameters(), strict=True):
        mine.copy_(whole(theirs))
    return copy.train(model.training)


def is_shared(tensor: Tensor) -> bool:
    """Say whether a tensor is a DTensor, whose module takes seconds to import."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """Return this process's rows of a tensor, or all of one that is not shared; memory is shared.

    Gradients do not pass through.
    """
    return tensor.detach().to_local() if is_shared(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor: gathered from all processes, all of which call this; or itself."""
    return tensor.full_tensor() if is_shared(tensor) else tensor


def rows_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the rows of a whole tensor that are this process's share of `like`, as a view."""
    if not is_shared(like):
        return tensor
    # As torch.chunk divides: the last processes may have fewer rows than others, or none.
    first = dist.get_rank() * -(-len(tensor) // dist.get_world_size())
    return tensor[first : first + len(local(like))]


def from_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Return the tensor, shared as `like`, of which `rows` are this process's share; no copy."""
    if not is_shared(like):
        return rows
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(
        rows, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )
