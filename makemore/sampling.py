"""More of what a rung was given: new words, or lines of text."""

import torch
from torch import Tensor, nn

from makemore.data import Data, text_words
from sample import choose, row_generator


@torch.inference_mode()
def sample(model: nn.Module, data: Data, count: int, seed: int) -> list[str]:
    """Return `count` words, or lines of running text, drawn from a rung.

    A word ends at the boundary, a line at its newline, and both where the longest do.
    """
    if count < 1:
        return []
    model.eval()
    text = data.kind == "text"
    # Text goes on behind a newline, where it has some; a word begins behind a boundary.
    newline = data.alphabet.find("\n") + 1
    end = newline if text else 0
    idx = torch.full((count, 1), (newline or 1) if text else 0)
    generators = [row_generator(seed, row) for row in range(count)]
    for _ in range(data.longest):
        logits = model(idx[:, -model.block_size :])[0][:, -1]
        idx = torch.cat([idx, _draw(logits, generators, text)[:, None]], dim=1)
        if (idx[:, 1:] == end).any(1).all() and end == idx[0, 0]:
            break
    return [_until(row, end, data) for row in idx[:, 1:].tolist()]


def _draw(logits: Tensor, generators: list[torch.Generator], text: bool) -> Tensor:
    """Return the next id of every row; in running text, the boundary is never one."""
    if text:
        return choose(logits[:, 1:], generators, 1.0, None, None) + 1
    return choose(logits, generators, 1.0, None, None)


def _until(ids: list[int], end: int, data: Data) -> str:
    return data.decode(ids[: ids.index(end)] if end in ids else ids)


def marked_words(model: nn.Module, data: Data, count: int, seed: int) -> list[str]:
    """Return `count` generated words, each with (seen) if the training split has it, or (new)."""
    lines = sample(model, data, count, seed)
    words = lines if data.kind == "words" else text_words(" ".join(lines))
    return [f"{word} ({'seen' if word in data.seen else 'new'})" for word in words[:count]]
