"""Two "nodes" on this machine: a torchrun for each, that meet on the loopback interface."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from tests.tiny import ROOT

# How long anything here may take on a busy machine; what takes longer is stuck.
PATIENCE = 600


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def node_options(rendezvous: str, nodes: int = 2) -> list[list[str]]:
    """Return torchrun's options for each node, with a static or a c10d rendezvous."""
    port, count = free_port(), f"--nnodes={nodes}"
    if rendezvous == "c10d":
        meeting = [f"--rdzv_endpoint=127.0.0.1:{port}", f"--rdzv_id=test-{port}"]
        return [[count, "--rdzv_backend=c10d", *meeting]] * nodes
    meeting = ["--master_addr=127.0.0.1", f"--master_port={port}"]
    return [[count, f"--node_rank={node}", *meeting] for node in range(nodes)]


def start_node(
    options: list[str], command: list[object], cwd: Path, **environment: str
) -> subprocess.Popen:
    """Start one torchrun with `options` in a process group of its own, and return it.

    What it says goes to output_N.txt and errors_N.txt in `cwd`, N being the number of the start, so
    that a pipe nobody reads cannot hold it up.
    """
    number = len(list(cwd.glob("output_*.txt")))
    words = [str(ROOT / str(command[0])), *map(str, command[1:])]
    with (
        open(cwd / f"output_{number}.txt", "wb") as output,
        open(cwd / f"errors_{number}.txt", "wb") as errors,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, *words],
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            start_new_session=True,
        )
    process.output, process.errors = cwd / f"output_{number}.txt", cwd / f"errors_{number}.txt"
    return process


def finish(process: subprocess.Popen, seconds: float = PATIENCE) -> tuple[int, str, str]:
    """Return the status, the output and the errors of a node, which has to end in time."""
    try:
        status = process.wait(seconds)
    finally:
        end(process)
    return status, process.output.read_text(), process.errors.read_text()


def end(*processes: subprocess.Popen) -> None:
    """Kill whatever is left of nodes: torchrun and, each in a group of its own, its workers."""
    for process in processes:
        # Without its launcher a worker is nobody's child.
        for pid in [process.pid, *workers(process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.wait()


def workers(launcher: int) -> list[int]:
    """Return the ids of a process's children, by what /proc says of every process."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            fields = (directory / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == launcher:
            found.append(int(directory.name))
    return found


def rank_of(pid: int) -> int | None:
    """Return the rank that torchrun has given a process, or None."""
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    return next((int(word[5:]) for word in variables if word.startswith(b"RANK=")), None)
