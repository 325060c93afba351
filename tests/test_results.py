"""Run directories to table, figure and text, on runs written by hand."""

import json
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import config
import figures
import metrics
import results
from config import Config, UserError
from tests.tiny import ROOT
from utils import load_config

PUBLISHED = "OpenAI GPT-2 124M"


def write_run(
    runs_dir: Path, name: str = "small", data: str = "pydocs", evals: bool = False, steps: int = 4
) -> Path:
    """Write a run of four steps, in which step k takes 9 seconds and has loss 10 - k."""
    run = runs_dir / name
    run.mkdir(parents=True)
    changes = {"name": name, "data": data, "train.steps": steps, "train.micro_batch_size": 1}
    resolved = config.replace(Config(), changes)
    (run / "config.json").write_text(config.to_json(resolved))
    lines = []
    for step in range(5):
        at = {"step": step, "tokens": step * 524288}
        if step:
            train = {"loss": 10.0 - step, "lr": 6e-4, "grad_norm": 1.5, "mfu": None}
            clock = {"tokens_per_second": 58254.2, "seconds": 9.0 * step}
            lines.append({"kind": "train", **at, **train, **clock})
        # Neither the best validation loss nor the best score is the last one, or the first.
        if step in (0, 3, 4):
            loss = {0: 10.8, 3: 6.25, 4: 6.5}[step]
            lines.append({"kind": "val", **at, "loss": loss, "bits_per_byte": loss / 4})
        if evals and step:
            hellaswag = {
                "acc_norm": 0.29 if step == 2 else 0.28,
                "acc_norm_stderr": 0.0046,
                "examples": 10042,
            }
            lines.append({"kind": "eval", "step": step, "task": "hellaswag", **hellaswag})
            lines.append(
                {
                    "kind": "eval",
                    "step": step,
                    "task": "wikitext",
                    "perplexity": 86.0 + abs(step - 3),
                }
            )
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def cells(table: str) -> list[dict[str, str]]:
    """Return the rows of a Markdown table as dictionaries."""
    head, rule, *rows = [[c.strip() for c in line[1:-1].split("|")] for line in table.splitlines()]
    assert all(set(cell) == {"-"} for cell in rule)
    return [dict(zip(head, row, strict=True)) for row in rows]


def figure_text(run: Path, stem: str = "results") -> str:
    """Return the SVG, in which matplotlib names every piece of text in a comment."""
    return (run / "figures" / f"{stem}.svg").read_text()


def test_table_values(tmp_path):
    run = metrics.read_run(write_run(tmp_path, evals=True))
    (row,) = cells(results.table([run]))
    assert row == {
        "run": "small",
        "recipe": "gpt2",
        "size": "124m",
        "data": "pydocs",
        "steps": "4 of 4",
        "tokens": "2.1M",
        "best train loss (one step)": "6.0000 at 4",
        "best val loss": "6.2500 at 3",
        "last val loss": "6.5000",
        "best bits per byte": "1.5625 at 3",
        "best hellaswag acc_norm": "29.00 ± 0.46 %",
        "best wikitext perplexity": "86.00",
        "training hours": "0.01",
        "tokens/s": "58.3K",
    }


def test_table_of_several_leaves_out_the_unknown(tmp_path):
    runs = [metrics.read_run(write_run(tmp_path, name, evals=name == "b")) for name in "ab"]
    rows = cells(results.table(runs))
    assert [row["run"] for row in rows] == ["a", "b"]
    assert [row["best hellaswag acc_norm"] for row in rows] == ["-", "29.00 ± 0.46 %"]
    assert not any("hellaswag" in name for name in cells(results.table(runs[:1]))[0])


def test_a_diverged_run_says_so(tmp_path):
    path = write_run(tmp_path)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(
            '{"kind": "train", "step": 5, "loss": NaN}\n{"kind": "val", "step": 5, "loss": NaN}\n'
        )
    run = metrics.read_run(path)
    (row,) = cells(results.table([run]))
    assert row["last val loss"] == "nan"
    assert row["best val loss"] == "6.2500 at 3"
    figures.draw([run])


def test_length_in_epochs_or_tokens(tmp_path):
    path = write_run(tmp_path, steps=None)
    assert metrics.read_run(path).progress == "4 of 18,849"
    changed = config.replace(load_config(path), {"train.epochs": 2.0})
    (path / "config.json").write_text(config.to_json(changed))
    assert metrics.read_run(path).progress == "4 (2 epochs)"


def test_figures_exist_and_repeat_to_the_byte(tmp_path):
    path = write_run(tmp_path, evals=True)
    paths = figures.draw([metrics.read_run(path)])
    assert paths == [path / "figures" / "results.png", path / "figures" / "results.svg"]
    first = [path.read_bytes() for path in paths]
    assert first[0].startswith(b"\x89PNG") and b"<svg" in first[1]
    figures.draw([metrics.read_run(path)])
    assert [path.read_bytes() for path in paths] == first
    # Nothing half-written is left behind.
    assert len(list((path / "figures").iterdir())) == 2


