"""Faults injected into runs started from the command line: what each costs, and what is left.

`launch` starts main.py behind a few lines of Python that break something in that process only; each
test then looks at the exit status, at what was printed and at the files of the run.
"""

import functools
import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from corpus.tokenizer import gpt2_tokenizer
from tests.runs import metrics, steps
from tests.tiny import ROOT, make_data, start, wait_for

pytestmark = pytest.mark.slow  # programs started many times, by each of its tests

STEPS = 8
TINY = f"""--model.n-layer 2 --model.n-head 2 --model.n-embd 32 --model.block-size 32 --name run
    --train.steps {STEPS} --train.batch-tokens 256 --train.micro-batch-size 4 --train.dtype float32
    --train.val-interval 4 --train.val-tokens 128 --train.checkpoint-interval 4
    --train.keep-checkpoints 9 --train.sample-tokens 4 --train.shuffle sequences
    --train.eval-interval 0 --train.device cpu""".split()
SCORED = ["--train.eval-interval", "4", "--train.eval-tasks", "hellaswag", "hellaswag-cleaned"]
# A rank that fails ends all within 10 s; a busy machine gets half as much again.
SECONDS = 15
MESSAGE = "broken on purpose"
slow = functools.partial(pytest.param, marks=pytest.mark.slow)

LAUNCHER = """
import ctypes, os, runpy, signal, sys, time
from pathlib import Path
RANK, LAST = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) - 1
HERE = Path(__file__).parent
RUN = HERE / "runs/run"
sys.path.insert(0, {root!r})
if sys.platform == "linux" and LAST > 0:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # a rank ends with what started it

def called_from(file):
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.endswith(file):
        frame = frame.f_back
    return frame is not None

def before(owner, name, action):
    original = getattr(owner, name)
    def patched(*args, **kwargs):
        action(*args, **kwargs)
        return original(*args, **kwargs)
    setattr(owner, name, patched)

def fail(*args, **kwargs):
    raise RuntimeError({message!r})

{patch}
runpy.run_path({root!r} + "/main.py", run_name="__main__")
"""

