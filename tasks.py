"""Every benchmark by name.

    open_task("hellaswag", tokenizer) -> Task

A name stands for one text and one way to score it, so two numbers under one name can be compared.
"""

from collections.abc import Callable
from functools import partial

import cbt
import hellaswag
import lambada
import wikitext
from benchmark import Task
from corpus.tokenizer import Tokenizer
from utils import check_name

TASKS: dict[str, Callable[..., Task]] = {
    # Raw text, as in reproductions of GPT-2: acc_norm is by the mean log-probability of a token.
    "hellaswag": hellaswag.task,
    "hellaswag-train": partial(hellaswag.task, split="train"),
    "hellaswag-test": partial(hellaswag.task, split="test"),
    # lm-evaluation-harness's: cleaned text, and acc_norm by the log-probability of a character.
    "hellaswag-cleaned": partial(hellaswag.task, cleaned=True),
    # OpenAI's text, and that of LAMBADA's authors.
    "lambada": lambada.task,
    "lambada-standard": partial(lambada.task, standard=True),
    # Common nouns and named entities; each by two scorings.
    "cbt": cbt.task,
    "cbt-detokenized": partial(cbt.task, detokenized=True),
    "cbt-verbs": partial(cbt.task, parts=("V",)),
    "cbt-prepositions": partial(cbt.task, parts=("P",)),
    "wikitext": wikitext.task,
    "wikitext-valid": partial(wikitext.task, split="valid"),
    "wikitext-103": partial(wikitext.task, large=True),
    "wikitext-103-valid": partial(wikitext.task, split="valid", large=True),
}


def open_task(
    name: str,
    tokenizer: Tokenizer,
    limit: int | None = None,
    fetch: bool = True,
    attempts: int | None = None,
) -> Task:
    """Return a benchmark's examples, tokenised, the first `limit` of them where that is given.

    Its file is fetched, in `attempts` attempts, if it is not here and `fetch` is set. Raises
    UserError for an unknown name, for a file that cannot be had or is damaged, and for a
    tokenizer that is not GPT-2's.
    """
    check_name(name, TASKS, "benchmark")
    return TASKS[name](tokenizer, limit=limit, fetch=fetch, attempts=attempts)
