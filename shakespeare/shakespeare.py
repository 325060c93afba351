"""Shakespeare, or any text, to token shards: by character or in GPT-2's byte pairs.

    python shakespeare/shakespeare.py                             data/shakespeare-char
    python shakespeare/shakespeare.py --tokenizer gpt2            data/shakespeare-gpt2
    python shakespeare/shakespeare.py --text large                data/shakespeare-large-char
    python shakespeare/shakespeare.py --text novel.txt            data/novel-char

The first nine tenths of the text train, the rest validates. What comes out is a data directory like
any other, which load_fineweb.py makes: `python main.py --size nano --data shakespeare-char`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Run as a script, Python looks for modules in this folder only.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import load_fineweb
from utils import DATA_DIR, parse, run_script


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
    asked = parse(Arguments)
    names = {"tiny": "shakespeare", "large": "shakespeare-large"}
    source = names.get(asked.text, asked.text)
    out = asked.out or DATA_DIR / f"{Path(source).stem}-{asked.tokenizer}"
    load_fineweb.prepare(load_fineweb.Arguments((source,), out, asked.tokenizer))


if __name__ == "__main__":
    run_script(main)