# Scoring looks up embeddings for every batch, whatever it scores and however it batches.
SCORING = """
import torch.nn.functional
def broken(*args, **kwargs):
    if called_from("scoring.py") and {condition}:
        {action}
before(torch.nn.functional, "embedding", broken)
"""
SAMPLING = """
import sample
def broken(*args, **kwargs):
    if {condition}:
        {action}
before(sample, "continuations", broken)
"""
# What may break beside the training, and how.
BROKEN = {
    "benchmark": SCORING.format(condition="RANK == LAST", action="fail()"),
    "benchmark on rank 0": SCORING.format(condition="RANK == 0", action="fail()"),
    "sample": SAMPLING.format(condition="True", action="fail()"),
    "samples.md": SAMPLING.format(condition="True", action="(RUN / 'samples.md').mkdir()"),
    "figure": "import matplotlib.figure\nbefore(matplotlib.figure.Figure, 'savefig', fail)",
    "tracker": "",
}
# A training step is two calls of the model, or one on each of two ranks.
STEPPING = """
from config import UserError
from model import GPT
calls = []
def broken(self, *args, **kwargs):
    calls.extend([1] * self.training)
    if len(calls) == 5 - 2 * LAST and RANK == {rank}:
        (HERE / "step 3").touch()
        {action}
before(GPT, "forward", broken)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), 60, 1000, gpt2_tokenizer())


@pytest.fixture(scope="module", autouse=True)
def benchmarks(tmp_path_factory):
    """GPT2_DATA names a directory of evaluation data that holds a small HellaSwag."""
    directory = tmp_path_factory.mktemp("benchmarks")
    rows = []
    for i in range(6):
        row = {"activity_label": "Cats", "ctx": "The cat sat on a mat. It", "label": i % 4}
        row["endings"] = [f"{word} {'again ' * (i % 3)}sat." for word in ("a", "the", "on", "it")]
        rows.append(json.dumps(row) + "\n")
    (directory / "hellaswag").mkdir()
    (directory / "hellaswag" / "hellaswag_val.jsonl").write_text("".join(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2_DATA", str(directory))
        yield


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """A run that nothing disturbed, scored on two benchmarks."""
    here = tmp_path_factory.mktemp("straight")
    finish(launch(here, data, *SCORED))
    return here / "runs" / "run"


def write_launcher(here: Path, patch: str) -> Path:
    path = here / "launcher.py"
    path.write_text(LAUNCHER.format(root=str(ROOT), message=MESSAGE, patch=patch))
    return path


def launch(here: Path, data: Path | None, *args: object, patch: str = "", **options):
    """Start main.py in `here`, a tiny run of `data` or, without that, with nothing but `args`.

    `patch` runs first in its process, or in that of every rank.
    """
    tiny = ["--data", data, *TINY] if data else []
    return start(write_launcher(here, patch), *tiny, *args, **{"cwd": here, **options})


def finish(process: subprocess.Popen, status: int = 0, seconds: float = 240) -> str:
    """Wait for a process that should end with `status`; return all it printed."""
    try:
        shown = "".join(process.communicate(timeout=seconds))
    finally:
        process.kill()
    assert process.returncode == status, shown
    assert status or "Traceback" not in shown, shown
    return shown


def count_lines(shown: str, text: str) -> int:
    return sum(text in line for line in shown.splitlines())


def assert_complete(run: Path) -> None:
    assert [line["step"] for line in metrics(run, "train")] == list(range(1, STEPS + 1))
    assert steps(run) == [4, 8]


@pytest.mark.parametrize(
    ("fault", "processes"),
    [
        *[(fault, 1) for fault in ("benchmark", "sample", "samples.md", "figure")],
        *[slow("tracker", 1), *[slow(fault, 2) for fault in BROKEN if fault != "samples.md"]],
    ],
)
def test_what_breaks_beside_the_training_costs_a_line(data, tmp_path, fault, processes):
    # Whatever is asked of it, it raises.
    (tmp_path / "wandb.py").write_text(f"def __getattr__(name): raise RuntimeError({MESSAGE!r})")
    args = {"tracker": ["--train.trackers", "wandb"], "sample": [], "samples.md": [], "figure": []}
    options = {"patch": BROKEN[fault], "processes": processes, "WANDB_MODE": "offline"}
    shown = finish(launch(tmp_path, data, *args.get(fault, SCORED), **options))
    assert_complete(tmp_path / "runs" / "run")
    # A line for each time it was tried: two benchmarks; samples at steps 0, 4, 8 and at the end.
    times = count_lines(shown, fault if fault == "samples.md" else MESSAGE)
    assert 1 <= times <= {"figure": 1, "tracker": 1}.get(fault, 4), shown


@pytest.mark.parametrize("step", [4, slow(8)])
@pytest.mark.parametrize(
    ("template", "recorded"),
    [
        pytest.param(SCORING, "val", id="before scoring"),
        slow(SCORING, "eval", id="between two benchmarks"),
        slow(SAMPLING, "eval", id="before sampling"),
    ],
)
def test_killed_after_saving_nothing_is_missing_after_resume(
    data, straight, tmp_path, template, recorded, step
):
    line = f'{{"kind": "{recorded}", "step": {step},'
    condition = f"{line!r} in (RUN / 'metrics.jsonl').read_text()"
    patch = template.format(condition=condition, action="os.kill(os.getpid(), signal.SIGKILL)")
    finish(launch(tmp_path, data, *SCORED, patch=patch), status=-signal.SIGKILL)
    run = tmp_path / "runs" / "run"
    assert steps(run)[-1:] == [step]
    finish(launch(tmp_path, None, "--resume", "run"))
    assert_complete(run)
    assert metrics(run, times=False) == metrics(straight, times=False)
    assert (run / "samples.md").read_text() == (straight / "samples.md").read_text()


@pytest.mark.slow
def test_weights_of_an_unlisted_shape_bring_the_cadence_of_their_size(data, straight, tmp_path):
    """A model of 1.6M parameters is not validated and scored as often as one of 124M."""
    args = f"--init-from {straight} --data {data} --name run --train.steps 2".split()
    args += ["--train.batch-tokens", "64", "--train.sample-tokens", "0", "--train.device", "cpu"]
    finish(launch(tmp_path, None, *args))
    run = tmp_path / "runs" / "run"
    train = json.loads((run / "config.json").read_text())["train"]
    assert train["eval_interval"] == 0 and not metrics(run, "eval")
    assert train["val_tokens"] <= 1 << 20 and 0 < train["checkpoint_interval"] <= 500


@pytest.mark.slow
def test_resume_goes_on_after_stop_at_step(data, tmp_path):
    finish(launch(tmp_path, data, "--train.stop-at-step", "4"))
    run = tmp_path / "runs" / "run"
    assert steps(run) == [4] and len(metrics(run, "train")) == 4
    finish(launch(tmp_path, None, "--resume", "run"))
    assert_complete(run)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), slow(0o027, 0o640)])
def test_files_of_a_run_have_the_mode_of_the_umask(data, tmp_path, umask, mode):
    finish(launch(tmp_path, data, "--train.stop-at-step", "1", patch=f"os.umask({umask})"))
    files = [path for path in (tmp_path / "runs" / "run").rglob("*") if path.is_file()]
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files}
    assert set(modes.values()) == {oct(mode)} and "model.safetensors" in modes, modes


def start_ranks(here: Path, places: list[Path], data: Path, *args: object, patch: str) -> list:
    """Start two ranks as torchrun would, each in its place, with no launcher to end them."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(20000 + os.getpid() % 10000), "patch": patch}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank, **common} for rank in "01"]
    return [launch(here, data, *args, cwd=c, **r) for c, r in zip(places, ranks, strict=True)]


