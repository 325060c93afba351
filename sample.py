"""Text from a model, one token at a time: python sample.py MODEL --prompt TEXT

Samples of a prompt advance together as rows of a batch, each drawn by a generator of its own: what
one says depends neither on how many others there are nor, but for rounding, on the device.
"""

import codecs
import copy
import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor, nn

from config import UserError
from corpus.tokenizer import Tokenizer
from hf_import import find_model as find  # noqa: F401 - together with load
from hf_import import open_model as load
from model import KVCache
from training.attention import decode_kernels
from training.distributed import DistInfo, autocast, choose_device, pick_dtype
from utils import parse, run_script

ALONE = DistInfo(0, 0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Options:
    """Write text that continues a prompt."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A run, a checkpoint, gpt2[-medium|-large|-xl], a directory of transformers, or OWNER/NAME."""
    prompt: str  # Text to continue; - reads it from standard input, less the newline at its end.
    n: int = 1  # Number of samples; a single one is written as it comes.
    max_tokens: int = 256  # Most tokens in a sample; it ends where the model ends the document.
    temperature: float = 0.8  # Divides the logits; 0 always takes the likeliest token.
    top_k: int | None = 50  # Draw among the k likeliest tokens only.
    top_p: float | None = None  # Then among the fewest whose probabilities reach p only.
    seed: int = 1337  # The same seed gives the same samples.
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"  # Of the weights; auto: if fast here.
    device: Literal["cpu", "cuda", "mps", "auto"] = "auto"  # auto: CUDA, then MPS, then the CPU.
    runs_dir: str = "runs"  # Directory that holds the run directories.

    def __post_init__(self) -> None:
        _require(1 <= self.n <= 10_000, "--n must be between 1 and 10,000.")
        _require(self.max_tokens >= 1, "--max-tokens must be at least 1.")
        _require(
            0 <= self.temperature < float("inf"), "--temperature must be 0 or a number above it."
        )
        _require(self.top_k is None or self.top_k >= 1, "--top-k must be at least 1.")
        _require(self.top_p is None or 0 < self.top_p <= 1, "--top-p must be above 0, at most 1.")


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


def main() -> None:
    """Write the samples that the command line asks for to standard output."""
    o = parse(Options)
    prompt = o.prompt
    if prompt == "-":  # shells and editors end a text with a newline that is no part of it
        prompt = sys.stdin.buffer.read().decode("utf-8", "replace").removesuffix("\n")
    _require(prompt != "", "--prompt is empty; give text, or - to read it from standard input.")
    device = choose_device(ALONE, o.device).device
    model, tokenizer, begins_with_eot = load(o.source, o.runs_dir)
    model = for_sampling(model.to(device), pick_dtype(o.dtype, device))
    ids, context = prompt_ids(tokenizer, prompt, begins_with_eot), model.config.block_size
    if len(ids) > context:
        print(f"The prompt has {len(ids)} tokens; its last {context} are kept.", file=sys.stderr)
    drawing = o.temperature, o.top_k, o.top_p, o.seed, tokenizer.eot
    steps = generate(model, ids.expand(o.n, -1), o.max_tokens, *drawing)
    if o.n == 1:
        stream(steps, tokenizer, prompt)  # which leaves no steps for the loop
    for i, text in enumerate(collect(steps, tokenizer), start=1):
        print(f"--- sample {i} of {o.n} ---\n{prompt}{text}\n")


def for_sampling(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return the model in eval mode, its blocks' matrices cast to `dtype` and the rest shared.

    A new token reads every weight once: half the bytes, nearly twice the speed. By default the
    dtype is autocast's, where that is on, or stays.
    """
    if dtype is None and torch.is_autocast_enabled(device := model.wte.weight.device.type):
        dtype = torch.get_autocast_dtype(device)
    # A copy of the modules, but not of their tensors.
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared).eval()
    for layer in [m for m in model.h.modules() if dtype and isinstance(m, nn.Linear)]:
        for name, p in list(layer.named_parameters()):
            setattr(layer, name, nn.Parameter(p.detach().to(dtype), requires_grad=False))
    return model


def generate(
    model, tokens, max_tokens, temperature=1, top_k=None, top_p=None, seed=1337, eot=None, stop=None
) -> Iterator[Tensor]:
    """Yield the next token of every row, int64 (B,) on the CPU, `max_tokens` times at most.

    `tokens` is int64 (B, T), T >= 1; of more than the context the last part is kept. A row that has
    drawn `eot` goes on yielding it; when every row has, or `stop()` says so, the iterator ends.
    """
    model, T = for_sampling(model), model.config.block_size
    context = unread = tokens[:, -T:].cpu()
    weight, room = model.h[0].mlp.c_fc.weight, context.size(1) + max_tokens
    cache = KVCache(model.config, len(tokens), weight.device, weight.dtype, room)
    generators = [row_generator(seed, row) for row in range(len(tokens))]
    finished = torch.zeros(len(tokens), dtype=torch.bool)
    for _ in range(max_tokens):
        if finished.all() or (stop is not None and stop()):
            return
        logits = next_logits(model, unread, cache)  # prefill reads (B, T), decoding (B, 1)
        ids = choose(logits, generators, temperature, top_k, top_p)
        if eot is not None:
            ids = torch.where(finished, eot, ids)
            finished = ids == eot
        yield ids
        unread = ids[:, None]
        context = torch.cat([context, unread], dim=1)[:, -T:]
        if cache.length == T:  # full: read its last half again, and go on from there
            cache.length, unread = 0, context[:, -max(T // 2, 1) :]


@torch.inference_mode()  # here, since around a `yield` it would leak to the caller
def next_logits(model: nn.Module, ids: Tensor, cache: KVCache) -> Tensor:
    """Return the logits, float32 (B, V) on the CPU, that follow ids (B, T) and the cache."""
    device = cache.store.device
    with autocast(device, cache.store.dtype), decode_kernels():
        x = model.hidden(ids.to(device), cache)[:, -1]  # (B, C)
    with torch.autocast(device.type, enabled=False):  # bfloat16 takes steps of 0.5 at 100
        return model.logits(x.float()).cpu()


def row_generator(seed: int, row: int) -> torch.Generator:
    """Return the CPU generator of one row, far from those of other rows and seeds."""
    digest = hashlib.sha256(f"{seed} {row}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))  # it keeps 32 bits


def choose(logits: Tensor, generators, temperature: float, top_k=None, top_p=None) -> Tensor:
    """Return one id for each row of logits (B, V); raises UserError when a logit is not finite."""
    _require(bool(logits.isfinite().all()), "The logits are not finite: the training diverged.")
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Every row draws at every step, so that a row's numbers do not depend on the others' ends.
    uniform = torch.stack([torch.rand(1, dtype=torch.float64, generator=g) for g in generators])
    cumulative = distribution(logits, temperature, top_k, top_p).cumsum(dim=-1)
    # The first id whose cumulative probability exceeds the draw; it never has probability zero.
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]


def distribution(logits: Tensor, temperature: float, top_k=None, top_p=None) -> Tensor:
    """Return the probabilities, float64 (B, V), from which a token is drawn; temperature > 0.

    The top_k likeliest ids, and of them the fewest whose mass reaches top_p (Holtzman et al. 2020).
    They stay in their own order, so that near-equal ones that rounding swaps do not move the draw.
    """
    # Less the maximum first, so that no temperature is small enough to overflow.
    scaled = (logits.double() - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None:
        kept, ids = scaled.topk(min(top_k, scaled.size(-1)))
        scaled = torch.full_like(scaled, -torch.inf).scatter(-1, ids, kept)
    probs = scaled.softmax(dim=-1)
    if top_p is None or top_p >= 1:
        return probs
    kept, ids = probs.topk(min(top_k or probs.size(-1), probs.size(-1)))  # all that are not 0
    kept = kept.masked_fill(nn.functional.pad(kept.cumsum(-1)[:, :-1], (1, 0)) >= top_p, 0)
    return torch.zeros_like(probs).scatter(-1, ids, kept / kept.sum(dim=-1, keepdim=True))


def continuations(
    model, tokenizer, prompts, max_tokens, seed, temperature=0.8, begins_with_eot=True, stop=None
) -> list[str]:
    """Return a continuation of each prompt, as far as it came when `stop()` said so."""
    model, texts = for_sampling(model), []
    for prompt in prompts:
        tokens = prompt_ids(tokenizer, prompt, begins_with_eot)[None]
        drawing = temperature, 50, None, seed, tokenizer.eot, stop
        texts += collect(generate(model, tokens, max_tokens, *drawing), tokenizer) or [""]
    return texts


def generate_text(source, prompts, max_tokens=48, temperature=0.8, seed=1337) -> list[str]:
    """Return a continuation of each prompt by the model that `source` names, as sample.py would."""
    model, tokenizer, begins_with_eot = load(source)
    device = choose_device(ALONE, "auto").device
    model = for_sampling(model.to(device), pick_dtype("auto", device))
    return continuations(model, tokenizer, prompts, max_tokens, seed, temperature, begins_with_eot)


def prompt_ids(tokenizer: Tokenizer, prompt: str, begins_with_eot: bool) -> Tensor:
    """Return a prompt's ids, int64 (T,), after <|endoftext|> if documents begin so or it is ""."""
    start = [tokenizer.eot] if begins_with_eot or not prompt else []
    return torch.tensor(start + tokenizer.encode(prompt).tolist())


def stream(steps: Iterable[Tensor], tokenizer: Tokenizer, prompt: str) -> None:
    """Print the prompt and then row 0 as its tokens come, holding back characters cut in two."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(prompt, end="", flush=True)
    for ids in steps:
        if ids[0] != tokenizer.eot:
            print(decoder.decode(tokenizer.decode_bytes(ids[:1].tolist())), end="", flush=True)
    print(decoder.decode(b"", final=True))


def collect(steps: Iterable[Tensor], tokenizer: Tokenizer) -> list[str]:
    """Return the text of every row up to its <|endoftext|>, once all are finished."""
    rows = zip(*(ids.tolist() for ids in steps), strict=True)
    return [tokenizer.decode(row[: [*row, tokenizer.eot].index(tokenizer.eot)]) for row in rows]


if __name__ == "__main__":
    run_script(main)
