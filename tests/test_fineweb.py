"""Windows and their order: each exactly once, the same for every rank and world size."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from config import Config, TrainConfig, UserError, replace
from cross_entropy import IGNORED
from distributed import World
from documents import DocumentOrder, index_path, write_index
from fineweb import (
    FineWebEdu,
    rank_windows,
    read_update,
    training_batches,
    validation_batches,
)
from manifests import npy_header
from orders import permute, subseed, update_windows
from tests.tiny import make_data, tiny_config

CPU = torch.device("cpu")
ORDERS = ["sequential", "shuffle_documents", "shuffle_windows"]


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
    # Perfect squares, and counts past 32 bits.
    assert permute(np.arange(9), 9, 5, 0).tolist() == [8, 7, 3, 2, 6, 5, 0, 4, 1]
    golden = [4531210730, 3160995403, 9285094857, 1866638366]
    assert permute(np.arange(4), 10**10, 5, 1).tolist() == golden


def test_permutation_of_edge_counts():
    assert permute(np.arange(0), 0, 1, 0).tolist() == []
    assert permute(np.arange(1), 1, 1, 0).tolist() == [0]
    # Fifteen trillion tokens and far beyond: no overflow, and positions stay what they were.
    for count in (14_648_437_500, 2**62):
        positions = np.arange(count - 1000, count).astype(np.uint64)
        permuted = permute(positions, count, 1, 0)
        assert len(np.unique(permuted)) == 1000 and positions[0] == count - 1000
        assert permuted.min() >= 0 and permuted.max() < count


def test_each_window_of_the_published_epoch_once():
    windows = 9_650_967
    seen = np.zeros(windows, dtype=bool)
    for start in range(0, windows, 1 << 16):
        positions = np.arange(start, min(start + (1 << 16), windows))
        seen[permute(positions, windows, 1337, 0)] = True
    # As many as there are, so none came twice.
    assert seen.all()


def test_subseeds_differ():
    seeds = {subseed(seed, number) for seed in range(20) for number in range(20)}
    assert len(seeds) == 400 and all(0 <= seed < 2**64 for seed in seeds)
    assert subseed(-1, 0) == subseed(2**64 - 1, 0)


@pytest.mark.parametrize("order", ORDERS)
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


def plain_windows(data: FineWebEdu, config: Config, step: int) -> list[list[int]]:
    """Return the windows of an update, read one by one from the whole stream of its epoch."""
    length, total = data.block_size, len(data.stream)
    tokens = data.stream.read(0, total)
    if config.train.order == "shuffle_documents":
        epoch = (step - 1) // (len(data) // 24)
        tokens = DocumentOrder(data.stream, config.train.seed).read(epoch, 0, total)
    indices = update_windows(config, step, len(data))
    return [tokens[i * length : i * length + length + 1].tolist() for i in indices]


@pytest.mark.parametrize("order", ORDERS)
def test_an_update_is_the_same_for_any_world_size(data, tmp_path, order):
    config = tiny_config(data, tmp_path, tokens_per_update=24 * 32, order=order)
    windows = FineWebEdu(data, "train", 32)
    for step in (1, 2, len(windows) // 24, len(windows) // 24 + 1):
        expected = plain_windows(windows, config, step)
        assert len(expected) == 24
        for size in (1, 2, 3, 4, 8):
            parts = [read_update(windows, config, step, World(r, size, CPU)) for r in range(size)]
            assert {(part.shape, part.dtype) for part in parts} == {((24 // size, 33), torch.int64)}
            assert torch.cat(parts).tolist() == expected


@pytest.mark.parametrize("order", ORDERS)
def test_an_epoch_reads_each_of_its_tokens_once(data, tmp_path, order):
    config = tiny_config(data, tmp_path, tokens_per_update=24 * 32, order=order)
    windows = FineWebEdu(data, "train", 32)
    updates = len(windows) // 24
    for epoch in range(2):
        steps = range(epoch * updates + 1, epoch * updates + updates + 1)
        read = torch.cat([read_update(windows, config, step, World(0, 1, CPU)) for step in steps])
        inputs = {tuple(row.tolist()) for row in read[:, :-1]}
        # Forty random words make a window that does not come twice by chance.
        assert len(inputs) == updates * 24
        if order != "shuffle_documents":
            whole = windows.windows(np.arange(len(windows)))[:, :-1]
            assert inputs <= {tuple(row.tolist()) for row in whole}
        else:
            stream = windows.documents(config.train.seed).read(epoch, 0, updates * 24 * 32)
            assert read[:, :-1].reshape(-1).tolist() == stream.tolist()


SHARD, TOTAL, LENGTH = 100_000_000, 9_982_590_278, 1024


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """FineWeb-Edu's hundred shards in their size, but sparse: they take no room on the disk."""
    directory = tmp_path_factory.mktemp("published")
    for number in range(100):
        tokens = min(SHARD, TOTAL - number * SHARD)
        name = f"edufineweb_{'train' if number else 'val'}_{number:06d}.npy"
        with open(directory / name, "wb") as file:
            file.write(npy_header(tokens))
            file.truncate(128 + 2 * tokens)
    return directory


