"""transformers.Trainer with our weights, data and schedule has our losses, and leaves a run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import results
from bench import hf_trainer
from bench.hf_trainer import Options, check_new, compare, config_of
from config import Config, UserError, replace
from tests.runs import run_training
from tests.tiny import ROOT, make_data, tiny_config
from training import checkpoint
from training.logger import create_run

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from bench import hf_peer  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(autouse=True)
def no_memory():
    """Accelerate keeps the first arithmetic of a process for all that follow."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def small(data: Path, runs_dir: Path, **changes: object) -> Config:
    return tiny_config(data, runs_dir, **{"sample_tokens": 0, "checkpoint_interval": 0, **changes})


def our_run(config: Config) -> Path:
    return run_training(replace(config, {"name": "ours"}))


def their_run(config: Config) -> Path:
    hf_peer.train_with_trainer(config)
    return Path(config.train.runs_dir) / config.name


def lines(run: Path, kind: str) -> list[dict]:
    found = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def column(run: Path, kind: str, key: str) -> list[float]:
    return [line[key] for line in lines(run, kind)]


@pytest.mark.parametrize("order", ["sequences", "documents"])
def test_losses_rates_norms_and_validations_are_ours(data, tmp_path, order):
    # Two micro-batches a step, and a validation that its batches do not divide.
    config = small(data, tmp_path, micro_batch_size=4, shuffle=order, val_tokens=7 * 32)
    ours, theirs = our_run(config), their_run(config)
    for key, tolerance in (("loss", 1e-4), ("grad_norm", 1e-3), ("lr", 1e-12)):
        expected = pytest.approx(column(ours, "train", key), abs=tolerance)
        assert column(theirs, "train", key) == expected
    assert column(theirs, "train", "step") == list(range(1, 13))
    assert column(theirs, "val", "step") == [0, 5, 10, 12]
    assert column(theirs, "val", "loss") == pytest.approx(column(ours, "val", "loss"), abs=1e-4)
    expected = pytest.approx(column(ours, "val", "bits_per_byte"), abs=1e-4)
    assert column(theirs, "val", "bits_per_byte") == expected
    assert lines(theirs, "train")[0].keys() == lines(ours, "train")[0].keys()
    first, last = column(theirs, "train", "loss")[0], column(theirs, "train", "loss")[-1]
    assert last < first - 0.5


def test_in_bfloat16_losses_stay_near_ours(data, tmp_path):
    config = small(data, tmp_path, dtype="bfloat16")
    ours, theirs = our_run(config), their_run(config)
    expected = pytest.approx(column(ours, "train", "loss"), abs=2e-3)
    assert column(theirs, "train", "loss") == expected
    assert json.loads((theirs / "environment.jsonl").read_text())["dtype"] == "bfloat16"


def test_what_it_leaves_is_a_run_and_a_model(data, tmp_path, capsys):
    config = small(data, tmp_path, steps=3, val_interval=0)
    ours, theirs = our_run(config), their_run(config)
    assert column(theirs, "val", "step") == [0, 3]
    assert not list(theirs.rglob("*.bin"))
    model = transformers.GPT2LMHeadModel.from_pretrained(theirs / "hf")
    trained = hf_peer.GPT(config.model)
    checkpoint.load_model(checkpoint.newest(ours), trained)
    weights = hf_peer.to_transformers(trained.state_dict(), config.model)
    for name, tensor in model.named_parameters():
        torch.testing.assert_close(tensor.detach(), weights[name], atol=1e-4, rtol=1e-3)
    assert len(transformers.AutoTokenizer.from_pretrained(theirs / "hf")) == config.model.vocab_size
    results.report([ours, theirs], samples=0)
    assert (ours / "figures" / "overlay.png").exists()
    assert "tiny" in capsys.readouterr().out


def test_a_comparison_says_how_fast_and_how_near(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hf_trainer, "in_fresh_process", lambda loop, config: loop(config))
    compare(small(data, tmp_path, steps=6), repeats=2)
    faster, nearer = (json.loads(text) for text in capsys.readouterr().out.splitlines())
    assert faster["unit"] == "tokens/s"
    assert nearer["unit"] == "nats" and nearer["value"] < 1e-4
    assert (tmp_path / "tiny-ours").exists() and (tmp_path / "tiny").exists()


def test_the_settings_are_the_reproductions():
    config = config_of(Options(size="124m", steps=18_849))
    optim, train_ = config.optim, config.train
    assert (optim.lr, optim.weight_decay, optim.grad_clip) == (6e-4, 0.1, 1.0)
    assert round(optim.warmup_frac * train_.steps) == 700 and optim.final_lr_frac == 0
    assert train_.batch_tokens == 8 * 64 * config.model.block_size
    assert (optim.beta2, optim.schedule) == (0.999, "linear")


def test_a_run_that_exists_is_one_sentence(data, tmp_path):
    config = small(data, tmp_path)
    create_run(tmp_path / "tiny-ours", config)
    check_new(config, "")
    with pytest.raises(UserError, match=r"tiny-ours exists; choose another --name"):
        check_new(config, "", "-ours")


def test_accelerates_configuration_asks_for_zero_1():
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "bench" / "accelerate_zero1.yaml"))
    assert config.distributed_type.value == "DEEPSPEED"
    path = ROOT / config.deepspeed_config["deepspeed_config_file"]
    deepspeed = json.loads(path.read_text())
    assert deepspeed["zero_optimization"]["stage"] == 1
    # What both have a say in, Trainer fills in from our config.
    for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert deepspeed[name] == "auto"


@pytest.mark.slow
def test_two_processes_have_the_losses_of_one(data, tmp_path):
    runs = []
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={processes}", "-m", "bench.hf_trainer"]
        command += ["--data", str(data), "--steps", "5", "--dtype", "float32", "--device", "cpu"]
        command += ["--runs-dir", str(tmp_path), "--name", f"by-{processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        runs.append(tmp_path / f"by-{processes}")
    one, two = runs
    assert column(two, "train", "loss") == pytest.approx(column(one, "train", "loss"), abs=1e-4)
    assert column(two, "val", "loss") == pytest.approx(column(one, "val", "loss"), abs=1e-4)
    facts = json.loads((two / "environment.jsonl").read_text())
    assert (two / "hf" / "model.safetensors").exists()
    assert (facts["world_size"], facts["distributed"]) == (2, "MULTI_CPU")
