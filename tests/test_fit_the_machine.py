"""Micro-batches that are halved until they fit, recomputed blocks, attention kernels."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from config import Config, UserError
from model import GPT
from tests.runs import alone, column
from tests.tiny import make_data, tiny_config
from train import train
from training.attention import attention_by
from training.logger import create_run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data") / "tiny")


def train_trying(config: Config, tries: bool = True) -> tuple[list[tuple], dict]:
    """Train, trying the micro-batch or not; returns the losses and the facts of this start."""
    run = Path(config.train.runs_dir) / config.name
    create_run(run, config)
    train(config, run, alone(config), None, tries)
    facts = json.loads((run / "environment.jsonl").read_text().splitlines()[-1])
    return column(run, "train", "loss"), facts


def fits_only(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model run out of memory with more than `limit` sequences that need gradients."""
    forward = GPT.forward

    def small(self, idx, *arguments):
        if torch.is_grad_enabled() and len(idx) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB.")
        return forward(self, idx, *arguments)

    monkeypatch.setattr(GPT, "forward", small)


def test_a_micro_batch_that_does_not_fit_is_halved_and_the_run_is_the_same(
    data, tmp_path, monkeypatch, capsys
):
    config = tiny_config(data, tmp_path / "given", micro_batch_size=2, dropout=0.1)
    given, _ = train_trying(config, tries=False)
    fits_only(3, monkeypatch)
    config = tiny_config(data, tmp_path / "found", micro_batch_size=8, dropout=0.1)
    found, facts = train_trying(config)
    assert found == given and facts["micro_batch_size"] == 2
    said = capsys.readouterr().out
    for size, smaller in ((8, 4), (4, 2)):
        assert f"a micro-batch of {size} does not fit: going on with {smaller}" in said


def test_a_given_micro_batch_is_not_touched(data, tmp_path, monkeypatch):
    fits_only(3, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        train_trying(tiny_config(data, tmp_path, micro_batch_size=8), tries=False)


def test_not_even_one_sequence(data, tmp_path, monkeypatch):
    fits_only(0, monkeypatch)
    with pytest.raises(UserError, match="A micro-batch of 1 does not fit"):
        train_trying(tiny_config(data, tmp_path))


def test_other_errors_are_not_taken_for_want_of_memory(data, tmp_path, monkeypatch):
    def broken(self, *arguments):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(GPT, "forward", broken)
    with pytest.raises(RuntimeError, match="a mistake"):
        train_trying(tiny_config(data, tmp_path))


@pytest.mark.parametrize("changes", [{}, {"architecture": "modern", "bias": False}])
def test_a_run_with_gradient_checkpointing_is_the_same(data, tmp_path, changes):
    runs = [
        train_trying(tiny_config(data, tmp_path / str(on), gradient_checkpointing=on, **changes))
        for on in (False, True)
    ]
    assert runs[0][0] == runs[1][0]


def test_attention_is_the_same_by_any_kernel_that_is_here(data, tmp_path):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 16, 8).unbind()
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    for name in ("auto", "math", "flash"):
        with attention_by(name):
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.testing.assert_close(found, expected)
    by_math, _ = train_trying(tiny_config(data, tmp_path / "math", attention="math"))
    by_auto, _ = train_trying(tiny_config(data, tmp_path / "auto"))
    assert [loss for (loss,) in by_math] == pytest.approx([loss for (loss,) in by_auto], abs=1e-4)


def test_a_kernel_that_is_not_here_is_refused_in_a_sentence(data, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("it may be there")
    with pytest.raises(UserError, match="fa3"):
        train_trying(tiny_config(data, tmp_path, attention="fa3"))
