"""How the processes of a run meet, and how all of them end soon after one has failed.

The launcher's store of keys and values, which every process can reach, serves both.
"""

import contextlib
import datetime
import errno
import json
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist

from config import UserError
from utils import SURROUNDINGS, printable

LOST = (
    "Another process of this run died, or did not answer for {seconds:g} s, so this one ends too "
    "({reason}); the newest checkpoint is where --resume continues."
)
UNREACHABLE = (
    "Nobody answers at {where}, where the processes of this run should meet ({reason}); see that "
    "the first node is up and its port open to the rest."
)
UNCONNECTED = (
    "The processes of this run cannot connect to each other ({reason}); where nodes have several "
    "networks, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME in front of the command name the one "
    "between them."
)
# The store's key for the first failure of any rank.
FAILED = "failed"
# Seconds: a rank that fails is noticed after POLL at most, ends the others GRACE later so that what
# they have to say themselves is heard, and waits no longer than PATIENCE for store and terminal.
POLL, GRACE, PATIENCE = 1.0, 2.0, 4.0
# A launcher gives processes 30 s to end before it kills them, and new ones import torch first.
RESTART = 60.0


def env_number(name: str, default: int) -> int:
    """Return a number that torchrun puts into the environment."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"The environment says {name}={value}, which torchrun sets to a number.")
    return int(value)


def fresh_store(rank: int, world_size: int, timeout: float) -> dist.Store:
    """Return a part of the launcher's store that is new, and the same on all ranks.

    The store outlives its processes when torchrun restarts them, and a new process must not take
    the address of a dead one from it. Rank 0 publishes a new name, the others answer under it, each
    with a mark of its own, and go on when rank 0 lists that mark: what was left there by a dead
    rank 0, or meant for a dead process of the same rank, does not hold it.
    """
    wait = datetime.timedelta(seconds=timeout)
    try:
        store, _, _ = next(dist.rendezvous("env://", timeout=wait))
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise UserError(UNREACHABLE.format(where=where, reason=first_line(error))) from error
    store.set_timeout(wait)
    start, mark, others = uuid.uuid4().hex, uuid.uuid4().hex, range(1, world_size)
    deadline = time.monotonic() + timeout + RESTART

    def is_listed() -> bool:
        nonlocal start
        if not store.check(["start"]):
            return False
        start = store.get("start").decode()
        store.set(f"{start}/{rank}", mark)
        return store.check([f"{start}/go"]) and mark in store.get(f"{start}/go").decode()

    if rank == 0:
        store.set("start", start)
        for other in others:
            _wait(lambda key=f"{start}/{other}": store.check([key]), other, world_size, deadline)
        store.set(f"{start}/go", " ".join(store.get(f"{start}/{r}").decode() for r in others))
    else:
        _wait(is_listed, 0, world_size, deadline)
    return dist.PrefixStore(start, store)


def _wait(condition: Callable[[], bool], other: int, world_size: int, deadline: float) -> None:
    """Poll until `condition` holds; UserError when process `other` has not come by the deadline."""
    next_line = time.monotonic() + 10
    while not condition():
        now = time.monotonic()
        if now > deadline:
            raise UserError(
                f"Process {other} of {world_size}, counted from 0, did not come in time; see that "
                "every node was started, and what it printed."
            )
        if now > next_line and os.environ.get("LOCAL_RANK", "0") == "0":
            line = f"waiting for process {other} of {world_size}, counted from 0"
            print(line, file=sys.stderr, flush=True)
            next_line = now + 10
        time.sleep(0.02)


def connect(store: dist.Store, rank: int, world_size: int, timeout: float) -> None:
    """Make the process group: gloo for CPU tensors and, where there is CUDA, NCCL for the rest."""
    has_nccl = torch.cuda.is_available() and dist.is_nccl_available()
    backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
    wait = datetime.timedelta(seconds=timeout)
    try:
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=wait
        )
    except RuntimeError as error:
        raise UserError(UNCONNECTED.format(reason=first_line(error))) from error


def end_all_ranks(
    error: BaseException, rank: int, store: dist.Store | None, timeout: float
) -> NoReturn:
    """Say what went wrong, unless another rank has, tell the others, and end without waiting."""
    _exit_after(PATIENCE)
    status, sentence = 1, str(error) or type(error).__name__
    # Gloo tells a lost peer by nothing but its own name in the message.
    is_gloo = isinstance(error, RuntimeError) and "gloo" in sentence
    is_lost = is_gloo or isinstance(error, dist.DistError)
    is_known = is_lost or isinstance(error, UserError)
    if is_lost:
        sentence = LOST.format(seconds=timeout, reason=first_line(error))
    elif isinstance(error, OSError) and errno.errorcode.get(error.errno) in SURROUNDINGS:
        sentence, is_known = f"{error.filename or 'A file'}: {error.strerror}.", True
    elif isinstance(error, KeyboardInterrupt):
        status, sentence, is_known = 130, "interrupted", True
    elif isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 1
        # What an argument parser had to say is on the screen.
        sentence, is_known = "" if isinstance(error.code, int) else sentence, True
    mine = json.dumps({"rank": rank, "node": _node(), "sentence": sentence})
    first = mine
    with contextlib.suppress(Exception):
        # Sets the key where there is none, and returns what is there now.
        first = store.compare_set(FAILED, "", mine).decode()
    failure = json.loads(first)
    if first == mine or not (is_lost or failure["sentence"] == sentence):
        if sentence:
            _print_error(f"error: {printable(sentence)}" if is_known else traceback.format_exc())
    else:
        _print_failure(failure)
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os._exit(status)


def start_watching(store: dist.Store, timeout: float) -> Callable[[], None]:
    """End this process soon after another rank has failed, wherever it waits meanwhile.

    That is a thread's work; returns a function that stops it.
    """
    # Blocking in one client of the store would hold up the other.
    finished, store = threading.Event(), store.clone()

    def watch() -> None:
        while not finished.wait(POLL):
            try:
                failure = json.loads(store.get(FAILED)) if store.check([FAILED]) else None
            except Exception as error:
                # The store's process died; where it ended well, `finished` is set any moment now.
                sentence = LOST.format(seconds=timeout, reason=first_line(error))
                failure = {"rank": 0, "node": "", "sentence": sentence}
            if failure and not finished.wait(GRACE):
                _exit_after(PATIENCE)
                _print_failure(failure)
                os._exit(1)

    def stop() -> None:
        finished.set()
        thread.join()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return stop


def _exit_after(seconds: float) -> None:
    """End this process in any case: a dead store or a pipe that nobody reads must not hold it."""
    timer = threading.Timer(seconds, os._exit, [1])
    timer.daemon = True
    timer.start()


def _print_failure(failure: dict) -> None:
    """Print another rank's sentence, once on each node but its own."""
    if env_number("LOCAL_RANK", 0) == 0 and failure["node"] != _node() and failure["sentence"]:
        sentence = printable(failure["sentence"])
        _print_error(f"error: process {failure['rank']} ended the run: {sentence}")


def _print_error(text: str) -> None:
    with contextlib.suppress(Exception):
        print(text.rstrip("\n"), file=sys.stderr, flush=True)


def _node() -> str:
    """Return a name of this node; torchrun numbers nodes by GROUP_RANK."""
    return f"{socket.gethostname()} {os.environ.get('GROUP_RANK', '')}"


def first_line(error: BaseException) -> str:
    """Return what an exception says, without the advice that gloo adds."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    return line.partition(". This is typically")[0]
