"""Shakespeare, or any text, to token shards: by character or in GPT-2's byte pairs.

    python shakespeare/shakespeare.py                             data/shakespeare-char
    python shakespeare/shakespeare.py --tokenizer gpt2            data/shakespeare-gpt2
    python shakespeare/shakespeare.py --text large                data/shakespeare-large-char
    python shakespeare/shakespeare.py --text novel.txt            data/novel-char

The first nine tenths of the characters train, the rest validate. What comes out is a data directory
like any other: `python main.py --size nano --data shakespeare-char`.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Run as a script, Python looks for modules in this folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from config import UserError
from corpus.shards import DATA_DIR, Manifest
from corpus.tokenizer import CharTokenizer, Tokenizer, gpt2_tokenizer
from load_fineweb import SHARD_TOKENS
from preparation import claimed, totals
from sources import SHAKESPEARE, TEXTS, fetch_text, source_name
from utils import parse, run_script
from writer import ShardWriter

TRAIN_SHARE = 0.9
# Tokens are uint16, and <|endoftext|> is one more than the characters.
MOST_CHARACTERS = 65535


@dataclass(frozen=True)
class Arguments:
    """Turn Shakespeare, or any text, into token shards."""

    text: str = "tiny"
    """tiny, large (the complete works), or a file of UTF-8 text."""
    tokenizer: Literal["char", "gpt2"] = "char"
    """One token a character of the text, or GPT-2's byte pairs."""
    out: Path | None = None
    """Directory for the shards; under data/, named after text and tokenizer, by default."""


def main() -> None:
    """Prepare what the command line asks for."""
    prepare(**vars(parse(Arguments)))


def prepare(
    text: str = "tiny",
    tokenizer: Literal["char", "gpt2"] = "char",
    out: Path | None = None,
    quiet: bool = False,
) -> Manifest:
    """Write a text's token shards and return their manifest; leave a finished directory alone.

    The arguments are the fields of `Arguments`. Raises UserError when there is no such text, it
    cannot be split or encoded, or `out` holds anything but what would be written.
    """
    name = f"{_name(text)}-{tokenizer}"
    out = out or DATA_DIR / name
    content = _read(fetch_text(text) if text in TEXTS else Path(text))
    codec = _tokenizer(content, tokenizer, text)
    with claimed(out, _manifest(name, content, codec)) as manifest:
        already = "already " if manifest.complete else ""
        if not manifest.complete:
            cut = int(TRAIN_SHARE * len(content))
            train, val = _document(content[:cut], codec), _document(content[cut:], codec)
            manifest = ShardWriter(out, manifest, codec).write_splits(val, train)
    if not quiet:
        print(f"{out} is {already}complete: {totals(manifest)}.")
    return manifest


def _name(text: str) -> str:
    """Return what a text's shards are named after: shakespeare, shakespeare-large, or its file."""
    if text in TEXTS:
        return SHAKESPEARE if text == "tiny" else f"{SHAKESPEARE}-{text}"
    return source_name((str(Path(text).absolute()),), None)


def _read(path: Path) -> str:
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        texts = ", ".join(TEXTS)
        raise UserError(f"There is no file {path}; --text names one, or: {texts}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); convert it first.") from error
    if len(content) < 2:
        count = "one character" if content else "no characters"
        raise UserError(f"{path} holds {count}, too few to split into training and validation.")
    return content


def _tokenizer(content: str, tokenizer: str, text: str) -> Tokenizer:
    if tokenizer == "gpt2":
        return gpt2_tokenizer()
    if (count := len(set(content))) > MOST_CHARACTERS:
        raise UserError(
            f"{text} has {count:,} distinct characters, and tokens have room for "
            f"{MOST_CHARACTERS:,}; use --tokenizer gpt2."
        )
    # One alphabet for both parts, so that validation meets no character without a token.
    return CharTokenizer.from_text(content)


def _manifest(name: str, content: str, codec: Tokenizer) -> Manifest:
    digest = hashlib.sha256(content.encode()).hexdigest()
    return Manifest(
        name=name,
        tokenizer=codec.name,
        alphabet=codec.alphabet if isinstance(codec, CharTokenizer) else None,
        vocab_size=codec.vocab_size,
        source={"kind": "text", "digest": digest, "train_share": TRAIN_SHARE},
        shard_tokens=SHARD_TOKENS,
    )


def _document(text: str, codec: Tokenizer) -> np.ndarray:
    """Return the tokens of one document, uint16, <|endoftext|> first."""
    return np.concatenate([np.array([codec.eot], dtype=np.uint16), codec.encode(text)])


if __name__ == "__main__":
    run_script(main)
