"""Small models of either architecture, and what must hold for each of them, whatever its parts."""

import torch
from torch import Tensor

from config import ModelConfig
from model import GPT, KVCache
from modern import ModernGPT, build_model

VOCAB, CONTEXT = 61, 16
# Beginnings of documents have the last id.
EOT = VOCAB - 1


def config_of(**changes: object) -> ModelConfig:
    """Return the config of a model of two layers, two heads and width 16, with `changes`."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": CONTEXT, "vocab_size": VOCAB}
    return ModelConfig(**{**sizes, **changes})


def shaken(config: ModelConfig) -> GPT | ModernGPT:
    """Return a model in eval mode with no weight at its initial value, nor small, nor neutral.

    Rows past the vocabulary are large too, so that whoever reads them is found out.
    """
    torch.manual_seed(0)
    model = build_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def random_ids(rows: int, length: int, eots: tuple[int, ...] = (), seed: int = 0) -> Tensor:
    """Return ids, int64 (rows, length), with EOT in the columns `eots` and nowhere else."""
    ids = torch.randint(EOT, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, list(eots)] = EOT
    return ids


def changed(ids: Tensor, columns: slice) -> Tensor:
    """Return a copy whose `columns` hold other ids; EOT does not come and does not go."""
    other = ids.clone()
    other[:, columns] = torch.where(ids == EOT, EOT, (ids + 1) % EOT)[:, columns]
    return other


def largest_difference(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@torch.no_grad()
def assert_sound(model: GPT | ModernGPT) -> None:
    """Check loss, number of parameters, causality, cached keys and values, and packed texts."""
    config = model.config
    in_memory = sum(parameter.numel() for parameter in model.parameters())
    tables = 1 if config.tie_embeddings else 2
    padding = (config.padded_vocab_size - VOCAB) * config.n_embd * tables
    assert in_memory - padding == config.num_params
    idx = random_ids(3, CONTEXT, eots=(0, 7))
    logits, none = model(idx)
    assert none is None and logits.shape == (3, CONTEXT, VOCAB)
    _, loss = model(idx, changed(idx, slice(None)))
    assert loss.isfinite()
    _assert_causal(model, idx, logits)
    _assert_cache_equals_whole(model)
    _assert_packed_equals_separate(model)


def _assert_causal(model: GPT, idx: Tensor, logits: Tensor) -> None:
    for t in (1, 9):
        after, _ = model(changed(idx, slice(t, t + 1)))
        assert largest_difference(after[:, :t], logits[:, :t]) < 1e-5
        assert largest_difference(after[:, t:], logits[:, t:]) > 1e-3


def _assert_cache_equals_whole(model: GPT | ModernGPT) -> None:
    # A text that goes on is one document, so that a document mask hides nothing.
    idx = random_ids(3, CONTEXT, eots=(0,), seed=1)
    whole = model.hidden(idx)
    for prompt in (1, 6):
        cache = KVCache(model.config, 3, idx.device, torch.float32)
        parts = [model.hidden(idx[:, :prompt], cache)]
        parts += [model.hidden(idx[:, t : t + 1], cache) for t in range(prompt, CONTEXT)]
        assert largest_difference(torch.cat(parts, 1), whole) < 1e-5


def _assert_packed_equals_separate(model: GPT | ModernGPT) -> None:
    """Two texts of 6 and 9 tokens in one row, in both orders, and one token of padding."""
    texts = random_ids(1, 6, eots=(0,), seed=2), random_ids(1, 9, eots=(0,), seed=3)
    alone = [model.hidden(text) for text in texts]
    rows, places, masks = [], [], []
    for order in ((0, 1), (1, 0)):
        lengths = [texts[i].size(1) for i in order] + [1]
        rows.append(torch.cat([*(texts[i] for i in order), torch.zeros(1, 1).long()], 1))
        places.append(torch.cat([torch.arange(length) for length in lengths]))
        text_of = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
        sees = (text_of[:, None] == text_of[None]).tril()
        masks.append(torch.zeros(sees.shape).masked_fill(~sees, -torch.inf))
    found = model.hidden(
        torch.cat(rows), positions=torch.stack(places), mask=torch.stack(masks)[:, None]
    )
    assert largest_difference(found[:1, :6], alone[0]) < 1e-5
    assert largest_difference(found[:1, 6:15], alone[1]) < 1e-5
    assert largest_difference(found[1:, :9], alone[1]) < 1e-5
    assert largest_difference(found[1:, 9:15], alone[0]) < 1e-5
