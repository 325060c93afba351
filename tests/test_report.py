"""The HTML report: what is on it, that it holds together, and that nothing in a run breaks it."""

import html
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import curves
import figures
import metrics
import report
import run_facts
import window_ranking
from config import Config, replace, to_json
from corpus.shards import TokenShards
from metrics import Points
from tests.test_results import run_results, write_run
from tests.tiny import ROOT, make_data
from training.logger import Logger

INJECTION = "</script><script>injected = 1</script><img src=x onerror='injected = 1'>\u2028"


def append_samples(run: Path, step: int, prompts: list[str], texts: list[str]) -> None:
    logger = Logger(run, Config(), 10**9)
    logger.samples(step, prompts, texts)
    logger.close()


def append_losses(run: Path, step: int, indices: np.ndarray, losses: np.ndarray) -> None:
    logger = Logger(run, Config(), 10**9)
    logger.sequence_losses(step, indices, losses)
    logger.close()


def hostile_run(folder: Path) -> Path:
    """Write a run whose name, data and samples would like to be HTML."""
    run = write_run(
        folder, "<img src=x onerror='injected=1'>", data=INJECTION.replace("/", ""), evals=True
    )
    append_samples(run, 0, ["One @@DATA@@"], [" sample."])
    append_samples(run, 4, ["The end"], [INJECTION])
    (run / "environment.jsonl").write_text(json.dumps({"command": INJECTION, "versions": {}}))
    return run


def passage() -> dict:
    """Return what a model made of a passage, one of whose characters is two tokens."""
    likeliest = [[" <b>", 0.5], ["\\xc3", 0.25]]
    pieces = [
        {"text": "Ü", "tokens": [["\\xc3", 2.5, likeliest], ["\\x9c", 0.25, likeliest]]},
        {"text": "nï", "tokens": [["nï", 1.0, likeliest]]},
        {"text": " <b>", "tokens": [[" <b>", 9.0, likeliest]]},
    ]
    known = {"source": "a test", "checkpoint": "step_000004", "tokens": 4, "left_out": 7}
    return known | {"loss": 3.1875, "bits_per_byte": None, "pieces": pieces}


def sequence_record(run: Path) -> None:
    """Keep losses of ten sequences at two steps: sequence 3 is hard, and 7 is easy."""
    for step in (1, 2):
        losses = 6.0 - step + 0.01 * np.arange(10)
        losses[3], losses[7] = losses[3] + 2, losses[7] - 2
        append_losses(run, step, np.arange(10), losses)


def data_of(page: str) -> dict:
    """Return the data that a page holds."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def page_of(path: Path) -> dict:
    """Return the data of a run's page, without a model."""
    return data_of(report.write_report(path, loads_model=False).read_text(encoding="utf-8"))


def test_the_page_is_one_file_and_repeats_to_the_byte(tmp_path):
    path = write_run(tmp_path, evals=True)
    page = report.write_report(path, loads_model=False)
    assert page == path / "figures" / "report.html"
    first = page.read_bytes()
    assert report.write_report(path, loads_model=False).read_bytes() == first
    addresses = set(re.findall(rb"https?://[^\"' ]+", first))
    assert addresses == {b"http://www.w3.org/2000/svg"}
    assert not re.search(rb"<link|<img|@import|url\(h|\bsrc=", first)


def test_what_a_run_says_stays_text(tmp_path):
    path = hostile_run(tmp_path)
    page = report.write_report(path, loads_model=False).read_text(encoding="utf-8")
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "<img" not in page and "\u2028" not in page
    assert f"<title>{html.escape(path.name)}</title>" in page
    (run,) = data_of(page)["runs"]
    assert run["name"] == path.name
    assert run["samples"][1]["texts"][0]["text"] == "The end" + INJECTION.strip()
    # What looks like a place of the template is none.
    assert run["samples"][0]["texts"][0]["prompt"] == "One @@DATA@@"


def test_the_page_lets_only_its_own_script_run():
    page = report.render({"title": "t"})
    policy = re.search(r'content="(default-src[^"]*)"', page)[1]
    assert "default-src 'none'" in policy and re.search(r"script-src 'sha256-[\w+/]{43}='$", policy)


