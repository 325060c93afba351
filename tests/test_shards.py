"""The on-disk format, its writer and its reader."""

import os
import pickle
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from manifests import (
    MANIFEST,
    find_data,
    manifest_digest,
    read_manifest,
)
from shards import TokenStream
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
    stream = TokenStream(tmp_path, "train")
    assert len(stream.read(0, 20)) == 20
    assert len(stream.read(20, 0)) == 0
    with pytest.raises(IndexError):
        stream.read(0, 21)


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
    assert TokenStream(tmp_path, "train").read(0, 1)[0] == EOT


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
def stream(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stream")
    write(directory, [[document(30, 1), document(23, 2)]])
    return TokenStream(directory, "train")


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), data=st.data())
def test_reading_equals_slicing_the_concatenation(tmp_path_factory, lengths, data):
    directory = tmp_path_factory.mktemp("cuts")
    everything = np.random.default_rng(0).integers(0, 50257, sum(lengths)).astype(np.uint16)
    cuts = np.split(everything, np.cumsum(lengths)[:-1])
    for number, part in enumerate(cuts):
        np.save(directory / f"x_train_{number}.npy", part)
    stream, total = TokenStream(directory, "train"), len(everything)
    assert len(stream) == total
    count = data.draw(st.integers(0, total))
    start = data.draw(st.integers(0, total - count))
    assert np.array_equal(stream.read(start, count), everything[start : start + count])
    starts = data.draw(st.lists(st.integers(0, total - count), max_size=5))
    expected = [everything[s : s + count] for s in starts]
    windows = stream.windows(np.array(starts, dtype=np.int64), count)
    assert windows.shape == (len(starts), count) and windows.dtype == np.uint16
    assert windows.tolist() == [row.tolist() for row in expected]


def test_reading_past_either_end_is_an_error(stream):
    for start, count in ((-1, 2), (44, 2), (46, 0)):
        with pytest.raises(IndexError):
            stream.read(start, count)


def test_a_pickled_stream_carries_no_data(tmp_path):
    write(tmp_path, [[document(90_000)]], shard_tokens=40_000)
    stream = TokenStream(tmp_path, "train")
    stream.read(0, 50_000)
    packed = pickle.dumps(stream)
    assert len(packed) < 5_000
    assert np.array_equal(pickle.loads(packed).read(0, 50_000), stream.read(0, 50_000))


def test_a_stream_brings_its_tokenizer(stream):
    assert stream.vocab_size == 11
    assert stream.tokenizer.alphabet == TOKENIZER.alphabet


def test_a_shard_that_shrinks_or_goes_while_in_use(tmp_path):
    write(tmp_path, [[document(34)]])
    stream = TokenStream(tmp_path, "train")
    os.truncate(tmp_path / FIRST, 140)
    assert len(stream.read(0, 6)) == 6
    with pytest.raises(UserError, match=f"{FIRST} was truncated while in use"):
        stream.read(0, 10)
    (tmp_path / "tiny_train_000002.npy").unlink()
    with pytest.raises(UserError, match=r"tiny_train_000002.npy cannot be read \(No such file"):
        stream.read(10, 3)


def test_an_error_of_the_disk_is_a_sentence(stream, monkeypatch):
    def fails(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.preadv", fails)
    with pytest.raises(UserError, match=r"\.npy cannot be read \(Input/output error\)"):
        stream.read(0, 3)


def test_reading_without_preadv(stream, monkeypatch):
    expected = stream.read(0, 45)
    monkeypatch.delattr("os.preadv")
    again = pickle.loads(pickle.dumps(stream))
    assert np.array_equal(again.read(0, 45), expected)


def test_short_reads_are_continued(stream, monkeypatch):
    expected, whole = stream.read(0, 45), os.preadv
    monkeypatch.setattr("os.preadv", lambda fd, buffers, at: whole(fd, [buffers[0][:3]], at))
    assert np.array_equal(stream.read(0, 45), expected)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_many_files_threads_and_a_fork_share_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("shards.OPEN_FILES", 3)
    write(tmp_path, [[document(299, n)] for n in range(2)])
    stream = TokenStream(tmp_path, "train")
    expected = stream.read(0, len(stream))
    before, wrong = len(os.listdir("/proc/self/fd")), []

    def read(seed: int) -> None:
        starts = np.random.default_rng(seed).integers(0, len(stream) - 15, 400)
        found = stream.windows(starts, 15)
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
    stream.close()
    assert len(os.listdir("/proc/self/fd")) <= before - 3
    read(5)
    assert not wrong


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
    assert TokenStream(tmp_path, "train").read(0, 30).tolist() == list(range(20, 50))
    assert TokenStream(tmp_path, "val").read(0, 20).tolist() == list(range(20))
    assert TokenStream(tmp_path, "val").tokenizer.name == "gpt2"
    assert manifest_digest(tmp_path) is None


def test_llmc_bin_files_are_read_as_they_are(tmp_path):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, 9
    tokens = np.arange(9, dtype="<u2")
    (tmp_path / "fineweb_train_000001.bin").write_bytes(header.tobytes() + tokens.tobytes())
    assert TokenStream(tmp_path, "train").read(0, 9).tolist() == list(range(9))
    for changes, words in (
        ({0: 1}, "no llm.c header"),
        ({1: 2}, "no llm.c header"),
        ({0: 20240801, 1: 7}, "another tokenizer"),
        ({2: -1}, "announces -1 tokens"),
        ({2: 8}, "is padded"),
        ({2: 10}, "is truncated"),
    ):
        other = header.copy()
        other[list(changes)] = list(changes.values())
        (tmp_path / "fineweb_train_000001.bin").write_bytes(other.tobytes() + tokens.tobytes())
        assert "fineweb_train_000001.bin" in refuses(tmp_path) and words in refuses(tmp_path)
    (tmp_path / "fineweb_train_000001.bin").write_bytes(header.tobytes()[:-1])
    assert "header is cut off" in refuses(tmp_path)
