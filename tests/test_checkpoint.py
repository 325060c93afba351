"""Checkpoints: exact round trip, damage noticed and named, nothing earlier harmed."""

import dataclasses
import errno
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

from config import Config, ModelConfig, OptimConfig, UserError, to_json
from corpus.tokenizer import TOKENIZER_FILE, CharTokenizer
from model import GPT
from modern import build_model
from training import checkpoint
from training.optim import build_optimizers
from utils import seal, unseal

CONFIG = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=50)
FILES = ["model.safetensors", "optimizer.safetensors", "state.json"]


def trained(optimizer: str = "adamw", config: ModelConfig = CONFIG, steps: int = 2):
    torch.manual_seed(0)
    model = build_model(config)
    optimizers = build_optimizers(model, OptimConfig(optimizer=optimizer), torch.float32)
    go_on(model, optimizers, steps)
    return model, optimizers


def go_on(model, optimizers, steps: int) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        idx = torch.randint(0, model.config.vocab_size, (2, 9))
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        for each in optimizers:
            each.step()
            each.zero_grad()


@pytest.fixture
def one(tmp_path):
    """A run with one checkpoint: (run, path, model, optimizers)."""
    model, optimizers = trained()
    return tmp_path, checkpoint.save(tmp_path, 1, model, optimizers, {}), model, optimizers


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_round_trip_and_what_follows_are_bitwise(tmp_path, optimizer):
    model, optimizers = trained(optimizer)
    path = checkpoint.save(tmp_path, 2, model, optimizers, {"val_loss": 1.5})
    assert sorted(p.name for p in path.iterdir()) == FILES
    other, others = trained(optimizer, steps=0)
    checkpoint.load_model(path, other)
    checkpoint.load_optimizers(path, other, others)
    for a, b in zip(optimizers, others, strict=True):
        for mine, theirs in zip(a.state.values(), b.state.values(), strict=True):
            assert mine.keys() == theirs.keys()
            for key, tensor in mine.items():
                assert torch.equal(tensor, theirs[key])
                assert (tensor.dtype, tensor.device) == (theirs[key].dtype, theirs[key].device)
    for each in ((model, optimizers), (other, others)):
        go_on(*each, steps=3)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert checkpoint.verify(path)["val_loss"] == 1.5


def test_tensors_are_stored_unpadded_under_raw_names(tmp_path):
    changes = {"architecture": "modern", "bias": False, "tie_embeddings": False}
    model, optimizers = trained(config=dataclasses.replace(CONFIG, **changes))
    path = checkpoint.save(tmp_path, 2, model, optimizers, {})
    stored = load_file(path / "model.safetensors")
    assert stored.keys() == dict(model.named_parameters()).keys()
    moments = load_file(path / "optimizer.safetensors")
    for name in ("wte.weight", "lm_head.weight"):
        assert stored[name].shape == moments[f"{name}/exp_avg"].shape == (50, 16)
    assert model.wte.weight.shape == model.lm_head.weight.shape == (128, 16)


def test_optimizers_before_their_first_step_store_and_load_nothing(tmp_path):
    """In float16 every step so far may have overflowed; nothing is invented for them."""
    model, optimizers = trained(steps=0)
    path = checkpoint.save(tmp_path, 2, model, optimizers, {})
    assert load_file(path / "optimizer.safetensors") == {}
    other, others = trained("muon", steps=0)
    checkpoint.load_optimizers(path, other, others)
    assert [len(each.state) for each in others] == [0, 0]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        path = checkpoint.save(tmp_path, 2, *trained(), {})
    finally:
        os.umask(before)
    assert {p.name: p.stat().st_mode & 0o777 for p in path.iterdir()} == dict.fromkeys(FILES, mode)


