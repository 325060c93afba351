"""Runs of the ladder: exact continuation, the climb, its figures, and the command line."""

import dataclasses
import json
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file

from config import UserError
from makemore import __main__ as command
from makemore import train as module
from makemore.climb import climb
from makemore.data import load
from makemore.figures import labels
from makemore.rungs import RUNGS
from makemore.train import train
from tests.test_makemore import small, some_text, some_words, write_words

pytestmark = pytest.mark.slow


@pytest.fixture
def words(tmp_path):
    return some_words(tmp_path)


@pytest.fixture
def text(tmp_path):
    return some_text(tmp_path)


def stopped_after(monkeypatch, step: int) -> None:
    """Let the process die in the step after `step`, as if by a signal it cannot catch."""
    one_step = module._Run.one_step

    def dies(run, number: int) -> None:
        if number > step:
            raise SystemExit
        one_step(run, number)

    monkeypatch.setattr(module._Run, "one_step", dies)


def curve(result) -> list[tuple]:
    """Return a run's evaluations without the seconds, which are never the same."""
    return [(step, *losses) for step, _, *losses in result.record.curve]


def same(first, second) -> bool:
    """Say whether two runs ended with the same bits: weights, moments, measurements."""
    one, other = (load_file(path / "checkpoint.safetensors") for path in (first, second))
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("rung", RUNGS[1:])
@pytest.mark.parametrize("kind", ["words", "text"])
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(
    rung, kind, request, tmp_path, monkeypatch
):
    data = request.getfixturevalue(kind)
    settings = small(rung, data, dropout=0.0 if rung == "nn_bigram" else 0.2)
    straight = train(data, settings, tmp_path / "straight", quiet=True)
    with monkeypatch.context() as patch:
        stopped_after(patch, 13)
        with pytest.raises(SystemExit):
            train(data, settings, tmp_path / "killed", quiet=True)
    killed = train(data, settings, tmp_path / "killed", quiet=True)
    assert same(tmp_path / "straight", tmp_path / "killed")
    assert curve(killed) == curve(straight) and len(curve(straight)) == 15
    assert killed.record.ratios == straight.record.ratios
    assert killed.finished


def test_a_run_that_is_asked_to_stop_goes_on_from_the_step_in_hand(words, tmp_path):
    settings, asked = small("wavenet", words), threading.Event()
    straight = train(words, settings, tmp_path / "straight", quiet=True)
    asked.set()
    for _ in range(3):
        assert not train(words, settings, tmp_path / "stopped", asked.is_set, quiet=True).finished
    asked.clear()
    ended = train(words, settings, tmp_path / "stopped", asked.is_set, quiet=True)
    assert ended.finished and curve(ended) == curve(straight)
    assert same(tmp_path / "straight", tmp_path / "stopped")


def test_a_finished_run_is_read_and_not_trained(words, tmp_path, monkeypatch):
    settings = small("mlp", words)
    first = train(words, settings, tmp_path / "run", quiet=True)
    stopped_after(monkeypatch, 0)
    again = train(words, settings, tmp_path / "run", quiet=True)
    assert again.finished and again.losses == first.losses
    assert again.record.seconds == first.record.seconds
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_other_settings_under_the_same_name_are_refused(words, tmp_path):
    train(words, small("mlp", words), tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match=r"steps 30 -> 31\); give another --name"):
        settings = dataclasses.replace(small("mlp", words), steps=31)
        train(words, settings, tmp_path / "run", quiet=True)


def test_other_data_of_the_same_name_is_refused(words, tmp_path):
    train(words, small("bigram", words), tmp_path / "run", quiet=True)
    other = load(str(tmp_path / "some.txt"), seed=2)
    with pytest.raises(UserError, match="digest"):
        train(other, small("bigram", other), tmp_path / "run", quiet=True)


@pytest.mark.parametrize("damage", [b"", b"rubbish" * 99])
def test_a_damaged_checkpoint_is_named(words, tmp_path, damage):
    settings = small("mlp", words)
    train(words, settings, tmp_path / "run", quiet=True)
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(damage)
    with pytest.raises(UserError, match=r"checkpoint.safetensors is damaged"):
        train(words, settings, tmp_path / "run", quiet=True)


def test_a_loss_that_is_not_finite_ends_the_run_in_a_sentence(words, tmp_path):
    settings = dataclasses.replace(small("mlp", words), lr=float("inf"))
    with pytest.raises(UserError, match="is not finite: the training diverged"):
        train(words, settings, tmp_path / "run", quiet=True)


def test_training_learns(words, tmp_path):
    result = train(words, small("mlp", words), tmp_path / "run", quiet=True)
    first, last = curve(result)[0], curve(result)[-1]
    assert last[2] < first[2] - 0.3 and last[0] == 30


