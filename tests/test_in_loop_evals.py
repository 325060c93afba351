"""Benchmarks while a run trains: when they are scored, what is written, and that nothing moves."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from config import Config, replace
from corpus.tokenizer import gpt2_tokenizer
from model import GPT
from scoring import Scorer
from tests.runs import TENSORS, column, go_on, metrics, run_training, tensors
from tests.tiny import command, make_data, script, tiny_config
from training import checkpoint

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


@pytest.fixture(autouse=True)
def here(benchmarks, tmp_path, monkeypatch) -> None:
    """GPT2_DATA names that directory, nothing is in data/, and there is no network."""
    monkeypatch.setenv("GPT2_DATA", str(benchmarks))
    monkeypatch.chdir(tmp_path)
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def straight(data, benchmarks, tmp_path_factory) -> Path:
    """A run that nothing disturbed, scored on two tasks."""
    runs = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2_DATA", str(benchmarks))
        patch.chdir(runs)
        return run_training(two_tasks(data, runs))


def config_of(data: Path, runs: Path, **changes: object) -> Config:
    """Return a config of 8 steps, scored after every third, saved at 4 and 8."""
    changes = {"steps": 8, "eval_interval": 3, "vocab_size": 50257, "sample_tokens": 0} | changes
    return tiny_config(data, runs, val_tokens=128, **changes)


def two_tasks(data: Path, runs: Path) -> Config:
    """Return a config whose steps 0, 3, 6, 8 are scored, 0, 4, 6, 8 validated, 4 and 8 saved."""
    return config_of(data, runs, val_interval=6, eval_tasks=("hellaswag", "hellaswag-cleaned"))


def test_a_run_is_scored_at_its_interval_and_at_both_ends(data, tmp_path, capsys):
    found = metrics(run_training(config_of(data, tmp_path)), "eval")
    assert [line["step"] for line in found] == [0, 3, 6, 8]
    keys = {"kind", "step", "tokens", "task", "examples", "acc", "acc_norm", "seconds"}
    assert keys < found[0].keys()
    assert (found[1]["task"], found[1]["examples"], found[1]["tokens"]) == ("hellaswag", ROWS, 768)
    for line in found:
        p = line["acc_norm"]
        assert p * ROWS == pytest.approx(round(p * ROWS))
        assert line["acc_norm_stderr"] == pytest.approx((p * (1 - p) / (ROWS - 1)) ** 0.5)
    shown = f"step      3: hellaswag acc_norm {100 * found[1]['acc_norm']:.2f}"
    assert shown in capsys.readouterr().out


def test_the_first_examples_only_and_the_line_says_so(data, tmp_path, capsys):
    run = run_training(config_of(data, tmp_path, steps=0, eval_limit=5))
    assert column(run, "eval", "examples") == [(5,)]
    assert "hellaswag (only 5 examples) acc_norm " in capsys.readouterr().out


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_evaluation_moves_no_weight_and_no_loss(data, tmp_path, dropout):
    runs = [
        run_training(config_of(data, tmp_path / str(every), eval_interval=every, dropout=dropout))
        for every in (0, 1)
    ]
    assert [len(metrics(run, "eval")) for run in runs] == [0, 9]
    for name in TENSORS:
        a, b = (tensors(run, 8, name) for run in runs)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    a, b = (metrics(run, "train", "val", times=False) for run in runs)
    assert a == b


@pytest.mark.parametrize(
    ("task", "content", "interval", "said"),
    [
        ("lambada", None, 3, "lambada is not scored: "),
        # What is never to be scored is not looked for.
        ("lambada", None, 0, ""),
        ("hellaswag", '{"ctx": \n', 3, "hellaswag_val.jsonl, line 1"),
    ],
)
def test_without_good_data_one_line_says_so_and_the_run_goes_on(
    data, tmp_path, monkeypatch, capsys, task, content, interval, said
):
    if content is not None:
        (tmp_path / "hellaswag").mkdir()
        (tmp_path / "hellaswag" / "hellaswag_val.jsonl").write_text(content)
        monkeypatch.setenv("GPT2_DATA", str(tmp_path))
    run = run_training(config_of(data, tmp_path, eval_interval=interval, eval_tasks=(task,)))
    shown = capsys.readouterr().out
    assert said in shown and shown.count("is not scored") == (interval > 0)
    assert metrics(run, "eval") == [] and column(run, "train", "step")[-1] == (8,)


def test_a_vocabulary_that_does_not_fit_is_one_line_too(tmp_path, capsys):
    characters = make_data(tmp_path / "characters")
    run = run_training(tiny_config(characters, tmp_path, steps=1, eval_interval=1))
    shown = capsys.readouterr().out
    assert shown.count("hellaswag is not scored: ") == 1 and "vocabulary" in shown
    assert metrics(run, "eval") == []


# Each evaluation is two scores, so the third is the first one of step 3.
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
    data, straight, tmp_path, score, step, kept
):
    config = two_tasks(data, tmp_path)
    assert signal_in_score(score, config) == (step, False)
    run = tmp_path / config.name
    assert [line["task"] for line in metrics(run, "eval") if line["step"] == step] == kept
    newest = checkpoint.newest(run)
    assert (newest is None) == (step == 0)
    go_on(config)
    assert in_order(run) == in_order(straight)
    a, b = (checkpoint.read_state(checkpoint.checkpoint_path(r, 8)) for r in (straight, run))
    assert a["sha256"] == b["sha256"] and a["val_loss"] == b["val_loss"]


def in_order(run: Path) -> list[dict]:
    """Return what was recorded, whichever came first of what belongs to one step."""
    lines = metrics(run, times=False)
    return sorted(lines, key=lambda line: (line["step"], line["kind"], line.get("task")))


def signal_in_score(number: int, config: Config) -> tuple[int, bool]:
    """Train until a signal that comes as the score of that number begins; return as `train`."""
    calls, score = 0, Scorer.score

    def patched(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return score(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scorer, "score", patched)
        return go_on(config)


@pytest.mark.slow
def test_two_processes_score_as_one_and_leave_out_what_is_missing_together(data, tmp_path):
    changes = {"steps": 4, "eval_tasks": ("hellaswag", "cbt")}
    config = config_of(data, tmp_path, micro_batch_size=1, **changes)
    one = run_training(replace(config, {"name": "one"}))
    result = script(*command(config, "two"), cwd=tmp_path, processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("cbt is not scored: ") == 1
    assert result.stdout.count("step      3: hellaswag acc_norm ") == 1
    assert column(one, "eval", "step") == [(0,), (3,), (4,)]
    assert metrics(one, "eval", times=False) == metrics(tmp_path / "two", "eval", times=False)


def test_time_spent_beside_training_is_not_training_time(data, tmp_path, monkeypatch):
    """By a clock that jumps by an hour in every score, and in every batch of a validation."""
    clock, score, forward, hours = time.perf_counter, Scorer.score, GPT.forward, 0

    def later(original):
        def patched(self, *arguments):
            nonlocal hours
            hours += 0 if original is forward and self.training else 1
            return original(self, *arguments)

        return patched

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + 3600 * hours)
    monkeypatch.setattr(Scorer, "score", later(score))
    monkeypatch.setattr(GPT, "forward", later(forward))
    run = run_training(config_of(data, tmp_path, eval_interval=1, val_interval=1, steps=2))
    assert hours > 5 and column(run, "train", "seconds")[-1][0] < 3600
    assert all(seconds > 3600 for (seconds,) in column(run, "eval", "seconds"))
