"""Text from a model, one token at a time.

    python sample.py RUN|CHECKPOINT|HF_NAME --prompt TEXT

`generate.py` draws the tokens. All samples of a prompt advance together as the rows of one batch,
and what one says does not depend on how many others there are. On a CPU eight together take less
than twice as long as one, since it is the reading of the weights that takes the time; in bfloat16
(--dtype) these have half the bytes.

Training documents begin with <|endoftext|>, so a prompt to one of our own models does too. OpenAI's
models are given the prompt alone, as everyone else gives it to them. An empty prompt is
<|endoftext|> for both: the beginning of a document.
"""

import codecs
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from torch import Tensor

import checkpoint
import hf_import
from command_line import parse, run_script
from config import UserError
from decoder import Decoder
from devices import pick_device, pick_dtype
from generate import generate
from hf_configs import Saved
from hf_tokenizer import check_vocabulary
from logs import read_config, run_directory
from model import GPT
from modern import build_model
from tokenizer import Tokenizer, gpt2_tokenizer, load_tokenizer


@dataclass(frozen=True)
class Options:
    """Write text that continues a prompt."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN|CHECKPOINT|HF_NAME")]
    """A run, a checkpoint, gpt2[-medium|-large|-xl], a directory of transformers, or OWNER/NAME."""
    prompt: str
    """Text to continue; - reads it from standard input, less the newline at its end."""
    n: int = 1
    """Number of samples; a single one is written as it comes."""
    max_tokens: int = 256
    """Most tokens in a sample; it ends sooner where the model ends the document."""
    temperature: float = 0.8
    """Divides the logits: below 1 is surer, above 1 wilder, 0 always takes the likeliest token."""
    top_k: int | None = 50
    """Draw among the k likeliest tokens only."""
    top_p: float | None = None
    """Then draw among the fewest tokens whose probabilities reach p only."""
    seed: int = 1337
    """The same seed gives the same samples."""
    dtype: Literal["float32", "bfloat16", "auto"] = "auto"
    """Of weights and products; auto is bfloat16, half the bytes, where the processor has it."""
    device: Literal["cpu", "cuda", "mps", "auto"] = "auto"
    """Where to compute; auto takes CUDA, then MPS, then the CPU."""
    runs_dir: str = "runs"
    """Directory that holds the run directories."""


def main() -> None:
    """Write the samples that the command line asks for to standard output."""
    options = parse(Options)
    check_options(options)
    prompt = read_prompt(options.prompt)
    # A terminal that cannot show a character should not end the program.
    sys.stdout.reconfigure(errors="replace")
    device = pick_device(options.device)
    model, tokenizer, begins_with_eot = load(options.source, options.runs_dir)
    ids = prompt_ids(tokenizer, prompt, begins_with_eot)
    decoder = Decoder(model.to(device), pick_dtype(options.dtype, device))
    # Whatever it was rounded from need not stay in memory.
    del model
    context = decoder.config.block_size
    if len(ids) > context:
        print(f"The prompt has {len(ids)} tokens; its last {context} are kept.", file=sys.stderr)
    steps = generate(
        decoder,
        ids.expand(options.n, -1),
        options.max_tokens,
        options.temperature,
        options.top_k,
        options.top_p,
        options.seed,
        tokenizer.eot,
    )
    if options.n == 1:
        stream(steps, tokenizer, prompt)
    else:
        for i, text in enumerate(collect(steps, tokenizer), start=1):
            print(f"--- sample {i} of {options.n} ---\n{prompt}{text}\n")


def check_options(options: Options) -> None:
    """Raise UserError, naming the option, for a number that cannot be used."""
    _require(options.n >= 1, "--n must be at least 1.")
    _require(options.max_tokens >= 1, "--max-tokens must be at least 1.")
    _require(
        0 <= options.temperature < math.inf,
        "--temperature must be 0 (always the likeliest token) or a number above it.",
    )
    _require(options.top_k is None or options.top_k >= 1, "--top-k must be at least 1.")
    _require(
        options.top_p is None or 0 < options.top_p <= 1, "--top-p must be above 0 and at most 1."
    )


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


def read_prompt(prompt: str) -> str:
    """Return the prompt, from standard input if it is "-"; raises UserError if it is unusable."""
    try:
        if prompt == "-":
            # Shells and editors end a text with a newline that is no part of what should go on.
            prompt = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
        # Bytes that are not UTF-8 come from the command line as lone surrogates.
        prompt.encode("utf-8")
    except UnicodeError:
        raise UserError("--prompt is not UTF-8 text; convert it first.") from None
    _require(
        bool(prompt), "--prompt is empty; give the text to continue, or - to read it from a pipe."
    )
    return prompt


def load(source: str, runs_dir: str = "runs") -> tuple[GPT, Tokenizer, bool]:
    """Return (model on the CPU, its tokenizer, whether its documents begin with <|endoftext|>).

    Raises UserError when there is no such model, as `find` does, or it cannot be read.
    """
    found = find(source, runs_dir)
    if isinstance(found, Path) and not hf_import.is_saved_model(found):
        return _load_checkpoint(found)
    return _load_hf(str(found))


def find(source: str, runs_dir: str = "runs") -> Path | str:
    """Return the directory of a checkpoint or of a transformers model, or the name of a hub model.

    A run, by path or name, stands for its newest checkpoint and comes before a hub model of the
    same name. Raises UserError when there is no such model.
    """
    path = Path(source)
    if (path / "state.json").is_file() or hf_import.is_saved_model(path):
        return path
    try:
        run = run_directory(source, runs_dir)
    except UserError as error:
        if path.is_file():
            hf_import.refuse_file(path)
        # The name of a run that is not there should not set out for the network.
        if source in hf_import.HUB_NAMES or _is_repository(source, runs_dir):
            return source
        raise UserError(
            f"{error} Nor is it a checkpoint, a directory saved by transformers, "
            f"or one of {', '.join(hf_import.HUB_NAMES)}."
        ) from None
    newest = checkpoint.newest(run)
    if newest is None:
        raise UserError(f"The run {run} has no complete checkpoint yet.")
    return newest


def _is_repository(source: str, runs_dir: str) -> bool:
    """Say whether `source` may be a repository of the hub, rather than a run that is not there."""
    return hf_import.names_repository(source) and Path(source).parent != Path(runs_dir)


def _load_checkpoint(path: Path) -> tuple[GPT, Tokenizer, bool]:
    run = path.resolve().parent.parent
    state = checkpoint.read_state(path)
    tokenizer = load_tokenizer(**state.get("tokenizer", {"name": "gpt2", "alphabet": None}))
    model = build_model(read_config(run).model)
    checkpoint.load_model(path, model)
    return model, tokenizer, True


def _load_hf(source: str) -> tuple[GPT, Tokenizer, bool]:
    # A hub model is fetched once, and read from where it lies.
    directory = hf_import.find_directory(source)
    model, saved = hf_import.load(str(directory))
    return model, tokenizer_of(saved, source, directory), saved.begins_with_eot


def tokenizer_of(saved: Saved, source: str, directory: Path) -> Tokenizer:
    """Return the tokenizer of a model of transformers that `source` names, in `directory`.

    That of a model that is not ours is GPT-2's. Raises UserError when it has another vocabulary,
    so that its tokens cannot be turned into text.
    """
    tokenizer = load_tokenizer(**saved.tokenizer) if saved.tokenizer else gpt2_tokenizer()
    if saved.model.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{source} has {saved.model.vocab_size} token ids, but its tokenizer, "
            f"{tokenizer.name}, has {tokenizer.vocab_size}, so its tokens cannot be turned into "
            "text."
        )
    check_vocabulary(directory, tokenizer)
    return tokenizer


def prompt_ids(tokenizer: Tokenizer, prompt: str, begins_with_eot: bool) -> Tensor:
    """Return a prompt's ids, int64 (T,), after <|endoftext|> if documents begin so or it is ""."""
    start = [tokenizer.eot] if begins_with_eot or not prompt else []
    return torch.tensor(start + tokenizer.encode(prompt).tolist())


