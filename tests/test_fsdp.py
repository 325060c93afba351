"""FSDP: the losses, weights and files of DDP and of one process, and a run may go between them.

All that needs two processes happens in one start of them, `together`, which the tests look at.
"""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import logs
import sharding
from config import Config, UserError, replace
from counts import parameter_count
from distributed import World
from modern import build_model
from sharding import shard, whole_model
from tests.tiny import ROOT, fields, make_data, script, start, tiny_config, wait_for
from tokenizer import gpt2_tokenizer
from train import train

ALONE = World(0, 1, torch.device("cpu"))

MODERN = {
    **{"n_embd": 36, "n_head": 3, "n_layer": 3},
    "architecture": "modern",
    "bias": False,
    "positions": "rotary",
    "norm": "rmsnorm",
    "qk_norm": True,
    "x0_shortcut": True,
    # A parameter of one row, of which the second process has none.
    "value_residual": True,
    "tied": False,
}
# Two processes cannot divide its rows equally.
ODD = {"n_embd": 33, "n_head": 3, "n_layer": 3}
MODELS = {
    "gpt2-adamw": ODD,
    "gpt2-muon": ODD | {"optimizer": "muon", "muon_weight_decay": 0.1},
    "modern-muon": MODERN | {"optimizer": "muon"},
}

PROGRAM = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import json
import os
import signal
import threading
from pathlib import Path

import torch

import checkpoint
import logs
from config import UserError
from distributed import barrier, join_world
from model import GPT
from sharding import local
from tests.test_fsdp import config_of
from train import train
from trainer import begin


def main(world):
    for name, data, changes, resumes in json.loads(Path("jobs.json").read_text()):
        config = config_of(Path(data), Path("."), name, **changes)
        run, found = Path(name), checkpoint.newest(Path(name)) if resumes else None
        if world.is_main and not resumes:
            logs.create_run(run, config)
        barrier()
        train(config, run, world, found)
        barrier()


def planted(world, name, plant):
    # Calls `plant(loss)` in the last micro-batch of update 3, on rank 1.
    config = config_of(Path("data").resolve(), Path("."), name, parallel="fsdp")
    if world.is_main:
        logs.create_run(Path(name), config)
    barrier()
    calls, forward = [], GPT.forward

    def patched(self, idx, targets=None):
        logits, loss = forward(self, idx, targets)
        calls.extend([1] * self.training)
        return logits, plant(loss) if world.rank == 1 and len(calls) == 6 else loss

    GPT.forward = patched
    try:
        return train(config, Path(name), world)
    except UserError as error:
        return str(error)
    finally:
        GPT.forward = forward


def stop(loss):
    os.kill(os.getpid(), signal.SIGTERM)
    return loss


with join_world("cpu") as world:
    main(world)
    assert planted(world, "stopped", stop) == (3, False)
    assert "Update 3 has a loss of nan" in planted(world, "bad", lambda loss: loss * torch.nan)
    changes = {MODERN!r}
    config = config_of(Path("data").resolve(), Path("."), "held", parallel="fsdp", **changes)
    Path("held").mkdir(exist_ok=True)
    trainer, _ = begin(config, Path("held"), world, None, threading.Event())
    count = sum(local(parameter).numel() for parameter in trainer.model.parameters())
    Path(f"held/{{world.rank}}").write_text(str(count))
