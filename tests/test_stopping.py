"""Signals, lost processes and numbers gone bad: a run stops in good order, or at once, or by name.

SIGKILL at random moments is tests/torture.py's, of which test_torture.py runs a little.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import logs
from config import Config, UserError, replace
from distributed import World
from model import GPT
from tests.tiny import ROOT, fields, make_data, script, start, tiny_config, wait_for
from train import train

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """A run of 60 updates that nothing disturbed."""
    runs = tmp_path_factory.mktemp("straight")
    config = long_config(data, runs, 60)
    logs.create_run(runs / config.name, config)
    train(config, runs / config.name, ALONE)
    return runs / config.name


def long_config(data: Path, runs: Path, updates: int, **changes) -> Config:
    changes = {"val_interval": 7, "checkpoint_interval": 25, "sample_tokens": 0} | changes
    return tiny_config(data, runs, updates=updates, **changes)


def options(config: Config, name: str) -> list[str]:
    return ["main.py", "--data", config.data, "--name", name, *fields(config)]


def lines(run: Path, kind: str, *keys: str) -> list[tuple]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in keys) for line in found if line["kind"] == kind]


def last_step(run: Path) -> int:
    """The step of the last metric line that is written, while the run is going on."""
    steps = re.findall(r'"step": (\d+)', (run / "metrics.jsonl").read_text())
    return int(steps[-1]) if steps else 0


def assert_same_end(run: Path, straight: Path, step: int) -> None:
    for name in ("model.safetensors", "optimizer.safetensors"):
        a = load_file(checkpoint.checkpoint_path(straight, step) / name)
        b = load_file(checkpoint.checkpoint_path(run, step) / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    for kind in ("train", "val"):
        assert lines(run, kind, "step", "loss") == lines(straight, kind, "step", "loss")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_update_and_nothing_is_lost(
    data, straight, tmp_path, number
):
    """No time for validations, samples or the interval: a checkpoint where it stands, exit 0."""
    config = long_config(data, tmp_path, 60)
    process = start(*options(config, "run"), cwd=tmp_path)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    stopped = re.search(
        r"stopped after update (\d+); continue with: python main.py --resume run", output
    )
    assert stopped and "a second signal stops at once" in output
    step = int(stopped[1])
    if step:
        assert checkpoint.newest(tmp_path / "run") == checkpoint.checkpoint_path(
            tmp_path / "run", step
        )
        assert lines(tmp_path / "run", "train", "step")[-1] == (step,)
    resumed = script("main.py", "--resume", tmp_path / "run", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_end(tmp_path / "run", straight, 60)


def test_stopped_where_a_validation_is_due_it_begins_with_that(data, straight, tmp_path):
    """The signal comes during update 7, whose validation is then left to the resumed run."""
    config = long_config(data, tmp_path, 60)
    run = tmp_path / config.name
    logs.create_run(run, config)
    _signal_in_update(7, config, run)
    assert checkpoint.read_state(checkpoint.newest(run))["val_loss"] is None
    assert lines(run, "val", "step") == [(0,)]
    # A kill between that validation and the checkpoint after it leaves its line behind.
    logs.append_metrics(run, {"kind": "val", "step": 7, "tokens": 0, "loss": 1.0})
    train(config, run, ALONE, checkpoint.newest(run))
    assert_same_end(run, straight, 60)


def test_a_signal_in_the_last_update_leaves_its_measurements_to_be_made(data, tmp_path):
    config = long_config(data, tmp_path, 6)
    run = tmp_path / config.name
    logs.create_run(run, config)
    _signal_in_update(6, config, run)
    assert checkpoint.read_state(checkpoint.newest(run))["val_loss"] is None
    assert train(config, run, ALONE, checkpoint.newest(run)) == (6, True)
    assert checkpoint.read_state(checkpoint.newest(run))["val_loss"] > 0


def _signal_in_update(step: int, config: Config, run: Path) -> None:
    calls = 0
    forward = GPT.forward

    def patched(self, idx, targets=None):
        nonlocal calls
        calls += self.training
        # Two micro-batches an update.
        if calls == 2 * step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        return forward(self, idx, targets)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "forward", patched)
        assert train(config, run, ALONE) == (step, False)


@pytest.mark.parametrize("waiting", ["time.sleep(60)", "lock.acquire(); lock.acquire(timeout=60)"])
def test_a_second_signal_stops_at_once(tmp_path, waiting):
    """Also when the main thread waits inside C code, as in a collective nobody else will join."""
    code = (
        f"import sys, threading, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from signals import stop_requests\n"
        "with stop_requests() as asked:\n"
        "    print('ready', flush=True)\n"
        "    asked.wait()\n"
        f"    lock = threading.Lock(); {waiting}\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert "stopping" in process.stdout.readline() + process.stdout.readline()
    time.sleep(0.2)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert time.monotonic() - sent < 5


def test_handlers_are_put_back():
    from signals import stop_requests

    before = signal.getsignal(signal.SIGINT)
    with stop_requests(quiet=True) as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.wait(5)
    assert signal.getsignal(signal.SIGINT) is before


def ranks(name: str) -> dict[int, int]:
    """The process ids of a run's ranks, by what /proc says of every process."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            words = (directory / "cmdline").read_bytes().split(b"\0")
            variables = (directory / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = [word[5:] for word in variables if word.startswith(b"RANK=")]
        if name.encode() in words and rank:
            found[int(rank[0])] = int(directory.name)
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux")


@needs_proc
@pytest.mark.parametrize("target", ["one rank", "the launcher"])
def test_all_ranks_stop_together(data, tmp_path, target):
    config = long_config(data, tmp_path, 100_000)
    process = start(*options(config, "together"), cwd=tmp_path, processes=2)
    wait_for(lambda: (tmp_path / "together" / "metrics.jsonl").exists())
    wait_for(lambda: last_step(tmp_path / "together") > 3)
    if target == "one rank":
        os.kill(ranks("together")[1], signal.SIGTERM)
    else:
        process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=100)
    stopped = re.search(r"stopped after update (\d+)", output)
    assert stopped, output + errors
    assert checkpoint.newest(tmp_path / "together").name == f"step_{int(stopped[1]):06d}"
    assert "error:" not in errors
    # torchrun itself reports a signal it was sent as a failure, whatever its workers say.
    assert (process.returncode == 0) == (target == "one rank")
    assert not ranks("together")


