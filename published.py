"""What others report for OpenAI's models, by whose measurement and which protocol; none is ours."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A published value, a share of right answers in percent, and where it comes from."""

    value: float
    source: str


PAPER = "Radford et al. 2019"
# The same protocol as ours, by the name of the task, unless it says otherwise.
SAME = "lm-evaluation-harness, same protocol"
REPRODUCTION = "a reproduction's code, full-sequence loss"

_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def _by_size(source: str, *values: float | None) -> dict[str, Figure]:
    pairs = zip(_MODELS, values, strict=True)
    return {model: Figure(value, source) for model, value in pairs if value is not None}


_FIGURES: dict[tuple[str, str], list[dict[str, Figure]]] = {
    ("hellaswag", "acc_norm"): [
        _by_size("reproductions of GPT-2, same protocol: 29.4 to 29.55", 29.55, None, None, None)
    ],
    ("hellaswag-cleaned", "acc"): [_by_size(SAME, 28.9, None, None, None)],
    ("hellaswag-cleaned", "acc_norm"): [_by_size(SAME, 31.1, None, None, None)],
    ("lambada", "acc"): [
        _by_size(SAME, 32.56, None, None, None),
        _by_size(f"{PAPER}, section 3.3, without its filter", None, None, None, 52.66),
    ],
    ("lambada", "acc_no_stop_words"): [
        _by_size(f"{PAPER}, table 3, its own text and filter", 45.99, 55.48, 60.12, 63.24)
    ],
    ("lambada", "perplexity"): [
        _by_size(SAME, 40.06, None, None, None),
        _by_size(f"{PAPER}, table 3, its own text", 35.13, 15.60, 10.87, 8.63),
    ],
    ("cbt", "cn_acc"): [
        _by_size(f"{PAPER}, table 3, de-tokenised", 87.65, 92.35, 93.45, 93.30),
    ],
    ("cbt", "ne_acc"): [
        _by_size(f"{PAPER}, table 3, de-tokenised", 83.4, 87.1, 88.0, 89.05),
    ],
    ("cbt", "ne_acc_full"): [_by_size(REPRODUCTION, 59.33, 67.11, 68.95, 72.32)],
    ("wikitext", "word_perplexity"): [
        _by_size(SAME, 37.37, None, None, None),
        _by_size(f"{PAPER}, table 3, WikiText-103", 37.50, 26.37, 22.05, 17.48),
    ],
    ("wikitext", "token_perplexity"): [
        _by_size(f"{PAPER}, table 3, WikiText-2, its own text", 29.41, 22.76, 19.93, 18.34)
    ],
}


def published(model: str, task: str, metric: str) -> list[Figure]:
    """Return what is reported for a model of OpenAI's, by its name; [] where nothing is known."""
    reports = _FIGURES.get((task, metric), [])
    return [report[model] for report in reports if model in report]
