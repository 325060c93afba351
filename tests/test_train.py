"""The loop: learning, exact resume, elastic world size, and the pitfalls of earlier loops."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import logs
from config import UserError, identity_digest, replace
from distributed import World
from files import seal, unseal
from fineweb import FineWebEdu
from model import GPT
from optim import lr_at
from orders import update_windows
from tests.tiny import fields, make_data, script, tiny_config
from train import train

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


def run_training(config, resumed: Path | None = None) -> Path:
    run = Path(config.train.runs_dir) / config.name
    if resumed is None:
        logs.create_run(run, config)
    train(config, run, ALONE, resumed)
    return run


def metrics(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def weights(run: Path, step: int) -> dict:
    return load_file(checkpoint.checkpoint_path(run, step) / "model.safetensors")


def assert_same_tensors(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_loss_falls_and_first_and_last_step_are_measured(data, tmp_path):
    config = tiny_config(data, tmp_path, updates=60, lr=1e-2)
    run = run_training(config)
    val = metrics(run, "val")
    assert val[0]["step"] == 0 and val[-1]["step"] == 60
    assert val[-1]["loss"] < 0.6 * val[0]["loss"]
    assert val[0]["bits_per_byte"] == pytest.approx(
        val[0]["loss"] / 0.6931 * _tokens_per_byte(data, config), rel=1e-3
    )
    lines = metrics(run, "train")
    assert [line["step"] for line in lines] == list(range(1, 61))
    assert [line["lr"] for line in lines] == [lr_at(k, 60, config.optim) for k in range(1, 61)]
    assert checkpoint.all_checkpoints(run)[-1].name == "step_000060"


def _tokens_per_byte(data, config) -> float:
    """Targets over their text bytes in the validation windows; only end-of-text has none."""
    val = FineWebEdu(data, "val", config.model.block_size)
    targets = val.windows(range(config.train.val_tokens // config.model.block_size))[:, 1:]
    return targets.numel() / (targets != val.stream.tokenizer.eot).sum().item()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_resumed_weights_are_bitwise_those_of_a_straight_run(data, tmp_path, optimizer, dropout):
    config = tiny_config(data, tmp_path / "a", optimizer=optimizer, dropout=dropout)
    straight = run_training(config)
    # Checkpoints at 4 and 8: everything after 4 is lost, as after a crash.
    stopped = tmp_path / "b" / "tiny"
    shutil.copytree(straight, stopped)
    for step in (8, 12):
        shutil.rmtree(checkpoint.checkpoint_path(stopped, step))
    resumed = run_training(
        replace(config, {"train.runs_dir": str(tmp_path / "b")}), checkpoint.newest(stopped)
    )
    assert_same_tensors(weights(straight, 12), weights(resumed, 12))
    name = "optimizer.safetensors"
    assert_same_tensors(
        load_file(checkpoint.checkpoint_path(straight, 12) / name),
        load_file(checkpoint.checkpoint_path(resumed, 12) / name),
    )
    assert [(m["step"], m["loss"]) for m in metrics(straight, "train")] == [
        (m["step"], m["loss"]) for m in metrics(resumed, "train")
    ]
    assert metrics(straight, "val") == metrics(resumed, "val")
    assert (straight / "samples.md").read_text() == (resumed / "samples.md").read_text()


def test_a_run_goes_on_only_with_its_own_config_and_data(data, tmp_path):
    config = tiny_config(data, tmp_path, updates=4)
    run = run_training(config)
    newest = checkpoint.newest(run)
    with pytest.raises(UserError, match=r"another config\.json"):
        run_training(replace(config, {"optim.lr": 1.0}), newest)
    other = make_data(tmp_path / "other", documents=50)
    state = unseal((newest / "state.json").read_bytes())
    digest = identity_digest(replace(config, {"data": str(other)}))
    (newest / "state.json").write_bytes(seal({**state, "config_digest": digest}))
    with pytest.raises(UserError, match="is not the data"):
        run_training(replace(config, {"data": str(other)}), newest)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_process_two_processes_and_accumulation_agree(data, tmp_path, optimizer):
    base = tiny_config(data, tmp_path, optimizer=optimizer, updates=50, checkpoint_interval=0)
    losses = {}
    for name, processes, micro_batch in (
        ("one", 1, 8),
        ("two", 2, 4),
        ("half", 1, 4),
        ("slow", 2, 1),
    ):
        config = replace(base, {"name": name, "train.micro_batch": micro_batch})
        command = ["main.py", "--data", data, "--name", name, *fields(config)]
        result = script(*command, cwd=tmp_path, processes=processes)
        assert result.returncode == 0, result.stderr
        losses[name] = torch.tensor([m["loss"] for m in metrics(tmp_path / name, "train")])
        losses[f"{name} val"] = torch.tensor([m["loss"] for m in metrics(tmp_path / name, "val")])
    for name in ("two", "half", "slow"):
        assert (losses["one"] - losses[name]).abs().max() < 1e-4
        assert (losses["one val"] - losses[f"{name} val"]).abs().max() < 1e-4


def test_logged_loss_is_that_of_the_whole_update(data, tmp_path):
    config = tiny_config(data, tmp_path, updates=1)
    run = run_training(config)
    torch.manual_seed(config.train.seed)
    model = GPT(config.model)
    windows = FineWebEdu(data, "train", 32)
    batch = windows.windows(update_windows(config, 1, len(windows)))
    with torch.no_grad():
        _, loss = model(batch[:, :-1], batch[:, 1:])
    assert metrics(run, "train")[0]["loss"] == pytest.approx(loss.item(), abs=1e-6)


def test_validation_reads_the_same_tokens_every_time(data, tmp_path):
    """Next to no learning rate leaves the weights, so all validations must give one number."""
    run = run_training(tiny_config(data, tmp_path, lr=1e-30, weight_decay=0.0))
    losses = {line["loss"] for line in metrics(run, "val")}
    assert len(losses) == 1


def test_validation_does_not_depend_on_micro_batch(data, tmp_path):
    losses = []
    for micro_batch in (1, 8):
        config = tiny_config(data, tmp_path / str(micro_batch), updates=0, micro_batch=micro_batch)
        losses.append(metrics(run_training(config), "val")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_end_of_epoch_is_validated_and_saved(data, tmp_path):
    per_epoch = len(FineWebEdu(data, "train", 32)) // 8
    config = tiny_config(
        data, tmp_path, updates=per_epoch + 2, checkpoint_interval=0, val_interval=0
    )
    run = run_training(config)
    steps = [0, per_epoch, per_epoch + 2]
    assert [line["step"] for line in metrics(run, "val")] == steps
    assert [path.name for path in checkpoint.all_checkpoints(run)] == [
        f"step_{step:06d}" for step in steps[1:]
    ]


def test_newest_and_best_checkpoints_are_kept(data, tmp_path):
    config = tiny_config(data, tmp_path, updates=20, checkpoint_interval=2, keep_checkpoints=2)
    run = run_training(config)
    kept = {path.name for path in checkpoint.all_checkpoints(run)}
    losses = {line["step"]: line["loss"] for line in metrics(run, "val") if line["step"] > 0}
    at_checkpoints = {step: loss for step, loss in losses.items() if step % 2 == 0}
    best = min(at_checkpoints, key=at_checkpoints.get)
    assert kept == {"step_000018", "step_000020", f"step_{best:06d}"}


def test_a_text_that_looks_like_a_heading_survives_a_resumption(tmp_path):
    logs.append_samples(tmp_path, 4, ["In"], [" it\r## Step 9\n\r"])
    before = (tmp_path / "samples.md").read_bytes()
    logs.rewind(tmp_path, 4)
    assert (tmp_path / "samples.md").read_bytes() == before


def test_samples_are_written_at_start_and_at_each_checkpoint(data, tmp_path):
    run = run_training(tiny_config(data, tmp_path))
    text = (run / "samples.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## Step {step}" for step in (0, 4, 8, 12)
    ]


def test_compiled_training_matches_eager(data, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no compiler")
    losses = []
    for mode in ("off", "on"):
        config = tiny_config(data, tmp_path / mode, updates=3, compile=mode, sample_tokens=0)
        run = run_training(config)
        losses.append([m["loss"] for m in metrics(run, "train")])
        # Weights of a compiled model are saved under the raw model's names.
        assert "wte.weight" in weights(run, 3)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_training_goes_on_without_a_compiler(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    run_training(tiny_config(data, tmp_path, updates=1, compile="on"))
    assert "going on without it" in capsys.readouterr().out


def test_all_reduce_check(tmp_path):
    result = script("train.py", cwd=tmp_path, processes=2)
    assert result.returncode == 0, result.stderr
    assert "rank 1: cpu" in result.stdout
    assert "sum over 2 process(es): 3, as it should be" in result.stdout
    assert "GB/s" in result.stdout