# --- The climb and the command line ---


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A directory to work in, with a list of words."""
    write_words(tmp_path / "some.txt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def say(monkeypatch, *words: str) -> None:
    """Call the script with these words on its command line."""
    monkeypatch.setattr(sys, "argv", ["makemore", *words])
    command.main()


def test_a_climb_writes_one_object_a_rung_a_table_and_a_figure(work, monkeypatch, capsys):
    say(monkeypatch, "climb", "--data", "some.txt", "--steps", "3")
    climbed = json.loads((work / "runs/makemore/climb.json").read_text())
    assert [row["rung"] for row in climbed] == list(RUNGS)
    for row in climbed:
        assert {"parameters", "train_loss", "val_loss", "seconds"} <= row.keys()
        assert row["parameters"] > 0 and 0 < row["val_loss"] < 4 and row["seconds"] > 0
        assert len(row["words"]) == 5
        assert all(word.endswith((" (new)", " (seen)")) for word in row["words"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(RUNGS) and len(set(map(len, lines))) == 1
    assert "parameters | context | train" in lines[0]
    assert (work / "runs/makemore/climb.png").stat().st_size > 10_000
    assert sorted(p.name for p in work.iterdir()) == ["runs", "some.txt"]


def test_an_interrupted_climb_goes_on_and_tells_the_same(work, monkeypatch):
    data = load("some.txt", 1)
    straight = climb(data, 1, "straight", work, steps=3, quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_count", lambda *_: pytest.fail("climbed without being asked"))
        with pytest.raises(UserError):
            climb(data, 1, "straight", work, steps=4, quiet=True)
    asked = threading.Event()
    asked.set()
    assert climb(data, 1, "other", work, steps=3, asked=asked.is_set, quiet=True) is None
    again = climb(data, 1, "other", work, steps=3, quiet=True)
    timeless = [
        [{k: v for k, v in row.items() if k not in ("seconds", "curve")} for row in rows]
        for rows in (straight, again)
    ]
    assert timeless[0] == timeless[1]


def test_a_climb_on_running_text_climbs(work, text):
    climbed = climb(text, 1, "text", work, steps=2, quiet=True)
    assert [row["context"] for row in climbed][:4] == [1, 1, 3, 8]


def test_a_climb_that_ends_in_a_word_too_long_does_not_begin(work, monkeypatch):
    (work / "long.txt").write_text("\n".join([*(f"w{i}" for i in range(20)), "x" * 30]))
    with pytest.raises(UserError, match="The longest word of long has 30 characters"):
        say(monkeypatch, "climb", "--data", "long.txt")
    assert not (work / "runs").exists()


@pytest.mark.parametrize(
    ("rung", "drawn"),
    [
        ("bigram", {"counts.png", "counts.svg"}),
        ("mlp", {"embedding.png", "embedding.svg", "insides.png", "insides.svg"}),
        ("wavenet", {"insides.png", "insides.svg"}),
    ],
)
def test_a_rung_is_trained_drawn_and_asked_for_words(work, monkeypatch, capsys, rung, drawn):
    say(monkeypatch, rung, "--data", "some.txt", "--steps", "3", "--samples", "4")
    said = capsys.readouterr().out
    assert "some: a list of 216 words" in said and f"{rung}: " in said
    assert sum(line.endswith(("(new)", "(seen)")) for line in said.splitlines()) == 4
    found = {path.name for path in (work / f"runs/makemore/{rung}-some").iterdir()}
    assert found - {".lock", "settings.json", "checkpoint.safetensors"} == drawn


def test_the_same_command_makes_more_words_without_training(work, monkeypatch, capsys):
    say(monkeypatch, "mlp", "--data", "some.txt", "--steps", "3", "--norm", "batch")
    first = capsys.readouterr().out
    stopped_after(monkeypatch, 0)
    say(monkeypatch, "mlp", "--data", "some.txt", "--steps", "3", "--norm", "batch")
    assert capsys.readouterr().out == first


def test_a_seed_of_its_own_has_a_directory_of_its_own(work, monkeypatch):
    for seed in ("1337", "2"):
        say(monkeypatch, "bigram", "--data", "some.txt", "--seed", seed)
    found = {path.name for path in (work / "runs/makemore").iterdir()}
    assert found == {"bigram-some", "bigram-some-seed2"}


@pytest.mark.parametrize("option", [["--context", "9"], ["--norm", "batch"], ["--init", "naive"]])
def test_a_climb_refuses_what_is_for_one_rung(work, monkeypatch, option):
    with pytest.raises(UserError, match="climb takes every rung as it is"):
        say(monkeypatch, "climb", "--data", "some.txt", *option)


def test_help_names_every_rung_and_option(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        say(monkeypatch, "--help")
    said = capsys.readouterr().out
    assert end.value.code in (0, None)
    options = {f.name for f in dataclasses.fields(command.Options)} - {"rung"}
    assert all(f"--{name}" in said for name in options)
    assert all(rung in said for rung in ("climb", *RUNGS))


def test_an_unknown_rung_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        say(monkeypatch, "trigram")
    assert "invalid choice 'trigram'" in capsys.readouterr().err


def test_characters_that_cannot_be_seen_are_drawn_as_what_they_are():
    assert labels("\t\n aé") == ["·", "\\t", "\\n", "␣", "a", "é"]