def write_tokens(stream, start: int, tokens: np.ndarray) -> None:
    """Overwrite the tokens of a split from `start` on."""
    while len(tokens):
        number = int(np.searchsorted(stream.bounds, start, side="right")) - 1
        part = tokens[: stream.bounds[number + 1] - start]
        with open(stream.directory / stream.shards[number].file, "r+b") as file:
            file.seek(128 + 2 * int(start - stream.bounds[number]))
            file.write(part.tobytes())
        start, tokens = start + len(part), tokens[len(part) :]


@pytest.mark.parametrize("order", ORDERS)
def test_first_and_last_update_at_full_size(published, order):
    config = replace(Config(), {"train.order": order})
    data = FineWebEdu(published, "train", LENGTH)
    updates, rng = len(data) // 512, np.random.default_rng(0)
    assert (len(data), updates) == (9_650_967, 18_849)
    if order == "shuffle_documents":
        # Without any document in a sparse shard the pieces are the shards themselves.
        write_index(index_path(data.stream), [data.stream.bounds])
        shards = permute(np.arange(99), 99, subseed(config.train.seed, 0), 0)
        lengths = np.diff(data.stream.bounds)[shards]
    for step in (1, updates):
        expected = []
        for window in update_windows(config, step, len(data)):
            start = int(window) * LENGTH
            if order == "shuffle_documents":
                place = int(np.searchsorted(np.cumsum(lengths), start, side="right"))
                start += int(data.stream.bounds[shards[place]] - lengths[:place].sum())
            # The last token of the window before is this one's first.
            kept = data.stream.read(start, 1)
            first = kept if kept[0] else rng.integers(1, 50256, 1)
            tokens = np.concatenate([first, rng.integers(1, 50256, LENGTH)]).astype("<u2")
            write_tokens(data.stream, start, tokens)
            expected.append(tokens.astype(np.int64))
        expected = torch.from_numpy(np.stack(expected))
        for size in (1, 2, 4, 8):
            parts = [read_update(data, config, step, World(r, size, CPU)) for r in range(size)]
            # How a process divides its windows for accumulation changes none of them.
            for micro_batch in (1, 16, 64):
                batches = [batch for part in parts for batch in part.split(micro_batch)]
                assert torch.equal(torch.cat(batches), expected)


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


@pytest.mark.parametrize("order", ORDERS)
def test_an_epoch_may_end_with_the_split(tmp_path, order):
    """One update of eight windows, whose last target is the last token there is."""
    np.save(tmp_path / "x_train_0.npy", np.arange(257, dtype=np.uint16))
    data = FineWebEdu(tmp_path, "train", 32)
    config = tiny_config(tmp_path, tmp_path, tokens_per_update=256, order=order)
    for step in (1, 2):
        batch = read_update(data, config, step, World(0, 1, CPU))
        assert sorted(batch[:, 1:].reshape(-1).tolist()) == list(range(1, 257))


def test_a_spawned_worker_reads_the_document_order(data, tmp_path):
    config = tiny_config(data, tmp_path, order="shuffle_documents")
    windows = FineWebEdu(data, "train", 32)
    expected = read_update(windows, config, 1, World(0, 1, CPU))
    again = pickle.loads(pickle.dumps(windows))
    assert torch.equal(read_update(again, config, 1, World(0, 1, CPU)), expected)


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
            assert torch.equal(batch, read_update(windows, config, step, world))


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
