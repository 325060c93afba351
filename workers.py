"""Chunks to tokens, in this process or in several, always in the source's order.

    tokenized(chunks, first, workers, shortest, longest) -> number, Tokenized ...

What waits for its turn is bounded, so that memory stays flat however long the source is.
"""

import collections
import contextlib
import functools
import hashlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import FrameType
from typing import NamedTuple

import numpy as np

from chunks import Chunk
from config import UserError
from corpus.tokenizer import gpt2_tokenizer
from left_out import LeftOut, Unusable

# Bytes of text that may wait for their turn, however large the chunks and however many the workers.
AHEAD_BYTES = 256 << 20

# A worker's exit status after SIGTERM, and whether it has been asked to end.
ENDED = 128 + signal.SIGTERM
_ending = threading.Event()


class Tokenized(NamedTuple):
    """A chunk's documents: uint16 tokens, <|endoftext|> before each; a hash for each of those; and
    what was left out."""

    tokens: np.ndarray
    hashes: list[int]
    left_out: LeftOut


def tokenized(
    chunks: Iterable[Chunk],
    first: int,
    workers: int,
    shortest: int | None = None,
    longest: int | None = None,
) -> Iterator[tuple[int, Tokenized]]:
    """Yield the number and the tokens of each chunk from number `first` on, in their order.

    Raises UserError when a chunk cannot be read or a worker process dies. Closing the iterator ends
    the workers.
    """
    work = functools.partial(tokenize, shortest=shortest, longest=longest)
    left = ((number, chunk) for number, chunk in enumerate(chunks) if number >= first)
    if workers > 1:
        return _in_processes(left, work, workers)
    return ((number, work(chunk)) for number, chunk in left)


def tokenize(chunk: Chunk, shortest: int | None = None, longest: int | None = None) -> Tokenized:
    """Return a chunk's tokens; the pieces of a document that is cut up share its hash.

    A document of more than `longest` tokens, <|endoftext|> included, is cut into pieces of at most
    so many, and a document or piece of fewer than `shortest` is left out.
    """
    tokenizer = gpt2_tokenizer()
    mark = np.array([tokenizer.eot], dtype=np.uint16)
    pieces, hashes, left_out = [np.empty(0, dtype=np.uint16)], [], LeftOut()
    for text in chunk.texts():
        if isinstance(text, Unusable):
            left_out.add(text.kind, text.name)
            continue
        if not text:
            left_out.add("empty")
            continue
        body, digest = tokenizer.encode(text), _hash(text)
        step = longest - 1 if longest is not None else len(body)
        for start in range(0, len(body), step):
            piece = body[start : start + step]
            if shortest is not None and 1 + len(piece) < shortest:
                left_out.add("short")
                continue
            pieces += [mark, piece]
            hashes.append(digest)
    return Tokenized(np.concatenate(pieces), hashes, left_out)


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _in_processes(
    chunks: Iterator[tuple[int, Chunk]], work: Callable[[Chunk], Tokenized], workers: int
) -> Iterator[tuple[int, Tokenized]]:
    pool = _start_pool(workers)
    waiting, ahead = collections.deque(), 0
    try:
        for number, chunk in chunks:
            # Two chunks a worker keep all of them busy.
            while waiting and (len(waiting) > 2 * workers or ahead + chunk.size > AHEAD_BYTES):
                done, size, future = waiting.popleft()
                ahead -= size
                yield done, future.result()
            waiting.append((number, chunk.size, pool.submit(_worked, work, chunk)))
            ahead += chunk.size
        while waiting:
            done, _, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "A worker process died, perhaps because memory ran out; run the same command again to "
            "continue, with fewer --workers if it dies again."
        ) from error
    finally:
        # Only the chunks in hand are waited for. A worker that is ended while it sends its tokens
        # would leave the pool waiting for the rest of them for ever.
        pool.shutdown(wait=True, cancel_futures=True)


def _start_pool(workers: int) -> ProcessPoolExecutor:
    """Start worker processes afresh, since a forked copy of a threaded process may hang."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    # Ctrl-C reaches the workers too, even before they can say that it is not for them; they inherit
    # that from here. A process is started for each call that finds none idle.
    with _ignoring_interrupts():
        for _ in range(workers):
            pool.submit(int)
    return pool


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _worked(work: Callable[[Chunk], Tokenized], chunk: Chunk) -> Tokenized:
    """Return what a worker makes of a chunk, unless it was asked to end meanwhile."""
    found = work(chunk)
    if _ending.is_set():
        os._exit(ENDED)
    return found


def _end_soon(number: int, frame: FrameType | None) -> None:
    """End this worker, but not while it sends its tokens: the pool would wait for their rest.

    Whatever it sends now has gone in a second, and nothing more is sent.
    """
    _ending.set()
    timer = threading.Timer(1.0, os._exit, [ENDED])
    timer.daemon = True
    timer.start()


def _begin_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_soon)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker whose parent was killed would otherwise wait for work for ever.
    multiprocessing.parent_process().join()
    os._exit(1)


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
