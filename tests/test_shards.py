"""The on-disk format, its writer and its reader."""

import dataclasses
import hashlib
import os
import pickle
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from config import UserError
from corpus.shards import (
    MANIFEST,
    TokenShards,
    find_data,
    manifest_sha256,
    read_manifest,
    write_manifest,
)
from tests.corpora import contents
from tests.small_shards import EOT, FIRST, TOKENIZER, document, new_manifest, refuses, write
from writer import ShardWriter


def test_files_are_plain_npy_and_documents_run_over_their_boundaries(tmp_path):
    chunks = [[document(6, 1), document(8, 2)], [document(6, 3)]]
    manifest = write(tmp_path, chunks)
    names = [f"tiny_{split}_{i:06d}.npy" for i, split in enumerate(["val", "train", "train"])]
    assert [shard.file for shard in manifest.shards] == names
    assert [shard.split for shard in manifest.shards] == ["val", "train", "train"]
    arrays = [np.load(tmp_path / name) for name in names]
    assert [len(array) for array in arrays] == [10, 10, 3]
    assert {array.dtype.str for array in arrays} == {"<u2"}
    assert np.array_equal(np.concatenate(arrays), np.concatenate([*chunks[0], *chunks[1]]))
    assert arrays[0][0] == EOT
    assert manifest.complete
    assert [shard.reached for shard in manifest.shards] == [(0, 10), (1, 4), (1, 7)]
    # One byte a character, and none for the start of a document.
    assert sum(shard.bytes for shard in manifest.shards) == 20
    assert read_manifest(tmp_path) == manifest


def test_the_bytes_are_what_numpy_writes(tmp_path):
    write(tmp_path, [[document(24)]])
    file = tmp_path / "tiny_train_000001.npy"
    np.save(tmp_path / "again.npy", np.load(file))
    assert (tmp_path / "again.npy").read_bytes() == file.read_bytes()


def test_tokens_that_fill_the_shards_exactly(tmp_path):
    manifest = write(tmp_path, [[document(8, 1)], [document(9, 2)], [document(10, 3)]])
    assert [shard.tokens for shard in manifest.shards] == [10, 10, 10]
    shards = TokenShards(tmp_path, "train")
    assert shards.read([0], 20).shape == (1, 20)
    assert shards.read([20], 0).shape == (1, 0)
    with pytest.raises(IndexError):
        shards.read([0], 21)


def test_one_full_shard_is_a_small_corpus(tmp_path):
    manifest = write(tmp_path, [[document(4, 1), document(4, 2)]], val_tokens=5)
    assert (manifest.tokens("val"), manifest.tokens("train")) == (5, 5)


def test_a_small_corpus_is_split_by_the_hashes_of_its_documents(tmp_path):
    documents = [document(n, n) for n in (9, 2, 3, 4, 9)]
    writer = ShardWriter(tmp_path, new_manifest(shard_tokens=100, val_tokens=8), TOKENIZER)
    writer.add(np.concatenate(documents), [50, 30, 20, 10, 40], 0)
    manifest = writer.finish()
    # The least hash belongs to a document of 5 tokens; the next has 4, which would be too many.
    held_out = np.load(tmp_path / manifest.shards[0].file)
    assert np.array_equal(held_out, documents[3])
    kept = np.load(tmp_path / manifest.shards[1].file)
    assert np.array_equal(kept, np.concatenate([documents[i] for i in (0, 1, 2, 4)]))


def test_a_tenth_is_held_out_by_default(tmp_path):
    manifest = write(tmp_path, [[document(9, i) for i in range(40)]], shard_tokens=1000)
    assert (manifest.tokens("val"), manifest.tokens("train")) == (40, 360)


def test_the_end_of_a_single_document_is_held_out(tmp_path):
    manifest = write(tmp_path, [[document(49)]], shard_tokens=1000)
    assert (manifest.tokens("val"), manifest.tokens("train")) == (5, 45)
    assert TokenShards(tmp_path, "train").read([0], 1).item() == EOT


def test_nothing_to_write_and_nothing_to_train_on(tmp_path):
    with pytest.raises(UserError, match="no text"):
        ShardWriter(tmp_path, new_manifest(), TOKENIZER).finish()
    with pytest.raises(UserError, match="leaves nothing to train on"):
        write(tmp_path, [[document(5)]], val_tokens=6)


@pytest.mark.parametrize("cut", range(6))
def test_a_writer_continues_after_its_last_complete_shard(tmp_path_factory, cut):
    chunks = [np.concatenate([document(n, n), document(n + 3, n)]) for n in (4, 2, 11, 1, 7)]
    whole, part = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("part")
    writer = ShardWriter(whole, new_manifest(), TOKENIZER)
    for number, chunk in enumerate(chunks):
        writer.add(chunk, [0, 0], number)
    writer.finish()
    # Interrupted after `cut` chunks: what the writer had not flushed is lost.
    writer = ShardWriter(part, new_manifest(), TOKENIZER)
    for number, chunk in enumerate(chunks[:cut]):
        writer.add(chunk, [0, 0], number)
    found = read_manifest(part) if (part / MANIFEST).exists() else new_manifest()
    writer = ShardWriter(part, found, TOKENIZER)
    for number, chunk in enumerate(chunks):
        writer.add(chunk, [0, 0], number)
    writer.finish()
    assert contents(part) == contents(whole)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shards")
    write(directory, [[document(30, 1), document(23, 2)]])
    return TokenShards(directory, "train")


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


