"""Requests -> rows of one fixed length -> batches, so that little is computed twice or for nothing.

    plan(requests, max_length, batch_tokens) -> Plan(batches)

A request becomes a tree laid out in a row: its context once, then its endings one after another,
each of which sees the context and itself but not the others. Several trees share a row. Examples
of very different lengths so fill rows of one length to more than 99 percent, and a compiled model
meets one or two shapes in a whole benchmark. Where any shape will do, rows are about as long as
their trees, which saves attention. What each token may see is told by two numbers:

    tree     which request it belongs to; 0 is padding
    branch   0 for a context, 1, 2, ... for its endings

All ranks make the same plan, and whole batches are what they share out: a batch is computed alike
wherever it is computed.
"""

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from config import UserError
from likelihood import Request, loses_context, windows

# Row lengths are multiples of this where shapes are to be few, and of that elsewhere.
STEP, FINE_STEP = 128, 16
# Attention over rows of this length takes about as long as all the rest of GPT-2 (124M).
COSTLY_LENGTH = 1200


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass, and which of their states predict which tokens."""

    tokens: np.ndarray  # int64 (B, L)
    positions: np.ndarray  # int64 (B, L): the place of each token in its own text
    tree: np.ndarray  # int64 (B, L)
    branch: np.ndarray  # int64 (B, L)
    # Whether every row is one text from its start on, which plain causal attention suits.
    causal: bool
    # States to project onto the vocabulary, as places in the flattened (B * L,), ascending.
    states: np.ndarray
    # A prediction is a state (by its index in `states`), its target, and where its score is added.
    predicts: np.ndarray
    targets: np.ndarray
    slots: np.ndarray
    # Which predictions are the first of an ending.
    begins: np.ndarray
    # The request of each tree in it; one that did not fit into a tree is there several times.
    requests: list[int]


@dataclass(frozen=True)
class Plan:
    """The batches of a list of requests, and how their scores are laid out.

    Slots are numbered through all requests: the endings of one, then its context.
    """

    batches: list[Batch]
    first_slots: np.ndarray  # int64 (requests + 1,)

    @property
    def tokens(self) -> int:
        """Tokens that the model reads, padding included."""
        return sum(batch.tokens.size for batch in self.batches)


@dataclass(frozen=True)
class _Tree:
    """One context and the branches after it; `slots` says where each branch's score belongs."""

    context: np.ndarray
    branches: tuple[np.ndarray, ...]
    slots: tuple[int, ...]
    request: int
    context_slot: int | None = None
    # Branches that go on with an ending whose beginning was scored in an earlier window.
    continues: bool = False

    @property
    def length(self) -> int:
        """Tokens that have to be read: nothing follows the last one of a branch."""
        return len(self.context) + sum(len(branch) - 1 for branch in self.branches)