@pytest.mark.slow
def test_a_run_of_20_000_steps_stays_small(tmp_path):
    path = write_run(tmp_path, evals=True, data="fineweb-edu", steps=20_000)
    rng, lines = np.random.default_rng(0), []
    for step in range(1, 20_001):
        loss = 3 + 8 * math.exp(-step / 500) + rng.normal(0, 0.05)
        line = {"kind": "train", "step": step, "loss": loss, "lr": 6e-4 * (1 - step / 3e4)}
        line |= {"grad_norm": rng.gamma(2), "tokens_per_second": 1e6 * rng.uniform(0.9, 1.1)}
        lines.append(json.dumps(line | {"seconds": step * 0.3}))
        if step % 250 == 0:
            lines.append(json.dumps({"kind": "val", "step": step, "loss": loss + 0.05}))
            scores = {"acc_norm": rng.uniform(0.25, 0.32), "acc_norm_stderr": 0.0045}
            lines.append(json.dumps({"kind": "eval", "step": step, "task": "lambada", **scores}))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for step in range(0, 20_000, 250):
        append_samples(path, step, ["The meaning of life is"], [" to be sampled." * 20])
    page = report.write_report(path, loads_model=False)
    assert page.stat().st_size < 1_000_000
    assert len(data_of(page.read_text())["runs"][0]["samples"]) == run_facts.MOST_STEPS


def test_thinning_keeps_spikes_ends_and_order():
    values = np.sin(np.arange(20_000) / 500)
    values[12_345], values[777] = 50.0, -50.0
    series = Points(np.arange(1, 20_001), values, np.zeros(20_000))
    thin = curves.thinned(series, 100)
    assert len(thin["x"]) <= 102
    assert thin["x"] == sorted(thin["x"]) and (thin["x"][0], thin["x"][-1]) == (1, 20_000)
    assert thin["y"][thin["x"].index(12_346)] == 50 and -50 in thin["y"]
    few = Points(np.arange(3), np.array([1.23456789, 2.0, 3e-9]), np.zeros(3))
    assert curves.thinned(few) == {"x": [0, 1, 2], "y": [1.23457, 2, 3e-9]}


def test_baselines_stand_where_they_can_be_compared(tmp_path):
    ours = metrics.read_run(write_run(tmp_path, "a", data="fineweb-edu", evals=True))
    other = metrics.read_run(write_run(tmp_path, "b", evals=True))
    (loss,) = curves.baselines([ours])["loss"]
    assert loss["values"] == [figures.LOSS_BASELINE] * 2
    assert {rule["task"] for rule in curves.baselines([ours])["scores"]} == {"hellaswag"}
    assert curves.baselines([ours, other]) == {"loss": [], "scores": []}


def test_scores_and_shares_are_told_apart(tmp_path):
    page = page_of(write_run(tmp_path, evals=True))
    found = {score["metric"]: score for score in page["runs"][0]["curves"]["scores"]}
    assert found["acc_norm"]["y"] == [28, 29, 28, 28] and found["acc_norm"]["share"]
    assert found["acc_norm"]["error"] == [0.46] * 4 and found["acc_norm"]["chosen"]
    assert found["perplexity"]["y"][0] == 88 and not found["perplexity"]["share"]


@pytest.mark.parametrize(
    "leave",
    [
        {"metrics.jsonl": '{"kind": "val", "step": 0, "loss": 10.8}\n'},
        {"metrics.jsonl": '{"kind": "train", "step": 1, "loss": NaN, "lr": Infinity}\n'},
        {"environment.jsonl": "[1]", "evals.json": "{damaged", "samples.md": "no headings"},
        {"evals.json": '{"a": 1, "b": {"c": 2, "d": {"metrics": [3]}, "e": {"metrics": null}}}'},
        {"samples.md": "## Step 3\n\nodd **text** ...\n## Step 99999999999\n"},
        {"sequence_losses.bin": "cut"},
    ],
)
def test_a_page_does_without_what_is_missing_or_odd(tmp_path, leave):
    path = write_run(tmp_path)
    for name, content in leave.items():
        (path / name).write_text(content)
    assert page_of(path)["runs"][0]["name"] == "small"


def test_remarks_say_how_a_run_stands(tmp_path):
    path = write_run(tmp_path, steps=10)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 5, "loss": NaN}\n')
    starts = '{"started_at_step": 0}\n{"started_at_step": 2}\n{"started_'
    (path / "environment.jsonl").write_text(starts)
    remarks = " ".join(run_facts.remarks(metrics.read_run(path)))
    assert "1 training losses are not finite numbers, the first at step 5" in remarks
    assert "at step 5 of 10: still running, or interrupted" in remarks
    assert "continued at step 2" in remarks
    assert run_facts.remarks(metrics.read_run(write_run(tmp_path, "whole"))) == []


def test_samples_are_read_whatever_they_contain(tmp_path):
    path = write_run(tmp_path)
    odd = " text\n## Step 9\n**bold** ...\n\r## Step 8\r\n    indented"
    append_samples(path, 0, ["A"], [" first."])
    append_samples(path, 4, ["A", "B"], [odd, ""])
    append_samples(path, 0, ["A"], [" again."])
    found = run_facts.samples(metrics.read_run(path))
    assert [sample["step"] for sample in found] == [0, 4]
    assert found[0]["texts"] == [{"prompt": "A", "text": "A again."}]
    assert found[1]["texts"] == [{"prompt": "A", "text": "A" + odd}, {"prompt": "B", "text": "B"}]


