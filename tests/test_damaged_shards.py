"""Damaged, exchanged and planted shards and manifests: each is refused by its name."""

import contextlib
import dataclasses
import json
import os
import re
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from corpus.shards import (
    MANIFEST,
    TokenShards,
    Verification,
    npy_header,
    read_manifest,
    write_manifest,
)
from tests.corpora import contents
from tests.small_shards import FIRST, document, new_manifest, refuses, write
from utils import seal

LLMC_HEADER = np.array([20240520, 1, 3, *[0] * 253], dtype="<i4").tobytes()


@pytest.fixture
def directory(tmp_path):
    write(tmp_path, [[document(34)]])
    return tmp_path


def without_digests(directory) -> None:
    """Make the manifest one that knows no digests."""
    manifest = read_manifest(directory)
    shards = tuple(dataclasses.replace(shard, sha256=None) for shard in manifest.shards)
    write_manifest(directory, dataclasses.replace(manifest, shards=shards))


def verification_refuses(directory) -> str:
    verification = Verification(directory)
    with pytest.raises(UserError) as caught:
        verification.wait()
    # What a loop would see, as often as it looks.
    for _ in range(2):
        with pytest.raises(UserError, match=re.escape(str(caught.value))):
            verification.check()
    return str(caught.value)


def verified(directory) -> str:
    verification = Verification(directory)
    sentence = verification.wait()
    verification.check()
    return sentence


def test_a_truncated_shard_is_named(directory):
    path = directory / "tiny_train_000002.npy"
    path.write_bytes(path.read_bytes()[:-2])
    assert "tiny_train_000002.npy is not a readable token shard (truncated: 2 bytes" in refuses(
        directory
    )


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
    shards = TokenShards(directory, "train")
    with pytest.raises(UserError, match="token 11, past its vocabulary of 11"):
        shards.read([0, 8], 4)
    assert shards.read([4, 5], 4).shape == (2, 4)
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


def reseal(directory, **changes) -> None:
    """Write the manifest anew with `changes`, and the digest that fits them."""
    record = json.loads((directory / MANIFEST).read_text())
    del record["digest"]
    (directory / MANIFEST).write_bytes(seal({**record, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 12},
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
    ],
)
def test_a_manifest_that_makes_no_sense_is_named(directory, changes):
    # A field of another version's is left alone.
    reseal(directory, unheard_of=1)
    TokenShards(directory, "train")
    reseal(directory, **changes)
    assert re.fullmatch(rf".*/{MANIFEST} is damaged \([^\n]*\); prepare [^\n]*", refuses(directory))


@pytest.mark.parametrize(
    "changes",
    [
        *({"file": name} for name in ("../x.npy", "/etc/passwd", "..", "", "a\\b", "C:x", "a\0b")),
        *({"file": "tiny_train_000002.npy"}, {"file": 3}, {"split": "test"}, {"tokens": -1}),
        *({"tokens": "10"}, {"tokens": 10.5}, {"tokens": None}, {"sha256": 1}, {"reached": 5}),
        *({"reached": [1]}, {"reached": "ab"}),
    ],
)
def test_a_shard_entry_that_makes_no_sense_is_named(directory, changes):
    shards = json.loads((directory / MANIFEST).read_text())["shards"]
    shards[1].update(changes)
    reseal(directory, shards=shards)
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


def test_a_manifest_of_the_version_before_still_opens(directory):
    shards = json.loads((directory / MANIFEST).read_text())["shards"]
    reseal(directory, format=1, shards=[{**shard, "sampled_sha256": "ab"} for shard in shards])
    assert len(TokenShards(directory, "train")) == 25
    assert "the digests of 4 are right" in verified(directory)


def test_a_manifest_without_a_digest_is_refused(directory):
    record = json.loads((directory / MANIFEST).read_text())
    del record["digest"]
    (directory / MANIFEST).write_text(json.dumps(record))
    assert f"{MANIFEST} is damaged (it is not a sealed record)" in refuses(directory)


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
def test_a_flipped_byte_is_found(directory, place):
    flip(directory / FIRST, place)
    assert FIRST in verification_refuses(directory)
    # A header is looked at when the data is opened, the tokens are read in the background.
    if place < 128 and place != PLACES["padding"]:
        assert FIRST in refuses(directory)
    # The other split is not concerned.
    assert len(TokenShards(directory, "val")) == 10


