"""Numbers and figures of an experiment, on runs written by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import comparison
from comparison import Trial, compare, entries, first_crossing
from comparison_figures import draw_overlay, draw_rates
from config import Config, replace, to_json
from metrics import read_run
from tests.test_results import cells


def trial(
    runs_dir: Path,
    arm: str,
    losses: dict[int, float],
    seconds: float = 1.0,
    lr: float = 1e-3,
    seed: int = 1,
    steps: int = 4,
    data: str = "pydocs",
    score: float | None = None,
) -> Trial:
    """Write a run of 100 tokens and `seconds` a step, with these validation losses by step."""
    name = f"{arm}-{data}-lr{lr:g}-seed{seed}"
    run = runs_dir / name
    run.mkdir(parents=True)
    changes = {"recipe": arm, "data": data, "train.steps": steps}
    changes |= {"train.batch_tokens": 100, "model.block_size": 100, "optim.lr": lr}
    (run / "config.json").write_text(to_json(replace(Config(), changes)))
    lines = []
    for step in range(max(losses) + 1):
        at = {"step": step, "tokens": 100 * step}
        if step:
            lines.append({"kind": "train", **at, "loss": 5.0, "seconds": seconds * step})
        if step in losses:
            lines.append({"kind": "val", **at, "loss": losses[step]})
    if score is not None:
        at = {"step": max(losses), "task": "hellaswag", "examples": 10}
        lines.append({"kind": "eval", **at, "acc": score, "acc_stderr": 0.01})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Trial(arm, data, lr, seed, name, read_run(run))


def diverged(arm: str, lr: float = 1e-3, seed: int = 1) -> Trial:
    return Trial(arm, "pydocs", lr, seed, f"{arm}-{lr:g}-{seed}", None)


@pytest.mark.parametrize(
    ("losses", "level", "tokens"),
    [
        ([10, 6, 4, 3], 5.0, 150.0),
        ([10, 6, 4, 3], 4.0, 200.0),
        ([10, 6, 4, 3], 10.0, 0.0),
        ([10, 6, 4, 3], 2.9, None),
        # The first time counts, though the loss is above the level again.
        ([10, 4, 6, 3], 5.0, 100 * 5 / 6),
        ([10, 6, 6, 5.5], 6.0, 100.0),
    ],
)
def test_the_first_crossing_lies_on_the_line_between_two_validations(losses, level, tokens):
    found = first_crossing(np.array([0, 100, 200, 300]), np.array(losses, dtype=float), level)
    assert found == (None if tokens is None else pytest.approx(tokens, rel=1e-12))


def test_the_numbers_of_a_comparison(tmp_path):
    trials = [
        trial(tmp_path, "slow", {0: 10, 2: 7, 4: 6.0}, seconds=2.0, seed=1),
        trial(tmp_path, "slow", {0: 10, 2: 7, 4: 6.4}, seconds=4.0, seed=2),
        trial(tmp_path, "fast", {0: 10, 2: 4.2, 4: 3.0}, seconds=3.0),
    ]
    slow, fast = compare(entries(trials))
    assert slow["final_loss"] == pytest.approx(6.2)
    assert slow["final_loss_deviation"] == pytest.approx(0.4 / math.sqrt(2))
    assert slow["difference"] == 0.0
    assert slow["tokens_to_baseline"] == 400 and slow["share_of_tokens"] == 1.0
    assert slow["seconds"] == slow["seconds_to_baseline"] == 12.0
    assert fast["difference"] == pytest.approx(-3.2)
    # From 10 down to 4.2 over 200 tokens: 3.8 of the 5.8 to 6.2.
    assert fast["tokens_to_baseline"] == pytest.approx(200 * 3.8 / 5.8)
    assert fast["share_of_tokens"] == pytest.approx(3.8 / 5.8 / 2)
    assert fast["seconds_to_baseline"] == pytest.approx(3.0 * 2 * 3.8 / 5.8)
    assert fast["share_of_seconds"] == pytest.approx(3.0 * 2 * 3.8 / 5.8 / 12)
    assert fast["final_loss_deviation"] is None
    assert fast["parameters"] == trials[2].run.config.model.num_params


def test_the_table_says_the_same_in_words(tmp_path):
    trials = [
        trial(tmp_path, "slow", {0: 10, 2: 7, 4: 6.0}, seconds=2.0, seed=1),
        trial(tmp_path, "slow", {0: 10, 2: 7, 4: 6.4}, seconds=4.0, seed=2),
        trial(tmp_path, "fast", {0: 10, 2: 4.2, 4: 3.0}, seconds=100.0),
        trial(tmp_path, "short", {0: 10, 2: 8.0}, steps=4),
        diverged("wild"),
    ]
    slow, fast, short, wild = cells(comparison.table(compare(entries(trials))))
    assert slow == {
        "recipe": "slow",
        "lr": "0.001",
        "final val loss": "6.2000 ± 0.2828 (n = 2)",
        "difference": "+0.0000",
        "tokens": "400",
        "tokens to the baseline's loss": "400 (100.0 %)",
        "seconds to it": "12 (100.0 %)",
        "seconds in all": "12",
        "parameters": f"{trials[0].run.config.model.num_params:,}",
        "remark": "-",
    }
    assert fast["tokens to the baseline's loss"] == "131 (32.8 %)"
    assert fast["seconds to it"] == "131 (1092.0 %)"
    assert short["tokens to the baseline's loss"] == short["seconds to it"] == "-"
    assert short["remark"] == "stopped early at 2 of 4" and short["tokens"] == "200"
    assert wild["final val loss"] == "diverged" and wild["parameters"] == "-"


def test_a_baseline_that_rose_again_needed_less_than_its_budget(tmp_path):
    trials = [
        trial(tmp_path, "a", {0: 10, 2: 4.0, 4: 6.0}),
        trial(tmp_path, "b", {0: 10, 2: 6.0, 4: 5.0}),
    ]
    a, b = compare(entries(trials))
    assert a["tokens_to_baseline"] == pytest.approx(200 * 4 / 6) and a["share_of_tokens"] == 1.0
    assert b["tokens_to_baseline"] == 200 and b["share_of_tokens"] == pytest.approx(1.5)


def test_seeds_are_compared_where_all_were_validated(tmp_path):
    """A run that was interrupted saved, and so validated, once more than the others."""
    trials = [
        trial(tmp_path, "a", {0: 10, 2: 7.0, 3: 1.0, 4: 6.0}, seed=1),
        trial(tmp_path, "a", {0: 10, 2: 8.0, 4: 6.0}, seed=2),
    ]
    curve = comparison.validation_curve(entries(trials)[0].runs)
    assert curve.tokens.tolist() == [0, 200, 400]
    assert curve.mean.tolist() == [10.0, 7.5, 6.0]


def sweep(runs_dir: Path) -> list[Trial]:
    """Three rates of one arm, the middle one best and with two seeds; one rate of another."""
    return [
        *(trial(runs_dir, "a", {0: 10, 4: x}, lr=lr) for lr, x in ((1e-3, 6.5), (2e-3, 6.0))),
        diverged("a", lr=4e-3),
        trial(runs_dir, "a", {0: 10, 4: 5.5}, lr=2e-3, seed=2),
        trial(runs_dir, "b", {0: 10, 4: 5.0}, lr=1e-2),
    ]


def test_an_arm_stands_at_the_best_rate_of_its_first_seed(tmp_path):
    found = entries(sweep(tmp_path))
    assert [(entry.arm, entry.lr, len(entry.runs)) for entry in found] == [
        ("a", 2e-3, 2),
        ("b", 1e-2, 1),
    ]
    rows = comparison.sweep_rows(found)
    assert [(row["lr"], row["final_loss"], row["best"]) for row in rows] == [
        (1e-3, 6.5, False),
        (2e-3, 6.0, True),
        (4e-3, None, False),
    ]
    shown = cells(comparison.sweep_table(rows))
    assert [row["final val loss"] for row in shown] == ["6.5000", "6.0000", "diverged"]
    assert [row[""] for row in shown] == ["", "best", ""]
    assert comparison.warnings(found) == []


def test_a_best_rate_at_the_edge_is_said(tmp_path):
    trials = [
        trial(tmp_path, "a", {0: 10, 4: loss}, lr=lr) for lr, loss in ((1e-3, 6.5), (2e-3, 6.0))
    ]
    (sentence,) = comparison.warnings(entries([*trials, diverged("a", 3e-3)][:2]))
    assert sentence == "a: the best rate, 0.002, is at the edge of the sweep; widen it."
    assert comparison.warnings(entries([*trials, diverged("a", 3e-3)])) == []
    (sentence,) = comparison.warnings(entries([diverged("a", 1e-3), diverged("a", 2e-3)]))
    assert "every run diverged" in sentence


def test_of_equal_rates_the_lower_is_best(tmp_path):
    trials = [trial(tmp_path, "a", {0: 10, 4: 6.0}, lr=lr) for lr in (2e-3, 1e-3)]
    assert entries(trials)[0].lr == 1e-3


def test_data_sets_are_compared_by_scores(tmp_path):
    trials = [
        trial(tmp_path, arm, {0: 10, 4: loss}, data=data, score=score)
        for arm, data, loss, score in (
            ("a", "one", 6.0, 0.25),
            ("a", "two", 3.0, 0.5),
            ("b", "one", 5.0, 0.3),
            ("b", "two", 2.0, 0.6),
        )
    ]
    rows = cells(comparison.table(compare(entries(trials))))
    assert [(row["recipe"], row["data"], row["hellaswag acc"]) for row in rows] == [
        ("a", "one", "25.00 ± 1.00 %"),
        ("a", "two", "50.00 ± 1.00 %"),
        ("b", "one", "30.00 ± 1.00 %"),
        ("b", "two", "60.00 ± 1.00 %"),
    ]
    # Each against the first arm on the same data.
    assert [row["difference"] for row in rows] == ["+0.0000", "+0.0000", "-1.0000", "-1.0000"]


def test_figures_name_arms_and_losses_and_repeat_to_the_byte(tmp_path):
    found = entries([*sweep(tmp_path / "runs"), diverged("wild")])
    (tmp_path / "figures").mkdir()
    paths = draw_overlay(found, tmp_path / "figures") + draw_rates(found, tmp_path / "figures")
    assert [path.name for path in paths] == [
        *("overlay.png", "overlay.svg", "rates.png", "rates.svg")
    ]
    first = [path.read_bytes() for path in paths]
    overlay, rates = paths[1].read_text(), paths[3].read_text()
    for text in (
        *("a: 5.7500 ± 0.3536 (n = 2)", "b: 5.0000", "final loss of a, 5.7500"),
        *("wild: diverged", "validation loss (nats a token)"),
    ):
        assert f"<!-- {text} -->" in overlay
    for text in ("a: 6.0000 at 0.002", "b: 5.0000 at 0.01", "wild: diverged"):
        assert f"<!-- {text} -->" in rates
    draw_overlay(found, tmp_path / "figures")
    draw_rates(found, tmp_path / "figures")
    assert [path.read_bytes() for path in paths] == first


def test_the_start_is_left_above_the_panel_where_it_would_squash_the_rest(tmp_path):
    (tmp_path / "figures").mkdir()
    flat = entries([trial(tmp_path, "a", {0: 10, 2: 5.0, 4: 4.8})])
    assert (
        "its start at 10.0 is above the panel"
        in draw_overlay(flat, tmp_path / "figures")[1].read_text()
    )
    steep = entries([trial(tmp_path, "b", {0: 5.0, 2: 4.5, 4: 4.0})])
    assert "above the panel" not in draw_overlay(steep, tmp_path / "figures")[1].read_text()
