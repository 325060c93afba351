"""Sampling against a loop without a cache, against transformers, and eight rows against one.

    python -m bench.sample [--tokens 512] [--rows 1 8] [--dtype bfloat16 float32] [--repeats 3]

GPT-2 (124M) with random weights, as fast as with trained ones. A prompt of a few tokens is
continued greedily by as many as asked for, which no end-of-text cuts short. The loop without a
cache reads all tokens so far for each new one, and projects only the last state onto the
vocabulary; it is quadratic, takes minutes, and is measured once. Both references are measured in
their default, float32, and in bfloat16 too: autocast for the loop, weights loaded in bfloat16 for
transformers. Prefill is the reading of a prompt of as many tokens, up to the first logits after
it. Memory is the most that is held while tokens are drawn, weights included.

Every measurement has a process of its own, with the same environment, and they take turns.
"""

import importlib
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bench.device import begin_memory, peak_memory
from bench.processes import in_fresh_process
from bench.record import report
from config import ModelConfig
from model import GPT, KVCache
from sample import ALONE, for_sampling, generate, next_logits
from training.distributed import autocast, choose_device, synchronize

PROMPT_TOKENS = 8
REFERENCES = ("transformers", "no cache")


@dataclass(frozen=True)
class Options:
    """Measure how fast tokens are drawn."""

    tokens: int = 512
    """Tokens drawn in a row."""
    rows: tuple[int, ...] = (1, 8)
    """Rows that advance together; the references have one."""
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ("bfloat16", "float32")
    """Arithmetic of ours; each is compared with references of float32, and of the same."""
    references: tuple[Literal["transformers", "no cache"], ...] = REFERENCES
    """What to compare with."""
    repeats: int = 3
    """Measurements of each but the loop without a cache, taken in turn; medians are compared."""
    device: Literal["cpu", "cuda", "mps", "auto"] = "auto"
    """Where to compute."""


@dataclass(frozen=True)
class Figures:
    """What one measurement found."""

    speed: float  # tokens drawn a second, all rows together
    prefill: float  # tokens of a prompt read a second, all rows together
    memory: float  # MB


# A way to generate, a dtype's name, and a number of rows.
Case = tuple[str, str, int]


def main() -> None:
    """Print JSON lines: ours against each reference, and many rows against one."""
    options = parse(Options)
    cases: list[Case] = [("ours", dtype, n) for dtype in options.dtype for n in options.rows]
    dtypes = dict.fromkeys(("float32", *options.dtype))
    cases += [(name, dtype, 1) for name in options.references for dtype in dtypes]
    found: dict[Case, list[Figures]] = {case: [] for case in cases}
    for repeat in range(options.repeats):
        for case in cases:
            if case[0] != "no cache" or repeat == 0:
                args = (*case, options.tokens, options.device)
                found[case].append(in_fresh_process(measure, *args))
    for case in cases:
        if case[0] == "ours":
            compare(case, found, options.device)


def compare(case: Case, found: dict[Case, list[Figures]], device: str) -> None:
    """Print one of ours against every reference, or against the first number of rows."""
    _, dtype, rows = case
    first = next(n for name, _, n in found if name == "ours")
    others = [other for other in found if other[0] != "ours" and other[1] in ("float32", dtype)]
    if rows != first:
        others = [("ours", dtype, first)]
    for other in others:
        against = f"{first} rows" if other[0] == "ours" else f"{other[0]} in {other[1]}"
        for figure, unit in (("speed", "tokens/s"), ("prefill", "tokens/s"), ("memory", "MB")):
            values, references = (
                [getattr(figures, figure) for figures in found[which]] for which in (case, other)
            )
            name = f"sample, {dtype}, {rows} rows, {figure}, against {against}"
            report(name, unit, values, references, device)