def test_a_rank_that_does_not_write_leaves_no_trace(tmp_path):
    path = checkpoint.save(tmp_path, 2, *trained(), {}, is_main=False)
    assert path == checkpoint.checkpoint_path(tmp_path, 2) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named_and_the_newest_intact_one_taken(one, capsys, name, damage):
    run, good, *trained_ones = one
    bad = checkpoint.save(run, 2, *trained_ones, {"val_loss": 1.0})
    content = (bad / name).read_bytes()
    if damage == "flip":
        (bad / name).write_bytes(content[:50] + bytes([content[50] ^ 0xFF]) + content[51:])
    elif damage == "truncate":
        (bad / name).write_bytes(content[: len(content) // 2])
    else:
        (bad / name).unlink()
    assert checkpoint.newest(run) == good
    said = capsys.readouterr().err
    assert name in said and ("is damaged" in said) == (damage != "remove")
    shutil.rmtree(good)
    with pytest.raises(UserError, match=name) as caught:
        checkpoint.newest(run)
    assert "delete" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_what_cannot_be_read_is_not_called_damaged(one, monkeypatch, capsys, name):
    run, good, *trained_ones = one
    bad = checkpoint.save(run, 2, *trained_ones, {})
    read, digest = type(bad).read_bytes, checkpoint.sha256_file

    def refusing(function):
        def call(path):
            if path == bad / name:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            return function(path)

        return call

    monkeypatch.setattr(type(bad), "read_bytes", refusing(read))
    monkeypatch.setattr(checkpoint, "sha256_file", refusing(digest))
    assert checkpoint.newest(run) == good
    said = capsys.readouterr().err
    assert f"{bad / name} cannot be read (Stale file handle)" in said and "damaged" not in said
    shutil.rmtree(good)
    with pytest.raises(UserError, match=r"None of the 1 checkpoints .*\(Stale file") as caught:
        checkpoint.newest(run)
    assert "damaged" not in str(caught.value) and "delete" not in str(caught.value)


def test_a_state_of_wrong_content_is_refused(one, capsys):
    run, path, *_ = one
    for content in (b"[]", b'"x"', b"{}", seal({}), seal({"step": "one", "sha256": {}})):
        (path / "state.json").write_bytes(content)
        with pytest.raises(UserError, match=r"state\.json is damaged"):
            checkpoint.read_state(path)
    (path / "state.json").write_bytes(seal({"step": 9, "sha256": {}}))
    with pytest.raises(UserError, match="holds the checkpoint of step 9"):
        checkpoint.newest(run)


def test_another_architecture_or_optimizer_is_refused(tmp_path):
    model, optimizers = trained("muon")
    path = checkpoint.save(tmp_path, 2, model, optimizers, {})
    for changes in ({"n_embd": 32}, {"n_layer": 3}, {"n_layer": 1}, {"vocab_size": 51}):
        with pytest.raises(UserError, match=r"model\.safetensors is of another architecture"):
            checkpoint.load_model(path, GPT(dataclasses.replace(CONFIG, **changes)))
    with pytest.raises(UserError, match=r"optimizer\.safetensors is of another optimizer"):
        checkpoint.load_optimizers(path, *trained("adamw", steps=0))


def test_a_full_disk_harms_nothing_earlier(one, monkeypatch):
    run, good, model, optimizers = one

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for function in ("save_file", "write_atomically"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, function, full)
            with pytest.raises(UserError, match="No space left on device"):
                checkpoint.save(run, 2, model, optimizers, {})
        assert [p.name for p in good.parent.iterdir()] == ["step_000001"]
    checkpoint.verify(good)
    assert checkpoint.save(run, 2, model, optimizers, {}).exists()


def test_leftovers_of_an_interrupted_save_are_not_checkpoints(tmp_path):
    (tmp_path / "checkpoints" / ".step_000009.tmp").mkdir(parents=True)
    assert checkpoint.newest(tmp_path) is None
    checkpoint.save(tmp_path, 1, *trained(), {})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


def test_the_checkpoint_of_a_step_is_replaced(one):
    run, path, *trained_ones = one
    assert checkpoint.save(run, 1, *trained_ones, {"val_loss": 2.0}) == path
    assert checkpoint.verify(path)["val_loss"] == 2.0
    assert [p.name for p in path.parent.iterdir()] == ["step_000001"]


def test_prune_keeps_the_newest_and_the_best(tmp_path):
    model, optimizers = trained()
    for step, loss in enumerate([3.0, 1.0, 2.0, 2.5, 2.6], 1):
        checkpoint.save(tmp_path, step, model, optimizers, {"val_loss": loss})
    checkpoint.prune(tmp_path, keep=2, step=5)
    steps = [checkpoint.step_of(path) for path in checkpoint.all_checkpoints(tmp_path)]
    assert steps == [2, 4, 5] and checkpoint.step_of(checkpoint.best(tmp_path)) == 2


def test_what_cannot_be_deleted_costs_a_line(tmp_path, monkeypatch, capsys):
    model, optimizers = trained()
    for step in (1, 2):
        checkpoint.save(tmp_path, step, model, optimizers, {})

    def refuse(*paths):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(paths[0]))

    for function in ("replace", "listdir"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, refuse)
            checkpoint.prune(tmp_path, keep=1, step=2)
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "Permission denied" in said
    assert len(checkpoint.all_checkpoints(tmp_path)) == 2


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


def test_a_checkpoint_opens_with_its_tokenizer(tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=4)
    model, optimizers = trained(config=config)
    (tmp_path / "config.json").write_text(to_json(Config(model=config)))
    ours = CharTokenizer("abc")
    (tmp_path / TOKENIZER_FILE).write_text(ours.json)
    state = {"tokenizer": {"name": "char", "sha256": ours.sha256}}
    path = checkpoint.save(tmp_path, 2, model, optimizers, state)
    opened, tokenizer = checkpoint.load_run_model(path)
    assert tokenizer.alphabet == "abc" and torch.equal(opened.wte.weight, model.wte.weight)
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        checkpoint.load_run_model(path)


def test_the_seal_covers_the_state(one):
    _, path, *_ = one
    state = unseal((path / "state.json").read_bytes())
    assert state["step"] == 1 and state["sha256"].keys() == set(FILES[:2])


def test_a_checkpoint_that_was_being_replaced_is_put_back(tmp_path):
    """A kill between the two renames of a replacement leaves the old one under a hidden name."""
    directory = tmp_path / "checkpoints"
    (directory / ".step_000004.old.tmp").mkdir(parents=True)
    (directory / ".step_000004.tmp").mkdir()
    (directory / ".step_000008.tmp").mkdir()
    checkpoint.remove_leftovers(tmp_path)
    assert [path.name for path in directory.iterdir()] == ["step_000004"]
