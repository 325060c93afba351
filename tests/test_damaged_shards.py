"""Damaged, exchanged and planted shards and manifests: each is refused by its name."""

import contextlib
import dataclasses
import io
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
from corpus.shards import MANIFEST, TokenShards, npy_header, read_manifest, write_manifest
from corpus.tokenizer import TOKENIZER_FILE
from tests.small_shards import FIRST, SECOND, document, refuses, write
from training.verification import Verification
from utils import seal


@pytest.fixture
def directory(tmp_path):
    write(tmp_path, document(34))
    return tmp_path


def verification_refuses(directory) -> str:
    verification = Verification(directory)
    with pytest.raises(UserError) as caught:
        verification.wait()
    # What a loop would see, as often as it looks.
    for _ in range(2):
        with pytest.raises(UserError, match=re.escape(str(caught.value))):
            verification.check()
    return str(caught.value)


# --- Shards ---


def npy(tokens: np.ndarray) -> bytes:
    np.save(buffer := io.BytesIO(), tokens)
    return buffer.getvalue()


TOKENS = np.zeros(10, "<u2")
PAIRS = TOKENS.reshape(2, 5)


@pytest.mark.parametrize(
    "content",
    [
        *(npy(TOKENS)[:-2], npy(TOKENS) + b"\0\0", npy(TOKENS)[:128], npy(TOKENS)[:50], b""),
        *(npy(TOKENS[:7]), npy(PAIRS), npy(np.asfortranarray(PAIRS)), "missing", "directory"),
        *(npy(TOKENS.astype("<i4")), npy(TOKENS.astype(">u2")), npy(TOKENS.astype("<f4"))),
        pytest.param("pipe", marks=pytest.mark.skipif(os.name != "posix", reason="no pipes here")),
    ],
)
def test_what_is_no_shard_is_named(directory, content):
    (directory / SECOND).unlink()
    if isinstance(content, bytes):
        (directory / SECOND).write_bytes(content)
    elif content != "missing":
        (os.mkfifo if content == "pipe" else os.mkdir)(directory / SECOND)
    assert SECOND in refuses(directory) and SECOND in verification_refuses(directory)
    # The other split is not concerned.
    assert len(TokenShards(directory, "val")) == 10


def test_a_token_past_the_vocabulary(directory):
    tokens = np.load(directory / FIRST)
    tokens[3] = 11
    np.save(directory / FIRST, tokens)
    manifest = read_manifest(directory)
    shards = tuple(dataclasses.replace(shard, sha256=None) for shard in manifest.shards)
    write_manifest(directory, dataclasses.replace(manifest, shards=shards))
    found = TokenShards(directory, "train")
    with pytest.raises(UserError, match="token 11, past its vocabulary of 11"):
        found.read([0, 8], 4)
    assert found.read([4, 5], 4).shape == (2, 4)
    assert "holds token 11, past its vocabulary" in verification_refuses(directory)


def flip(path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


# Magic number, version, length, dtype, order, shape; padding and end; tokens begin at byte 128.
@pytest.mark.parametrize("place", [1, 6, 8, 22, 45, 61, 100, 127, 128, 139, 147])
def test_a_flipped_byte_is_found(directory, place):
    flip(directory / FIRST, place)
    # A header is looked at when the data is opened, the tokens are read in the background.
    if place < 100:
        assert FIRST in refuses(directory)
    assert FIRST in verification_refuses(directory)


@pytest.mark.parametrize("header", [b"", npy_header(10).replace(b"'<u2'", b"'|O' ")])
def test_a_pickle_is_never_loaded(directory, tmp_path, header):
    """One that makes a directory when it is loaded."""
    trap = tmp_path / "trap"
    (directory / FIRST).write_bytes(header + b"cos\nmkdir\n(V" + str(trap).encode() + b"\ntR.")
    assert FIRST in refuses(directory) and FIRST in verification_refuses(directory)
    (directory / MANIFEST).unlink()
    assert FIRST in refuses(directory)
    assert not trap.exists()
    with contextlib.suppress(AttributeError):
        np.load(directory / FIRST, allow_pickle=True)
    assert trap.exists()


LLMC_HEADER = np.array([20240520, 1, 3, *[0] * 253], dtype="<i4").tobytes()


@given(
    suffix=st.sampled_from([".npy", ".bin"]),
    start=st.sampled_from([b"", b"\x93NUMPY\x01\x00", b"PK", npy_header(3), LLMC_HEADER]),
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


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b"\xff", b'{"model": 3}', "other"])
def test_a_damaged_tokenizer_is_named(directory, content):
    shards, path = TokenShards(directory, "train"), directory / TOKENIZER_FILE
    content = path.read_bytes().replace(b'"b"', b'"B"') if content == "other" else content
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=TOKENIZER_FILE) as caught:
        _ = shards.tokenizer
    assert "\n" not in str(caught.value)


# --- Manifests ---


