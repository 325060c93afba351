"""The on-disk format, its writer and its reader."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from manifests import (
    MANIFEST,
    Manifest,
    find_data,
    manifest_digest,
    read_manifest,
    write_manifest,
)
from shards import ShardWriter, TokenStream
from tokenizer import CharTokenizer

TOKENIZER = CharTokenizer("abcdefghij")
EOT = TOKENIZER.eot


def new_manifest(**changes) -> Manifest:
    manifest = Manifest(
        name="tiny",
        tokenizer="char",
        alphabet=TOKENIZER.alphabet,
        vocab_size=TOKENIZER.vocab_size,
        source={"kind": "test"},
        shard_tokens=10,
    )
    return dataclasses.replace(manifest, **changes)


def document(length: int, seed: int = 0) -> np.ndarray:
    body = np.random.default_rng(seed).integers(0, EOT, length)
    return np.concatenate([[EOT], body]).astype(np.uint16)


def write(directory, chunks, **changes) -> Manifest:
    """Write chunks, each a list of documents, whose hashes are their numbers."""
    directory.mkdir(exist_ok=True)
    writer = ShardWriter(directory, new_manifest(**changes), TOKENIZER)
    count = 0
    for number, documents in enumerate(chunks):
        hashes = list(range(count, count + len(documents)))
        writer.add(np.concatenate(documents), hashes, number)
        count += len(documents)
    return writer.finish()


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


def contents(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    directory = tmp_path_factory.mktemp("stream")
    write(directory, [[document(30, 1), document(23, 2)]])
    return TokenStream(directory, "train")


@settings(deadline=None)
@given(data=st.data())
def test_reading_equals_slicing_the_concatenation(stream, data):
    files = sorted(stream.directory.glob("*_train_*.npy"))
    everything = np.concatenate([np.load(file) for file in files])
    assert len(stream) == len(everything) == 45
    count = data.draw(st.integers(0, 45))
    start = data.draw(st.integers(0, 45 - count))
    assert np.array_equal(stream.read(start, count), everything[start : start + count])
    starts = data.draw(st.lists(st.integers(0, 45 - count), max_size=5))
    expected = [everything[s : s + count] for s in starts]
    windows = stream.windows(np.array(starts, dtype=np.int64), count)
    assert windows.shape == (len(starts), count)
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


@pytest.fixture
def directory(tmp_path):
    write(tmp_path, [[document(34)]])
    return tmp_path


def refuses(directory, split="train") -> str:
    with pytest.raises(UserError) as caught:
        TokenStream(directory, split)
    return str(caught.value)


def test_a_truncated_shard_is_named(directory):
    path = directory / "tiny_train_000002.npy"
    path.write_bytes(path.read_bytes()[:-2])
    assert "tiny_train_000002.npy is truncated" in refuses(directory)


def test_an_empty_or_missing_shard_is_named(directory):
    path = directory / "tiny_train_000002.npy"
    path.write_bytes(b"")
    assert "tiny_train_000002.npy is not a readable token shard" in refuses(directory)
    path.unlink()
    assert "tiny_train_000002.npy is not a readable token shard" in refuses(directory)


@pytest.mark.parametrize("dtype", ["<i4", ">u2", "<f4"])
def test_a_shard_of_another_type_is_named(directory, dtype):
    np.save(directory / "tiny_train_000001.npy", np.zeros(10, dtype=dtype))
    assert "tiny_train_000001.npy is not a readable token shard" in refuses(directory)


def test_a_shard_of_two_dimensions_is_named(directory):
    np.save(directory / "tiny_train_000001.npy", np.zeros((2, 5), dtype="<u2"))
    assert "2-D" in refuses(directory)


def test_a_manifest_that_disagrees_with_a_file(directory):
    np.save(directory / "tiny_train_000001.npy", np.zeros(7, dtype="<u2"))
    assert "holds 7 tokens where its manifest says 10" in refuses(directory)


def test_a_token_past_the_vocabulary(directory):
    tokens = np.load(directory / "tiny_train_000001.npy")
    tokens[3] = 11
    np.save(directory / "tiny_train_000001.npy", tokens)
    with pytest.raises(UserError, match="token 11, past its vocabulary of 11"):
        TokenStream(directory, "train").windows(np.array([0]), 10)


def test_an_unfinished_directory_and_a_missing_split(directory):
    manifest = read_manifest(directory)
    write_manifest(directory, dataclasses.replace(manifest, shards=manifest.shards[:1]))
    assert "holds no train shards" in refuses(directory)
    write_manifest(directory, dataclasses.replace(manifest, complete=False))
    assert "is not finished" in refuses(directory)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"format": 1, "shards": 3}'])
def test_a_damaged_manifest_is_named(directory, text):
    (directory / MANIFEST).write_text(text)
    assert MANIFEST in refuses(directory)


def test_a_later_format_is_named(directory):
    raw = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps({**raw, "format": 2}))
    assert "has format 2" in refuses(directory)


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
    header[0] = 1
    (tmp_path / "fineweb_train_000001.bin").write_bytes(header.tobytes() + tokens.tobytes())
    assert "fineweb_train_000001.bin" in refuses(tmp_path)


def test_a_write_that_fails_leaves_what_was_there(directory, monkeypatch):
    before = contents(directory)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_manifest(directory, new_manifest())
    assert contents(directory) == before