def test_evaluations_stand_beside_what_is_published(tmp_path):
    path = write_run(tmp_path, evals=True)
    scored = {"metrics": {"acc": 0.5, "acc_stderr": 0.01}, "limit": None}
    results = {"step_000004": {"lambada": scored, "lambada limit=10": scored}}
    (path / "evals.json").write_text(json.dumps(results))
    rows = run_facts.evaluations(metrics.read_run(path))
    best = next(row for row in rows if row["how"] == "best in training")
    assert (best["score"], best["at"]) == ("29.00 ± 0.46 %", 2)
    assert best["published"] == ["29.55 (reproductions of GPT-2, same protocol: 29.4 to 29.55)"]
    whole, limited = (row for row in rows if row["task"].startswith("lambada"))
    assert (whole["score"], whole["at"]) == ("50.00 ± 1.00 %", 4)
    assert whole["published"] and not limited["published"]


def test_settings_name_what_differs_from_the_recipe():
    config = replace(Config(recipe="quickstart", size="nano"), {"optim.grad_clip": 0.5})
    changed = {row["name"]: row for row in run_facts.settings(config) if row["default"]}
    assert changed["optim.grad_clip"]["value"] == "0.5"
    assert changed["optim.grad_clip"]["default"] == "1"
    assert changed["optim.optimizer"]["default"] == "muon"
    assert "optim.beta1" not in changed


def test_sequences_are_ranked_by_what_is_left_when_the_step_is_taken_off(tmp_path):
    path = write_run(tmp_path, data="elsewhere")
    sequence_record(path)
    # Read once, early, and of no more than that step's loss.
    append_losses(path, 3, np.array([42]), np.array([9.0], dtype=np.float32))
    ranked = window_ranking.rank_sequences(metrics.read_run(path), None)
    assert (ranked["reads"], ranked["sequences"]) == (21, 11)
    excess, loss = ranked["rankings"]
    assert excess["highest"][0]["sequence"] == 3 and excess["lowest"][0]["sequence"] == 7
    assert loss["highest"][0]["sequence"] == 42
    row = excess["highest"][0]
    assert (row["reads"], row["first"], row["last"]) == (2, 7.03, 6.03)
    assert row["loss"] == 6.53 and row["text"] == ""
    assert sum(excess["histogram"]["counts"]) == 11
    assert page_of(path)["sequences"]["missing"].startswith("The data is not here")


def test_sequences_show_how_their_text_begins(tmp_path):
    shards = TokenShards(make_data(tmp_path / "data"), "train")
    path = write_run(tmp_path)
    changes = {"model.block_size": 96, "train.batch_tokens": 960}
    config = replace(metrics.read_run(path).config, changes)
    (path / "config.json").write_text(to_json(config))
    run = metrics.read_run(path)
    begins = window_ranking.beginnings(run, shards, np.array([1, 10**9]))
    (tokens,) = shards.read(np.array([96]), 64)
    assert begins == [shards.tokenizer.decode(tokens), ""]


def test_the_command_line_writes_pages_without_torch(tmp_path):
    for name in "ab":
        write_run(tmp_path / "runs", name)
    done = run_results("a", "b", "--report", "--compare", "--samples", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == ["False", "False"]
    assert done.stdout.splitlines() == [
        "Report: runs/a/figures/report.html",
        "Report: runs/b/figures/report.html",
        "Comparison: runs/a/figures/comparison.html",
    ]
    page = data_of((tmp_path / "runs/a/figures/comparison.html").read_text())
    assert [run["name"] for run in page["runs"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("a", "--compare"), "--compare needs two runs"),
        (("a", "--passage", "words"), "add --report"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(tmp_path, arguments, sentence):
    write_run(tmp_path / "runs", "a")
    command = [sys.executable, str(ROOT / "results.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr


def test_the_page_has_the_figures_colours():
    style = (ROOT / "assets" / "report.css").read_text()
    light = style.split("@media")[0]
    assert tuple(re.findall(r"--c\d: (#\w{6})", light)) == tuple(map(str.lower, figures.PALETTE))


def test_numbers_that_json_lacks_become_null():
    text = report.embedded({"a": [math.nan, 1.5, {"b": -math.inf}], "c": ("<", "&", "\u2029")})
    assert json.loads(text) == {"a": [None, 1.5, {"b": None}], "c": ["<", "&", "\u2029"]}
    assert not set("<>&\u2029") & set(text)
