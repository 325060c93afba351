"""The on-disk format, its writer and its reader."""

import dataclasses
import json
import os
import pickle
import re
import threading

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
    npy_header,
    read_manifest,
    write_manifest,
)
from shards import TokenStream
from tokenizer import CharTokenizer
from verify import verify_data
from writer import ShardWriter

TOKENIZER = CharTokenizer("abcdefghij")
EOT = TOKENIZER.eot
LLMC_HEADER = np.array([20240520, 1, 3, *[0] * 253], dtype="<i4").tobytes()


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


@pytest.fixture
def directory(tmp_path):
    write(tmp_path, [[document(34)]])
    return tmp_path


def without_digests(directory) -> None:
    """Make the manifest one that knows no digests, as older ones know none of samples."""
    manifest = read_manifest(directory)
    shards = tuple(
        dataclasses.replace(shard, sha256=None, sampled_sha256=None) for shard in manifest.shards
    )
    write_manifest(directory, dataclasses.replace(manifest, shards=shards))


def verification_refuses(directory) -> str:
    with pytest.raises(UserError) as caught:
        verify_data(directory, quiet=True)
    return str(caught.value)


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
    without_digests(directory)
    stream = TokenStream(directory, "train")
    for read in (lambda: stream.windows(np.array([0]), 10), lambda: stream.read(0, 4)):
        with pytest.raises(UserError, match="token 11, past its vocabulary of 11"):
            read()
    assert stream.windows(np.array([4, 5]), 4).shape == (2, 4)
    assert "holds token 11, past its vocabulary" in verification_refuses(directory)


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
    (directory / MANIFEST).write_text("[" * 100_000)
    assert MANIFEST in refuses(directory)


def unsealed(directory, **changes) -> dict:
    """Return the manifest as an older version would have written it, with `changes`."""
    raw = json.loads((directory / MANIFEST).read_text())
    raw.pop("digest", None)
    return {**raw, **changes}


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 12},
        {"vocab_size": 11.0},
        {"alphabet": "abc"},
        {"tokenizer": "gpt2"},
        {"tokenizer": None},
        {"tokenizer": "other", "vocab_size": 70000},
        {"shard_tokens": True},
        {"val_tokens": "3"},
        {"source": []},
        {"name": 3},
        {"complete": 1},
        {"shards": {}},
        {"unheard_of": 1},
    ],
)
def test_a_manifest_that_makes_no_sense_is_named(directory, changes):
    (directory / MANIFEST).write_text(json.dumps(unsealed(directory)))
    TokenStream(directory, "train")
    (directory / MANIFEST).write_text(json.dumps(unsealed(directory, **changes)))
    assert re.fullmatch(rf".*/{MANIFEST} is damaged \([^\n]*\); prepare [^\n]*", refuses(directory))


@pytest.mark.parametrize(
    "changes",
    [
        *({"file": name} for name in ("../x.npy", "/etc/passwd", "..", "", "a\\b", "C:x", "a\0b")),
        *({"file": "tiny_train_000002.npy"}, {"file": 3}, {"split": "test"}, {"tokens": -1}),
        *({"tokens": "10"}, {"tokens": 10.0}, {"tokens": None}, {"sha256": 1}, {"reached": 5}),
        *({"reached": [1]}, {"reached": "ab"}),
        *({"sampled_sha256": []}, {"more": 1}),
    ],
)
def test_a_shard_entry_that_makes_no_sense_is_named(directory, changes):
    raw = unsealed(directory)
    raw["shards"][1].update(changes)
    (directory / MANIFEST).write_text(json.dumps(raw))
    assert f"{MANIFEST} is damaged" in refuses(directory)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    directory = tmp_path_factory.mktemp("sealed")
    write(directory, [[document(14)]])
    return directory, (directory / MANIFEST).read_bytes()


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_no_changed_byte_of_a_manifest_goes_unnoticed(sealed, data):
    directory, content = sealed
    (directory / MANIFEST).write_bytes(content)
    meaning = read_manifest(directory)
    place = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= data.draw(st.integers(1, 255))
    changed = changed if data.draw(st.booleans()) else content[:place]
    (directory / MANIFEST).write_bytes(changed)
    try:
        assert read_manifest(directory) == meaning
    except UserError as error:
        assert MANIFEST in str(error)


def test_a_later_format_is_named(directory):
    raw = json.loads((directory / MANIFEST).read_text())
    (directory / MANIFEST).write_text(json.dumps({**raw, "format": 2}))
    assert "has format 2" in refuses(directory)


FIRST = "tiny_train_000001.npy"
# Bytes of a shard of ten tokens, whose header takes 128.
PLACES = {
    "magic": 1,
    "version": 6,
    "header length": 8,
    "descr": 22,
    "order": 45,
    "shape": 61,
    "padding": 100,
    "end of header": 127,
    "first token": 128,
    "middle token": 139,
    "last token": 147,
}


