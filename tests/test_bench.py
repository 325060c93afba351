"""The benchmarks at a tiny size: what they compare is comparable, and nothing they find is lost."""

import dataclasses
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, gpu_report, train_step
from bench.gpu_job import TINY, Job, read_results
from bench.gpu_profile import class_of
from bench.record import report, result
from bench.train_step import Case, Figures, measure, pairs_of, write_tokens
from config import ModelConfig
from hf_layouts import from_transformers
from loss import IGNORE_INDEX
from model import GPT
from tests.tiny import ROOT, make_data

MODEL = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=32)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    data = tmp_path_factory.mktemp("bench") / "random"
    write_tokens(data, 3 * 4 * MODEL.block_size)
    return Case(
        *("ours", MODEL, str(data), 4, "float32", "off", "cpu"),
        warm_up=1,
        steps=2,
    )


def losses(loop: str, case: Case) -> list[float]:
    return [float(loss) for loss in train_step.LOOPS[loop](case, CPU)]


def test_ours_and_the_plain_loop_begin_alike_and_learn_from_the_same_sequences(case):
    ours, plain = losses("ours", case), losses("plain", case)
    assert ours[0] == pytest.approx(plain[0], abs=1e-5)
    # Their rates differ, so after steps they come only near each other.
    assert ours == pytest.approx(plain, abs=0.05)
    assert ours[0] == pytest.approx(math.log(MODEL.vocab_size), abs=0.1)


def test_the_loss_of_transformers_is_ours_with_the_same_weights(case):
    theirs = losses("transformers", case)
    model = GPT(MODEL)
    weights = train_step.transformers_model(MODEL).state_dict()
    model.load_state_dict(from_transformers(weights, MODEL, "theirs"))
    batch = next(train_step.sequences_of(case, CPU))
    # It is given T tokens and predicts all but the first of them.
    targets = batch[:, 1:].clone()
    targets[:, -1] = IGNORE_INDEX
    assert theirs[0] == pytest.approx(model(batch[:, :-1], targets)[1].item(), abs=1e-3)


@pytest.mark.parametrize("loop", train_step.LOOPS)
def test_every_loop_gives_figures(case, loop):
    figures = measure(dataclasses.replace(case, loop=loop, dtype="bfloat16"))
    assert figures.tokens_per_second == pytest.approx(4 * 32 / figures.seconds)
    assert math.isfinite(figures.loss)
    assert figures.mfu is None


def test_a_loss_that_is_no_number_is_no_result(case, monkeypatch):
    nan = (torch.tensor(math.nan) for _ in range(9))
    monkeypatch.setitem(train_step.LOOPS, "plain", lambda case, device: nan)
    with pytest.raises(ArithmeticError, match="nan"):
        measure(dataclasses.replace(case, loop="plain"))


def test_the_claims_are_among_what_is_compared(case):
    ours = dataclasses.replace(case, dtype="bfloat16")
    pairs = pairs_of(ours, ("transformers",), ("bfloat16", "float32"))
    found = [(mine.dtype, other.dtype) for mine, other in pairs]
    # Beside those of one dtype: what our programs do by default, against what theirs do.
    assert found == [("bfloat16",) * 2, ("float32",) * 2, ("bfloat16", "float32")]
    assert all(mine.loop == "ours" for mine, _ in pairs)
    assert all(other.loop == "transformers" for _, other in pairs)


def test_measurements_take_turns(case, monkeypatch, capsys):
    seen = []

    def here(function, case):
        if function is train_step.seconds_to_read:
            return function(case)
        seen.append(case.loop)
        return Figures(100.0, 0.5, 200.0, None, 1.0)

    monkeypatch.setattr(train_step, "in_fresh_process", here)
    options = train_step.Options(dtype=("float32",), repeats=2, device="cpu")
    train_step.compare("nano", dataclasses.replace(case, dtype="float32"), ("plain",), options)
    assert seen == 2 * ["ours", "plain"]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    # Speed, seconds and memory; MFU is not known on a CPU.
    assert len(lines) == 4 and all(line["ratio"] == 1 for line in lines[:3])
    assert "reading of its sequences" in lines[3]["name"]
    assert lines[3]["reference"] == 0.5


def test_a_line_says_what_was_compared_and_what_made_it(capsys):
    report("x", "tokens/s", [1.0, 30.0, 2.0], [4.0, 4.0, 1.0])
    line = json.loads(capsys.readouterr().out)
    assert (line["value"], line["reference"], line["ratio"]) == (2.0, 4.0, 0.5)
    assert line["versions"].keys() >= {"python", "torch", "numpy", "tiktoken"}
    assert line.keys() == {
        *("name", "value", "unit", "reference", "ratio", "device", "versions", "commit")
    }