@needs_proc
@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGKILL, 30), (signal.SIGSTOP, 45)])
def test_a_lost_rank_ends_the_others_with_a_message(data, tmp_path, number, seconds):
    """Killed, or stopped for ever: at most the timeout and the launcher's own patience later."""
    config = long_config(data, tmp_path, 100_000, timeout=4.0)
    process = start(*options(config, "lost"), cwd=tmp_path, processes=2)
    wait_for(lambda: (tmp_path / "lost" / "metrics.jsonl").exists())
    wait_for(lambda: last_step(tmp_path / "lost") > 3)
    begun = time.monotonic()
    os.kill(ranks("lost")[1], number)
    _, errors = process.communicate(timeout=100)
    assert time.monotonic() - begun < seconds
    assert process.returncode != 0
    assert "error: Another process of this run died, or did not answer for 4 s" in errors
    assert not ranks("lost")


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_numbers_gone_bad_stop_the_run_before_the_weights_change(data, tmp_path, bad):
    config = long_config(data, tmp_path, 60, checkpoint_interval=4)
    run = tmp_path / config.name
    logs.create_run(run, config)
    forward = GPT.forward
    calls = []

    def planted(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        calls.extend([self] * self.training)
        # The second micro-batch of update 6.
        if len(calls) == 12:
            planted.weights = [p.detach().clone() for p in self.parameters()]
            weight = self.ln_f.weight[0]
            loss = loss + (weight / 0 if bad == "loss" else (weight - weight.detach()).sqrt())
        return logits, loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "forward", planted)
        with pytest.raises(UserError, match=r"Update 6 has a loss of .* no checkpoint has seen it"):
            train(config, run, ALONE)
    assert all(map(torch.equal, planted.weights, calls[0].parameters()))
    found = json.loads((run / "non_finite.json").read_text())
    windows = found["windows"]
    assert found["step"] == 6 and len(windows) == 8
    # A bad loss tells which micro-batch it came from; a bad gradient may have come from any.
    assert found["suspects"] == (windows[4:] if bad == "loss" else windows)
    assert checkpoint.newest(run).name == "step_000004"
    assert lines(run, "train", "step")[-1] == (5,)


def test_one_bad_rank_stops_all_and_names_its_windows(data, tmp_path):
    config = long_config(data, tmp_path, 60, micro_batch=2)
    program = tmp_path / "planted.py"
    program.write_text(
        f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import main
from command_line import run_script
from model import GPT

forward, calls = GPT.forward, []

def planted(self, idx, targets=None):
    logits, loss = forward(self, idx, targets)
    calls.extend([1] * self.training)
    bad = os.environ["RANK"] == "1" and len(calls) == 2 * 3
    return logits, loss * float("nan") if bad else loss

GPT.forward = planted
run_script(main.main)
"""
    )
    result = script(program, *options(config, "bad")[1:], cwd=tmp_path, processes=2)
    assert result.returncode == 1
    assert result.stderr.count("error: Update 3 has a loss of nan") >= 1
    found = json.loads((tmp_path / "bad" / "non_finite.json").read_text())
    assert found["suspects"] == found["windows"][6:8]


def test_weights_that_diverged_are_not_saved(data, tmp_path):
    """A rate that throws the weights to infinity in the very update before a checkpoint."""
    config = long_config(data, tmp_path, 8, lr=1e38, warmup=0.0, schedule="constant")
    config = replace(config, {"train.val_interval": 1, "train.checkpoint_interval": 1})
    run = tmp_path / config.name
    logs.create_run(run, config)
    with pytest.raises(UserError, match=r"not finite|diverged|has a loss of"):
        train(config, run, ALONE)
    for path in checkpoint.all_checkpoints(run):
        weights = load_file(path / "model.safetensors")
        assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_two_programs_cannot_write_to_one_run(data, tmp_path):
    config = long_config(data, tmp_path, 100_000)
    process = start(*options(config, "busy"), cwd=tmp_path)
    wait_for(lambda: (tmp_path / "busy" / "metrics.jsonl").exists())
    second = script("main.py", "--resume", tmp_path / "busy", cwd=tmp_path)
    process.kill()
    process.communicate()
    assert second.returncode == 1 and "Another process is writing to" in second.stderr