def assert_all_end(processes: list) -> list[str]:
    """See that all processes end in time and with a failure; return what each printed."""
    deadline, shown = time.monotonic() + SECONDS, []
    try:
        for process in processes:
            left = max(deadline - time.monotonic(), 0.1)
            shown.append("".join(process.communicate(timeout=left)))
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode for process in processes), shown
    return shown


@pytest.mark.slow
@pytest.mark.parametrize("error", ["UserError", "RuntimeError"])
@pytest.mark.parametrize(("failing", "torchrun"), [(0, False), (1, False), (1, True)])
def test_a_rank_that_fails_says_so_and_ends_all(data, tmp_path, failing, torchrun, error):
    patch = STEPPING.format(rank=failing, action=f"raise {error}({MESSAGE!r})")
    # A group that is destroyed while others wait inside a collective hangs, as NCCL's does.
    patch += "import torch\ntorch.distributed.destroy_process_group = lambda *_: time.sleep(600)"
    if torchrun:
        started = [launch(tmp_path, data, patch=patch, processes=2)]
    else:
        started = start_ranks(tmp_path, [tmp_path, tmp_path], data, patch=patch)
    wait_for((tmp_path / "step 3").exists)
    shown = assert_all_end(started)
    assert MESSAGE in shown[0 if torchrun else failing], shown


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_without_its_data_says_so_and_ends_all(data, tmp_path, failing):
    """One of two machines lacks the data: the rank starts where its name stands for nothing."""
    places = [tmp_path / "0", tmp_path / "1"]
    for place in places:
        place.mkdir()
    (places[1 - failing] / "here").symlink_to(data)
    args = [places, Path("here"), "--train.runs-dir", tmp_path / "runs"]
    # The clock runs from where torch has been imported.
    patch = "import torch\n(HERE / f'rank {RANK}').touch()"
    ranks = start_ranks(tmp_path, *args, patch=patch)
    wait_for(lambda: len(list(tmp_path.glob("rank *"))) == 2)
    shown = assert_all_end(ranks)
    assert "error: " in "".join(shown) and "Traceback" not in "".join(shown), shown


UNUSABLE_GPU = """
import torch
os.environ.pop("CUDA_VISIBLE_DEVICES", None)
torch.version.cuda, torch.cuda.is_available = "13.0", lambda: False
found, gpus = Path.glob, [Path("/dev/nvidia0")]
Path.glob = lambda self, pattern: gpus if str(self) == "/dev" else found(self, pattern)
"""


