"""Signals, --train.stop-at-step, lost processes, numbers gone bad: a run stops in good order.

SIGKILL at random moments is what tests/faults/ does, of which test_faults.py runs a little.
"""

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch

from config import Config, UserError, replace
from model import GPT
from tests.nodes import rank_of, workers
from tests.runs import (
    assert_same_end,
    column,
    go_on,
    last_step,
    metrics,
    run_training,
    steps,
    tensors,
)
from tests.tiny import ROOT, command, make_data, script, start, tiny_config, wait_for
from training import checkpoint
from training.optim import lr_at
from utils import locked

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """A run of 60 steps that nothing disturbed."""
    return run_training(long_config(data, tmp_path_factory.mktemp("straight"), 60))


def long_config(data: Path, runs: Path, steps: int, **changes) -> Config:
    changes = {"val_interval": 7, "checkpoint_interval": 25, "sample_tokens": 0} | changes
    return tiny_config(data, runs, steps=steps, **changes)


def stopped_after(output: str) -> int:
    found = re.search(r"stopped after step (\d+).*--resume", output)
    assert found, output
    return int(found[1])


# --- Signals ---


def test_a_signal_ends_the_run_after_its_step_and_nothing_is_lost(data, straight, tmp_path):
    """No time for validations, samples or the interval: a checkpoint where it stands, exit 0."""
    config = replace(long_config(data, tmp_path, 60), {"name": "run"})
    process = start(*command(config, "run"), cwd=tmp_path)
    run = tmp_path / "run"
    wait_for(lambda: last_step(run) > 1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in errors, errors
    step = stopped_after(output)
    assert steps(run)[-1] == step and column(run, "train", "step")[-1] == (step,)
    assert go_on(config) == (60, True)
    assert_same_end(run, straight, 60)


# Nothing is due at 6, a validation at 7, a checkpoint at 25.
@pytest.mark.parametrize("step", [6, 7, 25])
def test_stopped_where_something_is_due_it_begins_with_that(data, straight, tmp_path, step):
    config = long_config(data, tmp_path, 60)
    run = signal_in_step(step, config)
    assert checkpoint.read_state(checkpoint.newest(run))["val_loss"] is None
    assert column(run, "val", "step")[-1][0] < step
    assert go_on(config) == (60, True)
    assert_same_end(run, straight, 60)
    assert metrics(run, "val") == metrics(straight, "val")


def test_a_signal_in_the_last_step_leaves_its_validation_to_be_made(data, tmp_path):
    config = long_config(data, tmp_path, 6)
    run = signal_in_step(6, config)
    assert checkpoint.read_state(checkpoint.newest(run))["val_loss"] is None
    assert go_on(config) == (6, True)
    assert checkpoint.read_state(checkpoint.newest(run))["val_loss"] > 0
    assert column(run, "val", "step") == [(0,), (6,)]


def signal_in_step(step: int, config: Config) -> Path:
    """Train until a signal that comes in the second of a step's two micro-batches."""
    calls, forward = 0, GPT.forward

    def patched(self, *arguments):
        nonlocal calls
        calls += self.training
        if calls == 2 * step and self.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *arguments)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "forward", patched)
        assert go_on(config) == (step, False)
    assert signal.getsignal(signal.SIGTERM) is before
    return Path(config.train.runs_dir) / config.name


