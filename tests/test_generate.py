"""Generation: the cache is exact, draws are reproducible and stay inside what was asked for."""

import numpy as np
import pytest
import torch

from config import UserError
from decoder import Decoder
from generate import choose, distribution, generate, row_generator
from model import GPT
from tests.talking_model import prompt, rows, tiny_model


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


@pytest.mark.parametrize("top_k", [None, 7])
def test_top_p_finds_the_same_ids_among_few_as_among_all(monkeypatch, top_k):
    logits = torch.randn(3, 50) * torch.tensor([[0.1], [1.0], [5.0]])
    for top_p in (0.2, 0.6, 0.99):
        monkeypatch.setattr("generate.NUCLEUS", 50)
        expected = distribution(logits, 1.0, top_k, top_p)
        monkeypatch.setattr("generate.NUCLEUS", 4)
        torch.testing.assert_close(distribution(logits, 1.0, top_k, top_p), expected)


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


def test_a_decoder_can_be_used_again(model):
    decoder = Decoder(model)
    for seed in (1, 2):
        assert rows(generate(decoder, prompt(2), 9, seed=seed)) == rows(
            generate(model, prompt(2), 9, seed=seed)
        )