@pytest.mark.parametrize(
    ("data", "published"),
    [("fineweb-edu", True), ("/data/fineweb-edu/", True), ("fineweb", False)],
)
def test_baselines_for_fineweb_edu_only(tmp_path, data, published):
    path = write_run(tmp_path, data=data, evals=True)
    figures.draw([metrics.read_run(path)])
    assert (f"{PUBLISHED}, 3.292" in figure_text(path)) == published
    assert (f"{PUBLISHED}, 29.4 to 29.55" in figure_text(path)) == published
    assert ("GPT-3 125M, 33.7" in figure_text(path)) == published


def test_right_panel_shows_scores_when_present(tmp_path):
    with_scores, without = write_run(tmp_path, "a", evals=True), write_run(tmp_path, "b")
    for path in (with_scores, without):
        figures.draw([metrics.read_run(path)])
    assert "hellaswag acc_norm" in figure_text(with_scores)
    # Not a share of right answers, so not on an axis of percent.
    assert "perplexity" not in figure_text(with_scores)
    assert "gradient norm" in figure_text(without) and "right answers" not in figure_text(without)


def evaluate(run: Path, task: str, examples: int, **scores: float) -> None:
    """Add eval lines at steps 0 and 4 as training writes them; the later is better by 0.01."""
    with (run / "metrics.jsonl").open("a") as file:
        for step, better in ((0, 0.0), (4, 0.01)):
            line = {"kind": "eval", "step": step, "tokens": step * 524288, "task": task}
            line |= {"examples": examples}
            for name, value in scores.items():
                gain = -better if "perplexity" in name or "bits" in name else better
                line |= {name: value + gain, f"{name}_stderr": 0.0045}
            file.write(json.dumps({**line, "seconds": 12.5}) + "\n")


@pytest.fixture
def scored(tmp_path) -> Path:
    """A run on FineWeb-Edu that was scored on all four benchmarks."""
    run = write_run(tmp_path, data="fineweb-edu")
    evaluate(run, "hellaswag", 10_042, acc=0.27, acc_norm=0.29)
    evaluate(run, "lambada", 5153, acc=0.2, acc_no_stop_words=0.25, perplexity=70.0)
    evaluate(run, "cbt", 5000, cn_acc=0.7, ne_acc=0.5, acc=0.6, acc_full=0.4)
    perplexities = {"word_perplexity": 40.0, "bits_per_byte": 1.25, "token_perplexity": 30.0}
    evaluate(run, "wikitext", 62, **perplexities)
    return run


def test_one_score_of_each_task_is_drawn(scored):
    figures.draw([metrics.read_run(scored)])
    legend = re.findall(r"<!-- ((?:hellaswag|lambada|cbt|wikitext).*?) -->", figure_text(scored))
    assert legend == ["hellaswag acc_norm", "lambada acc", "cbt acc"]


def test_the_table_has_every_score_with_its_error(scored):
    (row,) = cells(results.table([metrics.read_run(scored)]))
    assert row["best hellaswag acc"] == "28.00 ± 0.45 %"
    assert row["best hellaswag acc_norm"] == "30.00 ± 0.45 %"
    assert row["best lambada perplexity"] == "69.99 ± 0.00"
    assert row["best cbt acc_full"] == "41.00 ± 0.45 %"
    assert row["best wikitext bits_per_byte"] == "1.2400 ± 0.0045"
    assert not any("seconds" in name or "examples" in name for name in row)


def test_published_scores_stand_beside_all_of_hellaswag_only(scored):
    run = metrics.read_run(scored)
    figures.draw([run])
    assert "GPT-3 125M, 33.7" in figure_text(scored)
    evaluate(scored, "hellaswag", 100, acc_norm=0.3)
    figures.draw([metrics.read_run(scored)])
    assert "GPT-3 125M, 33.7" not in figure_text(scored)
    assert f"{PUBLISHED}, 3.292" in figure_text(scored)


@pytest.mark.parametrize(
    ("metric", "value", "error", "text"),
    [
        ("acc_norm", 0.29412, 0.00454, "29.41 ± 0.45 %"),
        ("acc", 1.0, 0.0, "100.00 %"),
        ("word_perplexity", 37.3704, 0.31, "37.37 ± 0.31"),
        ("bits_per_byte", 1.04321, 0.00412, "1.0432 ± 0.0041"),
        ("perplexity", 1_234_567.0, 9_876.0, "1.23e+06 ± 9.88e+03"),
        ("perplexity", math.inf, math.nan, "inf"),
    ],
)
def test_a_score_in_words(metric, value, error, text):
    assert metrics.score_text(metric, value, error) == text


