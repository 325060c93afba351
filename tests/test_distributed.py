"""Processes and devices, and what DDP really sends."""

import pytest
import torch

import devices
from config import UserError
from devices import autocast, pick_device, pick_dtype
from tests.tiny import ROOT, script

CPU = torch.device("cpu")


def test_devices_and_dtypes():
    assert pick_device("cpu") == CPU
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no cuda device"):
            pick_device("cuda")
    assert pick_dtype("float32", CPU) == pick_dtype("tf32", CPU) == torch.float32
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "bf16 i8mm"])
def test_auto_dtype_follows_the_processor(tmp_path, monkeypatch, flag):
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(devices, "Path", lambda name: cpuinfo)
    assert pick_dtype("auto", CPU) == torch.float32
    cpuinfo.write_text("flags : avx512f")
    assert pick_dtype("auto", CPU) == torch.float32
    cpuinfo.write_text(f"flags : fpu {flag}")
    assert pick_dtype("auto", CPU) == torch.bfloat16


def test_autocast_takes_a_device_with_an_index():
    """Given "cuda:0" where a device type is wanted, autocast fails; given a device, it must not."""
    with autocast(torch.device("cpu", 0), torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_gradients_are_reduced_once_an_update(tmp_path):
    """Four micro-batches must cost one exchange of gradients, not four."""
    program = tmp_path / "count.py"
    program.write_text(
        f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import threading
import torch
from pathlib import Path
import train
from trainer import begin
from distributed import join_world
from tests.tiny import make_data, tiny_config

with join_world("cpu") as world:
    data = Path("data")
    if world.is_main:
        make_data(data)
    torch.distributed.barrier()
    config = tiny_config(data, Path("runs"), micro_batch=1)
    run = Path("runs") / "tiny"
    if world.is_main:
        run.mkdir(parents=True)
    torch.distributed.barrier()
    trainer, _ = begin(config, run, world, None, threading.Event())
    sent = []
    def hook(state, bucket):
        sent.append(bucket.is_last())
        return torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future().then(
            lambda future: future.value()[0] / world.size
        )
    trainer.parallel.register_comm_hook(None, hook)
    windows = trainer.data.windows(range(world.rank * 4, world.rank * 4 + 4))
    train.update(trainer, windows, 1)
    assert sum(sent) == 1, sent
    grown = torch.stack([p.detach().float().sum() for p in trainer.model.parameters()])
    both = [torch.empty_like(grown) for _ in range(2)]
    torch.distributed.all_gather(both, grown)
    assert torch.equal(*both)
    print("counted")
"""
    )
    result = script(program, cwd=tmp_path, processes=2, PYTHONPATH=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("counted") == 2


@pytest.mark.parametrize(
    "environment, cores, threads",
    [
        ({"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}, 16, 4),
        ({"LOCAL_WORLD_SIZE": "4"}, 2, 1),
        ({"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "2"}, 16, None),
        ({"LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}, 16, None),
    ],
)
def test_processes_share_the_cores_of_a_cpu(monkeypatch, environment, cores, threads):
    for name in ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    got = []
    monkeypatch.setattr(devices, "_cores", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", got.append)
    devices.share_cores()
    assert got == ([] if threads is None else [threads])
