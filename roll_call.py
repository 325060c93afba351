"""What processes tell each other before they train together: who is there, and with what.

torchrun keeps a store of keys and values that every process can reach, on every node and before any
device is touched. The store outlives its processes when they are restarted, so that what is found
in it may come from the dead: every call has a number of its own, and every answer a mark by which
whoever gave it knows it again.
"""

import contextlib
import datetime
import functools
import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from config import TrainConfig, UserError

T = TypeVar("T")
# A launcher gives processes 30 s to end before it kills them, and new ones import torch first.
RESTARTING = 60
POLL = 0.02
# How long a network file system may take to show what another node has written.
SIGHT = 60
MARK = "mark"
# This process among all that ever had its rank, and those it has heard of, by rank.
LIFE = uuid.uuid4().hex
_known: dict[int, str] = {}


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and how many there are, as torchrun says: 0 and 1 without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def ask(name: str, answer: Any, seconds: float = TrainConfig.timeout) -> list[Any]:
    """Return every process's answer, by rank; all have to ask for the same `name`.

    Answers are what JSON can hold. Raises UserError when a process does not answer for `seconds`,
    and the time that a restart takes; whoever was lost has perhaps to be missed by its peers first.
    """
    rank, size = rank_and_size()
    if size == 1:
        return [answer]
    return _call(_connect(), rank, size, name, answer, seconds + RESTARTING)[1]


def together(name: str, work: Callable[[], T], seconds: float = TrainConfig.timeout) -> T:
    """Do `work` on every process and return its result when none has failed.

    A mistake that one process meets, perhaps for want of a file that the others have, is raised as
    a UserError on all of them, so that none waits for one that is gone.
    """
    result, mistake, answers = _try(name, work, seconds)
    failed = [rank for rank, answer in enumerate(answers) if answer["mistake"]]
    if mistake and len(failed) == len(answers):
        raise mistake
    if failed:
        first = answers[failed[0]]
        raise UserError(
            f"Process {failed[0]}, on {first['host']}, cannot go on, though others can (all nodes "
            f"need the same files and the same command): {first['mistake']}"
        ) from mistake
    return result


def on_main(name: str, work: Callable[[], T], seconds: float = TrainConfig.timeout) -> T | None:
    """Do `work` on process 0 and return its result there, and None on the others, which wait.

    A mistake that it meets is a UserError on all.
    """
    is_main = rank_and_size()[0] == 0
    result, mistake, answers = _try(name, work if is_main else lambda: None, seconds)
    if mistake:
        raise mistake
    if answers[0]["mistake"]:
        raise UserError(answers[0]["mistake"])
    return result


def _try(
    name: str, work: Callable[[], T], seconds: float
) -> tuple[T | None, Exception | None, list[dict[str, str]]]:
    """Return this process's result or mistake, and every process's host and mistake, if any."""
    result, mistake = None, None
    try:
        result = work()
    except (UserError, OSError) as error:
        mistake = error
    mine = {"host": socket.gethostname(), "mistake": str(mistake or "")}
    return result, mistake, ask(name, mine, seconds)


def check_same(name: str, facts: dict[str, Any], seconds: float = TrainConfig.timeout) -> None:
    """Raise UserError, naming what differs, unless `facts` are the same on all processes."""
    if rank_and_size()[1] == 1:
        return
    mine = {"host": socket.gethostname(), "facts": json.loads(json.dumps(facts))}
    answers = ask(name, mine, seconds)
    wanted = answers[0]["facts"]
    for rank, answer in enumerate(answers):
        other = answer["facts"]
        keys = [*wanted, *(key for key in other if key not in wanted)]
        different = [key for key in keys if other.get(key) != wanted.get(key)]
        if different:
            shown = "; ".join(
                f"{key} {wanted.get(key)} and {other.get(key)}" for key in different[:5]
            )
            raise UserError(
                f"Process 0, on {answers[0]['host']}, and process {rank}, on {answer['host']}, "
                f"differ ({shown}); give every node the same command, and the same files."
            )


def see(path: Path, seconds: float) -> None:
    """Wait until `path`, which another node may just have written, is there; raises UserError."""
    deadline = time.monotonic() + min(seconds, SIGHT)
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{path}, which process 0 has, is not to be seen; the directory of runs must be "
                "one that all nodes share."
            )
        # A network file system may remember for half a minute that there was no such file; it asks
        # again when the directory is read.
        with contextlib.suppress(OSError):
            os.listdir(path.parent.parent)
            os.listdir(path.parent)
        time.sleep(POLL)


