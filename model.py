"""GPT-2, exactly (Radford et al. 2019): learned positions, pre-norm blocks, GELU, tied head.

Shapes: B windows, T tokens in a window, C = n_embd channels, V = vocab_size ids.
Parameter names are OpenAI's own, so weights travel to and from other implementations by name.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import ModelConfig

# Targets of this value carry no loss; they fill up a validation batch to its fixed shape.
IGNORED = -1


class GPT(nn.Module):
    """`forward(idx, targets=None) -> (logits, loss)`; one of the two is None."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        # Rows past vocab_size make the matrix products fast; no id ever selects them.
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw the weights from N(0, 0.02); projections onto the residual stream are scaled down.

        2 * n_layer of them add up there, so a factor 1 / sqrt(2 * n_layer) keeps its variance.
        """
        residual_std = 0.02 * (2 * self.config.n_layer) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                std = residual_std if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        with torch.no_grad():
            self.wte.weight[self.config.vocab_size :].zero_()

    def forward(
        self, idx: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return `(logits, None)`, or with targets `(None, loss)`.

        idx and targets are int64 (B, T); logits are (B, T, V); the loss is the mean over all
        targets that are not IGNORED, in nats, computed without ever holding all logits.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.logits(x), None
        return None, self.loss(x, targets)

    def hidden(self, idx: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """Return the final normalised states (B, T, C) of ids (B, T) that follow `cache`."""
        start = 0 if cache is None else cache.length
        stop = start + idx.size(1)
        if stop > self.config.block_size:
            raise ValueError(f"{stop} tokens do not fit the context of {self.config.block_size}")
        x = self._states(idx, torch.arange(start, stop, device=idx.device), cache=cache)
        if cache is not None:
            cache.length = stop
        return x

    def packed_hidden(self, idx: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Return the final normalised states (B, T, C) of rows that hold several texts.

        `positions`, int64 (B, T), are the tokens' places in their own texts; `mask`, (B, 1, T, T),
        is 0 where a token (second last dimension) sees another (last), and -inf elsewhere.
        """
        return self._states(idx, positions, mask)

    def _states(
        self,
        idx: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: "KVCache | None" = None,
    ) -> Tensor:
        x = self.drop(self.wte(idx) + self.wpe(positions))
        for block in self.h:
            x = block(x, mask, cache)
        return self.ln_f(x)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (..., V) of states (..., C)."""
        return F.linear(x, self.wte.weight)[..., : self.config.vocab_size]

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy in nats, float32, of states (B, T, C), targets (B, T)."""
        return chunked_cross_entropy(
            x.flatten(0, 1), self.wte.weight, targets.flatten(), self.config.vocab_size
        )


class Block(nn.Module):
    """Attention and MLP, each reading the normalised residual stream and adding to it."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: "KVCache | None" = None
    ) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class CausalSelfAttention(nn.Module):
    """Multi-head attention over the past, through PyTorch's fused kernels."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        if config.attention_dropout is not None:
            self.dropout = config.attention_dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_drop = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cache: "KVCache | None" = None
    ) -> Tensor:
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (B, n_head, T, head size)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        # A cache is either empty or followed by one token, which sees all of it.
        causal, dropout = mask is None and T > 1, self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        return self.resid_drop(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    """Two layers with GPT-2's tanh-approximated GELU between them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class KVCache:
    """Keys and values of the tokens read so far, in memory for a whole context from the start."""

    def __init__(self, config: ModelConfig, batch: int, device: torch.device, dtype: torch.dtype):
        head_size = config.n_embd // config.n_head
        shape = (config.n_layer, 2, batch, config.n_head, config.block_size, head_size)
        self.store = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, n_head, T, head size) and return those of all tokens so far."""
        stop = self.length + k.size(2)
        keys, values = self.store[layer]
        keys[:, :, self.length : stop] = k
        values[:, :, self.length : stop] = v
        return keys[:, :, :stop], values[:, :, :stop]


def chunked_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Return the mean of -log softmax(x @ weight.T)[target], float32, over targets not IGNORED.

    x is (N, C), weight (at least vocab_size rows, C), targets (N,). Rows of `weight` past
    vocab_size take no part. Under autocast the products are in its dtype; the log-softmax is always
    float32. Logits exist for a few hundred rows at a time, and their gradient is taken in the same
    pass, so neither a matrix of N x 50,257 is kept nor a product done twice.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    with torch.autocast(x.device.type, enabled=False):
        wants_grad = torch.is_grad_enabled()
        return _ChunkedCrossEntropy.apply(x, weight, targets, vocab_size, wants_grad)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, vocab_size, wants_grad):
        scored = targets != IGNORED
        scale = 1 / scored.sum().clamp(min=1)
        total = torch.zeros((), device=x.device)
        dx = torch.empty_like(x) if wants_grad else None
        dweight = torch.zeros_like(weight, dtype=torch.float32) if wants_grad else None
        chunk = 512 if x.device.type == "cpu" else 8192
        for rows in (slice(start, start + chunk) for start in range(0, len(x), chunk)):
            logp, dlogits = _log_softmax(x[rows], weight, targets[rows], vocab_size, wants_grad)
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
        return dx * dloss.to(dx.dtype), dweight * (dloss * scale), None, None, None


def _log_softmax(x, weight, targets, vocab_size, wants_grad):
    """Return log p(target), float32 (rows,), and its negated gradient by the logits, or None."""
    on_cpu = x.device.type == "cpu"
    # On a CPU, 128 rows of 50,304 float32 still fit the last-level cache.
    step = min(128, len(x)) if on_cpu else len(x)
    buffer = _scratch(step, weight, torch.float32)
    dlogits = _scratch(len(x), weight, weight.dtype) if wants_grad else None
    logps = []
    for rows in (slice(start, start + step) for start in range(0, len(x), step)):
        probs = buffer[: len(targets[rows])]
        probs.copy_(x[rows] @ weight.T)
        probs[:, vocab_size:] = -torch.inf
        target = targets[rows].clamp(min=0)[:, None]
        top = probs.amax(1, keepdim=True)
        above = probs.gather(1, target) - top
        torch.softmax(probs, 1, out=probs)
        # The likeliest id's probability is 1 / sum(exp(logit - top)), and never underflows.
        logp = (above + probs.amax(1, keepdim=True).log())[:, 0]
        logps.append(logp)
        if wants_grad:
            dlogits[rows] = probs
            # Softmax minus one-hot; the difference at the target is taken before rounding.
            each = torch.arange(len(target), device=x.device)
            dlogits[rows][each, target[:, 0]] = torch.expm1(logp).to(weight.dtype)
    return torch.cat(logps), dlogits


def _scratch(rows, weight, dtype):
    """Return memory for (rows, len(weight)) numbers; on a CPU the same one every time.

    A CPU program that gives tens of megabytes back to the system and asks for them again spends a
    tenth of its time on fresh pages.
    """
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return weight.new_empty(rows, len(weight), dtype=dtype)
    return _kept_memory(rows, len(weight), dtype)


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)
def _kept_memory(rows, columns, dtype):
    return torch.empty(rows, columns, dtype=dtype)
