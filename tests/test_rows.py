"""Padded rows and the losses of windows: what is read, what counts, what is kept."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import logs
import window_losses
from checkpoint import checkpoint_path
from checks import validate
from config import UserError, replace
from cross_entropy import IGNORED
from distributed import World
from fineweb import FineWebEdu, inputs_and_targets
from model import GPT
from orders import update_windows
from rows import training_windows
from tests.test_train import metrics, run_training
from tests.tiny import ALPHABET, fields, make_data, script, tiny_config
from train import train

T, EOT = 32, len(ALPHABET)
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    # Shards of 1,000 tokens, so that documents run on into the next one.
    return make_data(tmp_path_factory.mktemp("data") / "tiny", shard_tokens=1000)


def test_padded_rows_hold_every_prediction_once_and_one_document_each(data):
    rows = FineWebEdu(data, "train", T, "padded")
    tokens = rows.stream.read(0, len(rows.stream))
    windows = rows.windows(np.arange(len(rows))).numpy()
    pairs = np.array(
        [(a, b) for row in windows for a, b in itertools.pairwise(row) if b != IGNORED]
    )
    # In the order of the rows, the pairs are those of the stream.
    assert np.array_equal(pairs, np.stack([tokens[:-1], tokens[1:]], axis=1))
    for row in windows:
        held = row[row != IGNORED]
        # What begins in a row is what ends the last document's, so nothing comes after it.
        assert EOT not in held[1:-1]
        assert (row[len(held) :] == IGNORED).all()
    assert rows.padded.filled == len(pairs) / (len(rows) * T)
    assert len(rows) == training_windows(tiny_config(data, data, rows="padded"))
    inputs, targets = rows[0]
    assert inputs.min() >= 0 and len(inputs) == len(targets) == T


def test_padding_is_seen_by_nothing_that_counts(data):
    rows = FineWebEdu(data, "train", T, "padded")
    short = next(i for i in range(len(rows)) if (rows[i][1] == IGNORED).sum() > 4)
    inputs, targets = inputs_and_targets(rows.windows(np.array([short])))
    torch.manual_seed(0)
    model = GPT(tiny_config(data, data).model)
    _, loss = model(inputs, targets)
    other = torch.where(targets == IGNORED, torch.randint(EOT, inputs.shape), inputs)
    assert not torch.equal(inputs, other)
    assert torch.equal(model(other, targets)[1], loss)


def test_the_loss_of_a_padded_update_is_the_mean_over_its_tokens(data, tmp_path):
    losses = {}
    for name, micro_batch in (("whole", 8), ("parts", 2)):
        config = tiny_config(data, tmp_path, rows="padded", updates=6, micro_batch=micro_batch)
        losses[name] = [
            line["loss"] for line in metrics(run_training(named(config, name)), "train")
        ]
    assert losses["parts"] == pytest.approx(losses["whole"], abs=1e-5)
    torch.manual_seed(config.train.seed)
    model, rows = GPT(config.model), FineWebEdu(data, "train", T, "padded")
    windows = rows.windows(update_windows(config, 1, len(rows)))
    # Rows differ in length, so this is not the mean of their means.
    _, loss = model(*inputs_and_targets(windows))
    assert losses["whole"][0] == pytest.approx(loss.item(), abs=1e-6)


@pytest.mark.slow
def test_two_processes_share_padded_rows_and_window_losses_as_one_has_them(data, tmp_path):
    base = tiny_config(data, tmp_path, rows="padded", updates=6, log_window_losses=True)
    records = []
    for processes in (1, 2):
        config = named(base, f"of-{processes}")
        command = ["main.py", "--data", data, "--name", config.name, *fields(config)]
        result = script(*command, cwd=tmp_path, processes=processes)
        assert result.returncode == 0, result.stderr
        records.append(window_losses.read(tmp_path / config.name))
    one, two = records
    assert np.array_equal(one["window"], two["window"]) and len(one) == 6 * 8
    assert np.abs(one["loss"] - two["loss"]).max() < 1e-5


def test_window_losses_are_those_of_the_update_and_change_nothing(data, tmp_path):
    plain = tiny_config(data, tmp_path, updates=5)
    kept = named(replace(plain, {"train.log_window_losses": True}), "kept")
    lines = [metrics(run_training(config), "train") for config in (named(plain, "plain"), kept)]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    records = window_losses.read(tmp_path / "kept")
    assert records["step"].tolist() == [step for step in range(1, 6) for _ in range(8)]
    windows = len(FineWebEdu(data, "train", T))
    for line in lines[1]:
        mine = records[records["step"] == line["step"]]
        assert np.array_equal(mine["window"], update_windows(kept, line["step"], windows))
        assert mine["loss"].mean() == pytest.approx(line["loss"], abs=1e-5)


def test_a_resumed_run_keeps_the_window_losses_of_a_straight_one(data, tmp_path):
    config = tiny_config(data, tmp_path, updates=8, log_window_losses=True)
    straight = run_training(named(config, "straight"))
    broken = named(config, "broken")
    run = tmp_path / "broken"
    logs.create_run(run, broken)
    train(replace(broken, {"train.stop_at": 6}), run, ALONE)
    # Two updates past the checkpoint, and half a record.
    with open(run / window_losses.FILE, "ab") as file:
        file.write(b"half a")
    train(broken, run, ALONE, checkpoint_path(run, 4))
    expected = (straight / window_losses.FILE).read_bytes()
    assert (run / window_losses.FILE).read_bytes() == expected


@pytest.mark.parametrize("field", ["rows", "log_window_losses"])
def test_the_document_order_goes_with_neither(data, tmp_path, field):
    value = {"rows": "padded", "log_window_losses": True}[field]
    config = tiny_config(data, tmp_path, order="shuffle_documents", **{field: value})
    with pytest.raises(UserError, match="shuffle_windows"):
        validate(config)


def test_a_run_without_them_has_no_file(tmp_path):
    assert len(window_losses.read(tmp_path)) == 0
    window_losses.rewind(tmp_path, 3)
    assert not list(tmp_path.iterdir())


def named(config, name: str):
    return replace(config, {"name": name})
