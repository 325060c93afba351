"""Generation: the cache is exact, draws are reproducible and stay inside what was asked for."""

import numpy as np
import pytest
import torch
from torch import nn

import sample
from config import UserError
from model import GPT, KVCache
from sample import choose, distribution, for_sampling, generate, next_logits, row_generator
from tests.small_models import config_of, random_ids, shaken
from tests.talking_model import prompt, rows, tiny_model

MODERN = {
    "architecture": "modern",
    "pos_emb": "rope",
    "norm": "rmsnorm",
    "bias": False,
    "qk_norm": True,
    "value_residual": True,
    "x0_residual": True,
    "logit_softcap": 5.0,
}
MODELS = ({}, MODERN, {**MODERN, "tie_embeddings": False}, {"activation": "swiglu"})
# What the first version of this code drew, past the context of 16, whose last half is read again.
DRAWS = (
    ({"temperature": 0}, "10 10 10 0 0 31 0 0 0 0 20 0 47 30 17 24 30 24 38 14"),
    ({"seed": 1}, "34 2 37 1 0 3 0 34 45 21 0 15 3 6 47 14 4 10 26 3"),
    (
        {"temperature": 0.8, "top_k": 7, "seed": 2},
        "49 1 6 38 24 0 0 38 24 0 20 37 47 0 0 0 49 24 38 14",
    ),
    (
        {"temperature": 1.2, "top_p": 0.6, "seed": 3},
        "49 24 4 37 38 2 38 21 15 0 0 14 30 20 10 48 30 24 30 48",
    ),
    (
        {"temperature": 0.7, "top_k": 9, "top_p": 0.5, "seed": 4},
        "10 10 10 0 0 47 0 0 0 47 20 0 38 30 30 28 33 24 38 47",
    ),
)


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_model()


def without_cache(model: GPT, tokens: torch.Tensor, max_tokens: int) -> list[list[int]]:
    """Greedy generation that reads the whole context for every token; the plain reference."""
    block_size = model.config.block_size
    context, drawn = tokens[:, -block_size:], []
    for _ in range(max_tokens):
        if context.size(1) > block_size:
            context = context[:, -(block_size // 2) :]
        with torch.no_grad():
            drawn.append(model(context)[0][:, -1].argmax(dim=-1))
        context = torch.cat([context, drawn[-1][:, None]], dim=1)
    return rows(drawn)


@pytest.mark.parametrize("length", [1, 5, 15, 16, 40])
def test_greedy_equals_a_loop_without_cache_and_goes_on_past_the_context(model, length):
    tokens = torch.randint(50, (2, length), generator=torch.Generator().manual_seed(1))
    expected = without_cache(model, tokens, 45)
    assert rows(generate(model, tokens, 45, temperature=0)) == expected
    assert len(set(expected[0])) > 3


@pytest.mark.parametrize(("options", "expected"), DRAWS, ids=str)
def test_draws_stay_what_they_were(model, options, expected):
    (drawn,) = rows(generate(model, prompt(1), 20, **options))
    assert " ".join(map(str, drawn)) == expected


def test_stop_is_asked_between_tokens(model):
    asked, free = [], rows(generate(model, prompt(2), 9, seed=2))
    steps = generate(model, prompt(2), 9, seed=2, stop=lambda: asked.append(1) or len(asked) > 4)
    assert rows(steps) == [row[:4] for row in free]
    assert list(generate(model, prompt(1), 9, stop=lambda: True)) == []


def test_a_context_of_one_token_works():
    texts = rows(generate(tiny_model(block_size=1), prompt(1), 5, temperature=0))
    assert len(texts[0]) == 5


def test_a_row_ends_with_eot_and_all_rows_end_the_iteration(model):
    free = rows(generate(model, prompt(4), 40, seed=5))
    eot = next(token for token in range(50) if all(token in row for row in free))
    ends = [row.index(eot) for row in free]
    assert len(set(ends)) > 1
    stopped = rows(generate(model, prompt(4), 40, seed=5, eot=eot))
    assert len(stopped[0]) == max(ends) + 1
    for row, unstopped, end in zip(stopped, free, ends, strict=True):
        assert row[: end + 1] == unstopped[: end + 1]
        assert set(row[end:]) == {eot}


def test_no_row_depends_on_how_many_there_are(model):
    four = rows(generate(model, prompt(4), 30, seed=2))
    assert len({tuple(row) for row in four}) == 4
    for n in (1, 2, 3):
        assert rows(generate(model, prompt(n), 30, seed=2)) == four[:n]


def test_seeds_reproduce_whatever_the_global_generator_did(model):
    first = rows(generate(model, prompt(2), 30, seed=2))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert rows(generate(model, prompt(2), 30, seed=2)) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert rows(generate(model, prompt(2), 30, seed=3)) != first


def test_neighbouring_seeds_share_no_row(model):
    # Seed 2's second row must not be seed 3's first.
    texts = [tuple(r) for seed in range(4) for r in rows(generate(model, prompt(3), 12, seed=seed))]
    assert len(set(texts)) == len(texts)


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.2, 0.0, 0.3]).log().clamp(min=-1e30)
    many = 4000
    generators = [row_generator(0, row) for row in range(many)]
    ids = choose(logits.expand(many, -1), generators, 1.0, None, None)
    counts = torch.bincount(ids, minlength=4) / many
    assert counts[2] == 0
    torch.testing.assert_close(counts, logits.exp(), atol=0.03, rtol=0)


