"""Small shards of letters, for tests of the format."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from config import UserError
from corpus.shards import Manifest, TokenShards
from corpus.tokenizer import CharTokenizer
from writer import ShardWriter

TOKENIZER = CharTokenizer("abcdefghij")
EOT = TOKENIZER.eot
FIRST = "tiny_train_000001.npy"


def new_manifest(**changes: object) -> Manifest:
    """Return a manifest of shards of ten tokens, with `changes`."""
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
    """Return <|endoftext|> and `length` random letters."""
    body = np.random.default_rng(seed).integers(0, EOT, length)
    return np.concatenate([[EOT], body]).astype(np.uint16)


def write(directory: Path, chunks: list[list[np.ndarray]], **changes: object) -> Manifest:
    """Write chunks, each a list of documents, whose hashes are their numbers."""
    directory.mkdir(exist_ok=True)
    writer = ShardWriter(directory, new_manifest(**changes), TOKENIZER)
    count = 0
    for number, documents in enumerate(chunks):
        hashes = list(range(count, count + len(documents)))
        writer.add(np.concatenate(documents), hashes, number)
        count += len(documents)
    return writer.finish()


def refuses(directory: Path, split: str = "train") -> str:
    """Return the sentence with which opening a split is refused."""
    with pytest.raises(UserError) as caught:
        TokenShards(directory, split)
    return str(caught.value)
