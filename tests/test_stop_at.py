"""--train.stop-at: an early end of a run that stays the same run, with the schedule it had."""

import json
import os
import shlex
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import logs
import main
import metrics
import train as training
from checks import validate
from config import Config, UserError, changed_identity, identity_digest, last_update, replace
from distributed import World
from optim import lr_at
from tests.tiny import fields, make_data, tiny_config

ALONE = World(0, 1, torch.device("cpu"))
TOTAL = 12
# Muon's momentum rises over the whole run too.
MUON = {"optimizer": "muon", "momentum_warmup": 0.75, "schedule": "constant", "cooldown": 0.5}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    """A run of 12 updates that nothing stopped: saved at 4, 8, 12, validated at 5 and 10 too."""
    config = tiny_config(data, tmp_path_factory.mktemp("straight"), **MUON)
    run_to(config, None)
    return Path(config.train.runs_dir) / config.name


def run_to(config: Config, stop_at: int | None) -> tuple[int, bool]:
    """Train until `stop_at`, from the newest checkpoint where there is one; return as `train`."""
    run = Path(config.train.runs_dir) / config.name
    config = replace(config, {"train.stop_at": stop_at})
    if not run.exists():
        logs.create_run(run, config)
    return training.train(config, run, ALONE, checkpoint.newest(run))


def lines(run: Path, kind: str, *keys: str) -> list[tuple]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in keys) for line in found if line["kind"] == kind]


def steps(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.all_checkpoints(run)]


def assert_same_end(run: Path, straight: Path) -> None:
    """Bit for bit the same weights, optimizer state, losses and rates."""
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(checkpoint.checkpoint_path(r, TOTAL) / name) for r in (straight, run))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    keys = ("step", "loss", "lr", "grad_norm")
    assert lines(run, "train", *keys) == lines(straight, "train", *keys)
    assert lines(run, "val", "step", "loss")[-1] == lines(straight, "val", "step", "loss")[-1]


def test_it_ends_there_measured_and_saved_with_the_rates_of_the_whole_run(data, tmp_path):
    config = tiny_config(data, tmp_path, **MUON, log_interval=4)
    assert run_to(config, 6) == (6, True)
    run = tmp_path / "tiny"
    # 6 is a multiple of none of the intervals.
    assert lines(run, "val", "step") == [(0,), (4,), (5,), (6,)]
    assert steps(run) == [4, 6]
    assert lines(run, "train", "step", "lr") == [(k, lr_at(k, TOTAL, config.optim)) for k in (4, 6)]
    state = checkpoint.read_state(checkpoint.newest(run))
    assert state["val_loss"] == lines(run, "val", "loss")[-1][0]
    assert "## Step 6" in (run / "samples.md").read_text()


@pytest.mark.parametrize("ends", [(6, None), (3, 5, 10, TOTAL), (0, 4, 99)])
def test_resumed_it_ends_as_the_straight_run(data, straight, tmp_path, ends):
    config = tiny_config(data, tmp_path, **MUON)
    for end in ends:
        step = min(end or TOTAL, TOTAL) if end != 0 else 0
        assert run_to(config, end) == (step, True)
    assert_same_end(tmp_path / "tiny", straight)


def test_past_the_end_is_the_end(data, straight, tmp_path):
    assert run_to(tiny_config(data, tmp_path, **MUON), 99) == (TOTAL, True)
    run = tmp_path / "tiny"
    assert_same_end(run, straight)
    assert lines(run, "val", "step", "loss") == lines(straight, "val", "step", "loss")
    assert steps(run) == steps(straight) == [4, 8, 12]


@pytest.mark.parametrize("end", [0, 4, 6])
def test_before_the_step_a_run_stands_at_nothing_happens(data, tmp_path, end):
    config = tiny_config(data, tmp_path, **MUON)
    run_to(config, 6)
    run = tmp_path / "tiny"
    names = ("metrics.jsonl", "samples.md", "checkpoints/step_000006/state.json")
    before = [(run / name).read_bytes() for name in names]
    assert run_to(config, end) == (6, True)
    assert [(run / name).read_bytes() for name in names] == before and steps(run) == [4, 6]


@pytest.mark.parametrize(
    ("stop_at", "start", "last"),
    [(None, 0, 12), (5, 0, 5), (5, 5, 5), (5, 7, 7), (0, 0, 0), (99, 3, 12), (12, 12, 12)],
)
def test_where_a_start_ends(stop_at, start, last):
    config = replace(Config(), {"train.updates": TOTAL, "train.stop_at": stop_at})
    assert last_update(config, start) == last


def test_it_is_no_part_of_what_a_run_is():
    config = replace(Config(), {"train.updates": TOTAL})
    stopped = replace(config, {"train.stop_at": 3})
    assert identity_digest(stopped) == identity_digest(config)
    assert changed_identity(config, stopped) == []
    with pytest.raises(UserError, match=r"train\.stop_at must not be negative"):
        validate(replace(config, {"train.stop_at": -1}))


def test_tables_say_so(data, tmp_path):
    config = tiny_config(data, tmp_path, sample_tokens=0)
    run = tmp_path / "tiny"
    for end, progress in ((3, "3 of 12, stopped early"), (TOTAL, "12 of 12")):
        run_to(config, end)
        assert metrics.read_run(run).progress == progress


def command(text: str) -> list[str]:
    """Return the arguments of the command that is the last line, or ends it."""
    line = text.strip().splitlines()[-1]
    return shlex.split(line.partition("python main.py ")[2].partition("   ")[0])


def launch(args: list[str], capsys) -> list[str]:
    """Run main.py in this process; return the arguments that its last line gives to go on."""
    main.launch(main.resolve(args), ALONE)
    return command(capsys.readouterr().out)


def start(data: Path, runs: Path, stop_at: int, capsys) -> list[str]:
    config = tiny_config(data, runs, **MUON, stop_at=stop_at, sample_tokens=0)
    optim = [f"--optim.{name.replace('_', '-')}={value}" for name, value in MUON.items()]
    optim += [f"--optim.lr={config.optim.lr}", f"--optim.warmup={config.optim.warmup}"]
    words = ["--data", str(data), "--size", "nano", "--name", "tiny", *optim, *fields(config)]
    return launch(words, capsys)


@pytest.fixture
def no_figures(tmp_path, monkeypatch) -> None:
    """Drawing them takes longer than all the rest."""
    monkeypatch.setattr("results.report", lambda runs: None)
    monkeypatch.chdir(tmp_path)


def test_the_last_line_says_how_to_go_on(data, straight, tmp_path, no_figures, capsys):
    again = start(data, tmp_path, 3, capsys)
    assert again[:2] == ["--resume", "tiny"] and again[-2:] == ["--train.stop-at", "12"]
    assert steps(tmp_path / "tiny") == [3]
    launch(again, capsys)
    assert_same_end(tmp_path / "tiny", straight)


def test_a_signal_after_that_leaves_a_command_that_goes_on_too(
    data, straight, tmp_path, no_figures, monkeypatch, capsys
):
    """config.json still has the first start's end, which is behind."""
    again = start(data, tmp_path, 3, capsys)
    update = training.update

    def interrupted(trainer, windows, step):
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(trainer, windows, step)

    with monkeypatch.context() as patch:
        patch.setattr(training, "update", interrupted)
        again = launch(again, capsys)
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "tiny")) == 7
    launch(again, capsys)
    assert_same_end(tmp_path / "tiny", straight)