def test_a_line_names_the_gpu_where_it_computes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X")
    assert result("x", "s", 1.0)["device"].startswith("NVIDIA X, ")
    assert not result("x", "s", 1.0, device="cpu")["device"].startswith("NVIDIA X")


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("nvjet_hsh_192x192_64x3_2x1_v_bz_coopB_NNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu>", "matrix products"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "attention"),
        ("multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata, FusedAdam>", "optimizer"),
        ("triton_red_fused__log_softmax_nll_loss_forward_3", "softmax and loss"),
        ("triton_poi_fused_gelu_gelu_backward_2", "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(kernel, part):
    assert class_of(kernel) == part


def job(results: Path, section: str, seconds: float = 60) -> Job:
    return Job(section, TINY, "cpu", "", results, time.time() + seconds)


def test_a_section_that_fails_hangs_or_dies_leaves_its_results(tmp_path, monkeypatch):
    def raises(job: Job) -> None:
        job.record("first", 1.0, "s", {"a": 1})
        raise RuntimeError("no kernel image")

    def hangs(job: Job) -> None:
        job.record("first", 1.0, "s", {"a": 1})
        time.sleep(60)

    sections = {"raises": raises, "hangs": hangs, "dies": lambda job: os._exit(3)}
    monkeypatch.setattr(gpu, "SECTIONS", {name: (call, 1) for name, call in sections.items()})
    results, context = tmp_path / "results.jsonl", multiprocessing.get_context("fork")
    for name in sections:
        gpu.run_section(job(results, name, 3 if name == "hangs" else 60), context)
    gpu.run_section(job(results, "late", -1), context)
    lines = read_results(results)
    assert [(line["section"], line["value"]) for line in lines] == [
        *(("raises", 1.0), ("raises", None), ("hangs", 1.0), ("hangs", None)),
        *(("dies", None), ("late", None)),
    ]
    failures = [line["details"]["failed"] for line in lines if line["value"] is None]
    for failure, words in zip(failures, ("no kernel", "longer", "with 3", "no time"), strict=True):
        assert words in failure


def test_a_report_is_made_of_whatever_is_there(tmp_path):
    results = tmp_path / "x_gpu.jsonl"
    ladder = {"rung": "float32", "times the first": 1.0}
    job(results, "ladder").record("ladder, float32", 1234.5, "tokens/s", ladder)
    job(results, "throughput").record("t", None, "tokens/s", {"micro-batch": 64, "compile": "on"})
    details = {"micro-batch": 64, "compile": "on", "MFU": 0.51}
    job(results, "throughput").record("t", 5e5, "tokens/s", details)
    job(results, "losses").fail("it is a test")
    with open(results, "a") as file:
        file.write('{"section": "losses", "cut of')
    paths = gpu_report.write(results)
    assert [path.name for path in paths[1:]] == [
        *("x_gpu.md", "x_gpu_throughput.png", "x_gpu_ladder.png")
    ]
    text = paths[1].read_text()
    assert "at least 0.5; **0.51**, met" in text and "failed: it is a test" in text
    assert "at least 1.3; not measured" in text


@pytest.mark.slow
def test_importing_the_sections_does_not_touch_a_gpu():
    """A process that has asked CUDA for anything cannot hand it on to those it forks."""
    code = (
        "import torch\n"
        "def asked(*args): raise SystemExit('asked for a GPU')\n"
        "for name in ('is_available', 'device_count', '_lazy_init'):\n"
        "    setattr(torch.cuda, name, asked)\n"
        "import bench.gpu\n"
        "for name in bench.gpu.IMPORTS: __import__(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.slow
def test_the_whole_gpu_benchmark_runs_at_a_tiny_size(tmp_path):
    data = make_data(tmp_path / "data", documents=400, shard_tokens=20_000)
    out = tmp_path / "results"
    command = [sys.executable, "-m", "bench.gpu", "--tiny", "--device", "cpu"]
    command += ["--data", str(data), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (results,) = out.glob("*_gpu.jsonl")
    lines = read_results(results)
    assert {line["section"] for line in lines} == gpu.SECTIONS.keys()
    assert not [line for line in lines if "failed" in line["details"]]
    assert all(line["value"] is not None and math.isfinite(line["value"]) for line in lines)
    report_text = results.with_suffix(".md").read_text()
    assert "failed" not in report_text
    for image in ("throughput", "ladder", "training"):
        path = results.with_name(f"{results.stem}_{image}.png")
        assert path.read_bytes().startswith(b"\x89PNG") and path.name in report_text
    assert len(re.findall(r"^## ", report_text, re.MULTILINE)) == len(gpu.SECTIONS) + 1
