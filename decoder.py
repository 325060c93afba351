"""A model made ready to be asked for one token after another.

A new token reads every weight once, and that is nearly all its cost, so weights rounded to half
their bytes are twice as fast. They are rounded once here, where autocast would do it at every call.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cross_entropy import soft_capped
from model import GPT, KVCache

# Of the logits of a rounded head, as many of the largest are computed again without rounding.
EXACT = 128


class Decoder:
    """A model in eval mode, whatever mode the one it was made of is in or comes to be in.

    What is not rounded is shared with that model, so a decoder holds true until the model's weights
    change.
    """

    def __init__(self, model: GPT, dtype: torch.dtype | None = None):
        """Take a model on its device; `dtype` is that of the blocks' products.

        It is autocast's, where the caller has that on, or that of the weights, unless given.
        """
        weight = model.wte.weight
        self.config, self.device = model.config, weight.device
        if dtype is None:
            dtype = weight.dtype
            if torch.is_autocast_enabled(self.device.type):
                dtype = torch.get_autocast_dtype(self.device.type)
        # A copy of the modules, but not of their tensors.
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        self.model = copy.deepcopy(model, shared).eval()
        self.head, self.state_dtype = self._exact_head, weight.dtype
        if dtype == weight.dtype:
            return
        self.state_dtype = state_dtype(self.device, dtype)
        for name, module in list(self.model.h.named_modules()):
            if isinstance(module, nn.Linear):
                self.model.h.set_submodule(name, _RoundedLinear(module, dtype, self.state_dtype))
        # A GPU reads the whole head in a hundredth of the time it takes to start the kernels.
        if self.device.type == "cpu":
            self.head = _RoundedHead(model, dtype)

    def new_cache(self, rows: int, tokens: int) -> KVCache:
        """Return an empty cache for rows of `tokens` tokens, at most the model's context."""
        return KVCache(self.config, rows, self.device, self.state_dtype, tokens)

    # Decorated so rather than left to a caller that yields, in which the mode would leak out.
    @torch.inference_mode()
    def next_logits(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Return the logits, float32 (B, V) on the CPU, that follow ids (B, T) and the cache."""
        with torch.autocast(self.device.type, enabled=False):
            x = self.model.hidden(ids.to(self.device), cache)[:, -1]
            return self.head(x).float().cpu()

    def _exact_head(self, x: Tensor) -> Tensor:
        """Return the logits of states (B, C), in which bfloat16 could not tell apart what differs.

        They reach magnitudes of 100, where its steps are 0.5.
        """
        return self.model.logits(x.to(self.model.head_weight.dtype))


def state_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of what lies between products that are computed in `dtype`.

    A CPU's attention takes three times as long for one query in bfloat16 as in float32, though it
    reads half the bytes; on a GPU they are what counts.
    """
    return torch.float32 if device.type == "cpu" else dtype


class _RoundedLinear(nn.Module):
    """In place of a `lean.Linear`: its weights rounded for good, and its input at each call."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, out_dtype: torch.dtype):
        super().__init__()
        self.weight = linear.weight.detach().to(dtype)
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        self.out_dtype = out_dtype

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        x = F.gelu(x, approximate="tanh") if gelu else x
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(self.out_dtype)


class _RoundedHead:
    """The projection onto the vocabulary, with the likeliest ids' logits as without rounding.

    The others' errors are those of numbers around zero: what all rows of the matrix have in common
    is left out of the rounded product and added afterwards.
    """

    def __init__(self, model: GPT, dtype: torch.dtype):
        self.weight = model.head_weight.detach()
        self.vocab_size, self.softcap = model.config.vocab_size, model.config.softcap
        self.common = self.weight[: self.vocab_size].mean(0)
        self.rounded = (self.weight - self.common).to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the logits, float32 (B, V), of states (B, C)."""
        logits = F.linear(x.to(self.rounded.dtype), self.rounded)[:, : self.vocab_size].float()
        logits += (x * self.common).sum(1, keepdim=True)
        ids = logits.topk(min(EXACT, self.vocab_size)).indices
        # Not a product of matrices, in which a row's sums may depend on how many rows there are.
        logits.scatter_(1, ids, (self.weight[ids] * x[:, None]).sum(2))
        return soft_capped(logits, self.softcap) if self.softcap else logits
