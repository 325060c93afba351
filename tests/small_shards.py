"""Small shards of letters, for tests of the format."""

from pathlib import Path

import numpy as np
import pytest

from config import UserError
from corpus.shards import Manifest, ShardWriter, TokenShards
from corpus.tokenizer import TOKENIZER_FILE, CharTokenizer

TOKENIZER = CharTokenizer("abcdéfg€ij")
EOT = TOKENIZER.eot
EMPTY = Manifest("tiny", "char", 11, EOT, {"kind": "test"}, TOKENIZER.sha256)
FIRST, SECOND = "tiny_train_000001.npy", "tiny_train_000002.npy"


def document(length: int, seed: int = 0) -> np.ndarray:
    """Return <|endoftext|> and `length` random letters."""
    body = np.random.default_rng(seed).integers(0, EOT, length)
    return np.concatenate([[EOT], body]).astype(np.uint16)


def write(directory: Path, *documents: np.ndarray, size: int = 10) -> Manifest:
    """Write documents as shards of `size` tokens, the first of which validates."""
    directory.mkdir(exist_ok=True)
    (directory / TOKENIZER_FILE).write_text(TOKENIZER.json)
    writer = ShardWriter(directory, EMPTY, TOKENIZER, size)
    for row, tokens in enumerate(documents):
        writer.add(tokens, 0, None, (0, row))
    writer.flush(None, (1, 0, 0))
    return writer.record(complete=True)


def refuses(directory: Path, split: str = "train") -> str:
    """Return the sentence with which opening a split is refused."""
    with pytest.raises(UserError) as caught:
        TokenShards(directory, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)
