"""The loop: learning, exact resume, any number of processes, and the pitfalls of earlier loops."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import load_fineweb
import sample
from config import UserError, replace
from fineweb import FineWebEdu, sequence_indices
from model import GPT
from tests.runs import (
    assert_same_end,
    column,
    go_on,
    last_step,
    metrics,
    run_training,
    steps,
    tensors,
)
from tests.tiny import WORDS, command, make_data, script, tiny_config
from training import checkpoint, distributed
from training.logger import read_sequence_losses
from training.optim import lr_at

no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
gpu = pytest.param("cuda", marks=[pytest.mark.gpu, no_cuda])


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


def test_loss_falls_and_first_and_last_step_are_measured(data, tmp_path):
    config = tiny_config(data, tmp_path, steps=60, lr=1e-2)
    run = run_training(config)
    val = metrics(run, "val")
    assert val[0]["step"] == 0 and val[-1]["step"] == 60
    assert val[-1]["loss"] < 0.6 * val[0]["loss"]
    # Only end-of-text has no bytes; every other character is one.
    split = FineWebEdu(data, "val", config.model.block_size)
    targets = split.sequences(np.arange(config.train.val_tokens // config.model.block_size))[:, 1:]
    per_byte = targets.numel() / (targets != split.shards.tokenizer.eot).sum().item()
    bits = val[0]["loss"] / math.log(2) * per_byte
    assert val[0]["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    rates = [(k, 256 * k, lr_at(k, 60, config.optim)) for k in range(1, 61)]
    assert column(run, "train", "step", "tokens", "lr") == rates
    assert steps(run)[-1] == 60


@pytest.mark.parametrize(
    ("shuffle", "changes"),
    [
        ("sequences", {"optimizer": "muon", "dropout": 0.2}),
        ("documents", {"dropout": 0.2}),
        ("none", {"optimizer": "muon"}),
        ("sequences", {"architecture": "modern", "bias": False, "value_residual": True}),
    ],
)
def test_resumed_it_is_bitwise_the_straight_run(data, tmp_path, shuffle, changes):
    config = tiny_config(data, tmp_path / "a", shuffle=shuffle, **changes)
    straight = run_training(config)
    # Checkpoints at 4, 8 and 12: everything after 4 is lost, as after a crash.
    stopped = tmp_path / "b" / "tiny"
    shutil.copytree(straight, stopped)
    for step in (8, 12):
        shutil.rmtree(checkpoint.checkpoint_path(stopped, step))
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    assert go_on(replace(config, {"train.runs_dir": str(tmp_path / "b")})) == (12, True)
    assert_same_end(stopped, straight, 12)
    assert metrics(stopped, times=False) == metrics(straight, times=False)
    assert (stopped / "samples.md").read_text() == (straight / "samples.md").read_text()


def test_it_goes_on_only_with_its_own_config_and_data(data, tmp_path):
    config = tiny_config(data, tmp_path, steps=4)
    run_training(config)
    with pytest.raises(UserError, match=r"optim\.lr 0\.003 -> 1\.0"):
        go_on(replace(config, {"optim.lr": 1.0}))
    kept = data / "manifest.json"
    content = kept.read_bytes()
    try:
        make_data(data, documents=50)
        with pytest.raises(UserError, match="is not the data"):
            go_on(config)
    finally:
        make_data(data)
    assert kept.read_bytes() == content


@pytest.mark.parametrize(
    ("optimizer", "tolerance"),
    [("adamw", 1e-4), pytest.param("muon", 1e-5, marks=pytest.mark.slow)],
)
def test_one_process_two_processes_and_accumulation_agree(data, tmp_path, optimizer, tolerance):
    changes = {"steps": 50, "checkpoint_interval": 0, "val_interval": 10}
    base = tiny_config(data, tmp_path, optimizer=optimizer, **changes)
    one, half, moved = (
        replace(base, {"name": name, "train.micro_batch_size": size})
        for name, size in (("one", 8), ("half", 4), ("moved", 2))
    )
    # Two processes until step 30, then one.
    first = command(replace(moved, {"train.stop_at_step": 30}), "moved")
    result = script(*first, cwd=tmp_path, processes=2)
    assert result.returncode == 0, result.stderr
    assert go_on(moved) == (50, True)
    runs = [run_training(one), run_training(half), tmp_path / "moved"]
    for kind, keys in (("train", ("loss", "grad_norm")), ("val", ("loss", "bits_per_byte"))):
        wanted, *others = (np.array(column(run, kind, *keys)) for run in runs)
        for found in others:
            assert found.shape == wanted.shape
            assert np.abs(found - wanted)[:, 0].max() < tolerance
            np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_gradients_are_averaged_over_ranks_once_a_step(data, tmp_path, monkeypatch):
    """A process group of one, whose DDP counts what it would send."""
    sent = []

    def counting(state, bucket):
        sent.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def wrap(model, info):
        wrapped = nn.parallel.DistributedDataParallel(model)
        wrapped.register_comm_hook(None, counting)
        return wrapped

    monkeypatch.setattr(distributed, "wrap_ddp", wrap)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        run_training(tiny_config(data, tmp_path, steps=3, micro_batch_size=1))
    finally:
        dist.destroy_process_group()
    assert 3 <= len(sent) == 3 * len(set(sent))


def test_logged_loss_is_that_of_the_whole_step(data, tmp_path):
    config = tiny_config(data, tmp_path, steps=1)
    run = run_training(config)
    torch.manual_seed(config.train.seed)
    model = GPT(config.model)
    train = FineWebEdu(data, "train", 32)
    batch = train.sequences(sequence_indices(config, 1, len(train)))
    with torch.no_grad():
        _, loss = model(batch[:, :-1], batch[:, 1:])
    assert column(run, "train", "loss") == [pytest.approx((loss.item(),), abs=1e-6)]


def test_the_first_step_has_the_rate_of_step_one(data, tmp_path):
    """AdamW's first step moves every weight by the learning rate, whatever its gradient."""
    config = tiny_config(data, tmp_path, steps=100, stop_at_step=1, weight_decay=0.0, eps=1e-12)
    run = run_training(config)
    torch.manual_seed(config.train.seed)
    before, after = GPT(config.model).wpe.weight, tensors(run, 1)["wpe.weight"]
    moved = (after - before).abs().median().item()
    assert moved == pytest.approx(lr_at(1, 100, config.optim), rel=1e-3)


