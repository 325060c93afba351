"""experiments.py: arms to runs, runs to processes, and what is reused, continued or refused."""

import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

import arms
import experiments
import main
import recipes
from arms import planned_runs, read_command
from config import UserError
from tests.test_results import cells
from tests.tiny import ROOT, make_data, script, start, wait_for

TINY = [
    *("--model.n-layer", "1", "--model.n-head", "2", "--model.n-embd", "32"),
    *("--model.block-size", "32", "--train.batch-tokens", "128", "--train.val-tokens", "512"),
    *("--train.val-interval", "2", "--train.sample-tokens", "0", "--train.device", "cpu"),
]

# Stands in for main.py where only what goes on around it matters: no torch, no training.
STAND_IN = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import json, main
from training.logger import create_run
print("progress\\rprogress")
job = main.resolve(sys.argv[1:])
config, run = main.complete_config(job.config), job.run
if not run.exists():
    create_run(run, config)
if config.optim.lr > 0.5:
    (run / "non_finite.json").write_text("{{}}")
    raise SystemExit("error: Step 2 has a loss of nan.")
if config.optim.weight_decay == 0.5:
    raise SystemExit("error: The disk is full.")
end = config.train.steps
metrics = open(run / "metrics.jsonl", "a")
for step in (0, end):
    tokens = step * config.train.batch_tokens
    loss = 5 + abs(config.optim.lr - 0.02) + config.train.seed / 1e6 + (0 if step else 3)
    for kind in ("train", "val"):
        line = dict(kind=kind, step=step, tokens=tokens, loss=loss, seconds=step)
        metrics.write(json.dumps(line) + "\\n")
