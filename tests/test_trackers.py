"""Trackers show what metrics.jsonl says, and whatever becomes of them, training does not notice."""

import importlib.machinery
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from config import Config, UserError, replace
from tests.runs import go_on
from tests.tiny import ROOT, make_data, tiny_config, wait_for
from training import checkpoint
from training.logger import Logger, create_run
from training.trackers import check_trackers, run_id, tracker_values

LINES = [
    {"kind": "val", "step": 0, "tokens": 0, "loss": 5.5, "bits_per_byte": 1.75},
    {"kind": "train", "step": 1, "tokens": 64, "loss": 5.25, "lr": 0.5, "mfu": None},
    {"kind": "train", "step": 2, "tokens": 128, "loss": 4.5, "lr": 0.25, "mfu": None},
    {"kind": "val", "step": 2, "tokens": 128, "loss": 4.25},
    {"kind": "eval", "step": 2, "tokens": 128, "task": "lambada", "examples": 9, "accuracy": 0.5},
    {"kind": "train", "step": 3, "tokens": 192, "loss": 4.0, "lr": 0.125, "mfu": None},
]


@pytest.fixture
def run(tmp_path) -> Path:
    """The directory of a run without any metrics yet."""
    run = tmp_path / "runs" / "tiny"
    create_run(run, Config(name="tiny"))
    return run


def train_on(run: Path, lines: list[dict], step: int = 0, names=("tensorboard",)) -> Config:
    """Do with the record what a training does that begins at `step`; returns its config."""
    config = replace(Config(name="tiny"), {"train.trackers": tuple(names)})
    if (run / "tensorboard").exists():
        next_second()
    logger = Logger(run, config, step)
    for line in lines:
        logger.log(line)
    logger.close()
    return config


def next_second() -> None:
    """Wait for the clock: TensorBoard reads files in the order of the seconds in their names."""
    second = int(time.time())
    wait_for(lambda: int(time.time()) > second)


