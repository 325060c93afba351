"""FSDP: the losses, weights and files of DDP and of one process, and a run may go between them.

All that needs two ranks happens in one start of them, `together`, which the tests look at.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp  # takes seconds, once: ranks are forks of this process

from config import Config, UserError, replace
from corpus.tokenizer import gpt2_tokenizer
from model import GPT
from modern import build_model
from tests.ranks import run_ranks
from tests.runs import metrics, run_training, steps, tensors
from tests.tiny import command, make_data, start, tiny_config, wait_for
from train import train
from training import checkpoint, distributed
from training.distributed import (
    DistInfo,
    apply_fsdp,
    barrier,
    choose_device,
    init_distributed,
    to_local,
    unsharded_copy,
)
from training.logger import create_run
from training.optim import build_optimizers, set_lr

pytestmark = pytest.mark.slow

MODERN = {
    **{"n_embd": 36, "n_head": 3, "n_layer": 3},
    "architecture": "modern",
    "bias": False,
    "pos_emb": "rope",
    "norm": "rmsnorm",
    "qk_norm": True,
    "x0_residual": True,
    # A parameter of one row, of which the second rank has none.
    "value_residual": True,
    "tie_embeddings": False,
}
# Two ranks cannot divide its rows equally.
ODD = {"n_embd": 33, "n_head": 3, "n_layer": 3}
MODELS = {
    "gpt2-adamw": ODD,
    "gpt2-muon": ODD | {"optimizer": "muon", "muon_weight_decay": 0.1},
    "modern-muon": MODERN | {"optimizer": "muon"},
}
FSDP = {"parallel": "fsdp"}


def config_of(data: Path, runs: Path, name: str, **changes: object) -> Config:
    """Return a config of 20 steps of two micro-batches on each of two ranks, validated on an odd
    number of batches."""
    changes = {"steps": 20, "micro_batch_size": 2, "val_tokens": 9 * 32} | changes
    changes = {"checkpoint_interval": 5, "val_interval": 7, "muon_lr": 0.01} | changes
    return replace(tiny_config(data, runs, **changes), {"name": name})


def run_together(info: DistInfo, config: Config) -> tuple[int, bool]:
    """Train on all ranks, from the newest checkpoint where there is one."""
    run = Path(config.train.runs_dir) / config.name
    if info.is_main and not run.exists():
        create_run(run, config)
    barrier()
    return train(config, run, info, checkpoint.newest(run))


def run_planted(info: DistInfo, config: Config, plant) -> tuple[int, bool] | str:
    """Train, calling `plant(loss)` in the last micro-batch of step 3 on rank 1."""
    calls, forward = [], GPT.forward

    def patched(self, idx, *arguments):
        losses, loss = forward(self, idx, *arguments)
        calls.extend([1] * self.training)
        return losses, plant(loss) if info.rank == 1 and len(calls) == 6 else loss

    GPT.forward = patched
    try:
        return run_together(info, config)
    except UserError as error:
        return str(error)
    finally:
        GPT.forward = forward


def stop(loss: torch.Tensor) -> torch.Tensor:
    os.kill(os.getpid(), signal.SIGTERM)
    return loss


def resume_bitwise(info: DistInfo, directory: Path, optimizer: str, parallel: str) -> None:
    """Take five steps, and three, a checkpoint and two: the same bits."""
    model_config = config_of(directory, directory, "resume", **MODERN).model
    optim = config_of(directory, directory, "resume", optimizer=optimizer).optim
    ends = []
    for stops in (False, True):
        run, path = directory / f"resume-{optimizer}-{parallel}-{stops}", None
        for first, last in ((1, 3), (4, 5)):
            if path is None or stops:
                torch.manual_seed(len(str(path)))
                model = build_model(model_config)
                if path is not None:
                    checkpoint.load_model(path, model)
                forward = distributed.wrap_ddp(model, info) if parallel == "ddp" else model
                if parallel == "fsdp":
                    apply_fsdp(model, info)
                optimizers = build_optimizers(model, optim, torch.float32)
                if path is not None:
                    checkpoint.load_optimizers(path, model, optimizers)
            for step in range(first, last + 1):
                generator = torch.Generator().manual_seed(10 * step + info.rank)
                idx = torch.randint(0, model_config.vocab_size, (2, 33), generator=generator)
                set_lr(optimizers, step, 5, optim)
                forward(idx[:, :-1], idx[:, 1:])[1].backward()
                for each in optimizers:
                    each.step()
                    each.zero_grad()
            path = checkpoint.save(run, last, model, optimizers, {}, info.is_main)
            barrier()
        ends.append({name: tensors(run, 5, name) for name in ("model.safetensors", OPTIMIZER)})
    for name, a in ends[0].items():
        b = ends[1][name]
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name


OPTIMIZER = "optimizer.safetensors"


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """A directory of runs: each model alone, with DDP and with FSDP, and the rest."""
    directory = tmp_path_factory.mktemp("together")
    data, jobs = make_data(directory / "data"), []

    def job(name: str, data: Path = data, **changes: object) -> Config:
        return config_of(data, directory, name, **changes)

    for name, changes in MODELS.items():
        run_training(job(f"{name}-alone", **changes))
        for parallel in ("ddp", "fsdp"):
            jobs.append(job(f"{name}-{parallel}", **changes, parallel=parallel))
    chain = MODELS["modern-muon"]
    run_training(job("chain", **chain, stop_at_step=5))
    jobs.append(job("chain", **chain, stop_at_step=10, **FSDP))
    jobs.append(job("chain", **chain, stop_at_step=15))
    lean = ODD | FSDP | {"steps": 4, "dropout": 0.1}
    jobs.append(job("lean", **lean, gradient_checkpointing=True))
    jobs.append(job("not-lean", **lean))
    words = make_data(directory / "words", shard_tokens=1000, tokenizer=gpt2_tokenizer())
    evals = {"steps": 4, "vocab_size": 50257, "eval_interval": 2, "val_tokens": 96}
    jobs += [job(f"evals-{p}", words, **evals, parallel=p) for p in ("ddp", "fsdp")]
    make_hellaswag(directory / "benchmarks")

    def run() -> None:
        os.environ["GPT2_DATA"] = str(directory / "benchmarks")
        with init_distributed(60) as info:
            info = choose_device(info, "cpu")
            for config in jobs:
                run_together(info, config)
            assert run_planted(info, job("stopped", **FSDP), stop) == (3, False)
            bad = run_planted(info, job("bad", **FSDP), lambda loss: loss * torch.nan)
            assert "Step 3 has a loss of nan" in bad, bad
            for optimizer in ("adamw", "muon"):
                for parallel in ("ddp", "fsdp"):
                    resume_bitwise(info, directory, optimizer, parallel)
            model = build_model(job("held", **MODERN).model)
            whole = [p.detach().clone() for p in model.parameters()]
            apply_fsdp(model, info)
            count = sum(to_local(parameter).numel() for parameter in model.parameters())
            (directory / f"held-{info.rank}").write_text(str(count))
            copy = unsharded_copy(model)
            assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), whole, strict=True))

    ranks = run_ranks(directory, run)
    assert [rank.status for rank in ranks] == [0, 0], ranks[0].errors + ranks[1].errors
    assert "Warning" not in ranks[0].errors + ranks[1].errors, ranks[0].errors
    return directory


def make_hellaswag(directory: Path) -> None:
    endings = ["on a mat.", "and ran home again.", "at the dog.", "on and on and on."]
    row = {"activity_label": "Cats", "ctx_a": "The cat sat.", "ctx_b": "it", "endings": endings}
    rows = [row | {"ctx": f"The cat sat {'on ' * i}. It", "label": i % 4} for i in range(7)]
    (directory / "hellaswag").mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "hellaswag" / "hellaswag_val.jsonl").write_text(text)


def losses(run: Path, kind: str = "train") -> torch.Tensor:
    return torch.tensor([line["loss"] for line in metrics(run, kind)], dtype=torch.float64)


def assert_close(run: Path, other: Path, step: int) -> None:
    """Two runs have the same losses and weights after `step` steps, but for rounding."""
    for kind in ("train", "val"):
        assert len(losses(run, kind)) == len(losses(other, kind))
        assert (losses(run, kind) - losses(other, kind)).abs().max() < 1e-5
    a, b = tensors(run, step), tensors(other, step)
    assert a.keys() == b.keys()
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_twenty_steps_are_those_of_one_process(together, name, parallel):
    run = together / f"{name}-{parallel}"
    assert len(losses(run)) == 20
    assert_close(run, together / f"{name}-alone", 20)


@pytest.mark.parametrize("name", MODELS)
def test_checkpoints_do_not_tell_who_wrote_them(together, name):
    for file in ("model.safetensors", OPTIMIZER):
        ours = tensors(together / f"{name}-fsdp", 20, file)
        alone = tensors(together / f"{name}-alone", 20, file)
        assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
            n: (t.shape, t.dtype) for n, t in alone.items()
        }
        # Moments too have the same values.
        assert all(torch.allclose(ours[n], alone[n], atol=1e-5) for n in ours)


def test_a_run_goes_from_one_process_to_fsdp_to_ddp_and_back(together, tmp_path):
    run = Path(shutil.copytree(together / "chain", tmp_path / "chain"))
    assert steps(run) == [5, 10, 15]
    config = config_of(together / "data", tmp_path, "chain", **MODELS["modern-muon"])
    run_training(config, checkpoint.newest(run))
    assert [line["step"] for line in metrics(run, "train")] == list(range(1, 21))
    straight = together / "modern-muon-alone"
    assert (losses(run) - losses(straight)).abs().max() < 1e-5
    a, b = tensors(run, 20), tensors(straight, 20)
    assert max((a[name] - b[name]).abs().max() for name in a) < 1e-5


def test_samples_and_scores_are_made_along_the_way(together):
    ddp, fsdp = (together / f"evals-{parallel}" for parallel in ("ddp", "fsdp"))
    assert [line["step"] for line in metrics(fsdp, "eval")] == [0, 2, 4]
    assert metrics(fsdp, "eval", times=False) == metrics(ddp, "eval", times=False)
    samples = (fsdp / "samples.md").read_text()
    assert samples == (ddp / "samples.md").read_text()
    assert re.findall("^## .*", samples, re.MULTILINE) == ["## Step 0", "## Step 4"]


def test_blocks_that_are_computed_again_change_nothing(together):
    assert torch.equal(losses(together / "lean"), losses(together / "not-lean"))


def test_a_signal_to_one_rank_saves_from_both(together, tmp_path):
    run = Path(shutil.copytree(together / "stopped", tmp_path / "stopped"))
    newest = checkpoint.newest(run)
    assert newest == checkpoint.checkpoint_path(run, 3)
    assert checkpoint.read_state(newest)["val_loss"] is None
    run_training(config_of(together / "data", tmp_path, "stopped"), newest)
    assert [line["step"] for line in metrics(run, "train")] == list(range(1, 21))


def test_numbers_gone_bad_are_found_on_all_ranks(together):
    found = json.loads((together / "bad" / "non_finite.json").read_text())
    assert found["step"] == 3 and found["loss"] == "nan"
    # The last micro-batch of rank 1.
    assert found["suspects"] == found["sequences"][6:8]


def test_each_rank_holds_its_share(together):
    counts = [int((together / f"held-{rank}").read_text()) for rank in (0, 1)]
    model = build_model(config_of(together / "data", together, "held", **MODERN).model)
    whole = sum(p.numel() for p in model.parameters())
    assert whole > model.config.num_params
    assert sum(counts) == whole and max(counts) < 0.51 * whole


@pytest.mark.slow
def test_the_command_line_and_a_signal_to_a_whole_run(together, tmp_path):
    config = config_of(together / "data", tmp_path, "typed", **FSDP, steps=100_000)
    process = start(*command(config, "typed"), cwd=tmp_path, processes=2)
    wait_for(lambda: checkpoint.all_checkpoints(tmp_path / "typed"))
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=100)
    stopped = re.search(r"stopped after step (\d+)", output)
    assert stopped and "error:" not in errors, output + errors
    assert checkpoint.newest(tmp_path / "typed").name == f"step_{int(stopped[1]):06d}"


def test_alone_it_is_the_plain_model(together, tmp_path):
    config = config_of(together / "data", tmp_path, "plain", **ODD, **FSDP)
    a, b = tensors(run_training(config), 20), tensors(together / "gpt2-adamw-alone", 20)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    model = build_model(config.model)
    assert unsharded_copy(model) is model


def test_blocks_compiled_each_for_itself_keep_their_names_and_values():
    """The hooks that gather weights lie around the blocks."""
    config = config_of(Path("data"), Path("."), "compiled", **ODD).model
    idx = torch.randint(0, config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(config, n_layer=2))
    names, plain = list(model.state_dict()), model(idx, idx)[1]
    for block in model.h:
        block.compile(backend="aot_eager", dynamic=False)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(model(idx, idx)[1], plain)