def test_validation_reads_the_same_tokens_every_time_and_with_any_micro_batch(data, tmp_path):
    """Next to no learning rate leaves the weights, so all validations must give one number."""
    losses = set()
    for size in (1, 8):
        config = tiny_config(data, tmp_path / str(size), lr=1e-30, micro_batch_size=size)
        run = run_training(replace(config, {"optim.weight_decay": 0.0}))
        found = {round(line["loss"], 6) for line in metrics(run, "val")}
        assert len(found) == 1
        losses |= found
    assert max(losses) - min(losses) < 2e-6


def test_end_of_epoch_is_validated_and_saved(data, tmp_path):
    per_epoch = len(FineWebEdu(data, "train", 32)) // 8
    config = tiny_config(data, tmp_path, steps=per_epoch + 2, checkpoint_interval=0, val_interval=0)
    run = run_training(config)
    assert column(run, "val", "step") == [(0,), (per_epoch,), (per_epoch + 2,)]
    assert steps(run) == [per_epoch, per_epoch + 2]


def test_newest_and_best_checkpoints_are_kept(data, tmp_path):
    config = tiny_config(data, tmp_path, steps=20, checkpoint_interval=2, keep_checkpoints=2)
    run = run_training(replace(config, {"optim.lr": 0.3}))
    losses = dict(column(run, "val", "step", "loss"))
    best = min((step for step in losses if step and step % 2 == 0), key=losses.get)
    assert steps(run) == sorted({best, 18, 20})