def test_two_shards_that_changed_places(tmp_path):
    write(tmp_path, [[document(14, n) for n in range(2)]])
    a, b = tmp_path / "tiny_train_000001.npy", tmp_path / "tiny_train_000002.npy"
    contents = a.read_bytes(), b.read_bytes()
    a.write_bytes(contents[1]), b.write_bytes(contents[0])
    assert "tiny_train_000001.npy is damaged: its sha256" in verification_refuses(tmp_path)


def test_an_extended_shard_is_named(directory):
    path = directory / FIRST
    path.write_bytes(path.read_bytes() + b"\0\0")
    assert f"{FIRST} is not a readable token shard (padded: 2 bytes too many" in refuses(directory)


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
    assert "2-D <u2, not 1-D <u2 in C order" in refuses(directory)


def test_version_two_of_the_format_is_named(directory):
    with open(directory / FIRST, "wb") as file:
        np.lib.format.write_array(file, np.zeros(10, dtype="<u2"), version=(2, 0))
    assert "not version 1.0 of .npy" in refuses(directory)


@given(
    suffix=st.sampled_from([".npy", ".bin"]),
    start=st.sampled_from([b"", b"\x93NUMPY\x01\x00", npy_header(3), bytes(20), LLMC_HEADER]),
    rest=st.binary(max_size=200),
)
def test_arbitrary_bytes_are_a_shard_or_a_mistake(tmp_path_factory, suffix, start, rest):
    directory = tmp_path_factory.mktemp("bytes")
    (directory / f"x_train_1{suffix}").write_bytes(start + rest)
    try:
        shards = TokenShards(directory, "train")
        assert shards.read([0], len(shards)).shape == (1, len(shards))
    except UserError as error:
        assert "\n" not in str(error)


def test_verification_reads_both_splits_and_foreign_data(directory):
    sentence = verified(directory)
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
    assert "the digests of 0 are right" in verified(directory)
    val.write_bytes(npy_header(2) + b"\0\0\xff\xff")
    assert f"{val.name} holds token 65535" in verification_refuses(directory)


def test_verification_names_the_first_damaged_shard(tmp_path):
    write(tmp_path, [[document(99)]])
    for number in (7, 3, 8):
        flip(tmp_path / f"tiny_train_{number:06d}.npy", 140)
    assert "tiny_train_000003.npy" in verification_refuses(tmp_path)


def test_a_write_that_fails_leaves_what_was_there(directory, monkeypatch):
    before = contents(directory)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_manifest(directory, new_manifest())
    assert contents(directory) == before


def test_verification_in_blocks_finds_what_a_loop_then_sees(tmp_path, monkeypatch):
    monkeypatch.setattr("corpus.shards.BLOCK_BYTES", 10)
    write(tmp_path, [[document(199, n) for n in range(2)]], shard_tokens=100)
    assert "4 shards with 400 tokens" in verified(tmp_path)
    path = tmp_path / "tiny_train_000002.npy"
    flip(path, 233)
    TokenShards(tmp_path, "train")
    with contextlib.closing(Verification(tmp_path)) as verification:
        deadline = time.monotonic() + 20
        with pytest.raises(UserError, match=path.name):
            while time.monotonic() < deadline:
                verification.check()


def test_closing_a_verification_ends_its_thread_and_finds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("corpus.shards.BLOCK_BYTES", 2)
    write(tmp_path, [[document(400_000)]], shard_tokens=200_000)
    before = threading.active_count()
    verification = Verification(tmp_path)
    started = time.monotonic()
    verification.close()
    assert time.monotonic() - started < 1 and threading.active_count() == before
    verification.check()


def test_an_error_of_the_disk_is_told_as_it_is(directory, monkeypatch):
    def fails(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("corpus.shards.open", fails, raising=False)
    assert "Input/output error" in verification_refuses(directory)
