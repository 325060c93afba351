"""Which kernel computes attention on a GPU: the one that is fastest there, by measurement.

PyTorch has several behind `scaled_dot_product_attention`, and which is fastest depends on the GPU,
the shapes and the versions. What the chosen one cannot do, as with a mask, falls to the others.
"""

import contextlib
import importlib.util
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from config import Config, UserError
from devices import synchronize
from distributed import World, from_main

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "fa3": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
# What the plain products of `math` take is known without measuring.
CANDIDATES = ("cudnn", "flash", "fa3", "efficient")
REPEATS = 10


def choose_attention(config: Config, world: World, dtype: torch.dtype) -> str:
    """Return the name of the kernel to train with; "auto" stands for PyTorch's own choice.

    On CUDA, auto measures those that are there on this run's shapes; all processes take what the
    main one found. Raises UserError when the one that is asked for is not there.
    """
    name = config.train.attention
    if name != "auto":
        if time_attention(name, config, world.device, dtype, repeats=1) is None:
            raise UserError(f"Attention by {name} cannot be had here; choose auto or another.")
        return name
    if world.device.type != "cuda":
        return "auto"
    seconds = {name: time_attention(name, config, world.device, dtype) for name in CANDIDATES}
    there = [name for name in CANDIDATES if seconds[name] is not None]
    best = min(there, key=seconds.get) if there else "math"
    names = list(BACKENDS)
    return names[from_main(names.index(best), world)]


def time_attention(
    name: str, config: Config, device: torch.device, dtype: torch.dtype, repeats: int = REPEATS
) -> float | None:
    """Return the seconds of one forward and backward pass, or None if the kernel cannot do it."""
    model = config.model
    shape = (config.train.micro_batch, model.n_head, model.block_size, model.n_embd // model.n_head)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    try:
        with attention_by(name, alone=True):
            for i in range(repeats + 1):
                if i == 1:
                    # The first pass loads the kernel.
                    synchronize(device)
                    started = time.perf_counter()
                F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(v.detach())
            synchronize(device)
    except (RuntimeError, ImportError):
        return None
    return (time.perf_counter() - started) / repeats


@contextlib.contextmanager
def attention_by(name: str, alone: bool = False) -> Iterator[None]:
    """Compute attention by the kernel of that name; with the others behind it unless `alone`.

    Raises ImportError where FlashAttention 3 (Shah et al. 2024) is asked for and not installed.
    """
    if name == "auto":
        yield
        return
    first = BACKENDS[name]
    behind = [] if alone else [backend for backend in BACKENDS.values() if backend != first]
    with contextlib.ExitStack() as stack:
        if name == "fa3":
            stack.enter_context(_flash_attention_3())
        stack.enter_context(sdpa_kernel([first, *dict.fromkeys(behind)], set_priority=True))
        yield


@contextlib.contextmanager
def _flash_attention_3() -> Iterator[None]:
    """Put FlashAttention 3 in the place of PyTorch's own FlashAttention."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        raise ImportError("FlashAttention 3 is not installed")
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    activate_flash_attention_impl("FA3")
    try:
        yield
    finally:
        restore_flash_attention_impl()
