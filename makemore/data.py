"""Words or running text to batches of characters.

Id 0 is the boundary: it stands before and after each word, and where there is nothing to see. The
other ids are the characters in their order. A batch is a pure function of (data, seed, step), so a
run that was interrupted goes on exactly as it would have.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from config import UserError
from corpus.pydocs import pydocs_documents
from corpus.sources import TEXTS
from loss import IGNORE_INDEX
from utils import fetch

# Address, bytes, sha256.
NAMES = (
    "https://raw.githubusercontent.com/karpathy/makemore/master/names.txt",
    228_145,
    "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d",
)
# Lines of a list are words when they are no longer than this and have no space in them.
LONGEST_WORD = 40
# A bigram's table has as many rows and columns, each with its moments while it is being learnt.
MOST_CHARACTERS = 5_000
# Rows of a batch in an evaluation, which keeps no gradients.
EVALUATION_ROWS = 500

Kind = Literal["words", "text"]
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """Three splits of words or of running text, as ids."""

    name: str
    kind: Kind
    # The character of id i + 1 at place i.
    alphabet: str
    # Text: (N,). Words: int64 (words, longest + 2): boundary, characters, boundary, IGNORE_INDEX.
    train: Tensor
    val: Tensor
    test: Tensor
    # The words of the training split.
    seen: frozenset[str]
    # Of the content, the kind and the split.
    digest: str

    @property
    def vocab_size(self) -> int:
        """V: the characters, and the boundary."""
        return len(self.alphabet) + 1

    @property
    def longest(self) -> int:
        """Characters of the longest word, or of a line that is long enough."""
        return self.train.size(1) - 2 if self.kind == "words" else 120

    def decode(self, ids: list[int]) -> str:
        """Return the characters of ids, none of them 0."""
        return "".join(self.alphabet[i - 1] for i in ids)


def load(source: str, seed: int, kind: Kind | None = None) -> Data:
    """Return the data that `source` names: words, names, shakespeare, or a file.

    A file that is a list of short words, one a line, is taken for one unless `kind` says otherwise.
    Raises UserError when there is no such file, or too little in it, or it is not UTF-8.
    """
    name, content, found = _content(source)
    kind = kind or found
    if not content.strip():
        raise UserError(f"{source} is empty; give a file with a word on each line, or with text.")
    alphabet = "".join(sorted(set().union(*_words(content)) if kind == "words" else set(content)))
    if len(alphabet) < 2:
        raise UserError(
            f"{source} has an alphabet of one character ({alphabet!r}), of which there is nothing "
            "to learn; give a text with at least two."
        )
    if len(alphabet) > MOST_CHARACTERS:
        raise UserError(
            f"{source} has {len(alphabet):,} different characters, more than the "
            f"{MOST_CHARACTERS:,} there is room for; give a smaller text."
        )
    digest = hashlib.sha256(f"{kind} {seed} {content}".encode()).hexdigest()[:16]
    make = _word_data if kind == "words" else _text_data
    return make(name, content, alphabet, seed, digest)


def _content(source: str) -> tuple[str, str, Kind]:
    """Return a source's name, its content, and what kind that is."""
    if source == "words":
        return source, "\n".join(_english_words()), "words"
    if source == "names":
        return source, _read(fetch("names/names.txt", *NAMES)), "words"
    if source in TEXTS:
        return source, _read(fetch(*TEXTS[source])), "text"
    path = Path(source)
    content = _read(path)
    return path.stem or source, content, _kind(content)


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError as error:
        raise UserError(
            f"There is no file {path}; --data is words, names, shakespeare or a file."
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); convert it first.") from error


def _kind(content: str) -> Kind:
    lines = [line.strip() for line in content.splitlines()]
    short = all(len(line) <= LONGEST_WORD and len(line.split()) < 2 for line in lines)
    return "words" if short else "text"


def _words(content: str) -> list[str]:
    """Return the distinct words of a list, so that none is in two splits."""
    return list(dict.fromkeys(word for line in content.splitlines() if (word := line.strip())))


# Lower-case words between spaces and punctuation, not parts of code, paths or options.
_WORD = re.compile(
    r"(?<![\w.`'\"\-/%$@\\:<])[a-z]{3,14}(?![\w`(='\-/\[\\:>*]|[.]\w)",
)


def _english_words() -> list[str]:
    """Return the distinct English words of Python's own documentation, in alphabetical order."""
    return sorted({word for text in pydocs_documents() for word in _WORD.findall(text)})


