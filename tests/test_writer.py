"""What the writer does in blocks and in place, beside the plain way; what it counts."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import writer
from config import UserError
from corpus.shards import Manifest
from corpus.tokenizer import CharTokenizer
from left_out import LeftOut
from writer import ShardWriter

TOKENIZER = CharTokenizer("abcdéfg€ij")
EOT = TOKENIZER.eot


def new_manifest(shard_tokens: int = 10) -> Manifest:
    return Manifest(
        name="tiny",
        tokenizer="char",
        alphabet=TOKENIZER.alphabet,
        vocab_size=TOKENIZER.vocab_size,
        source={"kind": "test"},
        shard_tokens=shard_tokens,
    )


def document(length: int, seed: int = 0) -> np.ndarray:
    body = np.random.default_rng(seed).integers(0, EOT, length)
    return np.concatenate([[EOT], body]).astype(np.uint16)


def plain_split(documents, hashes, val_tokens) -> tuple[list[int], list[int]]:
    """Return the held-out and the other tokens, document by document."""
    total = sum(map(len, documents))
    limit = val_tokens if val_tokens is not None else total // 10
    groups = {}
    for digest, text in zip(hashes, documents, strict=True):
        groups[digest] = groups.get(digest, 0) + len(text)
    held, used = set(), 0
    for digest in sorted(groups):
        if groups[digest] <= limit:
            used += groups[digest]
            if used > limit:
                break
            held.add(digest)
    if not held:
        tokens = [int(token) for text in documents for token in text]
        cut = len(tokens) - max(limit, 1)
        return tokens[cut:], tokens[:cut]
    val = [int(t) for d, text in zip(hashes, documents, strict=True) if d in held for t in text]
    rest = [
        int(t) for d, text in zip(hashes, documents, strict=True) if d not in held for t in text
    ]
    return val, rest


@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=40),
    data=st.data(),
    block=st.integers(1, 50),
)
@settings(max_examples=150, deadline=None)
def test_a_small_corpus_is_split_like_the_plain_way(lengths, data, block):
    documents = [document(length, i) for i, length in enumerate(lengths)]
    # Few different hashes: pieces of one document, or the same text twice.
    hashes = [data.draw(st.integers(0, 2**64 - 1) | st.integers(0, 3)) for _ in documents]
    tokens = np.concatenate(documents)
    val_tokens = data.draw(st.none() | st.integers(1, len(tokens) - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "BLOCK", block)
        val, train = writer._part(tokens.copy(), writer._held_out(tokens, EOT, hashes, val_tokens))
    assert (val.tolist(), train.tolist()) == plain_split(documents, hashes, val_tokens)


@pytest.mark.parametrize("shard_tokens", [7, 10, 1000])
def test_the_bytes_of_text_are_those_of_each_file(tmp_path, monkeypatch, shard_tokens):
    monkeypatch.setattr(writer, "BLOCK", 3)
    shards = ShardWriter(tmp_path, new_manifest(shard_tokens=shard_tokens), TOKENIZER)
    for chunk in range(12):
        shards.add(np.concatenate([document(chunk, chunk), document(4)]), [chunk, 99], chunk)
    lengths = TOKENIZER.token_bytes()
    for shard in shards.finish().shards:
        assert shard.bytes == lengths[np.load(tmp_path / shard.file)].sum()


def test_a_split_that_is_already_made(tmp_path):
    val, train = document(25, 1), document(31, 2)
    manifest = ShardWriter(tmp_path, new_manifest(), TOKENIZER).write_splits(val, train)
    assert [shard.tokens for shard in manifest.shards] == [10, 10, 6, 10, 10, 10, 2]
    for split, tokens in (("val", val), ("train", train)):
        files = [shard.file for shard in manifest.shards if shard.split == split]
        assert np.array_equal(np.concatenate([np.load(tmp_path / f) for f in files]), tokens)
    assert manifest.complete


def test_a_shard_that_memory_has_no_room_for(tmp_path):
    with pytest.raises(UserError, match=r"no room for a shard of .*; choose fewer --shard-tokens"):
        ShardWriter(tmp_path, new_manifest(shard_tokens=10**17), TOKENIZER)


def test_a_flush_counts_the_chunks_before_the_one_it_ends_in(tmp_path):
    """That one is read again by a preparation that continues, and so are all after it."""
    shards = ShardWriter(tmp_path, new_manifest(shard_tokens=10), TOKENIZER)
    counted = []
    for chunk, length in enumerate([5, 3, 0, 12, 0, 2]):
        tokens = document(length, chunk) if length else np.empty(0, np.uint16)
        left_out = LeftOut()
        left_out.add("empty", count=10**chunk)
        shards.add(tokens, [chunk] if length else [], chunk, left_out)
        counted.append((shards.manifest.shards and shards.manifest.shards[-1].reached[0],
                        shards.manifest.left_out.get("empty", 0)))  # fmt: skip
    assert counted == [((), 0)] * 3 + [(3, 111)] * 3
    assert shards.finish().left_out == {"empty": 111111}


def test_counts_and_the_first_names_are_told():
    first, later = LeftOut(), LeftOut()
    first.add("short", count=2)
    first.add("not_utf8", "a.txt")
    for i in range(6):
        later.add("not_utf8", f"{i}.txt")
    later.add("empty", count=1200)
    together = first + later
    assert str(together) == (
        "1,200 empty documents; 7 not UTF-8: a.txt, 0.txt, 1.txt, 2.txt, 3.txt and 2 more; "
        "2 pieces below the minimum length"
    )
    assert list(together.in_order().counts) == ["empty", "not_utf8", "short"]
    assert str(LeftOut({"empty": 1})) == "1 empty document"
    assert dataclasses.asdict(first)["counts"] == {"short": 2, "not_utf8": 1}