@pytest.mark.parametrize("device", ["auto", slow("cpu")])
def test_gpus_that_cannot_be_used_are_not_passed_over(data, tmp_path, device):
    args = ["--train.stop-at-step", "1", "--train.device", device]
    shown = finish(launch(tmp_path, data, *args, patch=UNUSABLE_GPU), status=device == "auto")
    assert len(re.findall("error: .*--train.device cpu", shown)) == int(device == "auto"), shown
    assert (tmp_path / "runs" / "run" / "metrics.jsonl").exists() == (device == "cpu")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "processes", "where"),
    [("missing", 1, "1"), ("failing", 1, "1"), ("failing", 2, "1"), ("failing", 2, "RANK")],
)
def test_without_a_compiler_it_trains_uncompiled(
    data, straight, tmp_path, compiler, processes, where
):
    path = tmp_path / compiler
    (tmp_path / "failing").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "failing").chmod(0o755)
    patch = f"if {where}:\n    os.environ |= {{'CXX': {str(path)!r}, 'CC': {str(path)!r}}}\n"
    # A cache for each rank, or one would find what another has compiled.
    patch += "os.environ['TORCHINDUCTOR_CACHE_DIR'] = str(HERE / f'cache_{RANK}')"
    args = ["--train.compile", "on"]
    shown = finish(launch(tmp_path, data, *args, patch=patch, processes=processes))
    run = tmp_path / "runs" / "run"
    assert_complete(run)
    assert count_lines(shown, "torch.compile") == 1, shown
    found, expected = ([line["loss"] for line in metrics(r, "train")] for r in (run, straight))
    assert found == pytest.approx(expected, abs=1e-5)


# A step that takes long enough to be sent signals in; Python's handlers run between the naps.
NAP = STEPPING.format(rank=0, action="[time.sleep(0.1) for _ in range({tenths})]")


@pytest.mark.parametrize("nohup", [False, slow(True)])
def test_a_hangup_and_its_echo_ask_for_a_checkpoint(data, tmp_path, nohup):
    """As when an ssh connection drops: shell and terminal may each send the signal."""
    ignoring = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" if nohup else ""
    process = launch(tmp_path, data, patch=ignoring + NAP.format(tenths=20))
    wait_for((tmp_path / "step 3").exists)
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
    shown = finish(process)
    stopped = "stopped after step 3; continue with: python main.py --resume run" in shown
    assert (stopped, steps(tmp_path / "runs" / "run")) == (not nohup, [4, 8] if nohup else [3])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_six_seconds_later_ends_the_run_at_once(data, tmp_path, number):
    process = launch(tmp_path, data, patch=NAP.format(tenths=600))
    wait_for((tmp_path / "step 3").exists)
    process.send_signal(signal.SIGHUP)
    time.sleep(6)
    assert process.poll() is None
    process.send_signal(number)
    finish(process, status=128 + number, seconds=10)


@pytest.mark.parametrize(
    "command",
    [
        "{} 2>&1 | head -1",
        "{} >/dev/full 2>&1",
        slow("PYTHONIOENCODING=ascii {}"),
        *[slow("{} " + where) for where in ("| head -1", ">&- 2>&-", "2>/dev/full")],
    ],
)
def test_output_that_is_lost_ends_no_run(data, tmp_path, command):
    words = [sys.executable, write_launcher(tmp_path, ""), "--data", data, *TINY, *SCORED]
    # The shell's status is main.py's.
    command = "set -o pipefail; " + command.format(shlex.join(map(str, words)))
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, timeout=240)
    assert result.returncode == 0, result.stderr.decode()
    assert_complete(tmp_path / "runs" / "run")


# Between the blocks of a sample of 16 times 64 KiB of 1.2 MB, and in the last of them.
@pytest.mark.parametrize(
    ("split", "place", "processes"),
    [("train", 70_001, 1), slow("train", 70_001, 2), slow("val", 525_001, 1), slow("val", -1, 1)],
)
def test_a_byte_changed_in_a_shard_is_found(tmp_path, split, place, processes):
    data = make_data(tmp_path / "damaged", documents=10_000, shard_tokens=600_000)
    damaged = next(data.glob(f"*_{split}_*[02].npy"))
    content = bytearray(damaged.read_bytes())
    content[place // 2 * 2] ^= 1  # still a token of the vocabulary
    damaged.write_bytes(content)
    process = launch(tmp_path, data, "--train.steps", "50", processes=processes)
    shown = finish(process, status=1)
    assert re.search(f"error: .*{damaged.name}", shown), shown
    assert 50 not in steps(tmp_path / "runs" / "run")
