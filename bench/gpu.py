"""Everything that matters on one CUDA GPU in under nine minutes, offline.

    python -m bench.gpu [--data DIR] [--out bench/results] [--minutes 9]

Sections run one after the other, those that matter most first, each in a process of its own and for
a limited time: what fails or takes too long is written down as such, and the others go on. Every
result is appended to DATE_gpu.jsonl as soon as it is there; DATE_gpu.md and the figures are made of
that file at the end, and by `python -m bench.gpu_report FILE` at any time. Kernels are compiled
anew where nothing is cached, which takes about half of the time.
"""

import contextlib
import datetime
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Literal

import load_fineweb
from bench import gpu_ladder, gpu_profile, gpu_report, gpu_sections, gpu_uses
from bench.gpu_job import FULL, TINY, Job, Scale
from bench.processes import alone
from config import UserError
from corpus.shards import DATA_DIR, find_data, read_manifest

# What is measured, in this order, and the most seconds each may take of nine minutes. The training
# comes last and takes what is left, up to two minutes of it; the others leave it that.
SECTIONS: dict[str, tuple[Callable[[Job], None], float]] = {
    # With the imports of all.
    "machine": (gpu_sections.machine, 60),
    "throughput": (gpu_sections.throughput, 110),
    "against transformers": (gpu_sections.against_transformers, 60),
    "evaluation": (gpu_uses.evaluation, 45),
    "profile": (gpu_profile.profile_step, 30),
    "ladder": (gpu_ladder.ladder, 90),
    "attention": (gpu_sections.attention, 15),
    "losses": (gpu_sections.losses, 20),
    "host reads": (gpu_sections.host_reads, 15),
    "sampling": (gpu_uses.sampling, 20),
    "training": (gpu_uses.training, 200),
}
WHOLE = 9 * 60
# What takes seconds to import. Not this module, which is the main one of every process.
IMPORTS = (
    *("bench.gpu_sections", "bench.gpu_uses", "bench.gpu_ladder", "bench.gpu_profile"),
    *("torch._dynamo", "transformers.models.gpt2.modeling_gpt2"),
)
# Seconds for the report at the end.
REPORT = 10


@dataclass(frozen=True)
class Options:
    """Measure one GPU and write a report."""

    data: str = "pydocs"
    """Directory of token shards, or its name under data/; pydocs is made where it is not there."""
    out: Path = Path("bench/results")
    """Directory for the results, the report and the figures."""
    minutes: float = 9.0
    """When to be done."""
    tiny: bool = False
    """A model of two tiny layers, to see that everything works."""
    device: Literal["cuda", "cpu"] = "cuda"
    """The GPU, or a CPU for a test."""


def main() -> None:
    """Measure every section, then write the report and say where it is."""
    options, began = parse(Options), time.time()
    if options.device == "cpu" and not options.tiny:
        raise UserError("On a CPU this would take hours; add --tiny, or run bench.train_step.")
    alone(options.device)
    data = prepared(options.data)
    scale = sized(TINY if options.tiny else FULL, data)
    results = new_results(options.out)
    end = began + 60 * options.minutes - REPORT
    context = importing_server()
    for name, (_, seconds) in SECTIONS.items():
        allowed = seconds * 60 * options.minutes / (1 if options.tiny else WHOLE)
        job = Job(name, scale, options.device, str(data), results, min(time.time() + allowed, end))
        print(f"{time.time() - began:6.1f} s  {name}", flush=True)
        run_section(job, context)
    for path in gpu_report.write(results):
        print(path)


def prepared(data: str) -> Path:
    """Return the directory of the shards, after making those of the embedded corpus if asked."""
    if data == "pydocs":
        load_fineweb.prepare(load_fineweb.Arguments((data,), DATA_DIR / data), quiet=True)
    return find_data(data).resolve()


def sized(scale: Scale, data: Path) -> Scale:
    """Return the scale with the vocabulary of the data."""
    vocabulary = {"vocab_size": read_manifest(data).vocab_size}
    return replace(scale, model=replace(scale.model, **vocabulary))


def new_results(out: Path) -> Path:
    """Return a file of today's date, which is not there yet."""
    out.mkdir(parents=True, exist_ok=True)
    stem, number = f"{datetime.date.today()}_gpu", 1
    while (path := out / f"{stem}{'' if number == 1 else f'-{number}'}.jsonl").exists():
        number += 1
    path.touch()
    return path


def importing_server() -> ForkServerContext:
    """Return the context whose processes begin with everything imported, and nothing of CUDA yet.

    A process that has as much as counted the GPUs cannot pass them on to a child, so whatever asks
    while it is imported had better ask the driver's library.
    """
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTS])
    return context


def run_section(job: Job, context: ForkServerContext) -> None:
    """Run one section in a process of its own, and end it when its time is over."""
    if job.left <= 0:
        job.fail("no time was left for it")
        return
    process = context.Process(target=measure_section, args=(job,))
    process.start()
    process.join(job.left)
    if process.is_alive():
        job.fail("it took longer than it may; what it had measured until then is here")
        # Whatever it has started ends with it, if it has come so far.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    elif process.exitcode:
        job.fail(f"its process ended with {process.exitcode}")


def measure_section(job: Job) -> None:
    """Run one section here; what goes wrong becomes a result."""
    os.setsid()
    section, _ = SECTIONS[job.section]
    try:
        section(job)
    except Exception as error:
        job.fail(f"{type(error).__name__}: {error}"[:500])


if __name__ == "__main__":
    # Not at the top: started processes import this module again, and have no command line.
    from utils import parse, run_script

    run_script(main)