@needs_proc
@pytest.mark.parametrize(
    "target", ["one rank", pytest.param("the launcher", marks=pytest.mark.slow)]
)
def test_all_ranks_stop_together(data, tmp_path, target):
    config = long_config(data, tmp_path, 100_000)
    process = start(*command(config, "together"), cwd=tmp_path, processes=2)
    ranks = ranks_of(process.pid, tmp_path / "together")
    os.kill(ranks[1] if target == "one rank" else process.pid, signal.SIGTERM)
    output, errors = process.communicate(timeout=100)
    assert steps(tmp_path / "together")[-1] == stopped_after(output)
    assert "error:" not in errors
    # torchrun itself reports a signal it was sent as a failure, whatever its workers say.
    assert (process.returncode == 0) == (target == "one rank")


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_others_with_a_message(data, tmp_path, number):
    """Killed, or stopped for ever: at most the timeout and the launcher's own patience later."""
    config = long_config(data, tmp_path, 100_000, timeout=4.0)
    process = start(*command(config, "lost"), cwd=tmp_path, processes=2)
    ranks = ranks_of(process.pid, tmp_path / "lost")
    os.kill(ranks[1], number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and re.search(r"error: .*process.*4 s", errors), errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


def ranks_of(launcher: int, run: Path) -> dict[int, int]:
    """Return the process ids of the ranks of a run that has made some steps."""
    wait_for(lambda: last_step(run) > 3)
    return {rank_of(pid): pid for pid in workers(launcher)}


def test_two_programs_cannot_write_to_one_run(data, tmp_path):
    run = run_training(long_config(data, tmp_path, 1))
    with locked(run / "lock"):
        second = script("main.py", "--resume", run, cwd=tmp_path)
    assert second.returncode == 1 and f"process {os.getpid()} on" in second.stderr
    assert "Traceback" not in second.stderr


# --- An end that was asked for ---


def stop_at(config: Config, step: int | None) -> tuple[int, bool]:
    return go_on(replace(config, {"train.stop_at_step": step}))


def test_an_early_end_is_measured_and_saved_with_the_rates_of_the_whole_run(data, tmp_path):
    config = long_config(data, tmp_path, 60, log_interval=4, sample_tokens=4)
    assert stop_at(config, 6) == (6, True)
    run = tmp_path / "tiny"
    # 6 is a multiple of none of the intervals.
    assert column(run, "val", "step") == [(0,), (6,)] and steps(run) == [6]
    assert column(run, "train", "step", "lr") == [(k, lr_at(k, 60, config.optim)) for k in (4, 6)]
    state = checkpoint.read_state(checkpoint.newest(run))
    assert state["val_loss"] == column(run, "val", "loss")[-1][0]
    assert "## Step 6" in (run / "samples.md").read_text()
    # At or before the step a run stands at, nothing happens.
    names = ("metrics.jsonl", "samples.md", "checkpoints/step_000006/state.json")
    before = [(run / name).read_bytes() for name in names]
    for step in (0, 4, 6):
        assert stop_at(config, step) == (6, True)
    assert [(run / name).read_bytes() for name in names] == before


@pytest.mark.parametrize("ends", [(6, None), (0, 25, 32, 99), (99,)])
def test_resumed_after_an_early_end_it_is_the_straight_run(data, straight, tmp_path, ends):
    config = long_config(data, tmp_path, 60)
    for end in ends:
        step = 60 if end is None else min(end, 60)
        assert stop_at(config, end) == (step, True)
    assert_same_end(tmp_path / "tiny", straight, 60)


# --- Numbers gone bad ---


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_numbers_gone_bad_stop_the_run_before_the_weights_change(data, tmp_path, bad):
    config = long_config(data, tmp_path, 60, checkpoint_interval=4)
    forward, calls = GPT.forward, []

    def planted(self, *arguments):
        token_losses, loss = forward(self, *arguments)
        calls.extend([self] * self.training)
        # The second micro-batch of step 6.
        if len(calls) == 12 and self.training:
            planted.weights = [p.detach().clone() for p in self.parameters()]
            weight = self.ln_f.weight[0]
            loss = loss + (weight / 0 if bad == "loss" else (weight - weight.detach()).sqrt())
        return token_losses, loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "forward", planted)
        with pytest.raises(UserError, match=r"Step 6 has a loss of .*No checkpoint has seen it"):
            run_training(config)
    assert all(map(torch.equal, planted.weights, calls[0].parameters()))
    run = tmp_path / "tiny"
    found = json.loads((run / "non_finite.json").read_text())
    sequences = found["sequences"]
    assert found["step"] == 6 and len(sequences) == 8
    # A bad loss tells which micro-batch it came from; a bad gradient may have come from any.
    assert found["suspects"] == (sequences[4:] if bad == "loss" else sequences)
    assert steps(run) == [4] and column(run, "train", "step")[-1] == (5,)


@pytest.mark.slow
def test_one_bad_rank_stops_all_and_names_its_sequences(data, tmp_path):
    config = long_config(data, tmp_path, 60, micro_batch_size=2)
    program = tmp_path / "planted.py"
    program.write_text(
        f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import main
from model import GPT
from utils import run_script

forward, calls = GPT.forward, []

def planted(self, *arguments):
    token_losses, loss = forward(self, *arguments)
    calls.extend([1] * self.training)
    bad = os.environ["RANK"] == "1" and len(calls) == 2 * 3
    return token_losses, loss * float("nan") if bad else loss

GPT.forward = planted
run_script(main.main)
"""
    )
    result = script(program, *command(config, "bad")[1:], cwd=tmp_path, processes=2)
    assert result.returncode == 1
    assert result.stderr.count("error: Step 3 has a loss of nan") >= 1
    found = json.loads((tmp_path / "bad" / "non_finite.json").read_text())
    assert found["suspects"] == found["sequences"][6:8]


def test_weights_that_diverged_are_not_saved(data, tmp_path):
    """A rate that throws the weights to infinity in the very step before a checkpoint."""
    config = long_config(data, tmp_path, 8, lr=1e11, warmup_frac=0.0, schedule="constant")
    with pytest.raises(UserError, match=r"diverged|has a loss of"):
        run_training(replace(config, {"train.checkpoint_interval": 1}))
    for step in steps(tmp_path / "tiny"):
        weights = tensors(tmp_path / "tiny", step).values()
        assert all(torch.isfinite(tensor).all() for tensor in weights)