def measure(
    name: str,
    dtype_name: str,
    rows: int,
    tokens: int,
    device_name: str = "auto",
    config: ModelConfig | None = None,
) -> Figures:
    """Return the speed and the memory of `name`, "ours" or a reference, for a model of `config`."""
    device, dtype = choose_device(ALONE, device_name).device, getattr(torch, dtype_name)
    config = config or ModelConfig()
    kind = {"ours": Ours, "transformers": Transformers, "no cache": NoCache}[name]
    if kind is Transformers:
        # Memory that the package itself takes is not counted.
        importlib.import_module("transformers.models.gpt2.modeling_gpt2")
    torch.manual_seed(0)
    before = begin_memory(device)
    way = kind(config, device, dtype)
    short = torch.randint(config.vocab_size, (1, PROMPT_TOKENS)).expand(rows, -1)
    long = torch.randint(config.vocab_size, (1, min(tokens, config.block_size))).expand(rows, -1)
    way.draw(short, 4)
    begin_memory(device)
    drawn = _seconds(way.draw, short, tokens, device=device)
    memory = peak_memory(device) - before
    way.read(long)
    read = _seconds(way.read, long, device=device)
    return Figures(rows * tokens / drawn, long.numel() / read, memory / 1e6)


def _seconds(run: Any, *args: Any, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run(*args)
    synchronize(device)
    return time.perf_counter() - start


class Ours:
    """This project's."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype):
        self.model, self.dtype = for_sampling(GPT(config).to(device), dtype), dtype

    def draw(self, prompt: Tensor, tokens: int) -> Tensor:
        """Return the tokens (B, `tokens`) that follow a prompt (B, T)."""
        return torch.stack(list(generate(self.model, prompt, tokens, temperature=0)), dim=1)

    def read(self, prompt: Tensor) -> Tensor:
        """Return the logits (B, V) that follow a prompt (B, T)."""
        rows, tokens = prompt.shape
        device = self.model.wte.weight.device
        cache = KVCache(self.model.config, rows, device, self.dtype, tokens)
        return next_logits(self.model, prompt, cache)


class NoCache:
    """The same model, called anew for every token with all that there are."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype):
        self.model, self.device, self.dtype = GPT(config).to(device).eval(), device, dtype

    # Not inference mode, in which autocast would round all weights at every call.
    @torch.no_grad()
    def draw(self, prompt: Tensor, tokens: int) -> Tensor:
        """Return the tokens (B, `tokens`) that follow a prompt (B, T)."""
        ids = prompt.to(self.device)
        with autocast(self.device, self.dtype):
            for _ in range(tokens):
                x = self.model.hidden(ids[:, -self.model.config.block_size :])
                following = self.model.logits(x[:, -1]).argmax(dim=-1, keepdim=True)
                ids = torch.cat([ids, following], dim=1)
        return ids[:, prompt.size(1) :].cpu()

    @torch.no_grad()
    def read(self, prompt: Tensor) -> Tensor:
        """Return the logits (B, V) that follow a prompt (B, T)."""
        with autocast(self.device, self.dtype):
            return self.model.logits(self.model.hidden(prompt.to(self.device))[:, -1]).cpu()


class Transformers:
    """transformers' GPT-2 and its `generate`, with its cache."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype):
        from transformers import GPT2Config, GPT2LMHeadModel

        theirs = GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            # Random weights must not end the text.
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model, self.device = GPT2LMHeadModel(theirs).to(device, dtype).eval(), device

    def draw(self, prompt: Tensor, tokens: int) -> Tensor:
        """Return the tokens (B, `tokens`) that follow a prompt (B, T)."""
        prompt = prompt.to(self.device)
        ids = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        return ids[:, prompt.size(1) :].cpu()

    @torch.no_grad()
    def read(self, prompt: Tensor) -> Tensor:
        """Return the logits (B, V) that follow a prompt (B, T)."""
        prompt = prompt.to(self.device)
        return self.model(prompt, use_cache=True, logits_to_keep=1).logits[:, -1].cpu()


if __name__ == "__main__":
    # Not at the top: spawned processes import this module again, and have no command line.
    from utils import parse, run_script

    run_script(main)
