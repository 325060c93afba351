"""Devices, collectives, what DDP really sends, and how all ranks end when one fails."""

import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from config import UserError
from tests.ranks import Rank, run_ranks
from tests.tiny import make_data, tiny_config
from train import train
from training import distributed, launch
from training.attention import attention_by, decode_kernels
from training.distributed import DistInfo, autocast, choose_device, init_distributed, pick_dtype
from training.logger import create_run

CPU = torch.device("cpu")
ALONE = DistInfo(0, 0, 1, CPU)

# --- devices ---


def test_devices_and_dtypes(monkeypatch):
    assert choose_device(ALONE, "cpu").device == CPU
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.version, "cuda", None)
        with pytest.raises(UserError, match="no cuda device"):
            choose_device(ALONE, "cuda")
    assert pick_dtype("float32", CPU) == pick_dtype("tf32", CPU) == torch.float32
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16


def test_auto_refuses_gpus_that_this_build_cannot_use(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def too_old():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nX")

    monkeypatch.setattr(torch.cuda, "init", too_old)
    found = []
    monkeypatch.setattr(Path, "glob", lambda directory, pattern: found)
    assert choose_device(ALONE, "auto").device == CPU
    found.append(Path("/dev/nvidia0"))
    for name in ("auto", "cuda"):
        with pytest.raises(UserError, match="driver on your system is too old") as caught:
            choose_device(ALONE, name)
        assert "--train.device cpu" in str(caught.value) and "CUDA 13.0" in str(caught.value)
    assert choose_device(ALONE, "cpu").device == CPU
    # Someone has hidden the GPUs on purpose.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device(ALONE, "auto").device == CPU


def test_mps_is_for_one_process(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device(ALONE, "mps").device.type == "mps"
    with pytest.raises(UserError, match="MPS trains in one process"):
        choose_device(DistInfo(0, 0, 2, CPU), "mps")


@pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "bf16 i8mm"])
def test_auto_dtype_follows_the_processor(tmp_path, monkeypatch, flag):
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(distributed, "Path", lambda name: cpuinfo)
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


