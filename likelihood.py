"""What is asked of a model, and what it answers: how probable are these endings after this context?

    Request(context, endings) -> Scores(logprobs, tokens, greedy)

Every benchmark is written in these terms. A text by itself is the ending of <|endoftext|>.

What does not fit the model's context is scored by one rule (`windows`): every token of an ending is
predicted exactly once, and each from as many tokens before it as its window holds. A long context
so loses its beginning, and a long ending is read in pieces; both as in lm-evaluation-harness.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from config import UserError
from corpus.tokenizer import Tokenizer


@dataclass(frozen=True)
class Request:
    """Token ids, int64, of a context (at least one) and of endings (each at least one)."""

    context: np.ndarray
    endings: tuple[np.ndarray, ...]
    # Whether the context's own tokens after its first are to be scored too.
    scores_context: bool = False


@dataclass(frozen=True)
class Scores:
    """What a model says to one request; the arrays have one value an ending."""

    # Nats: the sum of log p(token | what is before it) over the ending's tokens, float64.
    logprobs: np.ndarray
    # How many tokens that sum is over, int64.
    tokens: np.ndarray
    # Whether each of them was the likeliest, bool.
    greedy: np.ndarray
    # The same, if an ending cannot begin with one of the ids the task excludes.
    greedy_filtered: np.ndarray
    # Of the context's tokens after its first, where the request asks for it.
    context_logprob: float = 0.0
    context_tokens: int = 0


def encode_request(
    tokenizer: Tokenizer, context: str, endings: Sequence[str], scores_context: bool = False
) -> Request:
    """Return the request for endings that directly follow a context, as text.

    As lm-evaluation-harness does: whitespace at the end of the context belongs to the ending, and
    an ending's tokens are those of the two together, less as many as the context has by itself. An
    empty context is <|endoftext|>. Raises UserError when an ending has no tokens.
    """
    stripped = context.rstrip()
    space, context = context[len(stripped) :], stripped
    before = tokenizer.encode(context).astype(np.int64)
    after = [
        tokenizer.encode(context + space + ending).astype(np.int64)[len(before) :]
        for ending in endings
    ]
    for ending, tokens in zip(endings, after, strict=True):
        if not len(tokens) or not ending.strip():
            raise UserError(
                f"an ending is empty, or no token of its own, after the context '{context[-40:]}'"
            )
    if not len(before):
        before = np.array([tokenizer.eot])
    return Request(before, tuple(after), scores_context)


def text_request(tokenizer: Tokenizer, text: str) -> Request:
    """Return the request for a whole text after <|endoftext|>; raises UserError if it is empty."""
    tokens = tokenizer.encode(text).astype(np.int64)
    if not len(tokens):
        raise UserError("a text is empty")
    return Request(np.array([tokenizer.eot]), (tokens,))


def windows(length: int, first: int, max_length: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, first, stop): tokens[start : stop - 1] are read to predict tokens[first:stop].

    The tokens from `first` on, of `length` in all, are predicted once each; a window reads at most
    `max_length`, and as many as that wherever there are.
    """
    while first < length:
        stop = min(first + max_length, length)
        yield max(0, stop - 1 - max_length), first, stop
        first = stop


def loses_context(request: Request, max_length: int) -> bool:
    """Say whether some of the context is out of sight of some of an ending's tokens."""
    return len(request.context) + max(map(len, request.endings)) - 1 > max_length


def ratio_with_error(
    numerators: Sequence[float], weights: Sequence[float] | None = None
) -> tuple[float, float]:
    """Return sum(numerators) / sum(weights) and its standard error; weights are 1 by default.

    With weights 1 they are the mean and the sample's standard deviation over root n; otherwise the
    error is that of a ratio estimator, to first order (Cochran 1977, section 6.3).
    """
    x = np.asarray(numerators, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    ratio, count = x.sum() / w.sum(), len(x)
    if count < 2:
        return float(ratio), 0.0
    squares = ((x - ratio * w) ** 2).sum()
    return float(ratio), math.sqrt(count / (count - 1) * squares) / float(w.sum())


def share(name: str, right: Sequence[float]) -> dict[str, float]:
    """Return `{name: share of right answers, name_stderr: its standard error}`."""
    value, error = ratio_with_error(right)
    return {name: value, f"{name}_stderr": error}


def perplexity(
    name: str, nats: Sequence[float], weights: Sequence[float] | None = None
) -> dict[str, float]:
    """Return `{name: exp(nats per weight), name_stderr: its standard error to first order}`."""
    value, error = ratio_with_error(nats, weights)
    # A model that has diverged has a perplexity past all numbers.
    value = math.exp(value) if value < 700 else math.inf
    return {name: value, f"{name}_stderr": value * error}
