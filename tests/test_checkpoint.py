"""Checkpoints: exact round trip, damage noticed and named, nothing earlier harmed."""

import dataclasses
import errno
import os

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
from config import ModelConfig, OptimConfig, UserError
from files import seal, unseal
from model import GPT
from optim import build_optimizers

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=50)


def trained(optimizer: str = "adamw", config: ModelConfig = CONFIG, updates: int = 2):
    torch.manual_seed(0)
    model = GPT(config)
    optimizers = build_optimizers(model, OptimConfig(optimizer=optimizer), torch.float32)
    for _ in range(updates):
        idx = torch.randint(0, config.vocab_size, (2, 9))
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
    return model, optimizers


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_round_trip_is_bitwise(tmp_path, optimizer):
    model, optimizers = trained(optimizer)
    path = checkpoint.save(tmp_path, 2, model, optimizers, {"val_loss": 1.5})
    assert sorted(p.name for p in path.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    other, others = trained(optimizer, updates=0)
    checkpoint.load_model(path, other)
    checkpoint.load_optimizers(path, other, others)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(optimizers, others, strict=True):
        for (_, mine), (_, theirs) in zip(a.state.items(), b.state.items(), strict=True):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert checkpoint.verify(path)["val_loss"] == 1.5


def test_weights_are_stored_unpadded_under_raw_names(tmp_path):
    model, optimizers = trained()
    path = checkpoint.save(tmp_path, 2, model, optimizers, {})
    stored = load_file(path / "model.safetensors")
    assert stored.keys() == dict(model.named_parameters()).keys()
    assert stored["wte.weight"].shape == (50, 16) and model.wte.weight.shape == (128, 16)
    assert load_file(path / "optimizer.safetensors")["wte.weight/exp_avg"].shape == (50, 16)


def test_a_process_that_does_not_write_leaves_no_trace(tmp_path):
    model, optimizers = trained()
    path = checkpoint.save(tmp_path, 2, model, optimizers, {}, writes=False)
    assert path == checkpoint.checkpoint_path(tmp_path, 2) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named_and_the_newest_intact_one_taken(tmp_path, capsys, name, damage):
    model, optimizers = trained()
    good = checkpoint.save(tmp_path, 1, model, optimizers, {"val_loss": 2.0})
    bad = checkpoint.save(tmp_path, 2, model, optimizers, {"val_loss": 1.0})
    content = (bad / name).read_bytes()
    if damage == "flip":
        (bad / name).write_bytes(content[:50] + bytes([content[50] ^ 0xFF]) + content[51:])
    elif damage == "truncate":
        (bad / name).write_bytes(content[: len(content) // 2])
    else:
        (bad / name).unlink()
    assert checkpoint.newest(tmp_path) == good
    assert name in capsys.readouterr().err


def test_another_architecture_is_refused(tmp_path):
    model, optimizers = trained()
    path = checkpoint.save(tmp_path, 2, model, optimizers, {})
    wider = GPT(dataclasses.replace(CONFIG, n_embd=32))
    with pytest.raises(UserError, match="another architecture"):
        checkpoint.load_model(path, wider)
    deeper = GPT(dataclasses.replace(CONFIG, n_layer=3))
    with pytest.raises(UserError, match="another architecture"):
        checkpoint.load_model(path, deeper)


def test_another_optimizer_or_version_is_refused(tmp_path):
    model, optimizers = trained("muon")
    path = checkpoint.save(tmp_path, 2, model, optimizers, {})
    other, others = trained("adamw", updates=0)
    with pytest.raises(UserError, match="another optimizer"):
        checkpoint.load_optimizers(path, other, others)
    state = unseal((path / "state.json").read_bytes())
    (path / "state.json").write_bytes(seal({**state, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        checkpoint.read_state(path)
    # Neither skipped nor trained over: beginning again is for a person to decide.
    with pytest.raises(UserError, match="format 99"):
        checkpoint.newest(tmp_path)


def test_a_full_disk_harms_nothing_earlier(tmp_path, monkeypatch):
    model, optimizers = trained()
    good = checkpoint.save(tmp_path, 1, model, optimizers, {})

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(UserError, match="No space left on device"):
            checkpoint.save(tmp_path, 2, model, optimizers, {})
    assert checkpoint.all_checkpoints(tmp_path) == [good]
    assert [p.name for p in good.parent.iterdir()] == ["step_000001"]
    checkpoint.verify(good)
    assert checkpoint.save(tmp_path, 2, model, optimizers, {}).exists()


def test_leftovers_of_an_interrupted_save_are_not_checkpoints(tmp_path):
    model, optimizers = trained()
    (tmp_path / "checkpoints" / ".step_000009.tmp").mkdir(parents=True)
    assert checkpoint.newest(tmp_path) is None
    checkpoint.save(tmp_path, 1, model, optimizers, {})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    model, optimizers = trained()
    for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, 2.6], 1):
        checkpoint.save(tmp_path, step, model, optimizers, {"val_loss": loss})
    checkpoint.prune(tmp_path, keep=2, step=5)
    assert [p.name for p in checkpoint.all_checkpoints(tmp_path)] == [
        "step_000002",
        "step_000004",
        "step_000005",
    ]
    assert checkpoint.best(tmp_path).name == "step_000002"


def test_a_damaged_or_foreign_neighbour_stops_neither_save_nor_prune(tmp_path):
    model, optimizers = trained()
    bad = checkpoint.save(tmp_path, 1, model, optimizers, {"val_loss": 0.5})
    (bad / "state.json").write_text("{")
    (tmp_path / "checkpoints" / "step_000001.bak").mkdir()
    for step, loss in ((2, 1.0), (3, 2.0)):
        checkpoint.save(tmp_path, step, model, optimizers, {"val_loss": loss})
    checkpoint.prune(tmp_path, keep=1, step=3)
    assert [p.name for p in checkpoint.all_checkpoints(tmp_path)] == ["step_000002", "step_000003"]
    assert (tmp_path / "checkpoints" / "step_000001.bak").exists()


def test_damaged_later_checkpoints_never_push_out_a_good_one(tmp_path):
    """After falling back from 20 and 30 to 10, what is saved at 12 must stay."""
    model, optimizers = trained()
    for step in (10, 12, 20, 30):
        checkpoint.save(tmp_path, step, model, optimizers, {"val_loss": 1.0 / step})
    checkpoint.prune(tmp_path, keep=1, step=12)
    assert [path.name[-2:] for path in checkpoint.all_checkpoints(tmp_path)] == ["12", "20", "30"]


def test_steps_beyond_six_digits_stay_in_order(tmp_path):
    model, optimizers = trained()
    for step in (999_999, 1_000_000):
        checkpoint.save(tmp_path, step, model, optimizers, {})
    assert checkpoint.newest(tmp_path).name == "step_1000000"
    checkpoint.prune(tmp_path, keep=1, step=1_000_000)
    assert [path.name for path in checkpoint.all_checkpoints(tmp_path)] == ["step_1000000"]