@pytest.mark.parametrize(
    "environment, cores, threads",
    [
        ({"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "1"}, 16, 4),
        ({"LOCAL_WORLD_SIZE": "4"}, 2, 1),
        ({"LOCAL_WORLD_SIZE": "4", "OMP_NUM_THREADS": "2"}, 16, None),
        ({"LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}, 16, None),
    ],
)
def test_processes_share_the_cores_of_a_cpu(tmp_path, monkeypatch, environment, cores, threads):
    for name in ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    got, active = [], tmp_path / "active"
    monkeypatch.setattr(distributed, "Path", lambda name: active)
    monkeypatch.setattr(distributed.os, "sched_getaffinity", lambda pid: range(cores), False)
    monkeypatch.setattr(torch, "set_num_threads", got.append)
    distributed.share_cores()
    assert got == ([] if threads is None else [threads])
    active.write_text("1\n")
    distributed.share_cores()
    # Two threads of one core count once.
    assert got[1:] == ([] if threads is None else [max(threads // 2, 1)])


@pytest.mark.parametrize("name", ["auto", "math", "flash"])
def test_attention_by_a_kernel_is_attention(name):
    q, k, v = torch.randn(3, 2, 4, 16, 8).unbind()
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    with attention_by(name, CPU), decode_kernels():
        found = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(found, plain)


@pytest.mark.parametrize("name", ["cudnn", "fa3"])
def test_a_kernel_that_is_not_there_is_refused(name):
    said = f"Attention by {name} cannot be had on cpu here"
    with pytest.raises(UserError, match=said), attention_by(name, CPU):
        pass


# --- several ranks ---


def said(ranks: list[Rank]) -> list[str]:
    """The last line of every error that the ranks have told."""
    pattern = r"(?m)^(?:error: .*|\w+Error(?:: .*)?)$"
    return [line for rank in ranks for line in re.findall(pattern, rank.errors)]


def raise_error(error: BaseException) -> None:
    raise error


def use_collectives() -> None:
    with init_distributed(60) as info:
        info = choose_device(info, "cpu")
        assert distributed.all_gather(torch.tensor([info.rank])).tolist() == [[0], [1]]
        for dtype, value in ((torch.float32, 1), (torch.float64, 2.0**52), (torch.int64, 2**60)):
            tensor = torch.full((3,), value, dtype=dtype)
            total = distributed.all_reduce_sum(tensor)
            assert total is tensor and tensor.tolist() == [2 * value] * 3
        flags = [distributed.all_reduce_any(flag) for flag in (False, info.rank == 1, True)]
        assert flags == [False, True, True]
        mine = {"rank": info.rank, "text": "é" * 10_000}
        assert distributed.broadcast(mine) == mine | {"rank": 0}
        assert distributed.on_rank0(lambda: os.environ["RANK"]) == "0"
        distributed.set_timeout(30)
        with pytest.raises(UserError, match="said by 0"):
            distributed.on_rank0(lambda: raise_error(UserError("said by 0")))
        # All have it, and all may go on.
        distributed.barrier()
        distributed.print0("first", "second")


def test_collectives(tmp_path):
    ranks = run_ranks(tmp_path, use_collectives)
    assert ranks == [Rank(0, "first\nsecond\n", ""), Rank(0, "", "")]


def test_alone_no_group_is_made_and_errors_are_errors():
    with pytest.raises(ZeroDivisionError), init_distributed() as info:
        assert info == ALONE and not dist.is_initialized()
        assert distributed.all_reduce_any(True) and distributed.broadcast(3) == 3
        assert distributed.all_gather(torch.ones(2)).tolist() == [[1, 1]]
        _ = 1 / 0


def test_a_world_size_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(UserError, match="WORLD_SIZE=abc"), init_distributed():
        pass


BAD_LUCK = UserError("bad luck")
# The ranks that fail, how, their exit status, and what is said by all together.
FAILURES = {
    "one says why": ([1], lambda: raise_error(BAD_LUCK), 1, ["error: bad luck"]),
    "both say the same": ([0, 1], lambda: raise_error(BAD_LUCK), 1, ["error: bad luck"]),
    "rank 0 decides": (
        [0, 1],
        lambda: distributed.on_rank0(lambda: raise_error(BAD_LUCK)),
        1,
        ["error: bad luck"],
    ),
    "a bug": ([0], lambda: 1 / 0, 1, ["ZeroDivisionError: division by zero"]),
    "a bug without words": ([1], lambda: raise_error(AssertionError()), 1, ["AssertionError"]),
    "Ctrl-C": ([1], lambda: raise_error(KeyboardInterrupt()), 130, ["error: interrupted"]),
    "an exit": ([0], lambda: sys.exit(2), 2, []),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_rank_that_fails_says_so_once_and_ends_all_within_seconds(tmp_path, failure):
    failing, fail, status, sentences = FAILURES[failure]

    def run() -> None:
        with init_distributed(600) as info:
            distributed.barrier()
            if info.rank in failing:
                fail()
            # As in a collective of NCCL, out of which no exception comes.
            time.sleep(300)

    begun = time.monotonic()
    ranks = run_ranks(tmp_path, run)
    assert time.monotonic() - begun < 30
    assert [rank.status for rank in ranks] == [status if i in failing else 1 for i in (0, 1)]
    assert said(ranks) == sentences


def test_another_node_says_why_it_ends(tmp_path):
    def run() -> None:
        os.environ.update(GROUP_RANK=os.environ["RANK"], LOCAL_RANK="0")
        with init_distributed(600) as info:
            if info.rank == 1:
                raise BAD_LUCK
            time.sleep(300)

    first, second = run_ranks(tmp_path, run)
    assert second.errors == "error: bad luck\n"
    assert first.errors == "error: process 1 ended the run: bad luck\n"


@pytest.mark.parametrize("loss", ["killed", pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_rank_that_is_lost_is_missed_by_the_others(tmp_path, loss):
    def run() -> None:
        with init_distributed(60) as info:
            distributed.barrier()
            distributed.set_timeout(4)
            if info.rank == 1 and loss == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if info.rank == 1:
                time.sleep(300)
            distributed.barrier()

    begun = time.monotonic()
    ranks = run_ranks(tmp_path, run)
    (sentence,) = said(ranks)
    assert time.monotonic() - begun < 60 and all(rank.status != 0 for rank in ranks)
    assert "Another process of this run died, or did not answer for 4 s" in sentence
    assert sentence.endswith("the newest checkpoint is where --resume continues.")


def test_gradients_are_reduced_once_a_step(tmp_path, monkeypatch):
    """Four micro-batches must cost one exchange of gradients, not four."""
    config = tiny_config(
        make_data(tmp_path / "data"), tmp_path, micro_batch_size=1, steps=3, sample_tokens=0
    )
    create_run(tmp_path / "tiny", config)
    sent, wrap_ddp = [], distributed.wrap_ddp

    def counting(model, info):
        model = wrap_ddp(model, info)

        def hook(state, bucket):
            sent.append(bucket.is_last())
            future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
            return future.then(lambda done: done.value()[0] / info.world_size)

        model.register_comm_hook(None, hook)
        return model

    def run() -> None:
        with init_distributed(60) as info:
            train(config, tmp_path / "tiny", choose_device(info, "cpu"))
        assert sum(sent) == 3, sent

    monkeypatch.setattr(distributed, "wrap_ddp", counting)
    assert [rank.status for rank in run_ranks(tmp_path, run)] == [0, 0]


# --- the meeting ---


@pytest.fixture
def store(monkeypatch):
    """A launcher's store, which holds what a dead start of two processes has left in it."""
    store = dist.HashStore()
    store.set("start", "dead")
    store.set("dead/1", "mark-of-the-dead")
    store.set("dead/go", "mark-of-the-dead")
    monkeypatch.setattr(dist, "rendezvous", lambda *args, **kwargs: iter([(store, 0, 2)]))
    return store


def test_a_new_start_takes_nothing_from_the_dead(store):
    """Rank 1 finds the old name and an old go, and waits until the new rank 0 comes."""
    found = {}

    def join(rank: int) -> None:
        found[rank] = launch.fresh_store(rank, 2, 60)

    second = threading.Thread(target=join, args=(1,))
    second.start()
    time.sleep(0.5)
    assert second.is_alive() and not found
    join(0)
    second.join(60)
    found[0].set("key", "value")
    assert found[1].get("key") == b"value"
    assert store.get("start") != b"dead" and not store.check(["key"])


@pytest.mark.parametrize("rank", [0, 1])
def test_who_does_not_come_is_named(store, monkeypatch, rank):
    monkeypatch.setattr(launch, "RESTART", 0.0)
    with pytest.raises(UserError, match=f"Process {1 - rank} of 2, counted from 0, did not come"):
        launch.fresh_store(rank, 2, 0.5)


def test_where_nobody_answers_is_said(monkeypatch):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(UserError, match=r"Nobody answers at 127\.0\.0\.1:None"):
        launch.fresh_store(1, 2, 1)
