"""Windows and their order: each exactly once, the same for every rank and world size."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from config import Config, TrainConfig, UserError, replace
from distributed import World
from fineweb import (
    FineWebEdu,
    permute,
    rank_windows,
    training_batches,
    update_windows,
    validation_batches,
)
from model import IGNORED
from tests.tiny import make_data, tiny_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 5))
def test_permutation_takes_each_position_once(count, seed, epoch):
    permuted = permute(np.arange(count), count, seed, epoch)
    assert np.array_equal(np.sort(permuted), np.arange(count))


def test_permutation_mixes_well_and_differs_by_epoch_and_seed():
    first = permute(np.arange(100_000), 100_000, seed=1, epoch=0)
    assert not np.array_equal(first, permute(np.arange(100_000), 100_000, 1, 1))
    assert not np.array_equal(first, permute(np.arange(100_000), 100_000, 2, 0))
    # In a random permutation neighbours are unrelated and about one position in all stays.
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.02
    assert np.sum(first == np.arange(100_000)) < 10
    # The first tenth spreads evenly over ten bins of the whole.
    counts = np.bincount(first[:10_000] // 10_000, minlength=10)
    assert counts.min() > 850 and counts.max() < 1150


def test_permutation_is_the_same_everywhere():
    """Golden values: another NumPy or machine must not change the order of an old run."""
    golden = [8243012, 8113894, 2426999, 1649365, 1228508, 1476122, 5206252, 2207337]
    assert permute(np.arange(8), 9_650_967, 1337, 0).tolist() == golden


@pytest.mark.parametrize("order", ["sequential", "shuffle_windows"])
def test_each_window_once_an_epoch_over_ranks_and_world_sizes(order):
    config = Config(train=TrainConfig(tokens_per_update=24 * 1024, micro_batch=1, order=order))
    windows = 24 * 7 + 5
    for epoch in range(2):
        whole = [update_windows(config, epoch * 7 + k, windows) for k in range(1, 8)]
        flat = np.concatenate(whole)
        assert len(np.unique(flat)) == 24 * 7 and flat.max() < windows
        for size in (1, 2, 3, 4, 8):
            for k in range(1, 8):
                step = epoch * 7 + k
                ranks = [
                    rank_windows(config, step, windows, World(r, size, CPU)) for r in range(size)
                ]
                assert np.array_equal(np.concatenate(ranks), whole[k - 1])


def test_a_new_epoch_has_a_new_order():
    config = Config(train=TrainConfig(tokens_per_update=8 * 1024, order="shuffle_windows"))
    assert not np.array_equal(update_windows(config, 1, 80), update_windows(config, 11, 80))


def test_published_epoch_length():
    """FineWeb-Edu sample-10BT: 9,650,967 training windows of 1,024 and 18,849 updates of 512."""
    windows = (9_982_590_278 - 100_000_000 - 1) // 1024
    assert windows == 9_650_967
    assert windows // 512 == 18_849
    last = update_windows(Config(), 18_849, windows)
    assert last[-1] == 18_849 * 512 - 1
    assert update_windows(Config(), 18_850, windows)[0] == 0


def test_items_are_inputs_and_targets_one_further_on(data):
    windows = FineWebEdu(data, "train", 32)
    x, y = windows[3]
    tokens = windows.stream.read(3 * 32, 33).astype(np.int64)
    assert x.tolist() == tokens[:-1].tolist() and y.tolist() == tokens[1:].tolist()
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_exact_division_leaves_the_last_target_inside(tmp_path):
    """Tokens that divide exactly by T hold one window less, for want of a last target."""
    directory = tmp_path / "exact"
    directory.mkdir()
    for split, tokens in (("train", 64), ("val", 65)):
        np.save(directory / f"x_{split}_0.npy", np.zeros(tokens, dtype=np.uint16))
    assert len(FineWebEdu(directory, "train", 32)) == 1
    assert len(FineWebEdu(directory, "val", 32)) == 2
    with pytest.raises(UserError, match="less than one window"):
        FineWebEdu(directory, "train", 64)


def test_works_with_a_plain_data_loader(data):
    windows = FineWebEdu(data, "train", 32)
    loader = DataLoader(windows, batch_size=4, shuffle=True, num_workers=2)
    assert sum(len(x) for x, _ in loader) == len(windows)


def test_batches_ahead_are_those_of_the_steps(data, tmp_path):
    config = tiny_config(data, tmp_path)
    windows = FineWebEdu(data, "train", 32)
    for rank in range(2):
        world = World(rank, 2, CPU)
        batches = list(training_batches(windows, config, world, 5, 9))
        assert len(batches) == 5
        for step, batch in zip(range(5, 10), batches, strict=True):
            expected = windows.windows(rank_windows(config, step, len(windows), world))
            assert torch.equal(batch, expected)


def test_an_error_in_the_reader_reaches_the_trainer(data, tmp_path, monkeypatch):
    windows = FineWebEdu(data, "train", 32)
    monkeypatch.setattr(windows, "windows", lambda indices: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(training_batches(windows, tiny_config(data, tmp_path), World(0, 1, CPU), 1, 2))


@pytest.mark.parametrize("micro_batch", [1, 4, 8])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_validation_reads_each_window_once_in_one_shape(data, tmp_path, size, micro_batch):
    config = replace(
        tiny_config(data, tmp_path), {"train.micro_batch": micro_batch, "train.val_tokens": 704}
    )
    windows = FineWebEdu(data, "val", 32)
    seen = []
    for rank in range(size):
        for inputs, targets in validation_batches(windows, config, World(rank, size, CPU)):
            assert inputs.shape == targets.shape == (micro_batch, 32)
            seen += [row.tolist() for row in targets if row[0] != IGNORED]
    expected = windows.windows(np.arange(704 // 32))[:, 1:].tolist()
    assert sorted(seen) == sorted(expected)
