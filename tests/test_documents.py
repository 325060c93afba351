"""train.shuffle documents: the re-ordered stream against lists of lists."""

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fineweb
from config import UserError
from fineweb import FineWebEdu, document_starts, load_batch, permutation, subseed
from tests.tiny import tiny_config

EOT = 50256
SEED = 7


def write(directory, shards: list[list[int]], block_size: int = 1) -> FineWebEdu:
    """Write shards as another project does, without a manifest."""
    directory.mkdir(exist_ok=True)
    for number, tokens in enumerate(shards):
        np.save(directory / f"x_train_{number:03d}.npy", np.array(tokens, dtype=np.uint16))
    return FineWebEdu(directory, "train", block_size)


def stream(data: FineWebEdu, epoch: int, seed: int = SEED) -> list[int]:
    """Return all tokens of an epoch in its order."""
    tokens = data.sequences(np.arange(len(data)), seed=seed, epoch=epoch)
    return [*tokens[:, :-1].flatten().tolist(), tokens[-1, -1].item()]


def documents(shard: list[int]) -> list[list[int]]:
    """Cut a shard before every <|endoftext|>."""
    found = []
    for place, token in enumerate(shard):
        if token == EOT or place == 0:
            found.append([])
        found[-1].append(token)
    return found


def reference(shards: list[list[int]], seed: int, epoch: int) -> list[int]:
    """Return an epoch's tokens, by shuffling lists."""
    tokens = []
    for shard in permutation(np.arange(len(shards)), len(shards), subseed(seed, 0), epoch):
        cut = documents(shards[shard])
        for piece in permutation(np.arange(len(cut)), len(cut), subseed(seed, shard + 1), epoch):
            tokens += cut[piece]
    return tokens


def make_shards(lengths: list[int], cuts: list[int]) -> list[list[int]]:
    """Return documents of `lengths` with distinct tokens, cut into shards of `cuts` tokens."""
    tokens = []
    for length in lengths:
        tokens += [EOT, *range(len(tokens), len(tokens) + length)]
    ends = np.cumsum(cuts)
    parts = [part.tolist() for part in np.split(np.array(tokens), ends[ends < len(tokens)])]
    return [part for part in parts if part]


@pytest.fixture(scope="module")
def shards() -> list[list[int]]:
    # A document longer than two shards, shards without any beginning, and some that begin with one.
    return make_shards([5, 0, 3, 60, 1, 1, 22, 0, 0, 9, 12], [11, 20, 20, 20, 7, 13, 17])


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=20),
    cuts=st.lists(st.integers(1, 25), max_size=12),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_reading_equals_shuffled_lists(tmp_path_factory, lengths, cuts, epoch, seed, data):
    shards = make_shards(lengths, cuts)
    size = data.draw(st.integers(1, sum(map(len, shards)) - 1))
    sequences = write(tmp_path_factory.mktemp("data") / "x", shards, size)
    expected = reference(shards, seed, epoch)
    whole = [expected[i * size : i * size + size + 1] for i in range(len(sequences))]
    some = data.draw(st.lists(st.integers(0, len(sequences) - 1), min_size=1, max_size=8))
    for indices in (range(len(sequences)), some):
        found = sequences.sequences(list(indices), seed=seed, epoch=epoch)
        assert found.tolist() == [whole[i] for i in indices]


def test_every_token_once_an_epoch_and_another_order_in_each(tmp_path, shards):
    data = write(tmp_path, shards)
    epochs = [stream(data, epoch) for epoch in range(4)]
    everything = sorted(token for shard in shards for token in shard)
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert stream(data, 0, SEED + 1) not in epochs
    # A few at a time, from two epochs in turn.
    for start in range(0, len(data) - 9, 9):
        for epoch in (1, 2):
            found = data.sequences(np.arange(start, start + 9), seed=SEED, epoch=epoch)
            assert found[:, 0].tolist() == epochs[epoch][start : start + 9]


def test_no_document_of_one_shard_is_left_in_its_place(tmp_path):
    """The order within a shard changes with the epoch, and shards do not share one."""
    shards = [[token for n in range(50) for token in (EOT, n)] for _ in range(2)]
    data = write(tmp_path, shards)
    halves = [stream(data, epoch)[i : i + 100][1::2] for epoch in range(2) for i in (0, 100)]
    assert all(sorted(half) == list(range(50)) for half in halves)
    assert len({tuple(half) for half in halves}) == 4


def test_empty_shards_are_passed_over(tmp_path):
    shards = [[], [EOT, 1, 2], [], [3, EOT, 4], []]
    data = write(tmp_path, shards)
    for epoch in range(5):
        assert stream(data, epoch) == reference(shards, SEED, epoch)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_scanning_in_blocks_finds_the_same(tmp_path, shards, monkeypatch, size):
    data = write(tmp_path, shards)
    monkeypatch.setattr(fineweb, "BLOCK_BYTES", size)
    for number, shard in enumerate(shards):
        lengths = [len(document) for document in documents(shard)]
        begins = np.cumsum([0, *lengths[:-1]])
        assert document_starts(data.shards, number).tolist() == begins.tolist()


def test_a_shard_is_scanned_once_when_it_is_entered_and_nothing_is_written(
    tmp_path, shards, monkeypatch
):
    before, scanned = None, []
    data, scan = write(tmp_path, shards), fineweb.document_starts
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(
        fineweb, "document_starts", lambda of, shard: scanned.append(shard) or scan(of, shard)
    )
    for index in range(len(data)):
        data.sequences([index], seed=SEED, epoch=0)
    assert sorted(scanned) == list(range(len(shards)))
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_rank_reads_the_shards_of_its_own_slice_only(tmp_path, monkeypatch):
    data = write(tmp_path, [[EOT, *range(n * 100, n * 100 + 63)] for n in range(8)], 16)
    config = tiny_config(
        tmp_path, tmp_path, batch_tokens=16 * 16, block_size=16, shuffle="documents", vocab_size=9
    )
    opened, shard = [], data.shards.shard
    monkeypatch.setattr(data.shards, "shard", lambda i: opened.append(i) or shard(i))
    seen = []
    for rank in range(4):
        opened.clear()
        load_batch(data, config, 1, rank, 4)
        seen.append(set(opened))
    # Four sequences are a shard, and the last target is the next one's first token.
    assert [len(shards) for shards in seen] == [2, 2, 2, 2]
    assert len(set.union(*seen)) == 5


def test_threads_share_the_order(tmp_path, shards):
    data, wrong = write(tmp_path, shards), []
    expected = [stream(data, epoch) for epoch in range(3)]

    def read(epoch: int) -> None:
        for _ in range(20):
            if stream(data, epoch) != expected[epoch]:
                wrong.append(epoch)

    threads = [threading.Thread(target=read, args=(epoch % 3,)) for epoch in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_token_past_the_vocabulary(tmp_path):
    data = write(tmp_path, [[EOT, 1, 2], [EOT, 50257, 4]])
    with pytest.raises(UserError, match="token 50257, past its vocabulary of 50257"):
        stream(data, 0)


def test_reading_past_the_end_is_an_error(tmp_path, shards):
    data = write(tmp_path, shards)
    with pytest.raises(IndexError):
        data.sequences([len(data)], seed=SEED, epoch=0)
