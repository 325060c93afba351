"""The ladder that lectures on GPT-2 climb: a plain model and loop, and one thing better at a time.

    float32 -> TF32 -> bfloat16 -> compile -> flash attention -> padded vocabulary -> fused AdamW

Every rung has all those before it. Model and loop are written out here, so that each of them is a
line one can see and nothing of this project's own makes them faster; its own step comes last.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.device import begin_memory, free_memory, peak_memory, seconds_of
from bench.gpu_job import Job
from bench.processes import alone
from bench.train_step import Case, measure
from config import ModelConfig
from training.distributed import autocast, peak_flops

RUNGS = (
    *("float32", "TF32", "bfloat16", "compile"),
    *("flash attention", "padded vocabulary", "fused AdamW"),
)


def ladder(job: Job) -> None:
    """Record tokens/s of every rung, each against the one below it, and of this project's step."""
    device, scale = alone(job.device).device, job.scale
    batch, below, slowest = scale.ladder_batch, None, 0.0
    for height, rung in enumerate(RUNGS, start=1):
        batch, speed, gigabytes = highest_fitting(frozenset(RUNGS[:height]), job, batch, device)
        slowest = slowest or speed
        record_rung(job, rung, batch, speed, gigabytes, below, slowest)
        below = speed
    torch.set_float32_matmul_precision("highest")
    case = Case("ours", scale.model, job.data, batch, "bfloat16", job.compile_modes[0], job.device)
    figures = measure(case)
    speed, gigabytes = figures.tokens_per_second, figures.megabytes / 1e3
    record_rung(job, "this project's own step", batch, speed, gigabytes, below, slowest)


def record_rung(
    job: Job,
    rung: str,
    batch: int,
    speed: float,
    gigabytes: float,
    below: float | None,
    slowest: float,
) -> None:
    """Write down one rung's tokens/s, with what it gains over the one below and over the first."""
    peak = peak_flops(alone(job.device).device)
    mfu = speed * job.scale.model.flops_per_token / peak if peak else None
    details = {
        "rung": rung,
        "micro-batch": batch,
        "times the first": round(speed / slowest, 2),
        "MFU": mfu and round(mfu, 4),
        "peak GB": round(gigabytes, 3),
    }
    job.record(f"ladder, {rung}", speed, "tokens/s", details, below)


def highest_fitting(
    has: frozenset[str], job: Job, batch: int, device: torch.device
) -> tuple[int, float, float]:
    """Return (micro-batch, tokens/s, peak GB) of a loop that has the rungs in `has`.

    The micro-batch is halved until it fits, which only the first rungs may need.
    """
    while True:
        try:
            before = begin_memory(device)
            step = plain_step(has, job.scale.model, batch, device)
            seconds = seconds_of(step, device, job.scale.steps)
            gigabytes = (peak_memory(device) - before) / 1e9
            return batch, batch * job.scale.model.block_size / seconds, gigabytes
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
            batch //= 2
        finally:
            step = None
            free_memory(device)


def plain_step(
    has: frozenset[str], config: ModelConfig, batch: int, device: torch.device
) -> Callable[[], Tensor]:
    """Return what makes one step of a plain GPT-2 on random sequences, and returns its loss."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if "TF32" in has else "highest")
    dtype = torch.bfloat16 if "bfloat16" in has else torch.float32
    rows = config.padded_vocab_size if "padded vocabulary" in has else config.vocab_size
    model = PlainGPT(config, rows, flash="flash attention" in has).to(device)
    # A CPU's compiler takes minutes for what a GPU's does in seconds, and this is no CPU's ladder.
    compiles = "compile" in has and device.type == "cuda"
    forward = torch.compile(model, dynamic=False) if compiles else model
    fused = "fused AdamW" in has
    optimizer = torch.optim.AdamW(model.parameters(), 6e-4, (0.9, 0.95), fused=fused)
    sequences = torch.randint(config.vocab_size, (batch, config.block_size + 1), device=device)

    def step() -> Tensor:
        with autocast(device, dtype):
            loss = forward(sequences[:, :-1], sequences[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


class PlainGPT(nn.Module):
    """GPT-2 as it is written on a blackboard; `rows` of the embedding, with or without padding."""

    def __init__(self, config: ModelConfig, rows: int, flash: bool):
        super().__init__()
        self.tokens = nn.Embedding(rows, config.n_embd)
        self.positions = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(PlainBlock(config, flash) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy of targets (B, T) after idx (B, T)."""
        x = self.tokens(idx) + self.positions.weight[: idx.size(1)]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class PlainBlock(nn.Module):
    """Attention and MLP, each reading the normalised stream and adding to it."""

    def __init__(self, config: ModelConfig, flash: bool):
        super().__init__()
        width, self.heads, self.flash = config.n_embd, config.n_head, flash
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.qkv(self.norm_1(x)).view(B, T, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            scores = q @ k.mT / (C // self.heads) ** 0.5
            future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
            y = scores.masked_fill(future, -torch.inf).softmax(dim=-1).to(v.dtype) @ v
        x = x + self.out(y.transpose(1, 2).reshape(B, T, C))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))
