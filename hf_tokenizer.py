"""Tokenizer files, as `AutoTokenizer.from_pretrained` reads them, for our tokenizers.

    tokenizer_files(tokenizer, model_max_length) -> {file name: text}
    check_vocabulary(directory)

GPT-2's come from OpenAI's rank table, so that no download is needed: vocab.json, merges.txt and
tokenizer.json. Others have a tokenizer.json already. There, "<|endoftext|>" in a
text is that token; in our data it is only characters.
"""

import functools
import json
from pathlib import Path
from typing import Any

from config import UserError
from corpus.tokenizer import BYTE_OF, END_OF_TEXT, RANK_FILE, GPT2Tokenizer, Tokenizer, read_ranks

BYTE_CHARACTERS = {byte: character for character, byte in BYTE_OF.items()}


def tokenizer_files(tokenizer: Tokenizer, model_max_length: int) -> dict[str, str]:
    """Return the text of each tokenizer file of a model that reads `model_max_length` tokens."""
    is_gpt2, end = isinstance(tokenizer, GPT2Tokenizer), tokenizer.decode([tokenizer.eot])
    settings = {
        "tokenizer_class": "GPT2Tokenizer" if is_gpt2 else "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "bos_token": end,
        "eos_token": end,
        # It would take the space before a full stop for one to remove.
        "clean_up_tokenization_spaces": False,
    }
    if is_gpt2:
        settings |= {"unk_token": END_OF_TEXT, "add_prefix_space": False}
    files = {"tokenizer_config.json": _json(settings)}
    if not is_gpt2:
        return {**files, "tokenizer.json": tokenizer.json}
    merges = [f"{left} {right}" for left, right in merge_rules()]
    return {
        **files,
        "vocab.json": _json(vocabulary(), indent=None),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "tokenizer.json": _json(_of_bytes(tokenizer)),
    }


def check_vocabulary(directory: Path) -> None:
    """Raise UserError, naming the file and a token, if a model's tokenizer is not GPT-2's.

    A directory without tokenizer files passes: there is nothing to compare.
    """
    wanted = vocabulary()
    for name in ("vocab.json", "tokenizer.json"):
        path = directory / name
        if not path.is_file():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            found = found["model"]["vocab"] if name == "tokenizer.json" else found
            # Where a special token stands apart, it is not in the table.
            other = next((t for t, i in wanted.items() if found.get(t, i) != i), None)
            other = other or next((t for t in found if t not in wanted), None)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{path} is damaged ({error!r}).") from None
        if other is not None:
            raise UserError(
                f"{path} is not the vocabulary of the gpt2 tokenizer: the token "
                f"{other!r} has id {found.get(other)} there and {wanted.get(other)} here."
            )
        return


@functools.cache
def vocabulary() -> dict[str, int]:
    """Return GPT-2's 50,257 tokens as Hugging Face writes them, with their ids."""
    ids = {_written(token): rank for token, rank in _ranks().items()}
    return {**ids, END_OF_TEXT: GPT2Tokenizer.eot}


@functools.cache
def merge_rules() -> tuple[tuple[str, str], ...]:
    """Return the pair that each of GPT-2's tokens of several bytes was merged from, in their order.

    The rank table has only each token's rank. The pair is what the token's bytes come to when they
    are merged by the tokens of lower rank alone.
    """
    ranks = _ranks()
    rules = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            left, right = _halves(token, ranks, rank)
            rules.append((_written(left), _written(right)))
    return tuple(rules)


@functools.cache
def _ranks() -> dict[bytes, int]:
    return read_ranks(RANK_FILE)


def _halves(token: bytes, ranks: dict[bytes, int], limit: int) -> list[bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
        best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], limit))
        parts[best : best + 2] = [pairs[best]]
    return parts


def _written(token: bytes) -> str:
    return "".join(BYTE_CHARACTERS[byte] for byte in token)


def _of_bytes(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return tokenizer.json of GPT-2's byte-pair encoding."""
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    by_bytes["use_regex"] = True
    return {
        **_shared(tokenizer),
        "pre_tokenizer": by_bytes,
        "post_processor": {**by_bytes, "trim_offsets": False},
        "decoder": by_bytes,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary(),
            "merges": [list(pair) for pair in merge_rules()],
        },
    }


def _shared(tokenizer: Tokenizer) -> dict[str, Any]:
    special = {"id": tokenizer.eot, "content": END_OF_TEXT, "special": True, "normalized": False}
    special |= {"single_word": False, "lstrip": False, "rstrip": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special],
        "normalizer": None,
    }


def _json(value: Any, indent: int | None = 2) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
