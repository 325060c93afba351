"""Requests are cut from texts, windows cover them, and errors are those of the statistics books."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import UserError
from corpus.tokenizer import gpt2_tokenizer
from likelihood import (
    encode_request,
    perplexity,
    ratio_with_error,
    share,
    text_request,
    windows,
)

TOKENIZER = gpt2_tokenizer()


def text_of(tokens: np.ndarray) -> str:
    return TOKENIZER.decode(tokens)


def test_a_context_and_its_endings_are_the_tokens_of_the_whole_text():
    request = encode_request(TOKENIZER, "The cat sat", [" on the mat.", " down"])
    assert text_of(request.context) == "The cat sat"
    assert [text_of(ending) for ending in request.endings] == [" on the mat.", " down"]
    whole = np.concatenate((request.context, request.endings[0]))
    assert whole.tolist() == TOKENIZER.encode("The cat sat on the mat.").tolist()


def test_space_after_a_context_belongs_to_the_ending():
    """A token of its own would hardly ever be followed by a word."""
    spaced = encode_request(TOKENIZER, "The cat sat ", ["on the mat."])
    assert text_of(spaced.context) == "The cat sat"
    assert text_of(spaced.endings[0]) == " on the mat."


def test_an_empty_context_is_the_start_of_a_document():
    request = encode_request(TOKENIZER, "", ["Hello"])
    assert request.context.tolist() == [TOKENIZER.eot]
    assert text_request(TOKENIZER, "Hello").context.tolist() == [TOKENIZER.eot]


@pytest.mark.parametrize("ending", ["", " ", "\n"])
def test_an_empty_ending_is_refused(ending):
    with pytest.raises(UserError, match=r"ending is empty, .* after the context 'The cat'"):
        encode_request(TOKENIZER, "The cat", [" sat", ending])


def test_an_empty_text_is_refused():
    with pytest.raises(UserError, match="a text is empty"):
        text_request(TOKENIZER, "")


@given(st.integers(2, 500), st.integers(1, 499), st.integers(1, 64))
def test_windows_predict_every_token_once_from_as_much_as_fits(length, first, max_length):
    first = min(first, length - 1)
    predicted = []
    for start, scored, stop in windows(length, first, max_length):
        assert start < scored < stop <= length
        assert stop - 1 - start <= max_length
        # Where there is more text than a window holds, it is full.
        assert start == 0 or stop - 1 - start == max_length
        predicted += range(scored, stop)
    assert predicted == list(range(first, length))


def test_a_share_has_the_error_of_a_sample_mean():
    found = share("acc", [1.0, 0.0, 0.0, 1.0, 1.0])
    assert found["acc"] == pytest.approx(0.6)
    assert found["acc_stderr"] == pytest.approx(np.std([1, 0, 0, 1, 1], ddof=1) / math.sqrt(5))
    assert share("acc", [1.0]) == {"acc": 1.0, "acc_stderr": 0.0}


def test_the_error_of_a_ratio_is_what_resampling_finds():
    rng = np.random.default_rng(0)
    weights = rng.integers(50, 500, size=300)
    nats = weights * rng.normal(3, 0.4, size=300)
    ratio, error = ratio_with_error(nats, weights)
    draws = rng.integers(300, size=(4000, 300))
    resampled = nats[draws].sum(1) / weights[draws].sum(1)
    assert ratio == pytest.approx(nats.sum() / weights.sum())
    assert error == pytest.approx(resampled.std(), rel=0.1)


def test_perplexity_is_the_exponential_and_its_error_follows():
    found = perplexity("ppl", [2.0, 4.0, 3.0])
    assert found["ppl"] == pytest.approx(math.exp(3))
    assert found["ppl_stderr"] == pytest.approx(math.exp(3) / math.sqrt(3))
    assert perplexity("ppl", [1e6])["ppl"] == math.inf