def _word_data(name: str, content: str, alphabet: str, seed: int, digest: str) -> Data:
    words = _words(content)
    tenth = len(words) // 10
    if not tenth:
        raise UserError(
            f"{name} has {len(words)} different words, too few to split into training, validation "
            "and test; give at least 10, one a line."
        )
    order = torch.randperm(len(words), generator=_generator(seed, "split")).tolist()
    words = [words[i] for i in order]
    train = words[: -2 * tenth]
    ids = {character: i for i, character in enumerate(alphabet, 1)}
    rows = torch.full((len(words), max(map(len, words)) + 2), IGNORE_INDEX)
    for row, word in zip(rows, words, strict=True):
        row[: len(word) + 2] = torch.tensor([0, *(ids[c] for c in word), 0])
    splits = rows.split([len(train), tenth, tenth])
    return Data(name, "words", alphabet, *splits, frozenset(train), digest)


def _text_data(name: str, content: str, alphabet: str, seed: int, digest: str) -> Data:
    tenth = len(content) // 10
    if tenth < 10:
        raise UserError(
            f"{name} has {len(content)} characters, too few to split into training, validation "
            "and test; give at least 100."
        )
    # One tenth validates and one tests; the others are put together in their order, which makes at
    # most two seams.
    val, test, *train = torch.randperm(10, generator=_generator(seed, "split")).tolist()
    ids = {character: i for i, character in enumerate(alphabet, 1)}
    encoded = torch.tensor([ids[c] for c in content])
    bounds = [i * tenth for i in range(10)] + [len(content)]
    pieces = [slice(*pair) for pair in itertools.pairwise(bounds)]
    kept = sorted(train)
    seen = frozenset(word for i in kept for word in text_words(content[pieces[i]]))
    joined = torch.cat([encoded[pieces[i]] for i in kept])
    splits = joined, encoded[pieces[val]], encoded[pieces[test]]
    return Data(name, "text", alphabet, *splits, seen, digest)


def text_words(text: str) -> list[str]:
    """Return the words of running text: runs of letters."""
    return re.findall(r"[^\W\d_]+", text)


def batch_at(data: Data, rows: int, length: int, seed: int, step: int) -> Batch:
    """Return idx and targets (rows, T) of optimizer step `step`, counted from 1.

    Words come in a new order each epoch, and T is what the longest of a batch needs. Of running
    text each row is a window of `length` characters from anywhere.
    """
    if data.kind == "text":
        starts = torch.randint(
            len(data.train) - length, (rows, 1), generator=_generator(seed, "batch", step)
        )
        windows = data.train[starts + torch.arange(length + 1)]
        return windows[:, :-1], windows[:, 1:]
    rows = min(rows, len(data.train))
    epoch, place = divmod(step - 1, len(data.train) // rows)
    return _trimmed(data.train[_order(len(data.train), seed, epoch)[place * rows :][:rows]])


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(count, generator=_generator(seed, "order", epoch))


def _trimmed(rows: Tensor) -> Batch:
    """Return idx and targets of words, without the columns that none of them reaches."""
    longest = int((rows != IGNORE_INDEX).sum(1).max())
    rows = rows[:, :longest]
    return rows[:, :-1].clamp(min=0), rows[:, 1:]


def examples(data: Data, split: Tensor, length: int, block_size: int, most: int) -> Iterator[Batch]:
    """Yield batches with the targets of a split once each, those of about `most` characters.

    Windows of running text overlap by what a model with a `block_size` below `length` needs to see
    of the past, so that it is never measured with less.
    """
    if data.kind == "words":
        for rows in split[: max(most // split.size(1), 1)].split(EVALUATION_ROWS):
            yield _trimmed(rows)
        return
    overlap = block_size - 1 if block_size < length else 0
    length = min(length, len(split) - 1)
    # Starts of windows, the last one as far to the end as it goes; what it repeats is not scored.
    stride, end = length - overlap, min(len(split) - 1, most)
    starts = torch.arange(0, max(end - overlap, 1), stride)
    scored_from = starts + overlap
    scored_from[0] = 0
    starts = starts.clamp(max=len(split) - 1 - length)
    places = starts[:, None] + torch.arange(length)
    targets = torch.where(places < scored_from[:, None], IGNORE_INDEX, split[places + 1])
    for rows in torch.arange(len(starts)).split(max(EVALUATION_ROWS * 16 // length, 1)):
        yield split[places[rows]], targets[rows]


def _generator(seed: int, *use: object) -> torch.Generator:
    """Return a generator of its own for each seed and use."""
    digest = hashlib.sha256(f"{seed} {use}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
