"""Decoders: what they round, what they do not, and what they leave as it was."""

import pytest
import torch
from torch import nn

import decoder as decoder_module
from decoder import Decoder
from generate import generate
from model import GPT, KVCache
from tests.small_models import config_of, random_ids, shaken
from tests.talking_model import prompt, rows, tiny_model

MODERN = {
    "architecture": "modern",
    "positions": "rotary",
    "norm": "rmsnorm",
    "bias": False,
    "qk_norm": True,
    "value_residual": True,
    "x0_shortcut": True,
    "softcap": 5.0,
}
MODELS = ({}, MODERN, {**MODERN, "tied": False}, {"activation": "swiglu"})


def linear_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Return the dtypes of the matrices of the blocks."""
    weights = [getattr(module, "weight", None) for module in model.h.modules()]
    return {weight.dtype for weight in weights if weight is not None and weight.dim() == 2}


def logits_of(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits after a prompt of all tokens but three, and then after each of these."""
    start = tokens.size(1) - 3
    cache = decoder.new_cache(*tokens.shape)
    parts = [decoder.next_logits(tokens[:, :start], cache)]
    parts += [decoder.next_logits(tokens[:, t : t + 1], cache) for t in range(start, start + 3)]
    return torch.stack(parts, dim=1)


def test_cached_logits_equal_those_of_a_full_forward():
    model = tiny_model()
    tokens = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens)[0]
    decoder = Decoder(model)
    cache = decoder.new_cache(3, 16)
    for length in range(4, 17):
        unread = tokens[:, cache.length : length]
        logits = decoder.next_logits(unread, cache)
        assert cache.length == length
        torch.testing.assert_close(logits, expected[:, length - 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", MODELS)
@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_rounded_decoder_is_close_to_the_model(monkeypatch, changes, on_gpu):
    if on_gpu:
        # What lies between products has their dtype there.
        monkeypatch.setattr(decoder_module, "state_dtype", lambda device, dtype: dtype)
    model, tokens = shaken(config_of(**changes)), random_ids(2, 12)
    exact = logits_of(Decoder(model), tokens)
    decoder = Decoder(model, torch.bfloat16)
    assert decoder.new_cache(1, 1).store.dtype == (torch.bfloat16 if on_gpu else torch.float32)
    assert linear_dtypes(decoder.model) == {torch.bfloat16}
    rounded = logits_of(decoder, tokens)
    assert rounded.dtype == torch.float32
    difference = (rounded - exact).abs().max()
    assert 0 < difference < 0.02 * exact.abs().max() + 0.1


def test_what_is_made_of_a_model_leaves_it_as_it_was_and_shares_the_embedding():
    model = tiny_model(dropout=0.5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decoder = Decoder(model, torch.bfloat16)
    logits_of(decoder, random_ids(1, 8) % 50)
    assert model.training and not decoder.model.training
    assert linear_dtypes(model) == {torch.float32}
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name])
    assert decoder.model.wte.weight is model.wte.weight
    assert Decoder(model).model.h[0].mlp.c_fc.weight is model.h[0].mlp.c_fc.weight


def far_from_zero() -> GPT:
    """Return a model whose logits lie around -100, and a few apart, as those of OpenAI's do."""
    model = tiny_model()
    with torch.no_grad():
        model.ln_f.bias += 5
        model.wte.weight[:50] -= 100 / (5 * 16)
    return model


@pytest.mark.parametrize("exact", [1, 3, 50])
def test_the_largest_logits_are_not_rounded_and_no_error_is_that_of_a_large_number(
    monkeypatch, exact
):
    monkeypatch.setattr(decoder_module, "EXACT", exact)
    head = decoder_module._RoundedHead(far_from_zero(), torch.bfloat16)
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) + 5
    found, expected = head(x), x @ head.weight[:50].T
    assert expected.mean() < -60
    assert (x @ head.weight[:50].T).bfloat16().float().sub(expected).abs().max() > 0.1
    top = expected.topk(exact).indices
    torch.testing.assert_close(found.gather(1, top), expected.gather(1, top), atol=1e-4, rtol=0)
    assert (found - expected).abs().max() < 0.1
    assert found.shape == (4, 50)


def test_rounded_text_does_not_depend_on_how_many_rows_there_are():
    decoder = Decoder(tiny_model(), torch.bfloat16)
    four = rows(generate(decoder, prompt(4), 30, seed=2))
    assert len({tuple(row) for row in four}) == 4
    for n in (1, 2, 3):
        assert rows(generate(decoder, prompt(n), 30, seed=2)) == four[:n]


def test_padding_is_never_drawn_from_a_rounded_head(monkeypatch):
    monkeypatch.setattr(decoder_module, "EXACT", 3)
    decoder = Decoder(tiny_model(), torch.bfloat16)
    for temperature in (0, 1.0, 100.0):
        drawn = torch.stack(list(generate(decoder, prompt(8), 60, temperature=temperature)))
        assert drawn.max() < 50


def test_autocast_of_the_caller_chooses_the_dtype_and_changes_nothing_else():
    model = tiny_model()
    assert linear_dtypes(Decoder(model).model) == {torch.float32}
    expected = logits_of(Decoder(model), random_ids(2, 9) % 50)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_dtypes(Decoder(model).model) == {torch.bfloat16}
        assert linear_dtypes(Decoder(model, torch.float32).model) == {torch.float32}
        found = logits_of(Decoder(model, torch.float32), random_ids(2, 9) % 50)
    assert torch.equal(found, expected)


def test_a_cache_has_room_for_what_can_come_and_no_more(monkeypatch):
    decoder, rooms = Decoder(tiny_model()), []
    new = decoder.new_cache
    monkeypatch.setattr(decoder, "new_cache", lambda *args: rooms.append(new(*args)) or rooms[-1])
    for length, tokens in ((5, 4), (5, 11), (5, 40)):
        list(generate(decoder, prompt(2, length), tokens))
    assert [cache.store.size(4) for cache in rooms] == [9, 16, 16]
    assert isinstance(rooms[0], KVCache)
