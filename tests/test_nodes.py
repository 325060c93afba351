"""Several nodes, restarts by torchrun, requeued jobs: the same run as one process makes alone.

The nodes are two torchruns on this machine. Kills by the dozen are `python -m tests.faults`'s.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.nodes import PATIENCE, end, finish, free_port, node_options, rank_of, start_node, workers
from tests.runs import assert_same_end, column, last_step, run_training
from tests.tiny import ROOT, make_data, script, tiny_config, wait_for
from training import checkpoint

pytestmark = pytest.mark.slow

STEPS = 60

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    """The run of one process."""
    return run_training(small(data, tmp_path_factory.mktemp("alone")))


def small(data: Path, runs: Path, **changes):
    settings = {"steps": STEPS, "val_interval": 8, "sample_tokens": 0, "keep_checkpoints": 2}
    return tiny_config(data, runs, **settings | changes)


def command(data: Path | str, runs: Path | str, **changes) -> list[object]:
    return tiny.command(small(Path(data), Path(runs), **changes), "run")


def error(errors: str) -> str:
    """The sentence that a process of ours ended with; torchrun has many more."""
    found = re.findall(r"(?m)^error: (.*)$", errors)
    assert len(found) == 1 and f'  File "{ROOT}' not in errors, errors
    return found[0]


@pytest.fixture(scope="module")
def nodes(data, tmp_path_factory) -> Path:
    """The run of two nodes with a process each."""
    return run_on_nodes("static", data, tmp_path_factory.mktemp("nodes"))


def run_on_nodes(rendezvous: str, data: Path, directory: Path) -> Path:
    started = [
        start_node([*options, "--nproc_per_node=1"], command(data, directory), directory)
        for options in node_options(rendezvous)
    ]
    for status, _, errors in map(finish, started):
        assert status == 0, errors
    return directory / "run"


def assert_same_losses(run: Path, other: Path) -> None:
    for kind in ("train", "val"):
        ours, theirs = (column(each, kind, "step", "loss") for each in (run, other))
        assert [step for step, _ in ours] == [step for step, _ in theirs]
        assert (torch.tensor(ours) - torch.tensor(theirs)).abs().max() <= 1e-5


def test_two_nodes_train_as_one_process(alone, nodes):
    assert_same_losses(nodes, alone)


@pytest.mark.slow
def test_nodes_that_find_each_other_by_c10d_do_so_too(data, alone, tmp_path):
    assert_same_losses(run_on_nodes("c10d", data, tmp_path), alone)


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["data", "runs"])
def test_what_one_node_does_not_see_is_said_at_once_on_both(data, tmp_path, missing):
    """Each node in a directory of its own, where only one thing is shared."""
    one, two = tmp_path / "one", tmp_path / "two"
    for node in (one, two):
        node.mkdir()
    shutil.copytree(data, one / "mine")
    words = command("mine", tmp_path) if missing == "data" else command(data, "runs", timeout=90)
    begun = time.monotonic()
    started = [
        start_node([*options, "--nproc_per_node=1"], words, cwd)
        for options, cwd in zip(node_options("static"), (one, two), strict=True)
    ]
    said = [error(errors) for status, _, errors in map(finish, started) if status == 1]
    assert len(said) == 2 and time.monotonic() - begun < 300
    thing = "There is no data 'mine'" if missing == "data" else "do not see runs/run"
    assert all(thing in sentence for sentence in said), said
    if missing == "runs":
        # Nothing is left that would stand in the way of the next try.
        assert not (one / "runs" / "run").exists()


@needs_proc
def test_a_killed_worker_is_restarted_and_the_run_ends_as_if_undisturbed(data, nodes, tmp_path):
    options = ["--standalone", "--nproc_per_node=2", "--max-restarts=3"]
    launcher = start_node(options, command(data, tmp_path), tmp_path)
    run = tmp_path / "run"
    try:
        wait_for(lambda: checkpoint.all_checkpoints(run), PATIENCE)
        time.sleep(random.uniform(0, 0.5))
        (killed,) = [pid for pid in workers(launcher.pid) if rank_of(pid) == 1]
        os.kill(killed, signal.SIGKILL)
        status, output, errors = finish(launcher)
    finally:
        end(launcher)
    assert status == 0, errors
    # The summary of each start.
    assert output.count("compute ") == 2
    assert_same_end(run, nodes, STEPS)


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("loss", ["the other node is killed", "the other process is stopped"])
def test_a_lost_node_ends_the_other_with_a_message(data, tmp_path, loss):
    words = command(data, tmp_path, steps=100_000, timeout=8.0)
    one, two = (
        start_node([*options, "--nproc_per_node=1"], words, tmp_path)
        for options in node_options("static")
    )
    try:
        wait_for(lambda: last_step(tmp_path / "run") > 3, PATIENCE)
        begun = time.monotonic()
        if loss == "the other node is killed":
            end(two)
        else:
            os.kill(workers(two.pid)[0], signal.SIGSTOP)
        status, _, errors = finish(one)
    finally:
        end(one, two)
    # The timeout, what torchrun needs to see it, and a busy machine.
    assert time.monotonic() - begun < 60
    assert status != 0
    assert "Another process of this run died, or did not answer for 8 s" in error(errors)


# --- Slurm ---


def test_the_slurm_script_is_bash_and_its_options_exist():
    path = ROOT / "slurm" / "train.sbatch"
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", path]).returncode == 0
    text = path.read_text()
    ours = re.findall(r" (--[\w.-]+)", text[text.index("main.py --") :].partition("\n")[0])
    ours += re.findall(r"(?m)^#   sbatch .*train.sbatch (.*)$", text)[0].split()
    known = script("main.py", "--help", cwd=ROOT).stdout
    assert "--auto-resume" in ours
    assert all(option in known for option in ours if option.startswith("--"))


FAKES = {
    # As Slurm does: one task a node, and signals passed on to every task.
    "srun": """while [[ "$1" == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=("$!"); done
trap 'kill -TERM "${tasks[@]}"' TERM
status=0
for task in "${tasks[@]}"; do
  while kill -0 "$task" 2>/dev/null; do wait "$task" && end=0 || end="$?"; done
  ((end == 0)) || status="$end"
done
exit "$status"
""",
    "scontrol": """case "$1" in
show) printf '127.0.0.1\\nother\\n' ;;
requeue) echo "$2" >>requeued.txt ;;
esac
""",
}


@needs_proc
@pytest.mark.slow
def test_a_slurm_job_that_is_stopped_requeues_itself_and_goes_on(data, tmp_path):
    fakes = tmp_path / "bin"
    fakes.mkdir()
    for name, body in FAKES.items():
        (fakes / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (fakes / name).chmod(0o755)
    (fakes / "torchrun").write_text(
        f'#!/usr/bin/env bash\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    )
    (fakes / "torchrun").chmod(0o755)
    (tmp_path / "main.py").symlink_to(ROOT / "main.py")
    words = command(data, tmp_path / "runs", steps=100_000)
    stopped = job(tmp_path, words[1:], 20_000 + free_port())
    run = tmp_path / "runs" / "run"
    wait_for(lambda: last_step(run) > 3, PATIENCE)
    stopped.send_signal(signal.SIGTERM)
    output, errors = stopped.communicate(timeout=PATIENCE)
    assert stopped.returncode != 0 and "error:" not in errors, errors
    step = int(re.search(r"stopped after step (\d+)", output)[1])
    assert checkpoint.step_of(checkpoint.newest(run)) == step
    assert (tmp_path / "requeued.txt").exists()
    # The same job once more, this time with an end in sight.
    again = job(tmp_path, [*words[1:], "--train.stop-at-step", str(step + 2)], 20_000 + free_port())
    output, errors = again.communicate(timeout=PATIENCE)
    assert again.returncode == 0, errors
    assert [k for (k,) in column(run, "train", "step")] == list(range(1, step + 3))


def job(cwd: Path, words: list[object], number: int) -> subprocess.Popen:
    """Run the Slurm script as a job of two nodes with that number."""
    variables = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    variables |= {"SLURM_JOB_ID": str(number), "SLURM_SUBMIT_DIR": str(cwd)}
    variables |= {"PROCESSES_PER_NODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        ["bash", str(ROOT / "slurm" / "train.sbatch"), *map(str, words)],
        cwd=cwd,
        env={**os.environ, **variables, "PATH": f"{cwd / 'bin'}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
