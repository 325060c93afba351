"""Text to token ids and back: GPT-2's byte-pair encoding, and single characters.

Both tokenizers answer to the same few names, so the rest of the project does not care which it has:

    name, vocab_size, eot          `eot` is the id of <|endoftext|>, which begins every document
    encode(text) -> uint16 array   ordinary text only: "<|endoftext|>" in it is just characters
    decode(ids) -> str
    token_bytes() -> array         UTF-8 bytes of each id, for bits per byte

No network is needed: OpenAI's rank table lies in `assets/` and is checked against its published
checksum. (Radford et al. 2019, section 2.2; the table is from OpenAI's GPT-2 release, modified
MIT.)
"""

import base64
import functools
import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from config import UserError

RANK_FILE = Path(__file__).parent.parent / "assets" / "gpt2.tiktoken"
RANK_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
END_OF_TEXT = "<|endoftext|>"

# How GPT-2 cuts text before merging bytes: contractions, words, numbers and punctuation, each with
# the space before it, and runs of whitespace. GPT-2's own pattern ends in `|\s+(?!\S)|\s+`, which
# keeps the last whitespace before a word apart from a longer run. That look-ahead takes a
# backtracking matcher, 1.5 times slower, which fails on a run of a million spaces. Without it the
# result is the same as long as no run has three characters and no text ends in two, and
# `_cut_at_runs` sees to that.
SPLIT_PATTERN = r"""^\s+$|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"""

# Unicode's White_Space, which is the pattern's `\s`; Python's own has four control characters more.
WHITESPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
IS_SPACE = np.zeros(65536, dtype=bool)
IS_SPACE[[ord(character) for character in WHITESPACE]] = True
LONG_RUN = re.compile(f"[{WHITESPACE}]{{2,}}(?:\\Z|(?=[{WHITESPACE}]))")


class GPT2Tokenizer:
    """GPT-2's byte-level BPE with 50,257 ids, through tiktoken."""

    name = "gpt2"
    vocab_size = 50257
    eot = 50256

    def __init__(self):
        """Read the bundled rank table; raises UserError when it is missing or altered."""
        import tiktoken

        self._encoding = tiktoken.Encoding(
            name="gpt2",
            pat_str=SPLIT_PATTERN,
            mergeable_ranks=read_ranks(RANK_FILE),
            special_tokens={END_OF_TEXT: self.eot},
        )

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text` as a 1-D uint16 array; no text is read as a special token."""
        # A lone surrogate cannot be written as UTF-8, so it becomes the replacement character.
        try:
            codes = np.frombuffer(text.encode("utf-16-le"), dtype="<u2")
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            codes = np.frombuffer(text.encode("utf-16-le"), dtype="<u2")
        if not _has_long_run(codes):
            return self._encode_piece(text)
        return np.concatenate([self._encode_piece(piece) for piece in _cut_at_runs(text)])

    def _encode_piece(self, text: str) -> np.ndarray:
        # The NumPy output skips building a Python list, and uint16 is what shards hold.
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; bytes that are not UTF-8 become the replacement character."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of `ids`, whose end may cut a character in two."""
        return self._encoding.decode_bytes([int(i) for i in ids])

    def token_bytes(self) -> np.ndarray:
        """Return the byte length of each id, int64 of shape (50257,); <|endoftext|> counts none."""
        lengths = [len(self._encoding.decode_single_token_bytes(i)) for i in range(self.eot)]
        return np.array([*lengths, 0], dtype=np.int64)


class CharTokenizer:
    """One id for each character of a fixed alphabet, and a last one for the start of a document."""

    name = "char"

    def __init__(self, alphabet: str):
        """Take an alphabet of distinct characters; raises UserError when it is empty or repeats."""
        if not alphabet or len(set(alphabet)) != len(alphabet):
            raise UserError("A character tokenizer needs an alphabet of distinct characters.")
        self.alphabet = alphabet
        self.eot = len(alphabet)
        self.vocab_size = len(alphabet) + 1
        self._ids = {character: i for i, character in enumerate(alphabet)}

    @classmethod
    def from_text(cls, text: str) -> "CharTokenizer":
        """Build the tokenizer whose alphabet is the sorted characters of `text`."""
        return cls("".join(sorted(set(text))))

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`; raises UserError naming a character outside the alphabet."""
        try:
            return np.array([self._ids[character] for character in text], dtype=np.uint16)
        except KeyError as error:
            raise UserError(
                f"The character {error.args[0]!r} is not in this model's alphabet."
            ) from None

    def decode(self, ids: Iterable[int]) -> str:
        """Return the characters of `ids`; the document start prints as <|endoftext|>."""
        return "".join(END_OF_TEXT if i == self.eot else self.alphabet[int(i)] for i in ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the UTF-8 bytes of `ids`."""
        return self.decode(ids).encode("utf-8")

    def token_bytes(self) -> np.ndarray:
        """Return the byte length of each id, int64; the document start counts none."""
        return np.array([*(len(c.encode("utf-8")) for c in self.alphabet), 0], dtype=np.int64)


Tokenizer = GPT2Tokenizer | CharTokenizer


def _has_long_run(codes: np.ndarray) -> bool:
    """Say whether UTF-16 text holds three whitespace characters in a row, or ends in two."""
    space = IS_SPACE[codes]
    pair = space[1:] & space[:-1]
    return len(pair) > 0 and bool(pair[-1] or (pair[1:] & pair[:-1]).any())


def _cut_at_runs(text: str) -> Iterator[str]:
    """Yield `text` in pieces: each long run of whitespace by itself, and what lies between them.

    The last character of a run that something follows begins the next piece.
    """
    start = 0
    for run in LONG_RUN.finditer(text):
        yield text[start : run.start()]
        yield run.group()
        start = run.end()
    yield text[start:]


@functools.cache
def gpt2_tokenizer() -> GPT2Tokenizer:
    """Return the process's one GPT-2 tokenizer (building it takes a third of a second)."""
    return GPT2Tokenizer()


def load_tokenizer(name: str, alphabet: str | None = None) -> Tokenizer:
    """Return the tokenizer a manifest names; raises UserError for an unknown one."""
    if name == GPT2Tokenizer.name:
        return gpt2_tokenizer()
    if name == CharTokenizer.name and alphabet:
        return CharTokenizer(alphabet)
    raise UserError(f"The data names a tokenizer this version does not know: {name!r}.")


def can_encode(tokenizer: Tokenizer, text: str) -> bool:
    """Say whether every character of `text` has an id."""
    return not isinstance(tokenizer, CharTokenizer) or set(text) <= set(tokenizer.alphabet)


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a rank table: on each line a token's bytes in base64 and its rank."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"The tokenizer's rank file {path} cannot be read ({error.strerror})."
        ) from error
    if hashlib.sha256(content).hexdigest() != RANK_SHA256:
        raise UserError(
            f"{path} is not OpenAI's rank table (its checksum differs); restore it with git."
        )
    pairs = (line.split() for line in content.splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in pairs}
