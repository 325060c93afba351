"""LAMBADA: the last word of a passage, which takes all of the passage to guess.

    lambada             OpenAI's text, as GPT-2 was scored on (Radford et al. 2019, section 3.3)
    lambada-standard    the authors' text: tokenised, in lower case (Paperno et al. 2016)

A passage is cut at its last space, as in lm-evaluation-harness. An answer is right when each token
of the word is the model's likeliest. `acc_no_stop_words` is the variant with which GPT-2's authors
raised their score: a prediction that begins with a function word, which hardly ever ends a
passage, gives way to the likeliest other one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from benchmark import (
    Task,
    WebFile,
    bad_line,
    count_rows,
    encode_line,
    find,
    is_published,
    read_json_lines,
    read_lines,
    read_member,
    require_examples,
    require_gpt2_vocabulary,
    search,
    store,
)
from corpus.tokenizer import Tokenizer
from likelihood import Scores, perplexity, share

OPENAI = WebFile(
    path="lambada/lambada_test.jsonl",
    address="https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
    size=1_819_752,
    sha256="4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
    rows=5_153,
)
ARCHIVE = WebFile(
    path="lambada/lambada-dataset.tar.gz",
    address="https://zenodo.org/records/2630551/files/lambada-dataset.tar.gz",
    size=334_527_694,
    sha256="8fbe499096ddbdcbbd0cac406861b5026fb451d15b8fe04e0e4f3d082f2ad5d7",
)
# One passage a line, inside the archive.
MEMBER = "lambada_test_plain_text.txt"
STANDARD = WebFile(f"lambada/{MEMBER}", ARCHIVE.address, rows=5_153)

# English function words. The list of GPT-2's authors is not published; this one is our own.
STOP_WORD_LIST = """
a an the this that these those some any each every both either neither another such all
no none
i me my mine myself you your yours yourself he him his himself she her hers herself it its
itself we us our ours ourselves they them their theirs themselves one who whom whose which what
and or but nor so yet if because since unless until while although though than as whether when
whenever where wherever why how
of in on at by for from to into onto upon with within without about above across after against
along among around before behind below beneath beside between beyond down during except inside
like near off out outside over past through throughout toward towards under up
am is are was were be been being have has had having do does did doing will would shall should
can could may might must
not only just also very too then there here even more most
"""
STOP_WORDS = frozenset(STOP_WORD_LIST.split())


@dataclass(frozen=True)
class Example:
    context: str
    word: str


def task(
    tokenizer: Tokenizer,
    standard: bool = False,
    limit: int | None = None,
    fetch: bool = True,
    attempts: int | None = None,
    path: Path | None = None,
) -> Task:
    """Return the first `limit` passages, by default all, of OpenAI's or the `standard` text.

    `path` is a file to read in place of the published one. Raises UserError when there is no file,
    for a line that is not a passage, and for a tokenizer that is not GPT-2's.
    """
    name = "lambada-standard" if standard else "lambada"
    require_gpt2_vocabulary(tokenizer, name)
    if path is None:
        path = _find_standard(fetch, attempts) if standard else find(OPENAI, fetch, attempts)
    published = is_published(STANDARD if standard else OPENAI, path, count_rows(path))
    examples, requests = [], []
    for number, text in islice(_read_plain(path) if standard else _read_openai(path), limit):
        example = _split(path, number, text)
        word = [f" {example.word}"]
        requests.append(encode_line(tokenizer, path, number, example.context, word))
        examples.append(example)
    require_examples(examples, path)
    text = "the authors' text" if standard else "OpenAI's text"
    if not published:
        text += ", of another file than the published one"
    return Task(
        name=name,
        protocol=f"{text}; acc by greedy match of the last word's tokens",
        path=path,
        published=published,
        examples=examples,
        requests=requests,
        judge=judge,
        summarize=summarize,
        headline="acc",
        excluded=stop_word_ids(tokenizer),
    )


def _find_standard(fetch: bool, attempts: int | None) -> Path:
    """Return the path of the authors' test passages, taken out of their archive if need be.

    A downloaded archive is deleted: a thousandth of it is this text, the rest is novels.
    """
    path = search(STANDARD)
    if path is not None:
        return path
    was_there = search(ARCHIVE) is not None
    archive = find(ARCHIVE, fetch, attempts)
    path = store(STANDARD, read_member(archive, MEMBER))
    if not was_there:
        archive.unlink(missing_ok=True)
    return path


def _read_openai(path: Path) -> Iterator[tuple[int, str]]:
    for number, row in read_json_lines(path):
        if not isinstance(row.get("text"), str):
            raise bad_line(path, number, 'has no text "text"')
        yield number, row["text"]


def _read_plain(path: Path) -> Iterator[tuple[int, str]]:
    # Whatever stands at the end of a line of plain text is no part of its last word.
    return ((number, line.rstrip()) for number, line in read_lines(path))


def _split(path: Path, number: int, text: str) -> Example:
    context, _, word = text.rpartition(" ")
    if not word.strip():
        raise bad_line(path, number, "has no last word: its text is empty or ends in a space")
    if not context.strip():
        raise bad_line(path, number, "has a text of one word only")
    return Example(context, word)


def stop_word_ids(tokenizer: Tokenizer) -> np.ndarray:
    """Return the sorted ids, int64, of stop words after a space, in lower case or capitalised."""
    words = {form for word in STOP_WORDS for form in (word, word.capitalize())}
    encoded = [tokenizer.encode(f" {word}") for word in words]
    return np.array(sorted(int(ids[0]) for ids in encoded if len(ids) == 1), dtype=np.int64)


def judge(example: Example, scores: Scores) -> dict[str, Any]:
    """Return whether the word was guessed, with and without stop words, and its nats."""
    greedy, filtered = bool(scores.greedy[0]), bool(scores.greedy_filtered[0])
    # A word can begin with the token of a shorter one, as " Hermione" does with " Her". Then the
    # filter hits the word as well, although the model's prediction was never a stop word.
    filtered = filtered or (greedy and example.word.lower() not in STOP_WORDS)
    nats = -float(scores.logprobs[0])
    return {"acc": float(greedy), "acc_no_stop_words": float(filtered), "nats": nats}


def summarize(facts: list[dict[str, Any]]) -> dict[str, float]:
    """Return acc, perplexity of the last word, and acc_no_stop_words, with standard errors."""
    return {
        **share("acc", [fact["acc"] for fact in facts]),
        **perplexity("perplexity", [fact["nats"] for fact in facts]),
        **share("acc_no_stop_words", [fact["acc_no_stop_words"] for fact in facts]),
    }