def fresh_store(seconds: float = TrainConfig.timeout) -> dist.Store:
    """Return a part of the store that holds nothing of earlier starts, the same on all processes.

    PyTorch's own keys keep their names when torchrun restarts processes, so that a new one could
    take the address of a dead one from there.
    """
    rank, size = rank_and_size()
    store = _connect()
    number, _ = _call(store, rank, size, "store", None, seconds + RESTARTING)
    return dist.PrefixStore(f"roll_call/{number}", store)


@functools.cache
def _connect() -> dist.Store:
    """Return torchrun's store, or one of process 0 where something else started the processes."""
    try:
        wait = datetime.timedelta(seconds=TrainConfig.timeout)
        store, _, _ = next(dist.rendezvous("env://", timeout=wait))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"Nobody answers at {where}, where the processes of this run should meet "
            f"({_first_line(error)}); see that the first node is up and its port open to the rest."
        ) from error
    store.set(f"roll_call/life/{rank_and_size()[0]}", LIFE)
    return store


def _call(
    store: dist.Store, rank: int, size: int, name: str, answer: Any, patience: float
) -> tuple[str, list[Any]]:
    """Return the number of a call, and all processes' answers to it."""
    name, deadline = f"roll_call/{name}", time.monotonic() + patience
    marked = {MARK: uuid.uuid4().hex, "life": LIFE, "answer": answer}
    try:
        if rank == 0:
            number, answers = _collect(store, size, name, marked, deadline)
        else:
            number, answers = _reply(store, rank, name, marked, deadline)
    except RuntimeError as error:
        raise UserError(
            f"The processes of this run lost each other at its start ({_first_line(error)}); "
            "what the first node printed may say why."
        ) from error
    missing = [str(other) for other in range(size) if answers[other] is None]
    if missing:
        raise UserError(
            f"Of {size} processes, number {', '.join(missing[:8])} did not come within "
            f"{patience:g} s; see that every node was started, and what it printed."
        )
    _known.update({other: answer["life"] for other, answer in enumerate(answers)})
    return number, [answer["answer"] for answer in answers]


def _collect(
    store: dist.Store, size: int, name: str, marked: dict[str, Any], deadline: float
) -> tuple[str, list[Any]]:
    """Call, as process 0: publish a new number, wait for the answers to it, publish those."""
    number = uuid.uuid4().hex
    store.set(name, number)
    answers: list[Any] = [marked] + [None] * (size - 1)
    for rank in range(1, size):
        key = f"{name}/{number}/{rank}"
        if _appears(store, key, deadline, rank):
            answers[rank] = json.loads(store.get(key))
    store.set(f"{name}/{number}/all", json.dumps(answers))
    return number, answers


def _reply(
    store: dist.Store, rank: int, name: str, marked: dict[str, Any], deadline: float
) -> tuple[str, list[Any]]:
    """Answer the call, as another process, until the answers that are published have this one's."""
    number = ""
    while time.monotonic() < deadline and _appears(store, name, deadline, 0):
        latest = store.get(name).decode()
        # Answers are published before process 0 can call again by the same name, so that they are
        # to be looked for once more before a new number is taken for a new start of process 0.
        if number and store.check([f"{name}/{number}/all"]):
            answers = json.loads(store.get(f"{name}/{number}/all"))
            if answers[rank] is not None and answers[rank][MARK] == marked[MARK]:
                return number, answers
        if latest != number:
            number = latest
            store.set(f"{name}/{number}/{rank}", json.dumps(marked))
        _check_same_life(store, 0)
        time.sleep(POLL)
    # Process 0 itself is missing.
    return number, [None] + [marked] * rank_and_size()[1]


def _appears(store: dist.Store, key: str, deadline: float, peer: int) -> bool:
    """Wait for a key that process `peer` is to set; returns whether it came in time."""
    # The store's own waiting prints warnings of its own when it is in vain.
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        _check_same_life(store, peer)
        time.sleep(POLL)
    return True


def _check_same_life(store: dist.Store, peer: int) -> None:
    """Raise UserError when a process that has answered before was started again since.

    It begins with the first call once more, and would never come to the present one.
    """
    key = f"roll_call/life/{peer}"
    if peer in _known and store.check([key]) and store.get(key).decode() != _known[peer]:
        raise UserError(
            f"Process {peer} died and was started again while this one waited for it, so that this "
            "one ends too; restarted together they go on."
        )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