"""


def config_of(data: Path, runs: Path, name: str, **changes: object) -> Config:
    """Return a config of 20 updates of two micro-batches on each of two processes, validated on an
    odd number of batches."""
    changes = {"updates": 20, "micro_batch": 2, "val_tokens": 9 * 32} | changes
    changes = {"checkpoint_interval": 5, "val_interval": 7, "muon_lr": 0.01} | changes
    return replace(tiny_config(data, runs, **changes), {"name": name})


def run_alone(config: Config, resumed: Path | None = None) -> Path:
    run = Path(config.train.runs_dir) / config.name
    if resumed is None:
        logs.create_run(run, config)
    train(config, run, ALONE, resumed)
    return run


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """A directory of runs: each model alone, with DDP and with FSDP, and the rest of PROGRAM."""
    directory = tmp_path_factory.mktemp("together")
    data = make_data(directory / "data")
    jobs = []
    for name, changes in MODELS.items():
        run_alone(config_of(data, directory, f"{name}-alone", **changes))
        for parallel in ("ddp", "fsdp"):
            jobs.append((f"{name}-{parallel}", str(data), changes | {"parallel": parallel}, False))
    chain = MODELS["modern-muon"] | {"parallel": "fsdp"}
    run_alone(config_of(data, directory, "chain", **chain, stop_at=5))
    jobs.append(("chain", str(data), chain | {"stop_at": 10}, True))
    jobs.append(("chain", str(data), chain | {"stop_at": 15, "parallel": "ddp"}, True))
    fsdp = {"updates": 4, "parallel": "fsdp"}
    lean = ODD | fsdp | {"gradient_checkpointing": True, "dropout": 0.1}
    jobs.append(("lean", str(data), lean, False))
    jobs.append(("not-lean", str(data), lean | {"gradient_checkpointing": False}, False))
    evals = {"vocab_size": 50257, "eval_interval": 2, "val_tokens": 96}
    words = make_data(directory / "words", shard_tokens=1000, tokenizer=gpt2_tokenizer())
    _make_hellaswag(directory / "benchmarks")
    jobs += [
        (f"evals-{p}", str(words), fsdp | evals | {"parallel": p}, False) for p in ("ddp", "fsdp")
    ]
    (directory / "jobs.json").write_text(json.dumps(jobs))
    (directory / "program.py").write_text(PROGRAM)
    environment = {"GPT2_DATA": str(directory / "benchmarks"), "PYTHONPATH": str(ROOT)}
    result = script(directory / "program.py", cwd=directory, processes=2, **environment)
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr, result.stderr
    return directory


def _make_hellaswag(directory: Path) -> None:
    endings = ["on a mat.", "and ran home again.", "at the dog.", "on and on and on."]
    row = {"activity_label": "Cats", "ctx_a": "The cat sat.", "ctx_b": "it", "endings": endings}
    rows = [row | {"ctx": f"The cat sat {'on ' * i}. It", "label": i % 4} for i in range(7)]
    (directory / "hellaswag").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "hellaswag" / "hellaswag_val.jsonl").write_text(text)


def metrics(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(run: Path, kind: str = "train") -> torch.Tensor:
    return torch.tensor([line["loss"] for line in metrics(run, kind)], dtype=torch.float64)


def tensors(run: Path, step: int, name: str = "model.safetensors") -> dict:
    return load_file(checkpoint.checkpoint_path(run, step) / name)


def assert_close(run: Path, other: Path, step: int) -> None:
    """Two runs have the same losses and weights after `step` updates, but for rounding."""
    for kind in ("train", "val"):
        assert len(losses(run, kind)) == len(losses(other, kind))
        assert (losses(run, kind) - losses(other, kind)).abs().max() < 1e-5
    a, b = tensors(run, step), tensors(other, step)
    assert a.keys() == b.keys()
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_twenty_updates_are_those_of_one_process(together, name, parallel):
    run = together / f"{name}-{parallel}"
    assert len(losses(run)) == 20
    assert_close(run, together / f"{name}-alone", 20)


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_do_not_tell_who_wrote_them(together, name):
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours = tensors(together / f"{name}-fsdp", 20, file)
        alone = tensors(together / f"{name}-alone", 20, file)
        assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
            n: (t.shape, t.dtype) for n, t in alone.items()
        }
        # Moments too have the same values.
        assert all(torch.allclose(ours[n], alone[n], atol=1e-5) for n in ours)


def test_a_run_goes_from_one_process_to_fsdp_to_ddp_and_back(together, tmp_path):
    run = Path(shutil.copytree(together / "chain", tmp_path / "chain"))
    assert [path.name[-2:] for path in checkpoint.all_checkpoints(run)] == ["05", "10", "15"]
    config = config_of(together / "data", tmp_path, "chain", **MODELS["modern-muon"])
    run_alone(config, checkpoint.newest(run))
    assert [line["step"] for line in metrics(run, "train")] == list(range(1, 21))
    straight = together / "modern-muon-alone"
    assert (losses(run) - losses(straight)).abs().max() < 1e-5
    a, b = tensors(run, 20), tensors(straight, 20)
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-5


def test_samples_and_scores_are_made_along_the_way(together):
    ddp, fsdp = (together / f"evals-{parallel}" for parallel in ("ddp", "fsdp"))
    assert [line["step"] for line in metrics(fsdp, "eval")] == [0, 2, 4]
    for ours, theirs in zip(metrics(fsdp, "eval"), metrics(ddp, "eval"), strict=True):
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}
    samples = (fsdp / "samples.md").read_text()
    assert samples == (ddp / "samples.md").read_text()
    assert re.findall("^## .*", samples, re.MULTILINE) == ["## Step 0", "## Step 4"]


def test_blocks_that_are_computed_again_change_nothing(together):
    assert torch.equal(losses(together / "lean"), losses(together / "not-lean"))


def test_a_signal_to_one_process_saves_from_both(together, tmp_path):
    run = Path(shutil.copytree(together / "stopped", tmp_path / "stopped"))
    newest = checkpoint.newest(run)
    assert newest == checkpoint.checkpoint_path(run, 3)
    assert checkpoint.read_state(newest)["val_loss"] is None
    run_alone(config_of(together / "data", tmp_path, "stopped"), newest)
    assert [line["step"] for line in metrics(run, "train")] == list(range(1, 21))


def test_numbers_gone_bad_are_found_on_all_processes(together):
    found = json.loads((together / "bad" / "non_finite.json").read_text())
    assert found["step"] == 3 and found["loss"] == "nan"
    # The last micro-batch of rank 1.
    assert found["suspects"] == found["windows"][6:8]


def test_each_process_holds_its_share(together):
    counts = [int((together / "held" / str(rank)).read_text()) for rank in (0, 1)]
    config = config_of(together / "data", together, "held", **MODERN).model
    whole = sum(p.numel() for p in build_model(config).parameters())
    assert whole > parameter_count(config)
    assert sum(counts) == whole and max(counts) < 0.51 * whole


def test_the_command_line_and_a_signal_to_a_whole_run(together, tmp_path):
    config = config_of(together / "data", tmp_path, "typed", parallel="fsdp", updates=100_000)
    command = ["main.py", "--data", config.data, "--name", "typed", *fields(config)]
    process = start(*command, cwd=tmp_path, processes=2)
    wait_for(lambda: checkpoint.all_checkpoints(tmp_path / "typed"))
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=100)
    stopped = re.search(r"stopped after update (\d+)", output)
    assert stopped and "error:" not in errors, output + errors
    assert checkpoint.newest(tmp_path / "typed").name == f"step_{int(stopped[1]):06d}"


def test_alone_it_is_the_plain_model(together, tmp_path):
    config = config_of(together / "data", tmp_path, "plain", **ODD, parallel="fsdp")
    a, b = tensors(run_alone(config), 20), tensors(together / "gpt2-adamw-alone", 20)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    model = build_model(config.model)
    assert whole_model(model) is model


def test_parts_are_compiled_each_for_itself_and_keep_their_names(monkeypatch):
    """Hooks lie around the blocks; what is compiled must not contain them."""
    compiled = []

    def compile_module(function, mode, world):
        def called(self, *inputs):
            compiled.append(type(self).__name__)
            return function(self, *inputs)

        return called if mode == "on" else function

    monkeypatch.setattr(sharding, "compile_module", compile_module)
    model = build_model(config_of(Path("data"), Path("."), "compiled").model)
    names, idx = list(model.state_dict()), torch.zeros(2, 4, dtype=torch.int64)
    plain = model(idx, idx)[1]
    sharding._compile_parts(model, "off", ALONE)
    assert torch.equal(model(idx, idx)[1], plain) and not compiled
    sharding._compile_parts(model, "on", ALONE)
    assert torch.equal(model(idx, idx)[1], plain)
    assert compiled == ["Block", "Block", "GPT"] and list(model.state_dict()) == names


def test_mps_is_refused():
    model = build_model(config_of(Path("data"), Path("."), "mps").model)
    with pytest.raises(UserError, match="MPS cannot share a model out"):
        shard(model, "off", World(0, 2, torch.device("mps")))
