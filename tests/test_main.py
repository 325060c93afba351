"""The command line: precedence, resuming, weights to begin with, and a person's mistakes."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import main
import recipes
import sample
from config import UserError, replace
from corpus.tokenizer import CharTokenizer, gpt2_tokenizer
from modern import build_model
from tests.runs import column, metrics, run_training, steps
from tests.tiny import ALPHABET, ROOT, fields, make_data, script, tiny_config
from training.setup import complete_config
from utils import load_config


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="module")
def source(data, tmp_path_factory) -> Path:
    """A run whose weights others begin with."""
    return run_training(tiny_config(data, tmp_path_factory.mktemp("source")))


def small(data: Path, name: str = "run") -> list[str]:
    return ["--data", str(data), "--name", name, *fields(tiny_config(data, Path("runs")))]


def mistake(*args: object, cwd: Path, **options) -> str:
    """Run main.py, expect a mistake, and return its sentence after checking that it is only one."""
    result = script("main.py", *args, cwd=cwd, **options)
    assert result.returncode == 1, result.stdout + result.stderr
    found = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(found) == 1 and found[0].endswith((".", "?")), result.stderr
    return found[0]


def test_size_then_recipe_then_command_line(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = main.resolve(["quickstart", "--data", str(data), "--model.n-layer", "3"])
    base = recipes.build("quickstart", "nano")
    assert (job.config.model.n_layer, job.config.model.n_embd) == (3, base.model.n_embd)
    assert job.config.optim == base.optim
    assert (job.run, job.resumes) == (Path("runs/quickstart-nano"), False)
    # What the data decides is part of the resolved config.
    assert job.config.model.vocab_size == 30 and job.config.train.steps > 0
    job = main.resolve(["--size", "nano", "--data", str(data), "--name", "x", "--optim.lr=0.5"])
    assert (job.config.recipe, job.config.size, job.config.optim.lr) == ("gpt2", "nano", 0.5)
    assert main.resolve(["--data", str(data), "--size", "d2"]).run.name == "gpt2-d2"


def test_what_is_typed_is_checked_over_the_recipe(data):
    """The parts of modern fit its recipe, not the defaults; so do batch and context together."""
    words = [
        "--size",
        "nano",
        "--data",
        str(data),
        "--model.no-qk-norm",
        "--model.logit-softcap=30",
    ]
    words += ["--model.block-size", "100", "--train.batch-tokens", "1000"]
    model = main.resolve(["modern", *words]).config.model
    assert (model.qk_norm, model.logit_softcap, model.value_residual) == (False, 30.0, True)
    assert main.resolve([*words, "modern"]).config.model == model, "the recipe may stand last"
    with pytest.raises(UserError, match=r"model\.logit_softcap can only be set with"):
        main.resolve(words)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["quickstrt"], "There is no recipe 'quickstrt'; did you mean quickstart?"),
        (["--size", "125m"], "There is no size '125m'; did you mean 124m?"),
        (["--data", "nowhere"], "There is no data 'nowhere'"),
        (["--data", "empty"], "empty holds no token shards"),
        (["--resume", "nothing"], "There is no run 'nothing'"),
        (["--name", "a/b"], "--name a/b is not 1 to 100 letters, digits, dots, dashes"),
        (["--name", ".."], "--name .. is not 1 to 100 letters"),
        (["--name", "$HOME"], "--name $HOME is not 1 to 100 letters"),
        (["--name", "a" * 101], "is not 1 to 100 letters"),
        (["--data", "\udcff"], "text that is not UTF-8"),
        (["--model.n-head", "5"], "must be a multiple of model.n_head 5"),
        (["--train.batch-tokens", "1000"], "is not a multiple of model.block_size 256"),
        (["--train.seed", "9" * 23], "train.seed cannot be 999"),
        (["--train.epochs", "1e300"], "train.epochs cannot be 1e+300"),
        (["--train.eval-tasks", "wikitex"], "no benchmark 'wikitex'; did you mean wikitext"),
        (["--data", "DATA", "--size", "124m"], "less than a step of 512"),
        (["--price", "2"], "--gpus and --price are for a plan"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(data, tmp_path, monkeypatch, args, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    args = [str(data) if arg == "DATA" else arg for arg in args]
    args += ["--size", "nano"] if "--size" not in args else []
    with pytest.raises(UserError) as error:
        main.resolve(args)
    text = str(error.value)
    assert sentence in text and "\n" not in text and len(text) < 300
    assert not (tmp_path / "runs").exists()


def test_a_tracker_that_is_not_installed_is_named(data, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["--size", "nano", "--data", str(data), "--train.trackers", "wandb", "trackio"]
    with pytest.raises(UserError, match="wandb is not installed"):
        main.resolve(words)


@pytest.mark.parametrize(
    ("typed", "shown"),
    [("--optim.lrr=1", "--optim.lr"), ("--train.steps=many", "int"), ("--train.shuffle=x", "none")],
)
def test_typing_mistakes_are_for_tyro_to_tell(tmp_path, typed, shown):
    result = script("main.py", typed, cwd=tmp_path)
    assert result.returncode == 2 and shown in result.stderr and "Traceback" not in result.stderr


def test_until_training_begins_torch_is_not_imported(data, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import main\n"
        f"main.resolve(['--size', 'nano', '--data', {str(data)!r}])\n"
        "main.plan(main.recipes.build('gpt2'))\n"
        "assert 'torch' not in sys.modules\n"
        "main.parse(main.Args, ['--help'])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert result.returncode == 0, result.stderr.decode()
    assert b"--train.batch-tokens" in result.stdout and b"--auto-resume" in result.stdout


@pytest.mark.slow
def test_train_then_resume_with_another_micro_batch_then_refuse_another_model(data, tmp_path):
    done = script("main.py", *small(data), "--train.stop-at-step", 8, "--verify", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Figure: runs/run/figures/results.png" in done.stdout
    assert f"{data} is intact" in done.stdout
    assert "python main.py --resume run" in done.stdout.splitlines()[-1]
    run = tmp_path / "runs" / "run"
    assert load_config(run).train.steps == 12 and steps(run) == [4, 8]
    # Unless it is typed again, the earlier end is not this start's.
    again = script("main.py", "--resume", run, "--train.micro-batch-size", 2, cwd=tmp_path)
    assert again.returncode == 0 and steps(run) == [4, 8, 12], again.stderr
    environment = [
        json.loads(line) for line in (run / "environment.jsonl").read_text().splitlines()
    ]
    assert [line["micro_batch_size"] for line in environment] == [4, 2]
    # The module may add its build (+cu130) to the package's version.
    assert torch.__version__.startswith(environment[0]["versions"]["torch"])

    changed = [*small(data), "--auto-resume", "--train.seed", "7"]
    for words, sentence in (
        (["--resume", "run", "--model.n-layer", "3", "--optim.lr", "1"], "model.n_layer 2 -> 3; "),
        (["--resume", "run", "modern"], "recipe gpt2 -> modern"),
        (small(data), "exists; add --resume run"),
        (changed, "train.seed 1337 -> 7"),
    ):
        assert sentence in mistake(*words, cwd=tmp_path)
    auto = script("main.py", *small(data), "--auto-resume", cwd=tmp_path)
    assert auto.returncode == 0, auto.stderr


@pytest.mark.slow
def test_a_run_that_torchrun_restarts_goes_on(data, tmp_path):
    words = small(data)
    first = script("main.py", *words, "--train.stop-at-step", 4, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    environment = {"TORCHELASTIC_RESTART_COUNT": "1"}
    again = script("main.py", *words, cwd=tmp_path, **environment)
    assert again.returncode == 0 and steps(tmp_path / "runs" / "run") == [4, 8, 12], again.stderr


@pytest.mark.slow
def test_two_ranks_train_resume_and_report(data, tmp_path):
    first = script("main.py", *small(data), "--train.stop-at-step", 4, cwd=tmp_path, processes=2)
    assert first.returncode == 0, first.stderr
    assert "= 2 process(es) x 1 accumulation step(s) x 4" in first.stdout
    assert first.stdout.count("Figure: ") == 2 and "There is no figure" not in first.stdout
    again = script("main.py", "--resume", "run", cwd=tmp_path, processes=2)
    assert again.returncode == 0 and steps(tmp_path / "runs" / "run") == [4, 8, 12], again.stderr


@pytest.mark.slow
def test_mistakes_of_several_ranks_are_one_sentence(data, tmp_path):
    refused = mistake(*small(data), cwd=tmp_path, processes=3)
    assert "3 processes cannot share a step of 8 sequences; valid are 1, 2, 4, 8." in refused
    assert "exist" not in refused and not (tmp_path / "runs").exists()
    indivisible = mistake(*small(data), "--train.micro-batch-size", 3, cwd=tmp_path)
    assert "micro_batch_size 3 does not divide a process's 8 sequences" in indivisible


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs Linux")
@pytest.mark.parametrize("where", ["a file", "no such place"])
def test_a_place_that_cannot_be_written_is_one_sentence(data, tmp_path, where):
    (tmp_path / "taken").write_text("a file, where a directory should be")
    runs_dir = tmp_path / "taken" / "runs" if where == "a file" else "/proc/runs"
    sentence = mistake(*small(data), "--train.runs-dir", runs_dir, cwd=tmp_path)
    assert "cannot be made" in sentence


def test_damaged_data_is_refused_by_verify_before_there_is_a_run(data, tmp_path):
    damaged = shutil.copytree(data, tmp_path / "damaged")
    shard = next(damaged.glob("*_train_*.npy"))
    content = bytearray(shard.read_bytes())
    content[-4] ^= 1
    shard.write_bytes(content)
    sentence = mistake(*small(damaged), "--verify", cwd=tmp_path)
    assert shard.name in sentence and "prepare the data again" in sentence
    assert not (tmp_path / "runs").exists()


def test_a_run_is_of_one_program_at_a_time(data, source, tmp_path):
    run = shutil.copytree(source, tmp_path / "runs" / "busy")
    holds = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pathlib, utils\n"
        f"with utils.locked(pathlib.Path({str(run / 'lock')!r})):\n"
        "    print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holds], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"held\n"
        sentence = mistake("--resume", "busy", cwd=tmp_path)
        other.communicate(b"\n")
    assert f"process {other.pid} on " in sentence and "wait for it to end" in sentence


# Weights to begin with.

TINY = (
    *("--train.steps", "4", "--train.batch-tokens", "64", "--train.val-tokens", "1024"),
    *("--train.sample-tokens", "0", "--train.dtype", "float32", "--train.device", "cpu"),
)


def config_of(*args: str):
    typed = [*args, *TINY]
    return main.new_config(typed, main.parse(main.Args, typed))


@pytest.mark.slow
def test_a_run_begins_where_its_source_ended(data, source, tmp_path):
    words = ["--init-from", source, "--data", data, "--train.micro-batch-size", 1, *TINY]
    result = script("main.py", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    run = tmp_path / "runs" / f"gpt2-d2-from-{source.name}"
    before, after = column(source, "val", "loss"), column(run, "val", "loss")
    assert after[0] == pytest.approx(before[-1], abs=1e-6)
    assert "begun with the weights of" in result.stdout
    # Nothing is scored that a model of its size is not scored on.
    assert metrics(run, "eval") == []
    assert script("main.py", "--resume", run, cwd=tmp_path).returncode == 0


def test_the_shape_is_the_sources_and_dropout_is_free(source):
    config = config_of(
        *("--init-from", str(source), "--model.dropout", "0.1", "--model.block-size", "16")
    )
    assert (config.model.n_layer, config.model.n_embd, config.model.vocab_size) == (2, 32, 30)
    assert (config.model.dropout, config.model.block_size) == (0.1, 16)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((4, 4, 128), "nano"),
        ((1, 1, 32), "d2"),  # smaller than any
        ((6, 6, 300), "d4"),  # between two
        ((12, 12, 768), "124m"),
        ((13, 12, 768), "124m"),
    ],
)
@pytest.mark.parametrize("recipe", ["gpt2", "modern"])
def test_the_cadence_is_that_of_the_largest_size_that_is_not_larger(
    monkeypatch, shape, size, recipe
):
    sizes = dict(zip(("n_layer", "n_head", "n_embd"), shape, strict=True), block_size=96)
    found = dataclasses.replace(recipes.build(recipe, "nano").model, **sizes)
    with torch.device("meta"):
        model = build_model(found)
    monkeypatch.setattr(sample, "load", lambda *_: (model, gpt2_tokenizer(), False))
    words = [recipe, "--init-from", "gpt2", "--train.steps", "4"]
    config = main.new_config(words, main.parse(main.Args, words))
    listed = recipes.build(recipe, size)
    assert (config.size, config.model, config.optim) == (size, found, listed.optim)
    whole = listed.train.batch_tokens // 96 * 96  # of sequences
    changes = {"train.steps": 4, "train.batch_tokens": whole, "model.block_size": 96}
    assert config.train == replace(listed, changes).train
    words += ["--size", "350m"]
    assert main.new_config(words, main.parse(main.Args, words)).size == "350m"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["modern"], "modern has model.architecture modern, but .* has gpt2"),
        (["gpt2-rope"], "model.pos_emb rope, but .* has learned"),
        (["--model.n-layer", "3"], "model.n_layer 3 does not fit .*, which has 2"),
        (["--model.block-size", "64"], "model.block_size 64 does not fit .*, which has 32"),
        (["--model.no-bias"], "model.bias False does not fit"),
    ],
)
def test_another_shape_is_refused(source, words, sentence):
    with pytest.raises(UserError, match=sentence):
        config_of(*words, "--init-from", str(source))


def test_data_of_another_vocabulary_is_refused(source, tmp_path):
    more = make_data(tmp_path / "more", tokenizer=CharTokenizer(ALPHABET + "!"))
    config = config_of("--init-from", str(source), "--data", str(more))
    with pytest.raises(UserError, match=r"a vocabulary of 31 ids, but .* one of 30"):
        complete_config(config)
    # As many characters, but others.
    mixed = CharTokenizer("".join(reversed(ALPHABET)))
    mixed = make_data(tmp_path / "mixed", tokenizer=mixed)
    words = ["--init-from", source, "--data", mixed, "--name", "mixed", *TINY]
    assert "has the ids of another tokenizer" in mistake(*words, cwd=tmp_path)
    assert not (tmp_path / "runs").exists()


def test_a_source_that_is_not_there_is_one_sentence():
    with pytest.raises(UserError, match="nowhere"):
        config_of("--init-from", "nowhere")