def flip(path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_flipped_byte_is_found_when_the_data_is_opened(directory, place):
    flip(directory / FIRST, place)
    assert FIRST in refuses(directory)
    assert FIRST in verification_refuses(directory)
    # The other split is not concerned.
    assert len(TokenStream(directory, "val")) == 10


@pytest.mark.parametrize("place", list(PLACES.values())[:-3], ids=list(PLACES)[:-3])
def test_a_flipped_byte_of_the_header_is_found_without_digests(directory, place):
    without_digests(directory)
    flip(directory / FIRST, place)
    assert FIRST in refuses(directory)


def test_a_flipped_byte_between_the_sampled_blocks_is_found_by_verification(tmp_path):
    manifest = write(tmp_path, [[document(1_599_999, n) for n in range(2)]], shard_tokens=1_600_000)
    assert "2 shards with 3,200,000 tokens" in verify_data(tmp_path, quiet=True)
    path = tmp_path / manifest.shards[1].file
    # The first block is 64 KiB long, and the second begins at a fifteenth of the file.
    flip(path, 100_000)
    TokenStream(tmp_path, "train")
    assert f"{path} is damaged: its sha256" in verification_refuses(tmp_path)
    flip(path, 100_000)
    for place in (0, 65_535, path.stat().st_size // 2, path.stat().st_size - 1):
        if place == path.stat().st_size // 2:
            # The eighth block, of which fifteen parts of 16 lie before and after.
            place = 7 * (path.stat().st_size - 65_536) // 15
        flip(path, place)
        assert path.name in refuses(tmp_path)
        flip(path, place)
    TokenStream(tmp_path, "train")


def test_two_shards_that_changed_places(tmp_path):
    write(tmp_path, [[document(14, n) for n in range(2)]])
    a, b = tmp_path / "tiny_train_000001.npy", tmp_path / "tiny_train_000002.npy"
    assert a.stat().st_size == b.stat().st_size
    contents = a.read_bytes(), b.read_bytes()
    a.write_bytes(contents[1]), b.write_bytes(contents[0])
    assert "tiny_train_000001.npy is not what was prepared" in refuses(tmp_path)
    assert "tiny_train_000001.npy" in verification_refuses(tmp_path)


def test_an_extended_shard_is_named(directory):
    path = directory / FIRST
    path.write_bytes(path.read_bytes() + b"\0\0")
    assert f"{FIRST} is padded" in refuses(directory)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_directory_or_a_pipe_in_place_of_a_shard(directory):
    (directory / FIRST).unlink()
    os.mkfifo(directory / FIRST)
    assert FIRST in refuses(directory)
    (directory / FIRST).unlink()
    (directory / FIRST).mkdir()
    assert FIRST in refuses(directory)
    assert FIRST in verification_refuses(directory)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_is_never_loaded(directory, tmp_path):
    trap = tmp_path / "trap"
    np.save(directory / FIRST, np.array([Bomb(trap)], dtype=object), allow_pickle=True)
    assert FIRST in refuses(directory) and FIRST in verification_refuses(directory)
    (directory / MANIFEST).unlink()
    assert FIRST in refuses(directory)
    assert not trap.exists()
    np.load(directory / FIRST, allow_pickle=True)
    assert trap.exists()


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_order_of_two_dimensions_is_named(directory, order):
    np.save(directory / FIRST, np.zeros((2, 5), dtype="<u2", order=order))
    assert f"2-D <u2{', Fortran order' if order == 'F' else ''}, not 1-D" in refuses(directory)


def test_version_two_of_the_format_is_named(directory):
    with open(directory / FIRST, "wb") as file:
        np.lib.format.write_array(file, np.zeros(10, dtype="<u2"), version=(2, 0))
    assert ".npy version 2.0" in refuses(directory)


@settings(deadline=None)
@given(
    suffix=st.sampled_from([".npy", ".bin"]),
    start=st.sampled_from([b"", b"\x93NUMPY\x01\x00", npy_header(3), bytes(20), LLMC_HEADER]),
    rest=st.binary(max_size=200),
)
def test_arbitrary_bytes_are_a_shard_or_a_mistake(tmp_path_factory, suffix, start, rest):
    directory = tmp_path_factory.mktemp("bytes")
    (directory / f"x_train_1{suffix}").write_bytes(start + rest)
    try:
        stream = TokenStream(directory, "train")
        assert len(stream.read(0, len(stream))) == len(stream)
    except UserError as error:
        assert "\n" not in str(error)


def test_verification_reads_both_splits_and_foreign_data(directory):
    sentence = verify_data(directory, quiet=True)
    assert sentence == (
        f"{directory} is intact: 4 shards with 35 tokens, all below 11; the digests of 4 are right."
    )
    val = directory / "tiny_val_000000.npy"
    kept = val.read_bytes()
    flip(val, 130)
    assert val.name in verification_refuses(directory)
    val.write_bytes(kept)
    (directory / MANIFEST).unlink()
    # Ids of characters are ids of the GPT-2 vocabulary as well.
    assert "their digests are unknown" in verify_data(directory, quiet=True)
    val.write_bytes(npy_header(2) + b"\0\0\xff\xff")
    assert f"{val.name} holds token 65535" in verification_refuses(directory)


def test_verification_names_the_first_damaged_shard(tmp_path):
    write(tmp_path, [[document(99)]])
    for number in (7, 3, 8):
        flip(tmp_path / f"tiny_train_{number:06d}.npy", 140)
    assert "tiny_train_000003.npy" in verification_refuses(tmp_path)


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


def test_a_write_that_fails_leaves_what_was_there(directory, monkeypatch):
    before = contents(directory)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_manifest(directory, new_manifest())
    assert contents(directory) == before
