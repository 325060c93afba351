"""A little of what `python -m tests.faults` does at length, and that it can fail at all."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults import common, damage, disk, kills
from tests.faults.common import Outcome, attempt, check_same_run, check_sentence, processes_in

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs Linux's /proc"),
]


@pytest.mark.slow
@pytest.mark.parametrize("part", [kills.training, kills.preparation, kills.restarts])
def test_what_is_killed_ends_like_what_was_not(part, tmp_path):
    outcome = part(0, 2, tmp_path)
    assert outcome.failures == [] and outcome.seen["kills"] >= 1


def test_a_killed_run_ends_like_the_undisturbed_one(tmp_path):
    """One of each kind of moment, found by its place in the run rather than by chance."""
    wanted, _ = common.straight(tmp_path / "straight", **kills.KINDS[1], steps=12)
    folder = tmp_path / "killed"
    common.make_data(folder)
    words = [*common.command(**kills.KINDS[1], steps=12), "--auto-resume"]
    process = common.tiny.start(*words, cwd=folder)
    common.wait_for(lambda: any((folder / common.RUN / "checkpoints").glob("step_000004")))
    assert common.kill_at_random(process, random.Random(0), 0.0)
    common.succeed(folder, *words)
    check_same_run(folder, wanted)


@pytest.fixture(scope="module")
def trials(tmp_path_factory) -> Outcome:
    """What is read in this process; the package does more through main.py."""
    parts = (damage.checkpoints, damage.records, damage.shards, damage.pickles)
    return damage.run(0, 0, tmp_path_factory.mktemp("damage"), parts)


def test_damage_is_refused_by_name(trials):
    assert trials.failures == []
    assert trials.seen["damages"] > 1000 and trials.seen["pickles"] == 3


@pytest.mark.slow
def test_runs_go_on_from_what_is_intact(tmp_path):
    assert damage.run(0, 0, tmp_path, (damage.resumed,)).failures == []


@pytest.mark.slow
@pytest.mark.skipif(not disk.can_mount(), reason="mounting a small disk needs root")
def test_full_disks_harm_nothing(tmp_path):
    assert disk.run(0, 0, tmp_path).failures == []


# --- The experiment itself must be able to fail ---


def test_a_failed_trial_is_told_and_its_folder_kept(tmp_path, capsys):
    def trial(rng, folder, seen):
        subprocess.Popen(["sleep", "60"], cwd=folder)
        (folder / "evidence").touch()
        raise AssertionError("the losses differ")

    outcome = Outcome()
    attempt(outcome, 7, tmp_path, "trial", trial)
    folder = tmp_path / "trial"
    assert (folder / "evidence").exists() and not processes_in(folder)
    (failure,) = outcome.failures
    assert "--seed 7" in failure and str(folder) in failure and "the losses differ" in failure
    assert failure in capsys.readouterr().out


def test_anything_but_one_sentence_is_found():
    good = "error: a is damaged; restore it.\n"
    check_sentence(1, good, "a ")
    for status, errors in (
        (1, f"Traceback (most recent call last):\n{good}"),
        (1, 2 * good),
        (1, "error: a is damaged;\nrestore it.\n"),
        (1, "error: b is damaged; restore it.\n"),
        (1, f"training 0%|  |{good}"),
        (1, ""),
        (0, good),
    ):
        with pytest.raises(AssertionError):
            check_sentence(status, errors, "a ")


def test_a_run_that_ended_otherwise_is_found(tmp_path):
    """One bit of one weight, one digit of one loss, one file too many."""
    kept, other = tmp_path / "a", tmp_path / "b"
    common.straight(kept, steps=4)
    for name, change in (
        ("checkpoints/step_000004/model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
        ("checkpoints/step_000004/optimizer.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
        ("metrics.jsonl", lambda b: b.replace(b'"lr": 0.003', b'"lr": 0.004', 1)),
        ("samples.md", lambda b: b + b"\n"),
        ("figures/other.png", None),
        ("checkpoints/.step_000002.tmp", None),
    ):
        shutil.copytree(kept, other)
        check_same_run(other, kept)
        path = other / common.RUN / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(change(path.read_bytes()) if change else b"other")
        with pytest.raises(AssertionError):
            check_same_run(other, kept)
        shutil.rmtree(other)
