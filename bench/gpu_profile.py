"""Where the time of one step goes: matrix products, attention, loss, optimizer, other, idle."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing

from bench.device import kernel_seconds
from bench.gpu_job import Job
from bench.processes import alone
from bench.train_step import Case, ours

# What kernels, or operators on a CPU, have in their names; the first class that fits is theirs.
# Attention comes first, since its kernels are made of the same libraries as the products', and the
# products come last, since other kernels name what they are fused with.
CLASSES = {
    "attention": ("flash", "fmha", "attention", "attn", "sdpa"),
    "optimizer": ("adam", "multi_tensor", "foreach", "newton", "lpnorm", "l2norm", "linalg_vector"),
    "softmax and loss": ("softmax", "nll", "cross_entropy", "amax", "expm1", "logsumexp", "gather"),
    "matrix products": (
        *("gemm", "nvjet", "cutlass", "xmma", "splitk", "cublas", "matmul"),
        *("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "triton_tem"),
    ),
}
# The longest kernels that are listed by name.
LISTED = 12


def profile_step(job: Job) -> None:
    """Record the seconds of every class of kernels in one step of ours, and the longest ones."""
    device, scale = alone(job.device).device, job.scale
    case = Case(
        *("ours", scale.model, job.data, scale.batch, "bfloat16", job.compile_modes[0]),
        device=job.device,
        warm_up=scale.warm_up,
        steps=3 * scale.steps,
    )
    with closing(ours(case, device)) as losses:
        for _ in range(scale.warm_up):
            next(losses)
        kernels, wall = kernel_seconds(lambda: next(losses), device, scale.steps)
    details = {"micro-batch": scale.batch, "compile": case.compile}
    spent: dict[str, float] = defaultdict(float)
    for name, seconds in kernels:
        spent[class_of(name)] += seconds
    for part, seconds in shares(spent, wall):
        facts = {"part": part, "share": round(seconds / wall, 4), **details}
        job.record(f"a step, {part}", 1e3 * seconds, "ms", facts)
    job.record("a step, in all", 1e3 * wall, "ms", {"part": "in all", "share": 1.0, **details})
    for name, seconds in kernels[:LISTED]:
        facts = {"kernel": name[:80], "class": class_of(name), "share": round(seconds / wall, 4)}
        job.record("kernel", 1e3 * seconds, "ms", facts)


def class_of(name: str) -> str:
    """Return the class of a kernel, by its name."""
    lower = name.lower()
    found = (part for part, words in CLASSES.items() if any(word in lower for word in words))
    return next(found, "other")


def shares(spent: dict[str, float], wall: float) -> Iterator[tuple[str, float]]:
    """Yield the seconds of every class, and those in which no kernel ran."""
    for part in (*CLASSES, "other"):
        yield part, spent.get(part, 0.0)
    yield "idle", max(wall - sum(spent.values()), 0.0)
