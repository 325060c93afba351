"""The preflight says in a line each what works, and in a sentence what does not."""

import pytest
import torch
import torch.distributed as dist

from config import Config, UserError, replace
from sample import ALONE
from tests.tiny import script
from training import preflight
from training.preflight import check

pytestmark = pytest.mark.slow


def test_one_process_is_checked_too(capsys):
    check(ALONE)
    lines = capsys.readouterr().out.splitlines()
    starts = ("rank 0: cpu", "all-reduce", "training step: loss", "torch.compile", "all is well")
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    assert "bfloat16" in lines[0]


def test_several_processes_are_checked_together(tmp_path):
    result = script("train.py", cwd=tmp_path, processes=2)
    assert result.returncode == 0, result.stderr
    assert "rank 1: cpu" in result.stdout
    assert "the sum over 2 processes is right" in result.stdout and "GB/s" in result.stdout
    assert "the same weights on 2 process(es)" in result.stdout
    assert result.stdout.splitlines()[-1] == "all is well"


def test_a_compiler_is_tried_where_it_would_be_used(monkeypatch, capsys):
    config = replace(Config(), {"train.compile": "on"})
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    check(ALONE, config)
    assert "torch.compile: works" in capsys.readouterr().out

    def broken(function, **_):
        raise ImportError("no Triton\nanywhere")

    monkeypatch.setattr(torch, "compile", broken)
    check(ALONE)
    with pytest.raises(UserError, match=r"\(no Triton anywhere\).*--train.compile off"):
        check(ALONE, config)


def test_a_collective_that_fails_comes_with_advice(monkeypatch):
    def broken(*_):
        raise dist.DistBackendError("NCCL error\nand more")

    monkeypatch.setattr(preflight, "_check_all_reduce", broken)
    with pytest.raises(UserError, match=r"cannot train \(NCCL error\)\."):
        check(ALONE)


def test_weights_that_differ_between_processes_are_found(monkeypatch):
    monkeypatch.setattr(preflight, "all_gather", lambda x: torch.stack([x, x + 1]))
    with pytest.raises(UserError, match=r"weights differ.*NCCL_P2P_DISABLE=1"):
        check(ALONE)
