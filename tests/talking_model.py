"""A small model whose text varies, and which would draw padding ids if it could."""

import dataclasses
from collections.abc import Iterable

import torch

from config import ModelConfig
from model import GPT

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=50)


def tiny_model(**changes) -> GPT:
    """Return a small GPT whose weights are large enough for its text to vary."""
    torch.manual_seed(1)
    model = GPT(dataclasses.replace(CONFIG, **changes))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    # Padding that would win every draw if it took part in one: whatever the state, one of the two
    # signs gives a logit far above all real ones.
    padding = model.wte.weight.data[model.config.vocab_size :]
    padding[0::2] = 100 * model.wte.weight.data[7]
    padding[1::2] = -100 * model.wte.weight.data[7]
    return model.eval()


def prompt(rows: int, length: int = 5) -> torch.Tensor:
    """Return `rows` times the same random ids, int64 (rows, length)."""
    ids = torch.randint(50, (1, length), generator=torch.Generator().manual_seed(3))
    return ids.expand(rows, -1)


def rows(steps: Iterable[torch.Tensor]) -> list[list[int]]:
    """Return the ids of every row."""
    return torch.stack(list(steps), dim=1).tolist()