def stream(steps: Iterator[Tensor], tokenizer: Tokenizer, prompt: str) -> None:
    """Print the prompt and then row 0 as its tokens come, holding back characters cut in two."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(prompt, end="", flush=True)
    for ids in steps:
        if ids[0] != tokenizer.eot:
            print(decoder.decode(tokenizer.decode_bytes(ids[:1].tolist())), end="", flush=True)
    print(decoder.decode(b"", final=True))


def collect(steps: Iterator[Tensor], tokenizer: Tokenizer) -> list[str]:
    """Return the text of every row up to its <|endoftext|>, once all are finished."""
    rows = torch.stack(list(steps), dim=1).tolist()
    ends = [row.index(tokenizer.eot) if tokenizer.eot in row else len(row) for row in rows]
    return [tokenizer.decode(row[:end]) for row, end in zip(rows, ends, strict=True)]


def continuations(
    model: GPT | Decoder,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_tokens: int,
    seed: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
    begins_with_eot: bool = True,
) -> list[str]:
    """Return one continuation of each prompt, without the prompt, from a model in memory.

    Each is that of row 0 in `generate`, whatever the other prompts are. `max_tokens` is at least 1.
    """
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    texts = []
    for prompt in prompts:
        tokens = prompt_ids(tokenizer, prompt, begins_with_eot)[None]
        steps = generate(
            decoder, tokens, max_tokens, temperature, top_k, seed=seed, eot=tokenizer.eot
        )
        texts += collect(steps, tokenizer)
    return texts


def generate_text(
    source: str,
    prompts: list[str],
    max_tokens: int = 48,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 1337,
    runs_dir: str = "runs",
    dtype: str = "auto",
) -> list[str]:
    """Return one continuation of each prompt from the model that `source` names, as in `load`.

    Where and in which arithmetic is chosen as by `sample.py`, unless `dtype` says that.
    """
    model, tokenizer, begins_with_eot = load(source, runs_dir)
    device = pick_device("auto")
    decoder = Decoder(model.to(device), pick_dtype(dtype, device))
    return continuations(
        decoder, tokenizer, prompts, max_tokens, seed, temperature, top_k, begins_with_eot
    )


if __name__ == "__main__":
    run_script(main)