def test_an_unfinished_directory_and_a_missing_split(directory):
    manifest = read_manifest(directory)
    write_manifest(directory, dataclasses.replace(manifest, shards=manifest.shards[:1]))
    assert "holds no train shards" in refuses(directory)
    write_manifest(directory, dataclasses.replace(manifest, complete=False))
    assert "is not finished" in refuses(directory)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"shards": 3}', '{"digest": 1}', "[" * 100_000])
def test_a_damaged_manifest_is_named(directory, text):
    (directory / MANIFEST).write_text(text)
    assert f"{MANIFEST} is damaged" in refuses(directory)


def reseal(directory, **changes) -> None:
    """Write the manifest anew with `changes`, and the digest that fits them."""
    record = json.loads((directory / MANIFEST).read_text())
    del record["digest"]
    (directory / MANIFEST).write_bytes(seal({**record, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        *({"vocab_size": 70_000}, {"vocab_size": 10}, {"vocab_size": "11"}, {"eot": -1}),
        *({"eot": None}, {"tokenizer": None}, {"tokenizer_sha256": 3}, {"source": []}),
        *({"name": 3}, {"skipped": {"empty": "2"}}, {"complete": 1}, {"shards": {}}),
    ],
)
def test_a_manifest_that_makes_no_sense_is_named(directory, changes):
    # A field of another version's is left alone.
    reseal(directory, unheard_of=1)
    TokenShards(directory, "train")
    reseal(directory, **changes)
    assert f"{MANIFEST} is damaged" in refuses(directory)


@pytest.mark.parametrize(
    "change",
    [
        *[("file", name) for name in ("../x.npy", "/etc/passwd", "..", "", "a\\b", "C:x", "a\0b")],
        *[("file", SECOND), ("file", 3), ("split", "test"), ("sha256", 1)],
        *[("tokens", count) for count in (-1, "10", 10.5, None)],
        *[("reached", place) for place in (5, [1], "abc")],
    ],
)
def test_a_shard_entry_that_makes_no_sense_is_named(directory, change):
    shards = json.loads((directory / MANIFEST).read_text())["shards"]
    shards[1].update([change])
    reseal(directory, shards=shards)
    assert f"{MANIFEST} is damaged" in refuses(directory)


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    write(directory := tmp_path_factory.mktemp("sealed"), document(14))
    return directory, read_manifest(directory), (directory / MANIFEST).read_bytes()


@settings(max_examples=300)
@given(data=st.data())
def test_no_changed_byte_of_a_manifest_goes_unnoticed(sealed, data):
    directory, meaning, content = sealed
    place = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[place] ^= data.draw(st.integers(1, 255))
    changed = changed if data.draw(st.booleans()) else content[:place]
    (directory / MANIFEST).write_bytes(changed)
    try:
        assert read_manifest(directory) == meaning
    except UserError as error:
        assert MANIFEST in str(error)


# --- Reading every byte ---


def test_verification_reads_both_splits_in_order_and_foreign_data(directory):
    assert Verification(directory).wait() == (
        f"{directory} is intact: 4 shards with 35 tokens, all below 11; the digests of 4 are right."
    )
    first, second = (directory / FIRST).read_bytes(), (directory / SECOND).read_bytes()
    (directory / FIRST).write_bytes(second)
    (directory / SECOND).write_bytes(first)
    # Both are damaged, and the first is named.
    assert f"{FIRST} is damaged: its sha256" in verification_refuses(directory)
    flip(val := directory / "tiny_val_000000.npy", 130)
    assert val.name in verification_refuses(directory)
    flip(val, 130)
    (directory / MANIFEST).unlink()
    # Ids of characters are ids of the GPT-2 vocabulary as well.
    assert "the digests of 0 are right" in Verification(directory).wait()
    val.write_bytes(npy_header(2) + b"\0\0\xff\xff")
    assert f"{val.name} holds token 65535" in verification_refuses(directory)


def test_verification_in_blocks_finds_what_a_loop_then_sees(tmp_path, monkeypatch):
    monkeypatch.setattr("training.verification.BLOCK_BYTES", 10)
    write(tmp_path, document(199), document(199, 1), size=100)
    assert "4 shards with 400 tokens" in Verification(tmp_path).wait()
    flip(tmp_path / SECOND, 233)
    TokenShards(tmp_path, "train")
    with contextlib.closing(Verification(tmp_path)) as verification:
        deadline = time.monotonic() + 20
        with pytest.raises(UserError, match=SECOND):
            while time.monotonic() < deadline:
                verification.check()


def test_closing_a_verification_ends_its_thread_and_finds_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("training.verification.BLOCK_BYTES", 2)
    write(tmp_path, document(400_000), size=200_000)
    flip(tmp_path / FIRST, 400_000)
    before = threading.active_count()
    verification = Verification(tmp_path)
    verification.close()
    assert threading.active_count() == before
    verification.check()


def test_an_error_of_the_disk_is_told_as_it_is(directory, monkeypatch):
    def fails(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("training.verification.open", fails, raising=False)
    with pytest.raises(OSError, match="Input/output error"):
        Verification(directory).wait()
