"""The command line: precedence, resuming, and a person's mistakes, each one plain sentence."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import main
import recipes
from config import UserError
from logs import read_config
from tests.tiny import fields, make_data, script, tiny_config


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


def mistake(*args: object, cwd: Path) -> str:
    """Run main.py, expect a mistake, and return its sentence after checking that it is only one."""
    result = script("main.py", *args, cwd=cwd)
    assert result.returncode in (1, 2), result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and line.endswith((".", "?"))
    return line


def small(data: Path, name: str = "run") -> list[str]:
    return ["--data", str(data), "--name", name, *fields(tiny_config(data, Path("runs")))]


def test_size_then_recipe_then_command_line(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = main.resolve(["quickstart", "--data", str(data), "--model.n-layer", "3"])
    base = recipes.build("quickstart", "nano")
    assert (job.config.model.n_layer, job.config.model.n_embd) == (3, base.model.n_embd)
    assert job.config.optim == base.optim
    assert (job.run, job.resumes) == (Path("runs/quickstart-nano"), False)
    # What the data decides is part of the resolved config.
    assert job.config.model.vocab_size == 30 and job.config.train.updates > 0
    job = main.resolve(["--size", "nano", "--data", str(data), "--name", "x", "--optim.lr=0.5"])
    assert (job.config.recipe, job.config.size, job.config.optim.lr) == ("gpt2", "nano", 0.5)
    assert main.resolve(["--data", str(data), "--size", "nano"]).run.name == "gpt2-nano"


def test_benchmarks_are_known_before_anything_starts(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--data", str(data), "--size", "nano", "--train.eval-tasks", "hellaswag", "wikitex"]
    with pytest.raises(UserError, match=r"no benchmark 'wikitex'; did you mean wikitext"):
        main.resolve(words)
    assert main.resolve([*words[:-1], "wikitext"]).config.train.eval_tasks == (
        "hellaswag",
        "wikitext",
    )
    assert not list(tmp_path.iterdir())


def test_train_then_resume_with_another_micro_batch_then_refuse_another_model(data, tmp_path):
    done = script("main.py", *small(data), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Figure: runs/run/figures/results.png" in done.stdout
    assert "python main.py --resume run" in done.stdout
    run = tmp_path / "runs" / "run"
    assert read_config(run).train.updates == 12
    environment = json.loads((run / "environment.json").read_text())
    assert (environment["world_size"], environment["micro_batch"]) == (1, 4)
    # The module may add its build (+cu130) to the package's version.
    assert torch.__version__.startswith(environment["versions"]["torch"])

    again = script("main.py", "--resume", "run", "--train.micro-batch", 2, cwd=tmp_path)
    assert again.returncode == 0, again.stderr

    sentence = mistake("--resume", "run", "--model.n-layer", 3, "--optim.lr", 1, cwd=tmp_path)
    assert "model.n_layer 2 -> 3" in sentence and "optim.lr 0.003 -> 1" in sentence
    assert "exists; add --resume run" in mistake(*small(data), cwd=tmp_path)
    auto = script("main.py", *small(data), "--auto-resume", cwd=tmp_path)
    assert auto.returncode == 0, auto.stderr
    changed = [*small(data), "--auto-resume", "--train.seed", 7]
    assert "train.seed 1337 -> 7" in mistake(*changed, cwd=tmp_path)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["quickstrt"], "There is no recipe 'quickstrt'; did you mean quickstart?"),
        (["--size", "125m"], "There is no size '125m'; did you mean 124m?"),
        (["--optim.lrr", "1"], "There is no option --optim.lrr; did you mean --optim.lr?"),
        (["--train.updates", "many"], "--train.updates"),
        (["--train.order", "random"], "--train.order"),
        (["--data", "nowhere"], "There is no data 'nowhere'"),
        (["--data", "empty"], "empty holds no token shards"),
        (["--resume", "nothing"], "There is no run 'nothing'"),
        (["--data", "DATA", "--name", "a/b"], "--name a/b is not a plain name"),
        (["--data", "DATA", "--model.n-head", "5"], "must be a multiple of model.n_head 5"),
        (["--data", "DATA", "--train.tokens-per-update", "1000"], "is not a multiple of"),
        (["--data", "DATA", "--size", "124m"], "less than one update"),
    ],
)
def test_mistakes_are_one_sentence_without_loading_torch(
    data, tmp_path, monkeypatch, args, sentence
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    args = [str(data) if arg == "DATA" else arg for arg in args]
    if "--size" not in args:
        args += ["--size", "nano"]
    with pytest.raises(UserError) as error:
        main.resolve(args)
    text = str(error.value)
    assert sentence in text and "\n" not in text and len(text) < 300
    assert not (tmp_path / "runs").exists()


def test_mistakes_from_the_shell(data, tmp_path):
    assert "did you mean quickstart" in mistake("quickstrt", cwd=tmp_path)
    indivisible = mistake(*small(data), "--train.micro-batch", 3, cwd=tmp_path)
    assert "does not divide the 8 windows" in indivisible and "1, 2, 4, 8." in indivisible
    assert not (tmp_path / "runs").exists()


def test_too_many_processes_are_one_sentence(data, tmp_path):
    result = script("main.py", *small(data), cwd=tmp_path, processes=3)
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "cannot be shared by 3 processes; valid" in errors[0]


def test_help_shows_every_field(tmp_path):
    result = script("main.py", "--help", cwd=tmp_path, COLUMNS="200")
    assert result.returncode == 0
    for option in (
        *("--model.n-layer", "--model.block-size", "--model.dropout", "--optim.lr"),
        *("--optim.grad-clip", "--train.updates", "--train.tokens-per-update", "--train.compile"),
        *("--train.val-tokens", "--train.keep-checkpoints", "--train.runs-dir", "--auto-resume"),
    ):
        assert option in result.stdout
    assert "Peak learning rate of AdamW" in result.stdout


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux")
@pytest.mark.parametrize("where", ["a file", "no such place"])
def test_a_place_that_cannot_be_written_is_one_sentence(data, tmp_path, where):
    (tmp_path / "taken").write_text("a file, where a directory should be")
    runs_dir = tmp_path / "taken" / "runs" if where == "a file" else "/proc/runs"
    sentence = mistake(*small(data), "--train.runs-dir", runs_dir, cwd=tmp_path)
    assert "cannot be made" in sentence


@pytest.mark.parametrize("verify", [False, True])
def test_damaged_data_is_refused_before_there_is_a_run(data, tmp_path, verify):
    """Past the sampled blocks only --verify sees it; these shards are small enough to be seen."""
    damaged = shutil.copytree(data, tmp_path / "damaged")
    shard = next(damaged.glob("*_train_*.npy"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    options = ["--verify"] if verify else []
    sentence = mistake(*small(damaged), *options, cwd=tmp_path)
    assert shard.name in sentence and "prepare the data again" in sentence
    assert not (tmp_path / "runs").exists()


def test_verify_says_what_it_read(data, tmp_path):
    result = script("main.py", *small(data), "--verify", "--train.updates", 1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"{data} is intact" in result.stdout
