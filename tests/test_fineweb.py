"""Sequences and their order: each exactly once, the same for every rank and world size."""

import hashlib
import itertools
import pickle
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from config import Config, TrainConfig, UserError, replace
from corpus.shards import npy_header
from fineweb import (
    FineWebEdu,
    epoch_of,
    load_batch,
    permutation,
    prefetch,
    sequence_indices,
    subseed,
    validation_batches,
)
from loss import IGNORE_INDEX
from tests.tiny import make_data, script, tiny_config

ORDERS = ["none", "documents", "sequences"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


# --- The permutation ---


@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 5))
def test_permutation_takes_each_position_once(count, seed, epoch):
    permuted = permutation(np.arange(count), count, seed, epoch)
    assert np.array_equal(np.sort(permuted), np.arange(count))


def test_permutation_mixes_well_and_differs_by_epoch_and_seed():
    first = permutation(np.arange(100_000), 100_000, seed=1, epoch=0)
    assert not np.array_equal(first, permutation(np.arange(100_000), 100_000, 1, 1))
    assert not np.array_equal(first, permutation(np.arange(100_000), 100_000, 2, 0))
    # In a random permutation neighbours are unrelated and about one position in all stays.
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.02
    assert np.sum(first == np.arange(100_000)) < 10
    # The first tenth spreads evenly over ten bins of the whole.
    counts = np.bincount(first[:10_000] // 10_000, minlength=10)
    assert counts.min() > 850 and counts.max() < 1150


def test_permutation_is_the_same_everywhere():
    """Golden values: another NumPy or machine must not change the order of an old run."""
    golden = [8243012, 8113894, 2426999, 1649365, 1228508, 1476122, 5206252, 2207337]
    assert permutation(np.arange(8), 9_650_967, 1337, 0).tolist() == golden
    # Perfect squares, and counts past 32 bits.
    assert permutation(np.arange(9), 9, 5, 0).tolist() == [8, 7, 3, 2, 6, 5, 0, 4, 1]
    golden = [4531210730, 3160995403, 9285094857, 1866638366]
    assert permutation(np.arange(4), 10**10, 5, 1).tolist() == golden


def test_permutation_of_edge_counts():
    assert permutation(np.arange(0), 0, 1, 0).tolist() == []
    assert permutation(np.arange(1), 1, 1, 0).tolist() == [0]
    # Fifteen trillion tokens and far beyond: no overflow, and positions stay what they were.
    for count in (14_648_437_500, 2**62):
        positions = np.arange(count - 1000, count).astype(np.uint64)
        permuted = permutation(positions, count, 1, 0)
        assert len(np.unique(permuted)) == 1000 and positions[0] == count - 1000
        assert permuted.min() >= 0 and permuted.max() < count


def test_each_sequence_of_the_published_epoch_once():
    count = 9_650_967
    seen = np.zeros(count, dtype=bool)
    for start in range(0, count, 1 << 16):
        positions = np.arange(start, min(start + (1 << 16), count))
        seen[permutation(positions, count, 1337, 0)] = True
    # As many as there are, so none came twice.
    assert seen.all()


def test_subseeds_differ():
    seeds = {subseed(seed, number) for seed in range(20) for number in range(20)}
    assert len(seeds) == 400 and all(0 <= seed < 2**64 for seed in seeds)
    assert subseed(-1, 0) == subseed(2**64 - 1, 0)


# --- Steps and ranks ---


@pytest.mark.parametrize("shuffle", ORDERS)
def test_each_sequence_once_an_epoch(shuffle):
    config = Config(train=TrainConfig(batch_tokens=24 * 1024, shuffle=shuffle))
    count = 24 * 7 + 5
    for epoch in range(2):
        steps = range(epoch * 7 + 1, epoch * 7 + 8)
        assert {epoch_of(config, step, count) for step in steps} == {epoch}
        flat = np.concatenate([sequence_indices(config, step, count) for step in steps])
        assert len(np.unique(flat)) == 24 * 7 and flat.max() < count and flat.dtype == np.int64


def test_a_new_epoch_has_a_new_order():
    config = Config(train=TrainConfig(batch_tokens=8 * 1024, shuffle="sequences"))
    assert not np.array_equal(sequence_indices(config, 1, 80), sequence_indices(config, 11, 80))


def test_published_epoch_length():
    """FineWeb-Edu sample-10BT: 9,650,967 training sequences of 1,024 and 18,849 steps of 512."""
    count = (9_982_590_278 - 100_000_000 - 1) // 1024
    assert count == 9_650_967 and count // 512 == 18_849
    assert sequence_indices(Config(), 18_849, count)[-1] == 18_849 * 512 - 1
    assert sequence_indices(Config(), 18_850, count)[0] == 0


def document_order(config: Config, step: int, data: FineWebEdu) -> dict[str, int]:
    if config.train.shuffle != "documents":
        return {}
    return {"seed": config.train.seed, "epoch": epoch_of(config, step, len(data))}


@pytest.mark.parametrize("shuffle", ORDERS)
def test_a_batch_is_the_same_for_any_world_size_and_names_its_sequences(data, tmp_path, shuffle):
    config = tiny_config(data, tmp_path, batch_tokens=24 * 32, shuffle=shuffle)
    sequences = FineWebEdu(data, "train", 32)
    for step in (1, 2, len(sequences) // 24, len(sequences) // 24 + 1):
        whole = load_batch(sequences, config, step, 0, 1)
        assert whole.step == step and whole.tokens.shape == (24, 33)
        assert (whole.tokens.dtype, whole.indices.dtype) == (torch.int64, torch.int64)
        expected = sequence_indices(config, step, len(sequences))
        assert whole.indices.tolist() == expected.tolist()
        assert torch.equal(whole.inputs[:, 1:], whole.targets[:, :-1])
        for size in (2, 3, 4, 8):
            parts = [load_batch(sequences, config, step, rank, size) for rank in range(size)]
            assert {part.tokens.shape for part in parts} == {(24 // size, 33)}
            assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
            assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)
        # What is recorded of a step is enough to read its sequences again, one by one.
        order = document_order(config, step, sequences)
        again = [sequences.sequences([index], **order) for index in whole.indices.tolist()]
        assert torch.equal(torch.cat(again), whole.tokens)
        back = whole.indices.flip(0)
        assert torch.equal(sequences.sequences(back, **order), whole.tokens.flip(0))


@pytest.mark.parametrize("shuffle", ORDERS)
def test_an_epoch_reads_each_of_its_tokens_once(data, tmp_path, shuffle):
    config = tiny_config(data, tmp_path, batch_tokens=24 * 32, shuffle=shuffle)
    sequences = FineWebEdu(data, "train", 32)
    steps = len(sequences) // 24
    for epoch in range(2):
        batches = [
            load_batch(sequences, config, step, 0, 1).inputs
            for step in range(epoch * steps + 1, epoch * steps + steps + 1)
        ]
        # Random words make a sequence that does not come twice by chance.
        inputs = {tuple(row) for row in torch.cat(batches).tolist()}
        assert len(inputs) == steps * 24
        order = document_order(config, epoch * steps + 1, sequences)
        whole = sequences.sequences(np.arange(len(sequences)), **order)[:, :-1]
        assert inputs <= {tuple(row) for row in whole.tolist()}


@pytest.mark.parametrize("shuffle", ORDERS)
def test_an_epoch_may_end_with_the_split(tmp_path, shuffle):
    """One step of eight sequences, whose last target is the last token there is."""
    np.save(tmp_path / "x_train_0.npy", np.arange(257, dtype=np.uint16))
    data = FineWebEdu(tmp_path, "train", 32)
    config = tiny_config(tmp_path, tmp_path, batch_tokens=256, shuffle=shuffle)
    for step in (1, 2):
        batch = load_batch(data, config, step, 0, 1)
        assert sorted(batch.targets.reshape(-1).tolist()) == list(range(1, 257))


# --- Golden batches ---

# Digests of the batches of steps 1, 2, 17 (the last of the first epoch), 18 and 40.
GOLDEN = {
    "none": ["ab4cfbb5ee08749a", "7d736eb07bc23662", "d4da4ded66ace764", "ab4cfbb5ee08749a",
             "daa77092238ea65a"],
    "documents": ["57ee1ae0fabaac22", "f2725c19d635354f", "5ab92f39cea18060", "bbc9761c1bb2b11a",
                  "f79f6948d43eefc7"],
    "sequences": ["84585f07c2af7684", "395625c041c26839", "81ff47e9e49aefe3", "b0b1ba28e08da507",
                  "32e1e711926c6c52"],
}  # fmt: skip
GOLDEN_VALIDATION = ["6f25089353849470", "4a9e9f9f3d934cc4", "69e3716a26b25ce9", "963518f03c457341",
                     "27fe2e4b1b84a7fe", "1ace70ef854fcbdb", "1b6daff5f29eff2f", "9c41958092c914c9",
                     "42b397f282116f22"]  # fmt: skip


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Two validation and five training shards of made-up documents; one is empty, one tiny."""
    directory = tmp_path_factory.mktemp("golden")
    i = np.arange(6000, dtype=np.uint64)
    tokens = ((i * np.uint64(2654435761)) >> np.uint64(7)) % np.uint64(997)
    tokens[(i * i) % np.uint64(37) == 3] = 50256
    bounds = [0, 1100, 1500, 2600, 2600, 2611, 4200, 6000]
    for number, (begin, end) in enumerate(itertools.pairwise(bounds)):
        name = f"x_{'val' if number < 2 else 'train'}_{number:06d}.npy"
        np.save(directory / name, tokens[begin:end].astype("<u2"))
    return directory


def digest(tokens: torch.Tensor) -> str:
    return hashlib.sha256(tokens.numpy().astype("<i8").tobytes()).hexdigest()[:16]


def test_batches_are_those_of_earlier_versions(golden):
    """Taken from version 175f930: a run continues, and a seed means, what it did then."""
    data, val = FineWebEdu(golden, "train", 32), FineWebEdu(golden, "val", 32)
    changes = {"micro_batch_size": 3, "val_tokens": 800, "batch_tokens": 256, "seed": 7}
    assert (len(data), len(val)) == (140, 46)
    for shuffle, digests in GOLDEN.items():
        config = tiny_config(golden, golden, shuffle=shuffle, **changes)
        batches = [load_batch(data, config, step, 0, 1) for step in (1, 2, 17, 18, 40)]
        assert [digest(batch.tokens) for batch in batches] == digests
    batches = validation_batches(val, config, 0, 1)
    assert [digest(torch.stack(batch)) for batch in batches] == GOLDEN_VALIDATION


SHARD, TOTAL, LENGTH = 100_000_000, 9_982_590_278, 1024


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", ["none", "sequences"])
def test_first_and_last_step_at_full_size(tmp_path, shuffle):
    """FineWeb-Edu's hundred shards in their size, but sparse: they take no room on the disk."""
    for number in range(100):
        tokens = min(SHARD, TOTAL - number * SHARD)
        with open(tmp_path / f"e_{'train' if number else 'val'}_{number:06d}.npy", "wb") as file:
            file.write(npy_header(tokens))
            file.truncate(128 + 2 * tokens)
    config = replace(Config(), {"train.shuffle": shuffle})
    data = FineWebEdu(tmp_path, "train", LENGTH)
    assert (len(data), len(data) // 512) == (9_650_967, 18_849)
    for step in (1, 18_849):
        indices = sequence_indices(config, step, len(data))
        for index in indices[::37].tolist():  # each says which it is, in its second token
            shard, place = divmod(index * LENGTH + 1, SHARD)
            path = tmp_path / data.shards.shards[shard].file
            with open(path, "r+b") as file:
                file.seek(128 + 2 * place)
                file.write(np.array([index % 50_000 + 1], "<u2").tobytes())
        whole = load_batch(data, config, step, 0, 1).tokens
        assert torch.equal(whole[::37, 1], torch.from_numpy(indices[::37]) % 50_000 + 1)
        parts = [load_batch(data, config, step, rank, 8).tokens for rank in range(8)]
        assert torch.equal(torch.cat(parts), whole)


# --- As a Dataset ---


def test_items_are_inputs_and_targets_one_further_on(data):
    sequences = FineWebEdu(data, "train", 32)
    x, y = sequences[3]
    tokens = sequences.shards.read([3 * 32], 33)[0].astype(np.int64)
    assert x.tolist() == tokens[:-1].tolist() and y.tolist() == tokens[1:].tolist()
    assert torch.equal(sequences[-1][0], sequences[len(sequences) - 1][0])
    with pytest.raises(IndexError):
        sequences[len(sequences)]


def test_exact_division_leaves_the_last_target_inside(tmp_path):
    """Tokens that divide exactly by T hold one sequence less, for want of a last target."""
    for split, tokens in (("train", 64), ("val", 65)):
        np.save(tmp_path / f"x_{split}_0.npy", np.zeros(tokens, dtype=np.uint16))
    assert len(FineWebEdu(tmp_path, "train", 32)) == 1
    assert len(FineWebEdu(tmp_path, "val", 32)) == 2
    with pytest.raises(UserError, match="less than one sequence of 64"):
        FineWebEdu(tmp_path, "train", 64)


def test_works_with_a_plain_data_loader_and_in_spawned_workers(data, tmp_path):
    sequences = FineWebEdu(data, "train", 32)
    config = tiny_config(data, tmp_path, shuffle="documents")
    expected = load_batch(sequences, config, 1, 0, 1).tokens
    packed = pickle.dumps(sequences)
    assert len(packed) < 1000
    assert torch.equal(load_batch(pickle.loads(packed), config, 1, 0, 1).tokens, expected)
    loader = DataLoader(sequences, batch_size=4, shuffle=True, num_workers=2)
    assert sum(len(x) for x, _ in loader) == len(sequences)


# --- Prefetching ---


def info(rank: int, size: int) -> SimpleNamespace:
    return SimpleNamespace(rank=rank, world_size=size, device=torch.device("cpu"))


ALONE = info(0, 1)


@pytest.mark.parametrize("shuffle", ORDERS)
def test_batches_ahead_are_those_of_the_steps(data, tmp_path, shuffle):
    config, sequences = tiny_config(data, tmp_path, shuffle=shuffle), FineWebEdu(data, "train", 32)
    for rank in range(2):
        batches = list(prefetch(sequences, config, info(rank, 2), 5, 9))
        assert [batch.step for batch in batches] == [5, 6, 7, 8, 9]
        for batch in batches:
            expected = load_batch(sequences, config, batch.step, rank, 2)
            assert torch.equal(batch.tokens, expected.tokens)
            assert torch.equal(batch.indices, expected.indices)
    assert list(prefetch(sequences, config, ALONE, 5, 4)) == []


def test_an_error_in_the_reader_reaches_the_trainer_and_the_thread_ends(
    data, tmp_path, monkeypatch
):
    sequences, config = FineWebEdu(data, "train", 32), tiny_config(data, tmp_path)
    before, read, calls = threading.active_count(), sequences.sequences, []

    def unreliable(*arguments):
        calls.append(arguments)
        return read(*arguments) if len(calls) < 3 else 1 / 0

    monkeypatch.setattr(sequences, "sequences", unreliable)
    batches = prefetch(sequences, config, ALONE, 1, 9)
    assert [next(batches).step, next(batches).step] == [1, 2]
    with pytest.raises(ZeroDivisionError):
        next(batches)
    assert threading.active_count() == before


def test_closing_joins_the_thread_and_reads_no_further(data, tmp_path, monkeypatch):
    sequences, config = FineWebEdu(data, "train", 32), tiny_config(data, tmp_path)
    before, read, calls = threading.active_count(), sequences.sequences, []
    monkeypatch.setattr(sequences, "sequences", lambda *a: calls.append(a) or read(*a))
    batches = prefetch(sequences, config, ALONE, 1, 1000)
    next(batches)
    batches.close()
    assert threading.active_count() == before and len(calls) <= 3


# --- Validation ---


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 40])
def test_validation_reads_each_sequence_once_in_one_shape(data, tmp_path, size, micro_batch_size):
    config = tiny_config(data, tmp_path, micro_batch_size=micro_batch_size, val_tokens=704)
    sequences = FineWebEdu(data, "val", 32)
    seen, counts = [], set()
    for rank in range(size):
        batches = list(validation_batches(sequences, config, rank, size))
        counts.add(len(batches))
        for inputs, targets in batches:
            assert inputs.shape == targets.shape == (micro_batch_size, 32)
            kept = targets[:, 0] != IGNORE_INDEX
            assert bool((targets[~kept] == IGNORE_INDEX).all())
            assert torch.equal(inputs[kept][:, 1:], targets[kept][:, :-1])
            seen += targets[kept].tolist()
    # Under FSDP every rank has to call the model equally often.
    assert counts == {-(-22 // (size * micro_batch_size))}
    assert sorted(seen) == sorted(sequences.sequences(np.arange(22))[:, 1:].tolist())


# --- As a script ---


def test_it_describes_a_data_directory(data, tmp_path):
    result = script("fineweb.py", data, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    first, second, tokenizer, source, *text = result.stdout.splitlines()
    begun = np.count_nonzero(np.load(data / "tiny_val_000000.npy") == 29)
    assert first == f"val: 4,000 tokens in 1 shards, the first with {begun} documents"
    assert second.startswith("train: ") and "the first with" in second
    assert (tokenizer, source) == ("tokenizer: char, 30 ids", "source: kind test")
    assert "the" in " ".join(text)
    result = script("fineweb.py", "nowhere", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: There is no data 'nowhere'")
