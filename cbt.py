"""The Children's Book Test: which of ten words fills the blank? (Hill et al. 2016)

    cbt.task(tokenizer) -> Task     one request a question: what precedes the blank, ten endings

A question is twenty sentences of a book and a twenty-first with XXXXX in it. Every candidate with
the text after the blank is an ending of the same context, so the context is computed once, and from
the answer to this one request come two scores:

    acc        the likeliest ending, given what precedes it (Radford et al. 2019, section 3.2)
    acc_full   the lowest mean loss over the whole text, from its second token on, with the
               candidate in place; another number, since candidates differ in their tokens

The text is scored as the file has it: sentences joined by one space, punctuation apart, `` and ''
for quotes. `detokenized` scores it as people write, which is closer to what a model has read.

No question is left out. Some are published with fewer than ten candidates that are not empty; the
choice is among those. A candidate that is listed twice is right both times if it is right.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmark import (
    Task,
    WebFile,
    bad_line,
    find,
    is_published,
    read_lines,
    read_member,
    require_examples,
    require_gpt2_vocabulary,
    search,
    store,
)
from config import UserError
from corpus.tokenizer import Tokenizer
from likelihood import Request, Scores, encode_request, share

ARCHIVE = WebFile(
    path="cbt/CBTest.tgz",
    address=(
        "https://huggingface.co/datasets/cbt/resolve/"
        "7503a0643517afe02a86e4750d375a9686008efa/data/CBTest.tgz"
    ),
    size=120_547_669,
    sha256="932df0cadc1337b2a12b4c696b1041c1d1c6d4b6bd319874c6288f02e4a61e92",
)
QUESTIONS = 2500
SENTENCES = 20
BLANK = "XXXXX"
PARTS = {
    "CN": "common nouns",
    "NE": "named entities",
    "V": "verbs",
    "P": "prepositions",
}

# From the Penn Treebank's tokens to text, in this order.
DETOKENIZING = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        ("`` ?", '"'),
        (" ?''", '"'),
        ("` ", "'"),
        ("-LRB- ?", "("),
        (" ?-RRB-", ")"),
        ("-LSB- ?", "["),
        (" ?-RSB-", "]"),
        (r" (n't|'(?:s|m|d|ll|re|ve))\b", r"\1"),
        (" '(?= |$)", "'"),
        (r" ([.,:;?!])", r"\1"),
    )
]


@dataclass(frozen=True)
class Question:
    """A question of one part; the text is `before`, a candidate, and `after`."""

    part: str
    before: str
    # It may hold XXXXX too, for the same candidate.
    after: str
    # Usually ten, and none of them empty.
    candidates: tuple[str, ...]
    # The index of the right one.
    label: int

    def endings(self) -> list[str]:
        """Return what may follow `before`: each candidate and the text after it."""
        return [word + self.after.replace(BLANK, word) for word in self.candidates]


def task(
    tokenizer: Tokenizer,
    parts: Sequence[str] = ("CN", "NE"),
    detokenized: bool = False,
    limit: int | None = None,
    fetch: bool = True,
    attempts: int | None = None,
    paths: Sequence[Path] | None = None,
) -> Task:
    """Return the test questions of one or more parts, of each the first `limit` if given.

    The parts are CN, NE, V and P, as the files are named; `paths` are files to read instead of
    those that are found or fetched, one a part. Raises UserError when they cannot be had or
    something is wrong with a line, and for a tokenizer that is not GPT-2's.
    """
    name = _name(parts, detokenized)
    require_gpt2_vocabulary(tokenizer, name)
    paths = paths or [_find(part, fetch, attempts) for part in parts]
    read = [read_questions(path, part) for path, part in zip(paths, parts, strict=True)]
    published = [
        is_published(web_file(part), path, len(found))
        for part, path, found in zip(parts, paths, read, strict=True)
    ]
    questions = [question for part in read for question in part[:limit]]
    require_examples(questions, paths[0])
    if detokenized:
        questions = [_detokenized(question) for question in questions]
    return Task(
        name=name,
        protocol=(
            f"CBT test, {' and '.join(PARTS[part] for part in parts)}, "
            f"text {'de-tokenised by our rules' if detokenized else 'as in the file'}; acc by the "
            "text from the blank on, acc_full by the mean loss of the whole"
        ),
        path=paths[0],
        published=all(published),
        examples=questions,
        requests=[_request(tokenizer, question) for question in questions],
        judge=_judge,
        summarize=_summarize,
        headline="acc",
    )


def _name(parts: Sequence[str], detokenized: bool) -> str:
    kinds = "" if tuple(parts) == ("CN", "NE") else "-" + "-".join(PARTS[part] for part in parts)
    return f"cbt{kinds}{'-detokenized' if detokenized else ''}".replace(" ", "-")


def read_questions(path: Path, part: str) -> list[Question]:
    """Read a file of questions: lines numbered from 1 to 21, and blank ones between questions.

    Raises UserError, naming file and line, when the numbers or the last line's fields are wrong.
    """
    questions, sentences = [], []
    for number, line in read_lines(path):
        due = len(sentences) + 1
        found, _, text = line.strip().partition(" ")
        if found != str(due):
            raise bad_line(path, number, f"should be sentence {due} of its question")
        if due <= SENTENCES:
            sentences.append(text.strip())
            continue
        try:
            questions.append(_question(part, sentences, text))
        except ValueError as error:
            raise bad_line(path, number, str(error)) from None
        sentences = []
    if sentences or not questions:
        raise UserError(f"{path} ends before its last question does; fetch the file again.")
    return questions


def _question(part: str, sentences: list[str], line: str) -> Question:
    """Return the question that a twenty-first line asks; raises ValueError if it asks none."""
    fields = [field.strip() for field in line.split("\t")]
    if len(fields) < 3:
        raise ValueError("should have a question, its answer and its candidates, tabs between them")
    text, answer, candidates = fields[0], fields[1], fields[-1].split("|")
    if BLANK not in text:
        raise ValueError(f"has no {BLANK} in its question")
    candidates = tuple(word.strip() for word in candidates if word.strip())
    label = _index(answer, candidates)
    if label is None:
        raise ValueError(f"has an answer, '{answer}', that is not among its candidates")
    before, after = text.split(BLANK, 1)
    context = " ".join([*filter(None, sentences), before])
    return Question(part, context, after, candidates, label)


def _index(answer: str, candidates: tuple[str, ...]) -> int | None:
    """Return where the answer is, if need be in other letters: some candidates are capitalised."""
    if answer in candidates:
        return candidates.index(answer)
    matches = (i for i, word in enumerate(candidates) if word.lower() == answer.lower())
    return next(matches, None)


def detokenize(text: str) -> str:
    """Return text with quotes, brackets, contractions and punctuation as people write them."""
    for pattern, replacement in DETOKENIZING:
        text = pattern.sub(replacement, text)
    return text


def _detokenized(question: Question) -> Question:
    # Together, since what stands before the blank and what follows it touch the candidate.
    text = detokenize(question.before + BLANK + question.after)
    before, after = text.split(BLANK, 1)
    return replace(question, before=before, after=after)


def _request(tokenizer: Tokenizer, question: Question) -> Request:
    return encode_request(tokenizer, question.before, question.endings(), scores_context=True)


def _judge(question: Question, scores: Scores) -> dict[str, Any]:
    whole = (scores.context_logprob + scores.logprobs) / (scores.context_tokens + scores.tokens)
    choices = {"": int(np.argmax(scores.logprobs)), "_full": int(np.argmax(whole))}
    answer = question.candidates[question.label]
    facts: dict[str, Any] = {"part": question.part, "label": question.label}
    for scoring, choice in choices.items():
        facts[f"choice{scoring}"] = choice
        facts[f"acc{scoring}"] = float(question.candidates[choice] == answer)
    return facts


def _summarize(facts: list[dict[str, Any]]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    parts = list(dict.fromkeys(fact["part"] for fact in facts))
    for scoring in ("acc", "acc_full"):
        for part in parts if len(parts) > 1 else ():
            right = [fact[scoring] for fact in facts if fact["part"] == part]
            metrics |= share(f"{part.lower()}_{scoring}", right)
        metrics |= share(scoring, [fact[scoring] for fact in facts])
    return metrics


def web_file(part: str) -> WebFile:
    """Return the file of a part's test questions, which is published in an archive."""
    name = f"cbtest_{part}_test_2500ex.txt"
    also = (f"cbt/CBTest/data/{name}",)
    return WebFile(f"cbt/{name}", ARCHIVE.address, rows=QUESTIONS, also=also)


def _find(part: str, fetch: bool, attempts: int | None) -> Path:
    """Return the path of a part's test questions, taken out of the archive if need be."""
    file = web_file(part)
    if path := search(file):
        return path
    return store(file, read_member(find(ARCHIVE, fetch, attempts), Path(file.path).name))