def test_the_smallest_and_the_largest_draw_stay_inside_the_support(monkeypatch):
    logits = torch.tensor([[0.0, 1.0, 2.0, 1.5, 0.0]])
    for value, expected in ((0.0, 1), (1 - 2**-53, 3)):
        uniform = torch.tensor([value], dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda *_, uniform=uniform, **__: uniform)
        # The three likeliest are 1, 2 and 3.
        assert choose(logits, [None], 1.0, 3, None).tolist() == [expected]


def test_distribution_without_cuts_is_the_softmax():
    logits = torch.randn(3, 50)
    expected = (logits.double() / 0.7).softmax(dim=-1)
    torch.testing.assert_close(distribution(logits, 0.7), expected)
    torch.testing.assert_close(distribution(logits, 0.7, 1000, 1.0), expected)


@pytest.mark.parametrize("k", [1, 3, 50])
def test_top_k_keeps_the_k_likeliest(k):
    logits = torch.randn(4, 50)
    probs = distribution(logits, 1.0, top_k=k)
    assert ((probs > 0).sum(dim=-1) == k).all()
    kept = probs.gather(-1, logits.topk(k).indices)
    torch.testing.assert_close(kept, logits.topk(k).values.double().softmax(dim=-1))


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (1e-9, [0, 0.5, 0, 0]),
        (0.49, [0, 0.5, 0, 0]),
        (0.51, [0, 0.5, 0.3, 0]),
        (0.79, [0, 0.5, 0.3, 0]),
        (0.81, [0.15, 0.5, 0.3, 0]),
        (0.96, [0.15, 0.5, 0.3, 0.05]),
        (1.0, [0.15, 0.5, 0.3, 0.05]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p, expected):
    logits = torch.tensor([[0.15, 0.5, 0.3, 0.05]]).log()
    expected = torch.tensor([expected], dtype=torch.float64)
    actual = distribution(logits, 1.0, top_p=top_p)
    torch.testing.assert_close(actual, expected / expected.sum(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("top_p", "count"), [(0.25, 1), (0.5, 2), (0.51, 3), (0.75, 3)])
def test_top_p_stops_where_p_is_exactly_reached(top_p, count):
    probs = distribution(torch.zeros(1, 4), 1.0, top_p=top_p)
    assert (probs > 0).sum() == count


def test_top_p_counts_the_mass_that_top_k_left():
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    actual = distribution(probs.log(), 1.0, top_k=2, top_p=0.55)
    torch.testing.assert_close(actual, torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64))


def test_a_tiny_temperature_is_greedy_and_a_huge_one_uniform():
    logits = torch.randn(3, 50)
    assert torch.equal(distribution(logits, 1e-300).argmax(-1), logits.argmax(-1))
    assert (distribution(logits, 1e-300).amax(-1) == 1).all()
    torch.testing.assert_close(
        distribution(logits, 1e300), torch.full((3, 50), 0.02, dtype=torch.float64)
    )


@pytest.mark.parametrize("temperature", [0, 1.0, 100.0])
def test_padding_is_never_sampled(model, temperature):
    drawn = np.array(rows(generate(model, prompt(8), 60, temperature=temperature)))
    assert drawn.max() < 50
    with torch.no_grad():
        assert (model.hidden(prompt(1)) @ model.wte.weight.T).argmax(dim=-1).min() >= 50


