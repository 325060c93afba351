"""Float16: gradients too small for it are lifted, too large ones leave an update out."""

import json

import pytest
import torch

import checkpoint
import logs
import loss_scale as module
from config import UserError
from cross_entropy import chunked_cross_entropy
from distributed import World
from loss_scale import LossScale, loss_scale
from tests.tiny import make_data, tiny_config
from train import train

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


def run_of(data, runs_dir, **changes):
    config = tiny_config(data, runs_dir, **changes)
    run = runs_dir / config.name
    logs.create_run(run, config)
    return config, run


def train_lines(run):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


def test_float16_follows_float32(data, tmp_path):
    losses = {}
    for dtype in ("float32", "float16"):
        config, run = run_of(data, tmp_path / dtype, dtype=dtype)
        train(config, run, ALONE)
        losses[dtype] = [line["loss"] for line in train_lines(run)]
    assert losses["float16"] == pytest.approx(losses["float32"], abs=2e-2)
    assert losses["float16"] != losses["float32"]


def test_an_overflow_leaves_the_update_out_and_halves_the_scale(data, tmp_path):
    config, run = run_of(data, tmp_path, dtype="float16", loss_scale=2.0**20, updates=10)
    train(config, run, ALONE)
    found = train_lines(run)
    left_out = [line for line in found if line["grad_norm"] is None]
    assert left_out and len(left_out) < len(found)
    scales = [2.0**20, *(line["loss_scale"] for line in found)]
    for before, line, after in zip(scales, found, scales[1:], strict=False):
        assert after == (before / 2 if line["grad_norm"] is None else before)


def test_the_scale_is_part_of_the_checkpoint(data, tmp_path, monkeypatch):
    """Interrupted and resumed, the run ends with the bits of the straight one."""
    monkeypatch.setattr(module, "PATIENCE", 3)
    ends = []
    for name, stops in (("straight", [None]), ("halting", [4, None])):
        _, run = run_of(data, tmp_path / name, dtype="float16", loss_scale=2.0**23)
        for stop_at in stops:
            changed = tiny_config(
                data, tmp_path / name, dtype="float16", loss_scale=2.0**23, stop_at=stop_at
            )
            found = checkpoint.newest(run)
            train(changed, run, ALONE, found)
        newest = checkpoint.newest(run)
        ends.append((newest / checkpoint.WEIGHTS).read_bytes())
        ends.append(checkpoint.read_state(newest)["loss_scale"])
        assert ends[-1]["factor"] < 2.0**23
    assert ends[:2] == ends[2:]


def test_a_scale_grows_when_it_has_lasted_and_has_an_end(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 3)
    scale = LossScale(4.0)
    for _ in range(3):
        scale.held()
    assert scale.state() == {"factor": 8.0, "lasted": 0}
    with pytest.raises(UserError, match="Gradients overflow float16"):
        for _ in range(40):
            scale.overflowed()


def test_who_has_a_scale():
    assert loss_scale(torch.bfloat16, 65536.0) is None and loss_scale(torch.float16, 0.0) is None
    assert loss_scale(torch.float16, 65536.0).factor == 65536.0
    assert loss_scale(torch.float16, 2.0, {"factor": 8.0, "lasted": 5}).state()["lasted"] == 5


def test_gradients_of_a_mean_over_many_tokens_do_not_vanish():
    """In float16, 1 / 65,536 of a small gradient is nothing, unless the scale comes in first."""
    torch.manual_seed(0)
    x = (1e-2 * torch.randn(65_536, 4)).requires_grad_()
    weight, targets = 1e-2 * torch.randn(128, 4), torch.zeros(65_536, dtype=torch.long)
    grads = {}
    for dtype in (torch.float32, torch.float16):
        with torch.autocast("cpu", dtype, enabled=dtype == torch.float16):
            loss = chunked_cross_entropy(x, weight, targets, 100)
        (loss * 65_536).backward()
        grads[dtype], x.grad = x.grad, None
    assert (grads[torch.float16] != 0).float().mean() > 0.99
    torch.testing.assert_close(grads[torch.float16], grads[torch.float32], rtol=0.02, atol=1e-4)