metrics.close()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture
def command(data, tmp_path, monkeypatch) -> list[str]:
    """What every experiment here has in common; it runs in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return ["--size", "nano", "--data", str(data), "--name", "try", *TINY]


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> None:
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    monkeypatch.setattr(experiments, "MAIN", path)


def plan(*args: str) -> list[arms.Planned]:
    return planned_runs(*read_command(list(args)))


def run_all(monkeypatch: pytest.MonkeyPatch, *args: str) -> Path:
    monkeypatch.setattr(sys, "argv", ["experiments.py", *args])
    experiments.main()
    return Path("runs/experiments/try")


def test_runs_are_named_after_arm_data_rate_and_seed(command):
    found = plan("gpt2-rope", "gpt2-rope  --optim.weight-decay 0.2 --seeds 2 --lr 2e-3", *command)
    assert [run.config.name for run in found] == [
        "gpt2-rope-tiny-lr0.0015-seed1337",
        "gpt2-rope-optim.weight-decay-0.2-tiny-lr0.002-seed1337",
        "gpt2-rope-optim.weight-decay-0.2-tiny-lr0.002-seed1338",
    ]
    assert found[2].arm == "gpt2-rope --optim.weight-decay 0.2"
    assert found[0].directory == Path("runs/experiments/try/gpt2-rope-tiny-lr0.0015-seed1337")
    assert found[2].config.optim.weight_decay == 0.2 and found[2].config.train.seed == 1338
    assert found[0].config.model.n_embd == 32


def test_an_arm_is_named_once_with_all_its_rates(command):
    assert len(plan("gpt2-rope", " gpt2-rope ", *command)) == 1
    with pytest.raises(UserError, match="'gpt2-rope' is there twice; name it once, with all its"):
        plan("gpt2-rope", "gpt2-rope --lr 1e-3", *command)


def test_main_resolves_what_was_planned(command):
    """Every typed option reaches main.py, and nothing else changes there."""
    shared = [*command, "--lr", "1e-2", "3e-2", "--optim.grad_clip=0.5", "--seeds", "2"]
    for run in plan("modern --model.no-qk-norm --model.qk_norm", "gpt3-settings", *shared):
        job = main.resolve(run.arguments)
        assert (job.config, job.run) == (run.config, run.directory)
        assert job.config.optim.grad_clip == 0.5 and job.config.model.qk_norm == (
            run.arm != "gpt3-settings"
        )


def test_every_arm_trains_on_the_tokens_of_the_size(command):
    size = recipes.SIZES["nano"]
    command = command[: command.index("--train.batch-tokens")]
    found = plan("gpt2-baseline", "gpt3-settings", "shakespeare-char", *command)
    for run in found:
        train = run.config.train
        assert train.steps * train.batch_tokens == size.tokens
        assert train.val_tokens == size.val_tokens and train.val_interval == size.val_interval
    # What is typed counts for more.
    (typed,) = plan("gpt3-settings", *command, "--train.tokens", "40960")
    assert typed.config.train.steps == 20


def test_a_sweep_keeps_the_rates_in_proportion(command):
    adamw, muon, untied = (
        plan(recipe, *command, "--lr", "3e-2")[0].config.optim
        for recipe in ("gpt2-rope", "modern", "modern-untied")
    )
    before = read_command(["modern-untied", *command])[1][0].config.optim
    assert adamw.lr == muon.lr == untied.lr == 3e-2 and adamw.muon_lr == 0.02
    assert muon.muon_lr == pytest.approx(before.muon_lr * 3e-2 / before.lr) != before.muon_lr
    assert untied.lm_head_lr / untied.lr == pytest.approx(before.lm_head_lr / before.lr)


def test_later_seeds_wait_for_the_sweep(command):
    found = plan("gpt2-rope", "modern --lr 1e-2", *command, "--lr", "1e-3", "2e-3", "--seeds", "2")
    waits = {(run.arm[:6], run.lr, run.seed): run.waits for run in found}
    assert waits == {
        **{("gpt2-r", 1e-3, 1337): False, ("gpt2-r", 1e-3, 1338): True},
        **{("gpt2-r", 2e-3, 1337): False, ("gpt2-r", 2e-3, 1338): True},
        **{("modern", 1e-2, 1337): False, ("modern", 1e-2, 1338): False},
    }


def test_several_data_sets_are_scored_at_both_ends(command, data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    args = [*command, "--data", str(data), str(other), "--train.steps", "7"]
    found = plan("gpt2-rope", "gpt2-rope --train.eval-interval 3", *args)
    assert [(run.data, run.config.train.eval_interval) for run in found] == [
        *(("tiny", 7), ("other", 7), ("tiny", 3), ("other", 3))
    ]
    assert found[0].arguments[-1] == "7" and found[0].arguments[-2] == "--train.eval-interval"


@pytest.mark.parametrize(
    ("recipes", "options", "sentence"),
    [
        ([], [], "Name the recipes to compare"),
        (["modren"], [], "There is no recipe 'modren'; did you mean modern?"),
        (["modern --size nano"], [], "sets --size, which is the same for all"),
        (["modern --train.runs_dir=x"], [], "sets --train.runs-dir, which is the same for all"),
        (["modern gpt2"], [], "is not one recipe and options of its own"),
        (["modern 'x"], [], "cannot be read: no closing quotation"),
        (["gpt2"], ["--seeds", "0"], "--seeds must be at least 1"),
        (["gpt2 --seeds 0"], [], "that must be at least 1"),
        (["gpt2"], ["--lr", "-1"], "optim.lr cannot be -1.0"),
        (["gpt2"], ["--name", "a/b"], "is not a plain name"),
        (["gpt2"], ["--name", ""], "needs a --name"),
        (["gpt2"], ["--size", "nan"], "There is no size 'nan'; did you mean nano?"),
        (["gpt2"], ["--data", "nowhere"], "There is no data 'nowhere'"),
        (["gpt2"], ["--data"], "--data needs a directory"),
        (["gpt2"], ["--data", "a/x", "b/x/"], "directories of different names, not 'x' 2 times"),
        (["gpt2"], ["--processes", "3"], "3 processes cannot share a step"),
        (["gpt2", "gpt2 --train.steps 5"], [], "640 tokens of training on tiny and 'gpt2'"),
        (["gpt2", "gpt2 --train.val-tokens 64"], [], "64 tokens of validation on tiny and 'gpt2'"),
        (
            ["gpt2 --optim.eps 1e-3", "gpt2 --optim.eps 1e+3"],
            [],
            "Two arms would both be called gpt2-optim.eps-1e-3-tiny",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(command, recipes, options, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        plan(*recipes, *command, *options)
    assert not Path("runs").exists()


def test_an_unknown_option_of_an_arm_is_refused(command, capsys):
    with pytest.raises(SystemExit):
        plan("modern --model.no-qk-nrm", *command)
    assert "--model.no-qk-nrm" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_recipes_go_before_options(command):
    with pytest.raises(UserError, match="The recipes go before all options"):
        read_command([*command, "--jobs", "2", "gpt2"])


def test_the_embedded_corpus_is_made_before_the_runs_are_planned(command, monkeypatch):
    def prepare(asked: arms.load_fineweb.Arguments, quiet: bool) -> None:
        assert asked.source == ("pydocs",) and quiet
        make_data(asked.out)

    monkeypatch.setattr(arms.load_fineweb, "prepare", prepare)
    (run,) = plan("gpt2-rope", *command, "--data", "pydocs", "--train.epochs", "1")
    assert run.config.train.steps > 1 and run.config.model.vocab_size < 100


def test_a_sweep_then_seeds_then_a_table(command, stand_in, monkeypatch, capsys):
    """The best of three rates, one of which diverges, gets the other seeds; the rest do not."""
    args = ["gpt2-rope", "modern --lr 2e-2", *command, "--lr", "1e-2", "3e-2", "0.9"]
    args += ["--seeds", "2", "--jobs", "2"]
    directory = run_all(monkeypatch, *args)
    runs = {path.parent.name for path in directory.glob("*/config.json")}
    assert runs == {
        *(f"gpt2-rope-tiny-lr{lr}-seed1337" for lr in ("0.01", "0.03", "0.9")),
        *(f"modern-tiny-lr0.02-seed{seed}" for seed in (1337, 1338)),
        "gpt2-rope-tiny-lr0.01-seed1338",
    }
    record = json.loads((directory / "table.json").read_text())
    rope, modern = record["rows"]
    assert rope["lr"] == 0.01 and rope["final_loss"] == pytest.approx(5.0113375)
    assert modern["difference"] == pytest.approx(-0.01) and modern["seeds"] == 2
    losses = [(row["lr"], row["final_loss"], row["best"]) for row in record["sweep"]]
    assert losses == [
        (0.01, pytest.approx(5.011337), True),
        (0.03, pytest.approx(5.011337), False),
        (0.9, None, False),
    ]
    assert "is at the edge of the sweep" in record["warnings"][0]
    shown = capsys.readouterr().out
    assert "[3/6] gpt2-rope lr 0.9 seed 1337: diverged in " in shown
    assert "[6/6] gpt2-rope lr 0.01 seed 1338: 5.0113 in " in shown
    text = (directory / "table.md").read_text()
    assert cells(text.split("\n\n")[3])[1]["difference"] == "-0.0100"
    for name in ("overlay.png", "overlay.svg", "rates.png", "rates.svg"):
        assert (directory / "figures" / name).is_file()


def test_the_same_command_again_reuses_all_and_repeats_to_the_byte(
    command, stand_in, monkeypatch, capsys
):
    args = ["gpt2-rope", *command, "--lr", "1e-2", "0.9"]
    directory = run_all(monkeypatch, *args)
    files = [path for path in directory.rglob("*.*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    times = {path: path.stat().st_mtime_ns for path in directory.glob("*/metrics.jsonl")}
    monkeypatch.setattr(experiments.subprocess, "Popen", None)
    capsys.readouterr()
    run_all(monkeypatch, *args)
    shown = capsys.readouterr().out
    assert "[1/2] gpt2-rope lr 0.01 seed 1337: 5.0113, reused" in shown
    assert "[2/2] gpt2-rope lr 0.9 seed 1337: diverged, reused" in shown
    assert {path: path.read_bytes() for path in files} == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_run_of_other_settings_is_in_the_way(command, stand_in, monkeypatch):
    directory = run_all(monkeypatch, "gpt2-rope", *command)
    (config,) = directory.glob("*/config.json")
    with pytest.raises(UserError, match=r"optim.beta1 0.9 -> 0.8\); choose another --name"):
        plan("gpt2-rope", *command, "--optim.beta1", "0.8")
    assert config.is_file()


def test_a_failed_run_ends_all_with_its_last_words(command, stand_in, monkeypatch):
    with pytest.raises(UserError) as caught:
        run_all(monkeypatch, "gpt2-rope --optim.weight-decay 0.5", "modern", *command)
    name = "gpt2-rope-optim.weight-decay-0.5-tiny-lr0.0015-seed1337"
    assert str(caught.value) == (
        f"The run {name} failed (The disk is full); its log is runs/experiments/try/{name}.log, "
        "and the same command continues."
    )
    assert not list(Path("runs/experiments/try").glob("modern*"))


def test_jobs_share_the_cores(command, monkeypatch):
    found = []
    monkeypatch.setattr(experiments.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(experiments.subprocess, "Popen", lambda *a, **k: found.append((a[0], k)))
    options, chosen = read_command(["gpt2-rope", *command, "--jobs", "2", "--processes", "2"])
    (run,) = planned_runs(options, chosen)
    run.log.parent.mkdir(parents=True)
    experiments._start(run, "", options).output.close()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    experiments._start(run, "", options).output.close()
    assert [k["env"]["OMP_NUM_THREADS"] for _, k in found] == ["2", "3"]
    assert "--nproc_per_node=2" in found[0][0]


@pytest.mark.slow
def test_two_recipes_train_side_by_side(command, tmp_path):
    """The real thing: main.py twice, then nothing is left to do."""
    args = ["experiments.py", "gpt2-baseline", "modern", *command, "--train.steps", "4"]
    done = script(*args, "--jobs", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    directory = tmp_path / "runs/experiments/try"
    record = json.loads((directory / "table.json").read_text())
    assert [row["arm"] for row in record["rows"]] == ["gpt2-baseline", "modern"]
    for row in record["rows"]:
        assert row["tokens"] == 512 and 2 < row["final_loss"] < 4 and row["seconds"] > 0
    assert record["rows"][0]["share_of_tokens"] <= 1.0
    assert "[2/2] modern lr 0.01 seed 1337: " in done.stdout
    assert (directory / "modern-tiny-lr0.01-seed1337.log").stat().st_size > 0


@pytest.mark.slow
def test_ctrl_c_stops_a_run_in_good_order_and_the_same_command_continues(command, tmp_path):
    args = ["experiments.py", "gpt2-baseline", *command, "--train.steps", "400"]
    args += ["--train.val-interval", "100"]
    process = start(*args, cwd=tmp_path)
    directory = tmp_path / "runs/experiments/try"
    wait_for(lambda: any('"train"' in p.read_text() for p in directory.glob("*/metrics.jsonl")))
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues" in output, errors
    (run,) = (path.parent for path in directory.glob("*/config.json"))
    assert list(run.glob("checkpoints/step_*")) and not (directory / "table.md").exists()
    began = (run / "metrics.jsonl").read_text().splitlines()[0]
    done = script(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if '"train"' in line]
    assert lines[0] == began and steps == list(range(1, 401))
    starts = (run / "environment.jsonl").read_text().splitlines()
    assert [json.loads(line)["started_at_step"] > 0 for line in starts] == [False, True]
