"""The on-disk format, its writer and its reader."""

import dataclasses
import hashlib
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import UserError
from corpus.shards import MANIFEST, ShardWriter, TokenShards, manifest_sha256, write_manifest
from tests.corpora import contents
from tests.small_shards import EMPTY, EOT, FIRST, SECOND, TOKENIZER, document, refuses, write


def test_files_are_plain_npy_and_documents_run_over_their_boundaries(tmp_path):
    documents = [document(6, 1), document(8, 2), document(6, 3)]
    manifest = write(tmp_path, *documents)
    names = [f"tiny_{split}_{i:06d}.npy" for i, split in enumerate(["val", "train", "train"])]
    assert [shard.file for shard in manifest.shards] == names
    assert [shard.split for shard in manifest.shards] == ["val", "train", "train"]
    arrays = [np.load(tmp_path / name) for name in names]
    assert [len(array) for array in arrays] == [10, 10, 3]
    assert {array.dtype.str for array in arrays} == {"<u2"} and arrays[0][0] == EOT
    assert np.array_equal(np.concatenate(arrays), np.concatenate(documents))
    assert [shard.reached for shard in manifest.shards] == [(0, 1, 3), (0, 2, 4), (1, 0, 0)]
    np.save(tmp_path / "again.npy", arrays[1])
    assert (tmp_path / "again.npy").read_bytes() == (tmp_path / FIRST).read_bytes()
    shards = TokenShards(tmp_path, "train")
    assert shards.manifest == manifest and shards.vocab_size == 11
    assert shards.tokenizer.alphabet == TOKENIZER.alphabet


@pytest.mark.parametrize("size", [7, 10, 1000])
def test_the_bytes_of_text_are_those_of_each_file(tmp_path, monkeypatch, size):
    monkeypatch.setattr("corpus.shards.BLOCK_BYTES", 3)
    lengths = np.array([1, 1, 1, 1, 2, 1, 1, 3, 1, 1, 0])
    for shard in write(tmp_path, *(document(n, n) for n in range(12)), size=size).shards:
        assert shard.bytes == lengths[np.load(tmp_path / shard.file)].sum()


def test_what_there_is_no_room_for(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"lower --shard-tokens"):
        ShardWriter(tmp_path, EMPTY, TOKENIZER, 10**17)
    write(tmp_path, document(34))
    before = contents(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_manifest(tmp_path, EMPTY)
    assert contents(tmp_path) == before


# --- Reading ---


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), data=st.data())
def test_reading_equals_slicing_the_concatenation(tmp_path_factory, lengths, data):
    directory = tmp_path_factory.mktemp("cuts")
    everything = np.random.default_rng(0).integers(0, 50257, sum(lengths)).astype(np.uint16)
    cuts = np.split(everything, np.cumsum(lengths)[:-1])
    for number, part in enumerate(cuts):
        np.save(directory / f"x_train_{number}.npy", part)
    shards, total = TokenShards(directory, "train"), len(everything)
    assert len(shards) == total and shards.bounds.tolist() == [0, *np.cumsum(lengths)]
    assert all(np.array_equal(shards.shard(i), part) for i, part in enumerate(cuts))
    count = data.draw(st.integers(0, total))
    starts = data.draw(st.lists(st.integers(0, total - count), max_size=5))
    found = shards.read(starts, count)
    assert found.shape == (len(starts), count) and found.dtype == np.uint16
    assert found.tolist() == [everything[s : s + count].tolist() for s in starts]


def test_shards_end_where_they_end_and_are_never_written(tmp_path):
    write(tmp_path, document(90_000), size=40_000)
    shards = TokenShards(tmp_path, "train")
    for start, count in ((-1, 2), (50_000, 2), (50_002, 0), (3, -1)):
        with pytest.raises(IndexError):
            shards.read([0, start], count)
    with pytest.raises(ValueError, match="read-only"):
        shards.shard(0)[0] = 1
    packed = pickle.dumps(shards)
    assert len(packed) < 500
    assert np.array_equal(pickle.loads(packed).read([0], 50_001), shards.read([0], 50_001))


def test_a_shard_that_shrinks_or_goes_before_it_is_first_read(tmp_path):
    write(tmp_path, document(34))
    shards = TokenShards(tmp_path, "train")
    os.truncate(tmp_path / FIRST, 140)
    (tmp_path / SECOND).unlink()
    for start, name in ((0, FIRST), (10, SECOND)):
        with pytest.raises(UserError, match=name):
            shards.read([start], 6)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_many_files_threads_and_a_fork_share_the_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("corpus.shards.OPEN_SHARDS", 3)
    write(tmp_path, document(299), document(299, 1))
    before, shards = len(os.listdir("/proc/self/fd")), TokenShards(tmp_path, "train")
    expected = shards.read([0], len(shards))[0]

    def right(seed: int) -> bool:
        starts = np.random.default_rng(seed).integers(0, len(shards) - 15, 200)
        return np.array_equal(shards.read(starts, 15), [expected[s : s + 15] for s in starts])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(right, range(4)))
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    child = os.fork()
    if child == 0:
        os._exit(not right(9))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- Directories, and other people's shards ---


def test_the_digest_of_a_directory_tells_its_data_from_other_data(tmp_path):
    assert "holds no token shards" in refuses(tmp_path)
    np.save(tmp_path / "x_train_1.npy", np.arange(50, dtype=np.uint16))
    foreign = manifest_sha256(tmp_path)
    np.save(tmp_path / "x_train_1.npy", np.arange(51, dtype=np.uint16))
    assert manifest_sha256(tmp_path) != foreign
    manifest = write(tmp_path, document(34))
    digest = hashlib.sha256((tmp_path / MANIFEST).read_bytes()).hexdigest()
    assert manifest_sha256(tmp_path) == digest
    write_manifest(tmp_path, dataclasses.replace(manifest, source={"kind": "other"}))
    assert manifest_sha256(tmp_path) != digest


def test_build_nanogpts_directories_are_read_as_they_are(tmp_path):
    tokens = np.arange(50, dtype=np.uint16)
    np.save(tmp_path / "edufineweb_val_000000.npy", tokens[:20])
    np.save(tmp_path / "edufineweb_train_000002.npy", tokens[35:])
    np.save(tmp_path / "edufineweb_train_000001.npy", tokens[20:35])
    np.save(tmp_path / "embeddings.npy", np.zeros(3))
    np.save(tmp_path / "documents_train_0123456789ab.npy", np.arange(9))
    train, val = TokenShards(tmp_path, "train"), TokenShards(tmp_path, "val")
    # In the order of their names, not of the directory listing.
    assert train.read([0], len(train)).tolist() == [list(range(20, 50))]
    assert val.read([0], 20).tolist() == [list(range(20))] and val.tokenizer.name == "gpt2"


def test_llmc_bin_files_are_read_as_they_are(tmp_path):
    header, file = np.zeros(256, "<i4"), tmp_path / "fineweb_train_000001.bin"
    header[:3] = 20240520, 1, 9
    tokens = np.arange(9, dtype="<u2").tobytes()
    file.write_bytes(header.tobytes() + tokens)
    assert TokenShards(tmp_path, "train").read([0], 9).tolist() == [list(range(9))]
    for place, value in ((0, 1), (0, 20240801), (1, 2), (2, -1), (2, 8), (2, 10)):
        other = header.copy()
        other[place] = value
        file.write_bytes(other.tobytes() + tokens)
        assert file.name in refuses(tmp_path), (place, value)
    file.write_bytes(header.tobytes()[:-1])
    assert file.name in refuses(tmp_path)