def test_logits_that_are_not_finite_are_one_sentence():
    broken = tiny_model()
    broken.ln_f.weight.data[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        next(generate(broken, prompt(1), 1))


def test_dropout_is_off_and_the_model_stays_in_its_mode():
    model = tiny_model(dropout=0.5).train()
    expected = rows(generate(tiny_model(), prompt(1), 8))
    steps = generate(model, prompt(1), 8)
    first = next(steps)
    assert model.training
    # The caller's own code runs outside inference mode, and the ids are ordinary tensors.
    assert not torch.is_inference_mode_enabled()
    assert not first.is_inference()
    assert [[first.item(), *rows(steps)[0]]] == expected
    assert model.h[0].attn.training


# --- weights cast to another dtype ---


def linear_dtypes(model: nn.Module) -> set[torch.dtype]:
    """Return the dtypes of the matrices of the blocks."""
    return {parameter.dtype for parameter in model.h.parameters() if parameter.dim() == 2}


def logits_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits after a prompt of all tokens but three, and then after each of these."""
    start = tokens.size(1) - 3
    dtype = model.h[0].mlp.c_fc.weight.dtype
    cache = KVCache(model.config, len(tokens), torch.device("cpu"), dtype)
    parts = [next_logits(model, tokens[:, :start], cache)]
    parts += [next_logits(model, tokens[:, t : t + 1], cache) for t in range(start, start + 3)]
    return torch.stack(parts, dim=1)


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_cached_logits_equal_those_of_a_full_forward(changes):
    model, tokens = shaken(config_of(**changes)), random_ids(3, 12)
    with torch.no_grad():
        expected = model(tokens)[0][:, -4:]
    torch.testing.assert_close(logits_of(model, tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", MODELS, ids=str)
def test_cast_weights_compute_what_autocast_does_but_for_the_head(changes):
    model, tokens = shaken(config_of(**changes)), random_ids(2, 12)
    exact = logits_of(model, tokens)
    cast = for_sampling(model, torch.bfloat16)
    assert linear_dtypes(cast) == {torch.bfloat16}
    assert cast.wte.weight.dtype == torch.float32
    rounded = logits_of(cast, tokens)
    assert rounded.dtype == torch.float32
    difference = (rounded - exact).abs().max()
    assert 0 < difference < 0.02 * exact.abs().max() + 0.1
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            x = model.hidden(tokens[:, :9])[:, -1]
        torch.testing.assert_close(rounded[:, 0], model.logits(x.float()), atol=1e-5, rtol=1e-5)


def test_a_cast_leaves_the_model_as_it_was_and_shares_what_is_not_cast():
    model = tiny_model(dropout=0.5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cast = for_sampling(model, torch.bfloat16)
    logits_of(cast, random_ids(1, 8) % 50)
    assert model.training and not cast.training
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name])
    assert cast.wte.weight is model.wte.weight
    assert for_sampling(model).h[0].mlp.c_fc.weight is model.h[0].mlp.c_fc.weight
    assert for_sampling(cast).h[0].mlp.c_fc.weight is cast.h[0].mlp.c_fc.weight


def test_a_compiled_model_is_sampled_as_it_is(model):
    compiled = tiny_model()
    compiled.compile(dynamic=False)
    for block in compiled.h:
        block.compile(dynamic=False)
    found = rows(generate(compiled, prompt(1), 9, seed=2))
    assert found == rows(generate(model, prompt(1), 9, seed=2))


def test_autocast_of_the_caller_chooses_the_dtype(model):
    assert linear_dtypes(for_sampling(model)) == {torch.float32}
    cast = rows(generate(for_sampling(model, torch.bfloat16), prompt(2), 9, seed=2))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_dtypes(for_sampling(model)) == {torch.bfloat16}
        assert linear_dtypes(for_sampling(model, torch.float32)) == {torch.float32}
        assert rows(generate(model, prompt(2), 9, seed=2)) == cast
        assert torch.is_autocast_enabled("cpu")


def test_text_of_cast_weights_does_not_depend_on_how_many_rows_there_are(model):
    cast = for_sampling(model, torch.bfloat16)
    four = rows(generate(cast, prompt(4), 30, seed=2))
    assert len({tuple(row) for row in four}) == 4
    for n in (1, 2, 3):
        assert rows(generate(cast, prompt(n), 30, seed=2)) == four[:n]


def test_a_cache_has_room_for_what_can_come_and_no_more(model, monkeypatch):
    rooms = []
    monkeypatch.setattr(sample, "KVCache", lambda *args: rooms.append(KVCache(*args)) or rooms[-1])
    for length, tokens in ((5, 4), (5, 11), (5, 40)):
        list(generate(model, prompt(2, length), tokens))
    assert [cache.store.size(4) for cache in rooms] == [9, 16, 16]
