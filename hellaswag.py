"""HellaSwag: which of four endings goes on with the text? (Zellers et al. 2019, arXiv:1905.07830)

Two protocols, whose numbers cannot be compared:

    hellaswag            the text as it is; acc_norm by mean log-probability of a token
    hellaswag-cleaned    lm-evaluation-harness's text; acc_norm by log-probability a character

The first is that of reproductions of GPT-2 (build-nanogpt, llm.c). In both, acc is by the ending's
whole log-probability. Labels of the test split are not published: it has choices, but no scores.
"""

import re
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
    require_examples,
    require_gpt2_vocabulary,
)
from corpus.tokenizer import Tokenizer
from likelihood import Scores, share

ENDINGS = 4


# Rows, bytes and sha256.
PUBLISHED = {
    "train": (
        39_905,
        47_496_131,
        "dae5e69249868cb9fe4e23ff925c60b66169564cfb7072d793cd7356a2b69f8d",
    ),
    "val": (
        10_042,
        12_246_618,
        "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588",
    ),
    "test": (
        10_003,
        11_752_147,
        "da082b00543e422b8d25394614d102944586986def4de5cd1bd36d86bcb76261",
    ),
}
ADDRESS = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/"
FILES = {
    split: WebFile(
        path=f"hellaswag/hellaswag_{split}.jsonl",
        address=f"{ADDRESS}hellaswag_{split}.jsonl",
        size=size,
        sha256=sha256,
        rows=rows,
    )
    for split, (rows, size, sha256) in PUBLISHED.items()
}


@dataclass(frozen=True)
class Example:
    context: str
    # Four, without the space between context and ending.
    endings: tuple[str, ...]
    # The right one's place, where it is known.
    label: int | None


def task(
    tokenizer: Tokenizer,
    split: str = "val",
    cleaned: bool = False,
    limit: int | None = None,
    fetch: bool = True,
    attempts: int | None = None,
    path: Path | None = None,
) -> Task:
    """Return the first `limit` examples of a split (train, val or test), by default all of them.

    `path` is a file to read in place of the published one. Raises UserError when there is no file,
    for a line that is not an example, and for a tokenizer that is not GPT-2's.
    """
    name = "hellaswag-cleaned" if cleaned else "hellaswag"
    name += "" if split == "val" else f"-{split}"
    require_gpt2_vocabulary(tokenizer, name)
    path = path or find(FILES[split], fetch, attempts)
    published = is_published(FILES[split], path, count_rows(path))
    examples, requests, in_parts = [], [], True
    for number, row in islice(read_json_lines(path), limit):
        _check(path, number, row, cleaned, labelled=split != "test")
        example = _cleaned(row) if cleaned else _raw(row)
        endings = [f" {ending}" for ending in example.endings]
        requests.append(encode_line(tokenizer, path, number, example.context, endings))
        examples.append(example)
        in_parts = in_parts and _in_parts(row)
    require_examples(examples, path)
    return Task(
        name=name,
        protocol=_protocol(cleaned, published, in_parts),
        path=path,
        published=published,
        examples=examples,
        requests=requests,
        judge=judge_by_character if cleaned else judge_by_token,
        summarize=summarize,
        headline="acc_norm",
    )


def clean(text: str) -> str:
    """Return text without WikiHow's markup, as lm-evaluation-harness removes it."""
    text = text.strip().replace(" [title]", ". ")
    text = re.sub(r"\[.*?\]", "", text)
    return text.replace("  ", " ")


def judge_by_token(example: Example, scores: Scores) -> dict[str, Any]:
    """Return one example's choices, acc_norm's by the mean log-probability of a token."""
    return _facts(example.label, scores.logprobs, scores.logprobs / scores.tokens)


def judge_by_character(example: Example, scores: Scores) -> dict[str, Any]:
    """Return one example's choices, acc_norm's by log-probability over characters of the ending."""
    lengths = np.array([len(ending) for ending in example.endings])
    return _facts(example.label, scores.logprobs, scores.logprobs / lengths)


def _facts(label: int | None, sums: np.ndarray, means: np.ndarray) -> dict[str, Any]:
    # Of equal values argmax takes the first.
    facts = {"choice": int(np.argmax(sums)), "choice_norm": int(np.argmax(means))}
    if label is None:
        return facts
    right = {
        "acc": float(facts["choice"] == label),
        "acc_norm": float(facts["choice_norm"] == label),
    }
    return {**facts, "label": label, **right}


def summarize(facts: list[dict[str, Any]]) -> dict[str, float]:
    """Return acc and acc_norm with standard errors; nothing where labels are not known."""
    if any("acc" not in fact for fact in facts):
        return {}
    return {
        **share("acc", [fact["acc"] for fact in facts]),
        **share("acc_norm", [fact["acc_norm"] for fact in facts]),
    }


def _check(path: Path, number: int, row: dict[str, Any], cleaned: bool, labelled: bool) -> None:
    """Raise UserError, naming the line, unless a row is an example."""
    for key in ("ctx", "activity_label") if cleaned else ("ctx",):
        if not isinstance(row.get(key), str):
            raise bad_line(path, number, f'has no text "{key}"')
    endings = row.get("endings")
    if not isinstance(endings, list) or [type(ending) for ending in endings] != [str] * ENDINGS:
        raise bad_line(path, number, f'has no "endings", a list of {ENDINGS} texts')
    for place, ending in enumerate(endings):
        if not (clean(ending) if cleaned else ending).strip():
            raise bad_line(path, number, f"has an empty ending (number {place}, from 0)")
    label = row.get("label")
    if label in (None, ""):
        if labelled:
            raise bad_line(path, number, 'has no "label"')
    elif _label(label) is None:
        raise bad_line(path, number, f"has the label {label!r}, which is not one of 0 to 3")


def _label(value: Any) -> int | None:
    """Return a label, which some sources write as text, or None if it is none."""
    if type(value) is int and 0 <= value < ENDINGS:
        return value
    return int(value) if isinstance(value, str) and value in ("0", "1", "2", "3") else None


def _raw(row: dict[str, Any]) -> Example:
    return Example(row["ctx"], tuple(row["endings"]), _label(row.get("label")))


def _cleaned(row: dict[str, Any]) -> Example:
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}" if _in_parts(row) else row["ctx"]
    return Example(
        clean(f"{row['activity_label']}: {context}"),
        tuple(clean(ending) for ending in row["endings"]),
        _label(row.get("label")),
    )


def _in_parts(row: dict[str, Any]) -> bool:
    """Say whether a context is there in its two parts, of which the second is a sentence begun."""
    return isinstance(row.get("ctx_a"), str) and isinstance(row.get("ctx_b"), str)


def _protocol(cleaned: bool, published: bool, in_parts: bool) -> str:
    text, unit = ("text cleaned as in lm-eval", "character") if cleaned else ("raw text", "token")
    if cleaned and not in_parts:
        # Then the sentence that an ending goes on with is not capitalised.
        text += " but with ctx as it is, since ctx_a and ctx_b are missing"
    if not published:
        text += ", of another file than the published one"
    return f"{text}; acc_norm by log-probability per {unit}"
