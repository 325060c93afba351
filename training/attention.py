"""Which kernel computes attention behind `F.scaled_dot_product_attention` on a GPU."""

import contextlib
import importlib.util
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from config import UserError

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "fa3": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@contextlib.contextmanager
def attention_by(name: str, device: torch.device | None = None) -> Iterator[None]:
    """Compute attention by the kernel of that name; auto is PyTorch's own choice.

    What it cannot do, as with a mask, falls to the others. Raises UserError where it does not run
    on the device (by default the GPU, if there is one), which a tiny call finds out.
    """
    if name == "auto":
        yield
        return
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = BACKENDS[name]
    others = [backend for backend in dict.fromkeys(BACKENDS.values()) if backend != chosen]
    with contextlib.ExitStack() as stack:
        try:
            if name == "fa3":
                stack.enter_context(_flash_attention_3())
            with sdpa_kernel(chosen):
                _try_attention(device)
        except (RuntimeError, ImportError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"Attention by {name} cannot be had on {device.type} here ({reason}); choose auto "
                "or another."
            ) from error
        stack.enter_context(sdpa_kernel([chosen, *others], set_priority=True))
        yield


def _try_attention(device: torch.device) -> None:
    """Run attention forward and backward on a few numbers; raises RuntimeError if it cannot be."""
    dtype = torch.float32
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = torch.bfloat16 if has_bfloat16 else torch.float16
    # (B, H, T, head size)
    q, k, v = torch.ones(3, 1, 1, 128, 64, device=device, dtype=dtype, requires_grad=True).unbind()
    F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()


@contextlib.contextmanager
def _flash_attention_3() -> Iterator[None]:
    """Put FlashAttention 3 (Shah et al. 2024) in the place of PyTorch's own FlashAttention."""
    if importlib.util.find_spec("flash_attn_interface") is None:
        raise ImportError("FlashAttention 3 is not installed")
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    activate_flash_attention_impl("FA3")
    try:
        yield
    finally:
        restore_flash_attention_impl()


def decode_kernels() -> contextlib.AbstractContextManager:
    """Return the context to decode in, where every token makes a new shape.

    On Hopper and later PyTorch prefers cuDNN, which plans for each shape anew: slow, once a token.
    """
    if not torch.cuda.is_initialized():
        return contextlib.nullcontext()
    return sdpa_kernel([BACKENDS["flash"], BACKENDS["efficient"], BACKENDS["math"]])
