"""Benchmarks while a run trains: when they are scored, what is written, and that nothing moves."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import benchmark
import checkpoint
import logs
from config import Config, UserError, replace
from distributed import World
from scoring import Scorer
from tests.tiny import fields, make_data, script, tiny_config
from tokenizer import gpt2_tokenizer
from tqdm_bars import TrainingBar
from train import train

ALONE = World(0, 1, torch.device("cpu"))
ROWS = 12
# Nothing listens there, so that no test waits for the network.
OFFLINE = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("data") / "tiny"
    return make_data(directory, shard_tokens=1000, tokenizer=gpt2_tokenizer())


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory) -> Path:
    """A directory of evaluation data that holds a small HellaSwag."""
    directory = tmp_path_factory.mktemp("benchmarks")
    words = ["the cat", "a mat", "home again", "the dog ran", "on and on"]
    rows = [
        {
            "activity_label": "Cats",
            "ctx_a": f"The cat sat on {words[i % 5]}.",
            "ctx_b": "it",
            "ctx": f"The cat sat on {words[i % 5]}. It",
            "endings": [f"{words[(i + j) % 5]} {'again ' * (j * i % 3)}sat." for j in range(4)],
            "label": i % 4,
        }
        for i in range(ROWS)
    ]
    (directory / "hellaswag").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "hellaswag" / "hellaswag_val.jsonl").write_text(text)
    return directory


@pytest.fixture
def hellaswag(benchmarks, tmp_path, monkeypatch) -> None:
    """GPT2_DATA names that directory, and nothing is in data/."""
    monkeypatch.setenv("GPT2_DATA", str(benchmarks))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def straight(data, benchmarks, tmp_path_factory) -> Path:
    """A run that nothing disturbed, scored on two tasks."""
    runs = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2_DATA", str(benchmarks))
        patch.chdir(runs)
        return run_training(two_tasks(data, runs))


@pytest.fixture
def nothing_here(tmp_path, monkeypatch) -> None:
    """No evaluation data, and no network to fetch it from."""

    def download(url, *arguments, **options):
        raise UserError(f"{url} could not be fetched.")

    monkeypatch.delenv("GPT2_DATA", raising=False)
    monkeypatch.setattr(benchmark, "download", download)
    monkeypatch.chdir(tmp_path)


def config_of(data: Path, runs: Path, **changes: object) -> Config:
    """Return a config of 8 updates, measured by benchmark after every third, saved at 4 and 8."""
    changes = {"updates": 8, "eval_interval": 3, "vocab_size": 50257, "sample_tokens": 0} | changes
    return tiny_config(data, runs, val_tokens=128, **changes)


def two_tasks(data: Path, runs: Path) -> Config:
    """Return a config whose updates 0, 3, 6, 8 are scored, 0, 4, 6, 8 validated, 4 and 8 saved."""
    return config_of(data, runs, val_interval=6, eval_tasks=("hellaswag", "hellaswag-cleaned"))


def run_training(config: Config, resumed: Path | None = None) -> Path:
    run = Path(config.train.runs_dir) / config.name
    if resumed is None:
        logs.create_run(run, config)
    train(config, run, ALONE, resumed)
    return run


def lines(run: Path, kind: str = "eval") -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def record(run: Path) -> list[dict]:
    """Return the metric lines without what a clock has measured."""
    clock = {"seconds", "tokens_per_second"}
    text = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in text]


def test_a_run_is_scored_at_its_interval_and_at_both_ends(data, hellaswag, tmp_path, capsys):
    run = run_training(config_of(data, tmp_path))
    found = lines(run)
    assert [line["step"] for line in found] == [0, 3, 6, 8]
    keys = ["kind", "step", "tokens", "task", "examples", "acc", "acc_stderr"]
    assert list(found[0]) == [*keys, "acc_norm", "acc_norm_stderr", "seconds"]
    assert (found[1]["task"], found[1]["examples"], found[1]["tokens"]) == ("hellaswag", ROWS, 768)
    for line in found:
        p = line["acc_norm"]
        assert p * ROWS == pytest.approx(round(p * ROWS))
        assert line["acc_norm_stderr"] == pytest.approx((p * (1 - p) / (ROWS - 1)) ** 0.5)
    shown = capsys.readouterr().out
    assert f"hellaswag every 3 updates: {ROWS} examples, " in shown
    p, error = (100 * found[1][name] for name in ("acc_norm", "acc_norm_stderr"))
    assert f"step      3: hellaswag acc_norm {p:.2f} ± {error:.2f} %, acc " in shown


def test_a_checkpoint_has_the_latest_scores_and_the_step_they_are_of(data, hellaswag, tmp_path):
    run = run_training(config_of(data, tmp_path))
    for step, scored in ((4, 3), (8, 8)):
        state = checkpoint.read_state(checkpoint.checkpoint_path(run, step))
        (line,) = (line for line in lines(run) if line["step"] == scored)
        names = ("step", "acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
        assert state["scores"] == {"hellaswag": {name: line[name] for name in names}}


def test_the_first_examples_only_and_the_line_says_so(data, hellaswag, tmp_path, capsys):
    run = run_training(config_of(data, tmp_path, updates=0, eval_limit=5))
    assert [line["examples"] for line in lines(run)] == [5]
    assert "hellaswag (only 5 examples) acc_norm " in capsys.readouterr().out


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_evaluation_moves_no_weight_and_no_loss(data, hellaswag, tmp_path, dropout):
    runs = [
        run_training(config_of(data, tmp_path / str(every), eval_interval=every, dropout=dropout))
        for every in (0, 1)
    ]
    assert [len(lines(run)) for run in runs] == [0, 9]
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(checkpoint.checkpoint_path(run, 8) / name) for run in runs)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    a, b = ([line for line in record(run) if line["kind"] != "eval"] for run in runs)
    assert a == b


@pytest.mark.parametrize("interval", [0, 3])
def test_without_the_data_one_line_says_so_and_the_run_goes_on(
    data, nothing_here, tmp_path, capsys, interval
):
    run = run_training(config_of(data, tmp_path, eval_interval=interval))
    shown = capsys.readouterr().out
    # What is never to be scored is not looked for.
    assert shown.count("is not scored") == (interval > 0)
    assert ("hellaswag is not scored: https://" in shown) == (interval > 0)
    assert lines(run) == [] and lines(run, "train")[-1]["step"] == 8
    assert checkpoint.read_state(checkpoint.newest(run))["scores"] is None


def test_a_damaged_file_or_a_vocabulary_that_does_not_fit_is_one_line_too(
    data, hellaswag, tmp_path, capsys, monkeypatch
):
    characters = make_data(tmp_path / "characters")
    run_training(tiny_config(characters, tmp_path / "a", updates=1, eval_interval=1))
    shown = capsys.readouterr().out
    assert shown.count("hellaswag is not scored: ") == 1
    assert "vocabulary" in shown
    damaged = tmp_path / "hellaswag" / "hellaswag_val.jsonl"
    damaged.parent.mkdir()
    monkeypatch.setenv("GPT2_DATA", str(tmp_path))
    damaged.write_text('{"ctx": \n')
    run_training(config_of(data, tmp_path / "b", updates=1))
    assert "hellaswag_val.jsonl, line 1 is not valid JSON" in capsys.readouterr().out
    assert lines(tmp_path / "a" / "tiny") == lines(tmp_path / "b" / "tiny") == []


# Each evaluation is two scores, so the third is the first one of update 3.
@pytest.mark.parametrize(
    ("score", "step", "kept"),
    [
        (1, 0, []),
        (2, 0, ["hellaswag"]),
        (4, 3, ["hellaswag"]),
        (5, 6, []),
        (6, 6, ["hellaswag"]),
        (8, 8, ["hellaswag"]),
    ],
)
def test_a_run_stopped_while_it_is_scored_ends_like_a_straight_one(
    data, hellaswag, straight, tmp_path, score, step, kept
):
    config = two_tasks(data, tmp_path)
    run = tmp_path / config.name
    logs.create_run(run, config)
    assert _signal_in_score(score, config, run) == (step, False)
    assert [line["task"] for line in lines(run) if line["step"] == step] == kept
    newest = checkpoint.newest(run)
    assert (newest is None) == (step == 0)
    if newest:
        assert checkpoint.read_state(newest)["val_loss"] is None
    train(config, run, ALONE, newest)
    assert record(run) == record(straight)
    a, b = (checkpoint.read_state(checkpoint.checkpoint_path(r, 8)) for r in (straight, run))
    assert a["scores"] == b["scores"] and a["sha256"] == b["sha256"]


def _signal_in_score(number: int, config: Config, run: Path) -> tuple[int, bool]:
    """Train until a signal that comes as the score of that number begins; return as `train`."""
    calls, score = 0, Scorer.score

    def patched(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
        return score(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "score", patched)
        return train(config, run, ALONE)


def test_two_processes_score_as_one_and_leave_out_what_is_missing_together(
    data, hellaswag, tmp_path
):
    base = config_of(data, tmp_path, micro_batch=1, updates=4, eval_tasks=("hellaswag", "cbt"))
    scores = {}
    for processes in (1, 2):
        config = replace(base, {"name": str(processes)})
        command = ["main.py", "--data", data, "--name", config.name, *fields(config)]
        result = script(*command, cwd=tmp_path, processes=processes, **OFFLINE)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("cbt is not scored: ") == 1
        assert result.stdout.count("step      3: hellaswag acc_norm ") == 1
        found = [line for line in record(tmp_path / config.name) if line["kind"] == "eval"]
        scores[processes] = found
    assert [line["step"] for line in scores[1]] == [0, 3, 4]
    assert scores[1] == scores[2]


def test_time_spent_on_benchmarks_is_not_training_time(data, hellaswag, tmp_path, monkeypatch):
    score = Scorer.score

    def slow(self, *arguments):
        time.sleep(0.5)
        return score(self, *arguments)

    monkeypatch.setattr(Scorer, "score", slow)
    run = run_training(config_of(data, tmp_path, eval_interval=1, updates=2))
    assert lines(run, "train")[-1]["seconds"] < 0.5
    assert all(line["seconds"] > 0.5 for line in lines(run))


def test_the_bar_shows_the_score(capsys):
    bar = TrainingBar(0, 3, 1000)
    bar.start()
    bar.show_score("hellaswag acc_norm 29.4%")
    for loss in (5.0, 4.0, 3.0):
        bar.update(loss)
    bar.close()
    assert "left, hellaswag acc_norm 29.4%" in capsys.readouterr().err