def test_samples_are_written_at_start_and_at_each_checkpoint(data, tmp_path):
    text = (run_training(tiny_config(data, tmp_path)) / "samples.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [f"## Step {step}" for step in (0, 4, 8, 12)]


@pytest.mark.parametrize("shuffle", ["none", "documents", "sequences"])
def test_losses_of_sequences_are_kept_on_request(data, tmp_path, shuffle):
    config = tiny_config(data, tmp_path, shuffle=shuffle, log_sequence_losses=True, steps=6)
    run = run_training(config)
    changes = {"name": "plain", "train.log_sequence_losses": False}
    kept, plain = read_sequence_losses(run), run_training(replace(config, changes))
    n = len(FineWebEdu(data, "train", 32))
    for step, loss in column(plain, "train", "step", "loss"):
        rows = kept[kept["step"] == step]
        assert rows["sequence"].tolist() == sequence_indices(config, step, n).tolist()
        assert rows["loss"].mean() == pytest.approx(loss, abs=1e-5)
    assert not (plain / "sequence_losses.bin").exists()


def test_begun_with_the_weights_of_another_model_it_is_a_run_of_its_own(data, tmp_path):
    source = run_training(tiny_config(data, tmp_path / "source", steps=4))
    config = replace(tiny_config(data, tmp_path, block_size=16), {"init_from": str(source)})
    still = {"name": "still", "train.steps": 1, "optim.lr": 1e-30, "optim.weight_decay": 0.0}
    run = run_training(replace(config, still))
    # A shorter context has the first positions.
    found, wanted = tensors(run, 1), tensors(source, 4)
    wanted["wpe.weight"] = wanted["wpe.weight"][:16]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    # Resumed, it has its own weights, not the source's.
    straight = run_training(replace(config, {"name": "straight"}))
    assert go_on(replace(config, {"train.stop_at_step": 4})) == (4, True)
    assert go_on(config) == (12, True)
    assert_same_end(tmp_path / "tiny", straight, 12)


def test_a_run_on_a_trained_vocabulary_keeps_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(" ".join(np.random.default_rng(0).choice(WORDS, 20_000)))
    asked = load_fineweb.Arguments(("text.txt",), Path("mine"), "bpe", vocab_size=290)
    load_fineweb.prepare(asked, quiet=True)
    config = tiny_config(Path("mine"), Path("runs"), vocab_size=290, steps=8)
    straight = run_training(replace(config, {"name": "straight"}))
    assert go_on(replace(config, {"train.stop_at_step": 4})) == (4, True)
    assert go_on(config) == (8, True)
    assert_same_end(Path("runs/tiny"), straight, 8)
    kept = Path("runs/tiny/tokenizer.json")
    assert kept.read_bytes() == Path("mine/tokenizer.json").read_bytes()
    shutil.rmtree("mine")
    monkeypatch.setattr("sys.argv", ["sample.py", "tiny", "--prompt", "the cat"])
    capsys.readouterr()
    sample.main()
    assert capsys.readouterr().out.startswith("the cat")
    kept.write_text(kept.read_text() + " ")
    with pytest.raises(UserError, match=f"{kept} is no tokenizer that can be used"):
        sample.main()


@pytest.mark.parametrize("device", ["cpu", gpu])
def test_a_nan_reaches_no_checkpoint(data, tmp_path, device, monkeypatch):
    """Step 8 is bad, and a checkpoint is due after it; on CUDA it is read one step late."""
    config = tiny_config(data, tmp_path, micro_batch_size=8, device=device)
    forward, calls = GPT.forward, []

    def planted(self, idx, targets=None, return_token_losses=False):
        token_losses, loss = forward(self, idx, targets, return_token_losses)
        calls.extend([self] * self.training)
        return token_losses, loss * math.nan if self.training and len(calls) == 8 else loss

    monkeypatch.setattr(GPT, "forward", planted)
    with pytest.raises(UserError, match="Step 8 has a loss of nan"):
        run_training(config)
    run = tmp_path / "tiny"
    assert steps(run) == [4] and last_step(run) == 7
    sequences = json.loads((run / "non_finite.json").read_text())["sequences"]
    assert sequences == sequence_indices(config, 8, len(FineWebEdu(data, "train", 32))).tolist()


@pytest.mark.slow
def test_compiled_training_matches_eager(data, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no compiler")
    losses = []
    for mode in ("off", "on"):
        config = tiny_config(data, tmp_path / mode, steps=3, compile=mode, sample_tokens=0)
        run = run_training(config)
        losses.append([loss for (loss,) in column(run, "train", "loss")])
        # Weights of a compiled model are saved under the raw model's names.
        assert "wte.weight" in tensors(run, 3)
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