def plan(
    requests: Sequence[Request],
    max_length: int,
    batch_tokens: int,
    vocab_size: int,
    few_shapes: bool = True,
) -> Plan:
    """Lay out requests for a model that reads at most `max_length` tokens.

    A batch has about `batch_tokens` tokens, at least one row; with `few_shapes` there are at most
    two shapes. Raises UserError when a token is not in the model's vocabulary.
    """
    sizes = [len(request.endings) + 1 for request in requests]
    first_slots = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    trees = []
    for number, request in enumerate(requests):
        _check_vocabulary(request, vocab_size)
        trees += _trees(number, request, int(first_slots[number]), max_length)
    rows = pack([tree.length for tree in trees], few_shapes)
    batches = []
    for length in sorted({length for length, _ in rows}, reverse=True):
        alike = [[trees[i] for i in inside] for size, inside in rows if size == length]
        # As few batches as the limit allows, all of one shape, with few rows to fill up the last.
        number = -(-len(alike) // max(batch_tokens // length, 1))
        count = -(-len(alike) // number)
        for start in range(0, len(alike), count):
            batches.append(_lay_out(alike[start : start + count], count, length))
    return Plan(batches, first_slots)


def _check_vocabulary(request: Request, vocab_size: int) -> None:
    highest = max(int(part.max()) for part in (request.context, *request.endings))
    if highest >= vocab_size:
        raise UserError(
            f"The model has {vocab_size} token ids and the text needs id {highest}: its vocabulary "
            "does not fit this benchmark."
        )


def _trees(number: int, request: Request, first_slot: int, max_length: int) -> list[_Tree]:
    """Return the trees of one request: one, or a chain for every window where it does not fit."""
    context, endings = request.context, request.endings
    slots = tuple(range(first_slot, first_slot + len(endings)))
    context_slot = first_slot + len(endings) if request.scores_context else None
    if not loses_context(request, max_length):
        return [_Tree(context, endings, slots, number, context_slot)]
    chains = []
    for ending, slot in zip(endings, slots, strict=True):
        chains += _chains(number, np.concatenate((context, ending)), len(context), slot, max_length)
    if context_slot is not None:
        chains += _chains(number, context, 1, context_slot, max_length)
    return chains


def _chains(number: int, text: np.ndarray, first: int, slot: int, max_length: int) -> list[_Tree]:
    return [
        _Tree(text[start:scored], (text[scored:stop],), (slot,), number, continues=scored > first)
        for start, scored, stop in windows(len(text), first, max_length)
    ]


def pack(lengths: Sequence[int], few_shapes: bool = True) -> list[tuple[int, list[int]]]:
    """Return rows as (row length, indices of what lies in it), at the least estimated cost.

    With `few_shapes` there are at most two row lengths: one that suits most, and that of what is
    longer.
    """
    if not lengths:
        return []
    if not few_shapes:
        return _fill(lengths, lambda length: _round_up(length, FINE_STEP))
    shortest, longest = _round_up(min(lengths), STEP), _round_up(max(lengths), STEP)
    packings = [
        _fill(lengths, lambda length, usual=usual: usual if length <= usual else longest)
        for usual in range(shortest, longest + 1, STEP)
    ]
    return min(packings, key=lambda rows: sum(n * (1 + n / COSTLY_LENGTH) for n, _ in rows))


def _round_up(length: int, step: int) -> int:
    return -(-length // step) * step


def _fill(lengths: Sequence[int], row_length: Callable[[int], int]) -> list[tuple[int, list[int]]]:
    """Fill rows from the longest down, each where it leaves the least room (best fit).

    `row_length` is how long a row to begin with something of a given length is to be.
    """
    rows: list[tuple[int, list[int]]] = []
    room: list[tuple[int, int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(room, (lengths[i], -1))
        if place == len(room):
            rows.append((row_length(lengths[i]), []))
            left, row = rows[-1][0], len(rows) - 1
        else:
            left, row = room.pop(place)
        rows[row][1].append(i)
        bisect.insort(room, (left - lengths[i], row))
    return rows


def _lay_out(rows: list[list[_Tree]], count: int, length: int) -> Batch:
    """Return the batch of `count` rows, of which those past the given ones are padding."""
    tokens, positions, trees, branches = np.zeros((4, count, length), dtype=np.int64)
    parts: list[tuple[np.ndarray, ...]] = []
    for i, row in enumerate(rows):
        end = 0
        for j, tree in enumerate(row):
            start, end = end, end + tree.length
            here = slice(start, end)
            texts = [tree.context, *(branch[:-1] for branch in tree.branches)]
            tokens[i, here] = np.concatenate(texts)
            trees[i, here] = j + 1
            branches[i, here] = np.repeat(np.arange(len(texts)), list(map(len, texts)))
            after = len(tree.context)
            starts = [0, *[after] * len(tree.branches)]
            positions[i, here] = np.concatenate(
                [
                    np.arange(first, first + len(text))
                    for first, text in zip(starts, texts, strict=True)
                ]
            )
            parts += _predictions(tree, i * length + start)
    places, targets, slots, begins = (np.concatenate(part) for part in zip(*parts, strict=True))
    states, predicts = np.unique(places, return_inverse=True)
    order = np.argsort(predicts, kind="stable")
    causal = all(len(row) == 1 and len(row[0].branches) == 1 for row in rows)
    return Batch(
        *(tokens, positions, trees, branches, causal, states),
        *(part[order] for part in (predicts, targets, slots, begins)),
        requests=[tree.request for row in rows for tree in row],
    )


def _predictions(tree: _Tree, start: int) -> list[tuple[np.ndarray, ...]]:
    """Return (places, targets, slots, begins) of what is scored of a tree that lies at `start`."""
    context, parts = tree.context, []
    if tree.context_slot is not None:
        count = len(context) - 1
        slots = np.full(count, tree.context_slot)
        parts.append((np.arange(start, start + count), context[1:], slots, np.zeros(count, bool)))
    last, at = start + len(context) - 1, start + len(context)
    for branch, slot in zip(tree.branches, tree.slots, strict=True):
        # The context's last token predicts the first of every branch.
        places = np.concatenate(([last], np.arange(at, at + len(branch) - 1)))
        begins = np.zeros(len(branch), bool)
        begins[0] = not tree.continues
        parts.append((places, branch, np.full(len(branch), slot), begins))
        at += len(branch) - 1
    return parts