def test_overlay_names_every_run(tmp_path):
    paths = [write_run(tmp_path, name, evals=True) for name in ("first-run", "second-run")]
    figures.draw([metrics.read_run(path) for path in paths])
    text = figure_text(paths[0], "overlay")
    for name in ("first-run", "second-run"):
        assert f"<!-- {name} -->" in text and f"{name}: hellaswag acc_norm" in text
    assert (paths[0] / "figures" / "overlay.png").is_file()
    assert not (paths[1] / "figures").exists()


def test_overlay_with_other_data_has_no_baselines(tmp_path):
    paths = [write_run(tmp_path, data, data=data) for data in ("fineweb-edu", "pydocs")]
    figures.draw([metrics.read_run(path) for path in paths])
    assert PUBLISHED not in figure_text(paths[0], "overlay")


def test_a_run_that_has_only_begun_is_drawn(tmp_path):
    path = write_run(tmp_path)
    (path / "metrics.jsonl").write_text('{"kind": "val", "step": 0, "loss": 10.8}\n')
    run = metrics.read_run(path)
    figures.draw([run])
    assert cells(results.table([run]))[0]["steps"] == "0 of 4"


def test_smoothing_keeps_the_start_and_the_mean():
    values = np.concatenate(([10.0], np.tile([3.0, 5.0], 300)))
    smoothed = figures.smooth(values)
    assert smoothed[0] == 10.0
    np.testing.assert_allclose(smoothed[60:], 4.0, atol=0.2)
    np.testing.assert_array_equal(figures.smooth(values[:20]), values[:20])


def test_truncated_last_line_is_ignored(tmp_path):
    path = write_run(tmp_path)
    whole = metrics.read_run(path).metrics
    text = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(text + '{"kind": "train", "step": 5, "lo')
    assert metrics.read_run(path).metrics == whole
    # A whole object counts, whether or not its newline has arrived.
    (path / "metrics.jsonl").write_text(text.rstrip("\n"))
    assert metrics.read_run(path).metrics == whole


@pytest.mark.parametrize(
    "broken",
    ['{"kind": "tra', "[1, 2]", '{"kind": "val", "step": 1}', '{"step": 1, "loss": 2.0}', ""],
)
def test_broken_line_is_named(tmp_path, broken):
    path = write_run(tmp_path)
    lines = (path / "metrics.jsonl").read_text().split("\n")
    lines[2] = broken
    (path / "metrics.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 3 "):
        metrics.read_run(path)


def test_no_metrics_yet(tmp_path):
    path = write_run(tmp_path)
    for leave in (lambda: (path / "metrics.jsonl").write_text(""), (path / "metrics.jsonl").unlink):
        leave()
        with pytest.raises(UserError, match="no metrics yet"):
            metrics.read_run(path)


def test_newest_run(tmp_path):
    for age, name in enumerate(("b", "a", "c")):
        path = write_run(tmp_path, name) / "metrics.jsonl"
        os.utime(path, (1e9 - age, 1e9 - age))
    assert metrics.newest_run(str(tmp_path)) == tmp_path / "b"


def test_unwritable_figures_are_one_sentence(tmp_path):
    path = write_run(tmp_path)
    (path / "figures").write_text("in the way")
    with pytest.raises(UserError, match=r"results\.png could not be written"):
        figures.draw([metrics.read_run(path)])


def test_samples_go_with_their_prompts(tmp_path, monkeypatch, capsys):
    def generate_text(source, prompts, seed):
        if source.endswith("mute"):
            raise UserError("it has no checkpoint.")
        return [f" <{prompt} {seed}>" for prompt in prompts]

    for name, content in {
        "recipes": {"PROMPTS": ("A", "B")},
        "sample": {"generate_text": generate_text},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    runs = [metrics.read_run(write_run(tmp_path, name)) for name in ("mute", "fluent")]
    results.print_samples(runs, 2)
    shown = capsys.readouterr().out
    assert "No text from mute: it has no checkpoint." in shown
    assert "A <A 1337>" in shown and "B <B 1337>" in shown and "A <A 1338>" in shown


def run_results(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """Run the script, and report on stderr whether it loaded torch."""
    code = (
        "import sys, runpy\n"
        "try: runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
        "finally: print('torch' in sys.modules, 'pyplot' in str(sys.modules), file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", code, str(ROOT / "results.py"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_command_line_without_torch(tmp_path):
    write_run(tmp_path / "runs")
    done = run_results("--samples", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == ["False", "False"]
    assert "6.2500 at 3" in done.stdout
    assert "Figure: runs/small/figures/results.png" in done.stdout


def test_no_run_is_one_sentence(tmp_path):
    done = run_results(cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: No run under runs/ yet")
    assert "Traceback" not in done.stderr
