"""The document order against lists of lists, and its index under damage."""

import dataclasses
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import documents
from config import UserError
from documents import DocumentOrder, build_index, index_path
from files import locked
from manifests import read_manifest, write_manifest
from orders import permute, subseed
from shards import TokenStream

EOT = 50256
SEED = 7


def write(directory, shards: list[list[int]]) -> TokenStream:
    """Write shards as another project does, without a manifest."""
    directory.mkdir(exist_ok=True)
    for number, tokens in enumerate(shards):
        np.save(directory / f"x_train_{number:03d}.npy", np.array(tokens, dtype=np.uint16))
    return TokenStream(directory, "train")


def pieces(shard: list[int]) -> list[list[int]]:
    """Cut a shard before every <|endoftext|>."""
    found = []
    for place, token in enumerate(shard):
        if token == EOT or place == 0:
            found.append([])
        found[-1].append(token)
    return found


def reference(shards: list[list[int]], seed: int, epoch: int) -> list[int]:
    """Return an epoch's tokens, by shuffling lists."""
    stream = []
    for shard in permute(np.arange(len(shards)), len(shards), subseed(seed, 0), epoch):
        cut = pieces(shards[shard])
        for piece in permute(np.arange(len(cut)), len(cut), subseed(seed, shard + 1), epoch):
            stream += cut[piece]
    return stream


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


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=20),
    cuts=st.lists(st.integers(1, 25), max_size=12),
    epoch=st.integers(0, 3),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_reading_equals_shuffled_lists(tmp_path_factory, lengths, cuts, epoch, seed, data):
    shards = make_shards(lengths, cuts)
    stream = write(tmp_path_factory.mktemp("data") / "x", shards)
    expected, order = reference(shards, seed, epoch), DocumentOrder(stream, seed)
    assert order.read(epoch, 0, len(expected)).tolist() == expected
    for _ in range(4):
        start = data.draw(st.integers(0, len(expected)))
        count = data.draw(st.integers(0, len(expected) - start))
        found = order.read(epoch, start, count)
        assert found.dtype == np.uint16
        assert found.tolist() == expected[start : start + count]


def test_every_token_once_an_epoch_and_another_order_in_each(tmp_path, shards):
    stream = write(tmp_path, shards)
    order, total = DocumentOrder(stream, SEED), len(stream)
    epochs = [order.read(epoch, 0, total).tolist() for epoch in range(4)]
    everything = sorted(token for shard in shards for token in shard)
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert DocumentOrder(stream, SEED + 1).read(0, 0, total).tolist() not in epochs
    # A window at a time, as an update reads them, from two epochs in turn.
    for start in range(0, total - 9, 9):
        for epoch in (1, 2):
            assert order.read(epoch, start, 10).tolist() == epochs[epoch][start : start + 10]


def test_no_document_of_one_shard_is_left_in_its_place(tmp_path):
    """The order within a shard changes with the epoch, and shards do not share one."""
    shards = [[token for n in range(50) for token in (EOT, n)] for _ in range(2)]
    order = DocumentOrder(write(tmp_path, shards), SEED)
    halves = [order.read(epoch, start, 100)[1::2] for epoch in range(2) for start in (0, 100)]
    assert all(sorted(half) == list(range(50)) for half in halves)
    assert len({tuple(half) for half in halves}) == 4


def test_empty_shards_are_passed_over(tmp_path):
    shards = [[], [EOT, 1, 2], [], [3, EOT, 4], []]
    order = DocumentOrder(write(tmp_path, shards), SEED)
    for epoch in range(5):
        assert order.read(epoch, 0, 6).tolist() == reference(shards, SEED, epoch)


def test_the_index_is_made_once_and_found_again(tmp_path, shards, capsys):
    stream = write(tmp_path, shards)
    build_index(tmp_path, quiet=True)
    assert capsys.readouterr() == ("", "")
    path = index_path(stream)
    assert (
        path.name.startswith("documents_train_") and len(path.stem) == len("documents_train_") + 12
    )
    starts = np.load(path)
    flat = [token for shard in shards for token in shard]
    begins = {0, *np.cumsum([len(shard) for shard in shards]).tolist()}
    assert starts.tolist() == sorted(begins | {i for i, token in enumerate(flat) if token == EOT})
    # It is no shard, and another file does not make it stale.
    assert len(TokenStream(tmp_path, "train")) == len(stream)
    before = path.stat().st_mtime_ns
    build_index(tmp_path, quiet=True)
    assert path.stat().st_mtime_ns == before


def test_scanning_in_blocks_finds_the_same(tmp_path, shards, monkeypatch):
    stream = write(tmp_path, shards)
    whole = np.concatenate(documents.find_pieces(stream))
    for size in (1, 2, 7):
        monkeypatch.setattr(documents, "BLOCK_TOKENS", size)
        assert np.array_equal(np.concatenate(documents.find_pieces(stream)), whole)