def recorded(run: Path) -> dict[str, list[tuple]]:
    """Return the points (step, value) that a tracker should have, by name."""
    points = {}
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        for name, value in tracker_values(line).items():
            points.setdefault(name, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    return points


def shown(run: Path) -> dict[str, list[tuple]]:
    """Return the points that TensorBoard reads from the files of a run, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


@pytest.fixture
def fake_wandb(monkeypatch) -> types.ModuleType:
    """A stand-in for wandb that keeps what it is given in `sessions` and fails where it is told to.

    `fails` maps init, log or finish to the call that raises, counted from 1.
    """
    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    fake.sessions, fake.fails, fake.first_step, fake.key = [], {}, 0, True

    def count(place: str, calls: dict[str, int]) -> None:
        calls[place] = calls.get(place, 0) + 1
        if calls[place] == fake.fails.get(place):
            raise ConnectionError(f"no network\nat {place}")

    class Session:
        url = "https://wandb.example/run"

        def __init__(self, **settings):
            self.settings, self.rows, self.finished, self.calls = settings, [], False, {}
            self.step = fake.first_step
            fake.sessions.append(self)
            count("init", self.calls)

        def log(self, values, step):
            count("log", self.calls)
            self.step = step
            self.rows.append((step, values))

        def finish(self):
            self.finished = True
            count("finish", self.calls)

    fake.init, fake.Settings, fake.login = Session, dict, lambda **_: fake.key
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_values_are_named_by_kind_and_task():
    assert tracker_values(LINES[0]) == {"tokens": 0, "val/loss": 5.5, "val/bits_per_byte": 1.75}
    assert tracker_values(LINES[1]) == {"tokens": 64, "train/loss": 5.25, "train/lr": 0.5}
    expected = {"tokens": 128, "eval/lambada/examples": 9, "eval/lambada/accuracy": 0.5}
    assert tracker_values(LINES[4]) == expected


def test_tensorboard_shows_the_record(run, capfd):
    pytest.importorskip("tensorboard")
    train_on(run, LINES)
    assert shown(run) == recorded(run)
    assert shown(run)["train/loss"] == [(1, 5.25), (2, 4.5), (3, 4.0)]
    assert "left out" not in capfd.readouterr().err


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_run_that_goes_back_shows_no_point_twice(run, step):
    pytest.importorskip("tensorboard")
    train_on(run, LINES)
    again = [{**line, "loss": 1.0} for line in LINES if line["step"] > step]
    train_on(run, again, step)
    assert shown(run) == recorded(run)
    assert shown(run)["train/loss"][-1] == (3, 1.0)


def test_a_tracker_that_comes_later_has_the_beginning_too(run):
    pytest.importorskip("tensorboard")
    train_on(run, LINES[:5], names=())
    train_on(run, LINES[5:], step=2)
    assert shown(run) == recorded(run)


def test_what_tensorboard_was_sent_is_there_once_it_is_synced(run):
    pytest.importorskip("tensorboard")
    logger = Logger(run, replace(Config(name="tiny"), {"train.trackers": ("tensorboard",)}), 0)
    logger.log(LINES[1])
    logger.sync()
    assert shown(run) == recorded(run)
    logger.close()


def test_wandb_is_given_a_run_of_its_own_for_good(run, fake_wandb, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = train_on(run, LINES, names=("wandb",))
    assert capsys.readouterr().err == "Weights & Biases: https://wandb.example/run\n"
    (session,) = fake_wandb.sessions
    assert session.rows == [(line["step"], tracker_values(line)) for line in LINES]
    assert session.finished
    settings = session.settings
    assert (settings["project"], settings["resume"]) == ("mine", "allow")
    assert settings["id"] == run_id(run, config) and settings["id"].startswith("tiny-")
    assert settings["dir"] == str(run) and settings["config"]["optim.lr"] == 6e-4


def test_the_id_changes_with_what_makes_a_run_another_one(run):
    config = Config(name="tiny")
    same = replace(config, {"train.device": "cpu", "train.micro_batch_size": 2})
    assert run_id(run, same) == run_id(run, config)
    for changes in ({"optim.lr": 1.0}, {"model.n_layer": 3}, {"train.seed": 3}, {"data": "else"}):
        assert run_id(run, replace(config, changes)) != run_id(run, config)


def test_wandb_is_not_sent_again_what_it_has(run, fake_wandb, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    train_on(run, LINES, names=("wandb",))
    # As wandb says of a run that it knows up to step 3.
    fake_wandb.first_step = 4
    train_on(run, [LINES[5], {**LINES[5], "step": 4}], step=2, names=("wandb",))
    first, second = fake_wandb.sessions
    assert first.settings["id"] == second.settings["id"]
    assert [step for step, _ in second.rows] == [4]


def test_without_an_account_wandb_is_left_out_and_asks_nothing(
    run, fake_wandb, monkeypatch, capsys
):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake_wandb.key = False
    train_on(run, LINES, names=("wandb",))
    (line,) = capsys.readouterr().err.splitlines()
    assert "wandb login" in line and "WANDB_MODE=offline" in line
    assert fake_wandb.sessions == []


def test_wandb_offline_keeps_the_record_for_later(run, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_on(run, LINES, names=("wandb",))
    assert capfd.readouterr() == ("", "")
    (path,) = run.glob("wandb/offline-run-*/run-tiny-*.wandb")
    rows = [
        {
            ".".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        for record in wandb_records(path)
        if record.HasField("history")
    ]
    # wandb makes one row of all that belongs to a step.
    assert [row["_step"] for row in rows] == [0, 1, 2, 3]
    assert [row.get("train/loss") for row in rows] == [None, 5.25, 4.5, 4.0]
    assert rows[2]["val/loss"] == 4.25 and rows[2]["eval/lambada/accuracy"] == 0.5
    # A run that goes on begins with the step it stands at. Directories are named by the second,
    # which tests are too fast for.
    path.parent.rename(run / "wandb" / "first")
    train_on(run, [{**LINES[5], "step": 4}], step=3, names=("wandb",))
    (path,) = run.glob("wandb/offline-run-*/run-tiny-*.wandb")
    steps = [record.history.step.num for record in wandb_records(path)]
    assert [step for step in steps if step] == [3, 4]


@pytest.mark.slow
def test_trackio_keeps_one_curve_of_a_run_that_goes_on(run, tmp_path):
    """In processes of their own, as it reads its settings when it is imported."""
    pytest.importorskip("trackio")
    program = (
        "import json, sys\nfrom pathlib import Path\nfrom tests.test_trackers import train_on\n"
        "train_on(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), ('trackio',))"
    )
    read = (
        "import json, sys\nfrom trackio import SQLiteStorage as s\n"
        "(name,) = s.get_runs('gpt2')\nprint(name)\nprint(json.dumps(s.get_logs('gpt2', name)))"
    )
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}

    def python(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )

    first = python(program, str(run), json.dumps(LINES), "0")
    assert first.stdout == "" and len(first.stderr.splitlines()) == 1
    again = [LINES[5], {**LINES[5], "step": 4, "loss": 3.0}]
    python(program, str(run), json.dumps(again), "2")
    name, logs = python(read).stdout.splitlines()
    assert name.startswith("tiny-")
    losses = [(x["step"], x["train/loss"]) for x in json.loads(logs) if "train/loss" in x]
    assert losses == [(1, 5.25), (2, 4.5), (3, 4.0), (4, 3.0)]


def wandb_records(path: Path) -> list:
    """Return the records of wandb's file once its own process has written the last of them.

    It is a log of LevelDB's kind, with another heading.
    """
    wait_for(lambda: _records(path)[-1:] and _records(path)[-1].HasField("exit"))
    return _records(path)


def _records(path: Path) -> list:
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, records, parts = path.read_bytes(), 7, [], b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        # Whole, or the last part of one.
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


def trained(config: Config) -> list[dict]:
    """Return what a training records, without what the clock says."""
    go_on(config)
    run = Path(config.train.runs_dir) / config.name
    lines = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("seconds", "tokens_per_second"):
            line.pop(name, None)
    return lines


@pytest.fixture(scope="module")
def untracked(data, tmp_path_factory) -> list[dict]:
    return trained(tiny_config(data, tmp_path_factory.mktemp("untracked"), sample_tokens=0))


@pytest.mark.parametrize("fails", [{}, {"init": 1}, {"log": 3}, {"finish": 1}], ids=str)
def test_training_does_not_notice_what_becomes_of_a_tracker(
    data, tmp_path, untracked, fake_wandb, monkeypatch, capsys, fails
):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    fake_wandb.fails = fails
    config = tiny_config(data, tmp_path, sample_tokens=0, trackers=("wandb",))
    assert trained(config) == untracked
    (session,) = fake_wandb.sessions
    errors = capsys.readouterr().err
    said = [line for line in errors.splitlines() if "wandb is left out" in line]
    assert len(said) == (1 if fails else 0)
    if fails:
        assert f"no network at {next(iter(fails))}" in said[0]
    rows = {"init": 0, "log": 2}.get(next(iter(fails), ""), len(untracked))
    assert len(session.rows) == rows


def test_training_and_resuming_are_shown_as_they_are_recorded(data, tmp_path, untracked):
    pytest.importorskip("tensorboard")
    config = tiny_config(data, tmp_path, sample_tokens=0, trackers=("tensorboard",))
    trained(replace(config, {"train.stop_at_step": 6}))
    # As after a kill: steps 5 and 6 are made again.
    shutil.rmtree(checkpoint.newest(tmp_path / "tiny"))
    next_second()
    assert trained(config) == untracked
    assert shown(tmp_path / "tiny") == recorded(tmp_path / "tiny")


def test_what_a_tracker_raises_may_be_anything(run, fake_wandb, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for error in (SystemExit(3), RecursionError(), RuntimeError("\x1b[31mred\n" * 99)):
        monkeypatch.setattr(
            fake_wandb, "init", lambda error=error, **_: (_ for _ in ()).throw(error)
        )
        train_on(run, LINES[:1], names=("wandb",))
        (line,) = capsys.readouterr().err.splitlines()
        assert "wandb is left out" in line and line.isprintable()


def test_a_package_that_is_absent_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed; `pip install wandb` brings it"):
        check_trackers(("wandb",))
    check_trackers(())
