"""A little of what `python -m tests.torture` does at length."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.torture import damage, disk, preparation, training, worlds
from tests.torture.common import (
    Difference,
    Outcome,
    attempt,
    check_nothing_hidden,
    check_refusal,
    check_same_files,
    processes_in,
)
from tests.torture.runs import DATA, RUN, check_same_run, make_data

pytestmark = pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="needs Linux's /proc")


def test_killed_runs_end_like_the_undisturbed_one(tmp_path):
    text, outcome = training.run(0, 2, tmp_path)
    assert not outcome.failures
    assert outcome.seen.total() >= 2 and "bitwise" in text


def test_killed_preparations_end_with_the_same_bytes(tmp_path):
    text, outcome = preparation.run(0, 2, tmp_path)
    assert not outcome.failures
    assert outcome.seen["kills"] >= 2 and "no worker left alive" in text


def test_runs_move_between_numbers_of_processes(tmp_path):
    _, outcome = worlds.run(0, 0, tmp_path, kinds=(("shuffle_documents", "adamw"),))
    assert not outcome.failures
    assert outcome.seen["stops by a signal"] == 2


def test_damage_is_refused_by_name(tmp_path):
    """What is read in this process, and one resumption; the module does more through main.py."""
    quick = [name for name, _ in damage.TRIALS if "main.py" not in name]
    chosen = {*quick, "main.py --resume with no intact checkpoint"}
    _, outcome = damage.run(0, 0, tmp_path, only=lambda name: name in chosen)
    assert not outcome.failures
    assert outcome.seen["damages"] > 1000 and outcome.seen["pickles"] > 0


@pytest.mark.skipif(not disk.can_mount(), reason="mounting a small disk needs root")
def test_full_disks_harm_nothing(tmp_path):
    kinds = ("a checkpoint", "a download")
    _, outcome = disk.run(0, 0, tmp_path, kinds=kinds, rounds=1)
    assert not outcome.failures
    assert outcome.seen == dict.fromkeys(kinds, 1)


# --- The experiment itself must be able to fail ---


def test_a_failed_trial_is_told_and_its_folder_kept(tmp_path, capsys):
    def trial(rng, folder, seen):
        subprocess.Popen(["sleep", "60"], cwd=folder)
        (folder / "evidence").touch()
        raise Difference("the losses differ")

    outcome = Outcome()
    attempt(outcome, 7, tmp_path / "part", 3, "name", trial)
    folder = tmp_path / "part" / "trial_003"
    assert (folder / "evidence").exists() and not processes_in(folder)
    (failure,) = outcome.failures
    assert "--seed 7" in failure and str(folder) in failure and "the losses differ" in failure
    assert failure in capsys.readouterr().out


@pytest.mark.parametrize(
    "errors",
    [
        "Traceback (most recent call last):\nerror: a is damaged; restore it.\n",
        "error: a is damaged; restore it.\nerror: a is damaged; restore it.\n",
        "error: a is damaged;\nrestore it.\n",
        "error: b is damaged; restore it.\n",
        "training 0%|  |error: a is damaged; restore it.\n",
        "",
    ],
)
def test_anything_but_one_sentence_is_found(errors):
    check_refusal(
        subprocess.CompletedProcess([], 1, "", "error: a is damaged; restore it.\n"), "a "
    )
    with pytest.raises(Difference):
        check_refusal(subprocess.CompletedProcess([], 1, "", errors), "a ")
    with pytest.raises(Difference):
        check_refusal(subprocess.CompletedProcess([], 0, "", "error: a is damaged.\n"), "a ")


def test_other_and_stray_files_are_found(tmp_path):
    check_same_files({"a": b"1"}, {"a": b"1"})
    for other in ({"a": b"2"}, {}, {"a": b"1", "b": b""}):
        with pytest.raises(Difference):
            check_same_files(other, {"a": b"1"})
    check_nothing_hidden(tmp_path)
    (tmp_path / ".step_000002.tmp").mkdir()
    with pytest.raises(Difference):
        check_nothing_hidden(tmp_path)


def test_a_run_that_ended_otherwise_is_found(tmp_path):
    """One bit of one weight, one digit of one loss, one file too many."""
    kept = damage.finished_run(tmp_path / "a")
    other = tmp_path / "b"
    for name, change in (
        ("checkpoints/step_000012/model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
        ("checkpoints/step_000012/optimizer.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
        ("metrics.jsonl", lambda b: b.replace(b'"lr": 0.003', b'"lr": 0.004', 1)),
        ("samples.md", lambda b: b + b"\n"),
        ("figures/other.png", None),
    ):
        shutil.copytree(kept, other)
        check_same_run(other, kept)
        path = other / RUN / name
        path.write_bytes(change(path.read_bytes()) if change else b"other")
        with pytest.raises(Difference):
            check_same_run(other, kept)
        shutil.rmtree(other)


def test_the_data_is_what_is_documented(tmp_path):
    from shards import TokenStream
    from verify import verify_data

    data = make_data(tmp_path / DATA)
    assert "the digests of 4 are right" in verify_data(data, quiet=True)
    assert len(TokenStream(data, "train")) == 9000
