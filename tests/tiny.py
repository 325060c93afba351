"""Small data and small configs, so that a whole training run takes a second."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from config import Config, ModelConfig, OptimConfig, TrainConfig
from corpus.shards import Manifest, Shard, write_manifest
from corpus.tokenizer import TOKENIZER_FILE, CharTokenizer, Tokenizer

ROOT = Path(__file__).parent.parent
ALPHABET = "\n abcdefghijklmnopqrstuvwxyz."
CHARACTERS = CharTokenizer(ALPHABET)
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "ran", "home", "again")


def make_data(
    directory: Path,
    documents: int = 60,
    shard_tokens: int = 4000,
    tokenizer: Tokenizer = CHARACTERS,
    words: Sequence[str] = WORDS,
) -> Path:
    """Write shards of made-up documents in the documented format; the first is for validation.

    They are written plainly here, not by the project's own writer.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rng, tokens = np.random.default_rng(0), []
    for _ in range(documents):
        text = " ".join(rng.choice(words, size=int(rng.integers(20, 80)))) + "."
        tokens += [tokenizer.eot, *tokenizer.encode(text)]
    assert len(tokens) > shard_tokens, "a validation and a training split"
    shards = []
    for start in range(0, len(tokens), shard_tokens):
        part = np.array(tokens[start : start + shard_tokens], dtype="<u2")
        split = "train" if start else "val"
        path = directory / f"tiny_{split}_{len(shards):06d}.npy"
        np.save(path, part)
        text_bytes = int(tokenizer.token_bytes()[part].sum())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shards.append(Shard(path.name, split, len(part), text_bytes, digest))
    if tokenizer.json:
        (directory / TOKENIZER_FILE).write_text(tokenizer.json, encoding="utf-8")
    facts = (tokenizer.name, tokenizer.vocab_size, tokenizer.eot, {"kind": "test"})
    digest = tokenizer.sha256
    write_manifest(directory, Manifest("tiny", *facts, digest, {}, tuple(shards), complete=True))
    return directory


def tiny_config(data: Path, runs_dir: Path, **changes: object) -> Config:
    """Return a config of a 2-layer model and 12 steps of 8 sequences of 32 tokens."""
    train = {
        "steps": 12,
        "batch_tokens": 256,
        "micro_batch_size": 4,
        "shuffle": "sequences",
        "val_interval": 5,
        "val_tokens": 1024,
        "checkpoint_interval": 4,
        "keep_checkpoints": 9,
        "sample_tokens": 4,
        "dtype": "float32",
        "device": "cpu",
        "runs_dir": str(runs_dir),
    }
    optim = {"lr": 3e-3, "warmup_frac": 0.25}
    model = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}
    model["vocab_size"] = len(ALPHABET) + 1
    groups = ((train, TrainConfig), (optim, OptimConfig), (model, ModelConfig))
    for name, value in changes.items():
        next(group for group, kind in groups if name in kind.__dataclass_fields__)[name] = value
    parts = ModelConfig(**model), OptimConfig(**optim), TrainConfig(**train)
    return Config("gpt2", "nano", str(data), "tiny", *parts)


def start(*args: object, cwd: Path, processes: int = 1, **environment: str) -> subprocess.Popen:
    """Start a script of the project from `cwd`, under torchrun when there are several processes."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [str(ROOT / str(args[0])), *map(str, args[1:])]
    return subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def script(
    *args: object, cwd: Path, processes: int = 1, **environment: str
) -> subprocess.CompletedProcess:
    """Run a script of the project as `start` does, to its end."""
    process = start(*args, cwd=cwd, processes=processes, **environment)
    try:
        output, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait until `condition()` holds; a test that waits in vain fails here."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def fields(config: Config) -> list[str]:
    """Return a config's model, optim and train groups as command-line options."""
    options = []
    for group in ("model", "optim", "train"):
        for name, value in vars(getattr(config, group)).items():
            dashed = name.replace("_", "-")
            if isinstance(value, bool):
                options.append(f"--{group}.{'' if value else 'no-'}{dashed}")
            elif value is not None and value != ():
                words = value if isinstance(value, tuple) else (value,)
                options += [f"--{group}.{dashed}", *map(str, words)]
    return options


def command(config: Config, name: str) -> list[str]:
    """Return the arguments of `start` and `script` that train a config under another name."""
    where = ["--data", config.data, "--size", config.size, "--name", name]
    return ["main.py", *where, *fields(config)]
