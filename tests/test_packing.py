"""Rows hold every request once, waste little, and come in few shapes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from likelihood import Request
from packing import FINE_STEP, STEP, pack, plan


@given(st.lists(st.integers(1, 700), min_size=1, max_size=200), st.booleans())
@settings(max_examples=60, deadline=None)
def test_every_tree_lies_in_one_row_and_rows_are_not_overfull(lengths, few_shapes):
    rows = pack(lengths, few_shapes)
    assert sorted(i for _, inside in rows for i in inside) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in inside) <= size for size, inside in rows)
    if few_shapes:
        assert len({size for size, _ in rows}) <= 2
        assert all(size % STEP == 0 for size, _ in rows)
    else:
        assert all(size < lengths[inside[0]] + FINE_STEP for size, inside in rows)


def test_examples_of_many_lengths_fill_their_rows():
    rng = np.random.default_rng(0)
    lengths = rng.integers(30, 300, size=2000).tolist()
    rows = pack(lengths)
    assert sum(lengths) > 0.97 * sum(size for size, _ in rows)


def test_one_long_text_does_not_lengthen_all_rows():
    rows = pack([1000, *[100] * 500])
    assert sorted({size for size, _ in rows}) != [1024]
    assert sum(size for size, _ in rows) < 1.3 * (1000 + 50_000)


def test_no_requests_are_no_batches():
    assert plan([], 64, 512, 300).batches == []


def test_batches_have_one_shape_and_few_empty_rows():
    requests = [Request(np.arange(60), (np.arange(61),))] * 101
    batches = plan(requests, 128, 20 * 128, 300).batches
    assert {batch.tokens.shape for batch in batches} == {(17, 128)}
    assert len(batches) == 6


def test_single_texts_are_causal_and_trees_are_not():
    one, two = (np.arange(70),), (np.arange(40), np.arange(50))
    assert all(b.causal for b in plan([Request(np.arange(40), one)] * 5, 128, 512, 300).batches)
    assert not any(b.causal for b in plan([Request(np.arange(40), two)] * 5, 256, 512, 300).batches)


def test_a_state_that_predicts_several_endings_is_projected_once():
    batch = plan([Request(np.arange(10), (np.arange(5),) * 4)], 128, 128, 300).batches[0]
    assert len(batch.targets) == 20 and len(batch.states) == 17
    assert batch.begins.sum() == 4


def test_an_id_past_the_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"300 token ids .* needs id 300.*does not fit"):
        plan([Request(np.array([1]), (np.array([2]), np.array([300])))], 64, 512, 300)