def test_reading_past_either_end_is_an_error(shards):
    for start, count in ((-1, 2), (44, 2), (46, 0), (3, -1)):
        with pytest.raises(IndexError):
            shards.read([0, start], count)


def test_maps_cannot_be_written(shards):
    with pytest.raises(ValueError, match="read-only"):
        shards.shard(0)[0] = 1


def test_pickled_shards_carry_no_data(tmp_path):
    write(tmp_path, [[document(90_000)]], shard_tokens=40_000)
    shards = TokenShards(tmp_path, "train")
    expected = shards.read([0], 50_000)
    packed = pickle.dumps(shards)
    assert len(packed) < 500
    assert np.array_equal(pickle.loads(packed).read([0], 50_000), expected)


def test_shards_bring_their_tokenizer(shards):
    assert shards.vocab_size == 11
    assert shards.tokenizer.alphabet == TOKENIZER.alphabet


def test_a_shard_that_shrinks_or_goes_before_it_is_first_read(tmp_path):
    write(tmp_path, [[document(34)]])
    shards = TokenShards(tmp_path, "train")
    os.truncate(tmp_path / FIRST, 140)
    with pytest.raises(UserError, match=f"{FIRST} cannot be read"):
        shards.read([0], 6)
    (tmp_path / "tiny_train_000002.npy").unlink()
    with pytest.raises(UserError, match=r"tiny_train_000002.npy cannot be read"):
        shards.read([10], 3)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_many_files_threads_and_a_fork_share_the_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("corpus.shards.OPEN_SHARDS", 3)
    write(tmp_path, [[document(299, n)] for n in range(2)])
    before, wrong = len(os.listdir("/proc/self/fd")), []
    shards = TokenShards(tmp_path, "train")
    expected = shards.read([0], len(shards))[0]

    def read(seed: int) -> None:
        starts = np.random.default_rng(seed).integers(0, len(shards) - 15, 400)
        found = shards.read(starts, 15)
        if not np.array_equal(found, np.stack([expected[s : s + 15] for s in starts])):
            wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    child = os.fork()
    if child == 0:
        read(9)
        os._exit(len(wrong))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_an_empty_directory_and_no_directory(tmp_path):
    assert "holds no token shards" in refuses(tmp_path)
    with pytest.raises(UserError, match="There is no data 'nowhere'"):
        find_data("nowhere")


def test_the_seeds_directories_are_read_as_they_are(tmp_path):
    tokens = np.arange(50, dtype=np.uint16)
    np.save(tmp_path / "edufineweb_val_000000.npy", tokens[:20])
    np.save(tmp_path / "edufineweb_train_000002.npy", tokens[35:])
    np.save(tmp_path / "edufineweb_train_000001.npy", tokens[20:35])
    np.save(tmp_path / "embeddings.npy", np.zeros(3))
    # In the order of their names, not of the directory listing.
    assert TokenShards(tmp_path, "train").read([0], 30).tolist() == [list(range(20, 50))]
    assert TokenShards(tmp_path, "val").read([0], 20).tolist() == [list(range(20))]
    assert TokenShards(tmp_path, "val").tokenizer.name == "gpt2"


def test_the_digest_of_a_directory_tells_its_data_from_other_data(tmp_path):
    np.save(tmp_path / "x_train_1.npy", np.arange(50, dtype=np.uint16))
    foreign = manifest_sha256(tmp_path)
    np.save(tmp_path / "x_train_1.npy", np.arange(51, dtype=np.uint16))
    assert manifest_sha256(tmp_path) not in (foreign, None)
    manifest = write(tmp_path / "mine", [[document(34)]])
    content = (tmp_path / "mine" / MANIFEST).read_bytes()
    assert manifest_sha256(tmp_path / "mine") == hashlib.sha256(content).hexdigest()
    write_manifest(tmp_path / "mine", dataclasses.replace(manifest, source={"kind": "other"}))
    assert manifest_sha256(tmp_path / "mine") != hashlib.sha256(content).hexdigest()


def test_an_index_of_documents_that_lies_there_is_no_shard(tmp_path):
    np.save(tmp_path / "x_train_1.npy", np.arange(50, dtype=np.uint16))
    np.save(tmp_path / "documents_train_0123456789ab.npy", np.arange(9))
    assert len(TokenShards(tmp_path, "train")) == 50


def test_llmc_bin_files_are_read_as_they_are(tmp_path):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 9
    tokens = np.arange(9, dtype="<u2")
    (tmp_path / "fineweb_train_000001.bin").write_bytes(header.tobytes() + tokens.tobytes())
    assert TokenShards(tmp_path, "train").read([0], 9).tolist() == [list(range(9))]
    for changes, words in (
        ({0: 1}, "no llm.c header"),
        ({1: 2}, "no llm.c header"),
        ({0: 20240801, 1: 7}, "another tokenizer"),
        ({2: -1}, "no llm.c header"),
        ({2: 8}, "padded: 2 bytes too many"),
        ({2: 10}, "truncated: 2 bytes too few"),
    ):
        other = header.copy()
        other[list(changes)] = list(changes.values())
        (tmp_path / "fineweb_train_000001.bin").write_bytes(other.tobytes() + tokens.tobytes())
        assert "fineweb_train_000001.bin" in refuses(tmp_path) and words in refuses(tmp_path)
    (tmp_path / "fineweb_train_000001.bin").write_bytes(header.tobytes()[:-1])
    assert "header is cut off" in refuses(tmp_path)
