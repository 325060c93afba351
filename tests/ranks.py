"""Ranks of a run as forks of this process: nothing is imported again, so they start at once."""

import dataclasses
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist


@dataclasses.dataclass
class Rank:
    """How a rank ended, and what it had said."""

    status: int
    output: str
    errors: str


def run_ranks(
    directory: Path, function: Callable[[], None], processes: int = 2, seconds: float = 240
) -> list[Rank]:
    """Call `function` on each rank, in `directory`, as torchrun would on one machine.

    The store is this process's and outlives them, as torchrun's does.
    """
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    store = dist.TCPStore(
        "127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
    )
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            _be_rank(directory, function, environment | numbers)
        pids.append(pid)
    ended, deadline = {}, time.monotonic() + seconds
    while len(ended) < processes:
        for pid in pids:
            if pid not in ended and (found := os.waitpid(pid, os.WNOHANG))[0]:
                ended[pid] = os.waitstatus_to_exitcode(found[1])
            elif pid not in ended and time.monotonic() > deadline:
                os.kill(pid, 9)
        time.sleep(0.01)
    del store
    return [
        Rank(ended[pid], *((directory / f"{name}_{i}.txt").read_text() for name in STREAMS))
        for i, pid in enumerate(pids)
    ]


STREAMS = ("output", "errors")


def _be_rank(directory: Path, function: Callable[[], None], environment: dict[str, str]) -> None:
    """Become a rank, and end as a script would."""
    status = 1
    try:
        os.environ.update(environment)
        os.chdir(directory)
        for number, name in enumerate(STREAMS, 1):
            path = directory / f"{name}_{environment['RANK']}.txt"
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
