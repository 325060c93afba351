"""Prefill and decode: the next token of every row, from cached keys and values.

The past is kept as keys and values (`KVCache`), so a new token costs one token's work. A row draws
one uniform number a token from a CPU generator of its own, seeded by (seed, row): what row i says
depends neither on how many other rows there are nor on the device, but for the rounding of the
logits.
"""

import hashlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from config import UserError
from decoder import Decoder
from model import GPT

# Ids among which the likeliest that reach top_p are looked for first.
NUCLEUS = 1024


def generate(
    model: GPT | Decoder,
    tokens: Tensor,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 1337,
    eot: int | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every row, int64 (B,) on the CPU, `max_tokens` times at most.

    `tokens` is int64 (B, T), T >= 1; of more than the model's context the last part is kept. When
    the context is full, its last half is read again and generation goes on from there. A row that
    has drawn `eot` goes on yielding it, and when every row has, the iterator ends. A model is made
    into a `Decoder`, of autocast's dtype where the caller has that on.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    block_size = decoder.config.block_size
    context = unread = tokens[:, -block_size:].cpu()
    cache = decoder.new_cache(len(tokens), context.size(1) + max_tokens)
    generators = [row_generator(seed, row) for row in range(len(tokens))]
    finished = torch.zeros(len(tokens), dtype=torch.bool)
    for _ in range(max_tokens):
        logits = decoder.next_logits(unread, cache)
        ids = choose(logits, generators, temperature, top_k, top_p)
        if eot is not None:
            ids = torch.where(finished, eot, ids)
            finished = ids == eot
        yield ids
        if finished.all():
            return
        unread = ids[:, None]
        context = torch.cat([context, unread], dim=1)[:, -block_size:]
        if cache.length == block_size:
            cache.length = 0
            unread = context[:, -max(block_size // 2, 1) :]


def row_generator(seed: int, row: int) -> torch.Generator:
    """Return the CPU generator of one row, far from those of other rows and seeds."""
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    # PyTorch's CPU generator keeps 32 bits of its seed.
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def choose(
    logits: Tensor,
    generators: list[torch.Generator],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> Tensor:
    """Return one id for each row of logits (B, V); raises UserError when a logit is not finite."""
    if not logits.isfinite().all():
        raise UserError("The model's logits are not finite: its training diverged.")
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Every row draws at every step, so that a row's numbers do not depend on the others' ends.
    uniform = torch.stack([torch.rand(1, dtype=torch.float64, generator=g) for g in generators])
    cumulative = distribution(logits, temperature, top_k, top_p).cumsum(dim=-1)
    # The first id whose cumulative probability exceeds the draw; it never has probability zero.
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]


def distribution(
    logits: Tensor, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return the probabilities, float64 (B, V), from which a token is drawn; temperature > 0.

    Temperature first, then the top_k likeliest ids, then of those the fewest whose mass reaches
    top_p (nucleus sampling, Holtzman et al. 2020). Ids stay in their own order, so that two
    near-equal ones that rounding swaps do not move the draw.
    """
    # Less the maximum first, so that no temperature is small enough to overflow.
    scaled = (logits.double() - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None:
        kept, ids = scaled.topk(min(top_k, scaled.size(-1)))
        scaled = torch.full_like(scaled, -torch.inf).scatter(-1, ids, kept)
    probs = scaled.softmax(dim=-1)
    return probs if top_p is None or top_p >= 1 else _nucleus(probs, top_p, top_k)


def _nucleus(probs: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """Return probabilities (B, V), of which `top_k` are not 0, of the fewest that reach `top_p`."""
    # Sorting all ids takes longer than many a model; these few nearly always reach top_p.
    kept, ids = probs.topk(min(top_k or NUCLEUS, probs.size(-1)))
    if (kept.sum(dim=-1) < top_p).any():
        kept, ids = probs.sort(dim=-1, descending=True)
    mass_before = F.pad(kept.cumsum(dim=-1)[:, :-1], (1, 0))
    kept = kept.masked_fill(mass_before >= top_p, 0)
    return torch.zeros_like(probs).scatter(-1, ids, kept / kept.sum(dim=-1, keepdim=True))