def test_the_index_of_other_data_is_not_taken(tmp_path, shards):
    old = index_path(write(tmp_path, shards))
    build_index(tmp_path, quiet=True)
    stream = write(tmp_path, [*shards, [1, 2, EOT]])
    assert index_path(stream) != old
    assert DocumentOrder(stream, SEED).read(0, 0, len(stream)).tolist() == reference(
        [*shards, [1, 2, EOT]], SEED, 0
    )
    # With a manifest, it is the manifest's digest that counts.
    manifest = dataclasses.replace(read_manifest(tmp_path), source={"kind": "first"})
    write_manifest(tmp_path, manifest)
    first = index_path(TokenStream(tmp_path, "train"))
    write_manifest(tmp_path, dataclasses.replace(manifest, source={"kind": "second"}))
    assert len({first, old, index_path(stream), index_path(TokenStream(tmp_path, "train"))}) == 3


def refuses(stream) -> str:
    with pytest.raises(UserError) as caught:
        order = DocumentOrder(stream, SEED)
        for epoch in range(2):
            order.read(epoch, 0, len(stream))
    assert "\n" not in str(caught.value) and "delete it" in str(caught.value)
    return str(caught.value)


def test_no_changed_byte_of_the_index_goes_unnoticed(tmp_path, shards):
    stream = write(tmp_path, shards)
    build_index(tmp_path, quiet=True)
    path = index_path(stream)
    content = path.read_bytes()
    for place in [*range(0, 128, 7), 127, *range(128, len(content))]:
        for bit in (1, 64, 128):
            changed = bytes([content[place] ^ bit])
            path.write_bytes(content[:place] + changed + content[place + 1 :])
            assert path.name in refuses(stream)
    # Places so far apart that their difference overflows.
    places = np.frombuffer(content[128:], "<i8").copy()
    places[3:5] = 2**63 - 1, -(2**63) + 100
    np.save(path, places)
    assert path.name in refuses(stream)
    for damaged in (b"", content[:100], content[:-1], content[:-8], content + bytes(8)):
        path.write_bytes(damaged)
        assert path.name in refuses(stream)
    path.unlink()
    path.mkdir()
    assert path.name in refuses(stream)
    path.rmdir()
    assert len(DocumentOrder(stream, SEED).read(0, 0, len(stream))) == len(stream)


def test_an_index_that_lacks_or_doubles_a_piece_is_noticed(tmp_path, shards):
    stream = write(tmp_path, shards)
    build_index(tmp_path, quiet=True)
    path = index_path(stream)
    places = np.load(path)
    begin = int(np.flatnonzero(places == len(shards[0]))[0])
    for wrong in (np.delete(places, begin), np.insert(places, 3, places[3]), places[::-1]):
        np.save(path, wrong)
        assert path.name in refuses(stream)


def test_other_tokens_of_the_same_number_are_noticed(tmp_path, shards):
    stream = write(tmp_path, shards)
    build_index(tmp_path, quiet=True)
    write(tmp_path, [shard[::-1] for shard in shards])
    assert index_path(stream).name in refuses(stream)


def test_a_directory_that_cannot_be_written(tmp_path, shards, monkeypatch, capsys):
    stream = write(tmp_path, shards)

    def fails(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("os.replace", fails)
    build_index(tmp_path, quiet=False)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "Read-only" in said and "kept in memory" in said
    order = DocumentOrder(stream, SEED)
    assert capsys.readouterr().out == ""
    assert order.read(1, 0, len(stream)).tolist() == reference(shards, SEED, 1)
    assert not [name for name in os.listdir(tmp_path) if "documents" in name]


def test_two_that_make_the_index_at_once(tmp_path, shards, capsys):
    stream = write(tmp_path, shards)
    with locked(tmp_path):
        order = DocumentOrder(stream, SEED, quiet=False)
    assert "kept in memory" in capsys.readouterr().out and not index_path(stream).exists()
    assert order.read(0, 0, len(stream)).tolist() == reference(shards, SEED, 0)


def test_an_order_is_pickled_without_its_open_files(tmp_path, shards):
    order = DocumentOrder(write(tmp_path, shards), SEED)
    expected = order.read(0, 0, 50)
    again = pickle.loads(pickle.dumps(order))
    del order
    assert np.array_equal(again.read(0, 0, 50), expected)


def test_only_the_pieces_of_two_shards_are_held(tmp_path, shards):
    order = DocumentOrder(write(tmp_path, shards), SEED)
    for epoch in range(3):
        order.read(epoch, 0, len(order.stream))
        assert len(order._held) <= 2


def test_reading_past_either_end_is_an_error(tmp_path, shards):
    order = DocumentOrder(write(tmp_path, shards), SEED)
    for start, count in ((-1, 2), (len(order.stream) - 1, 2), (0, -1)):
        with pytest.raises(IndexError):
            order.read(0, start, count)
