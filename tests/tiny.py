"""Small data and small configs, so that a whole training run takes a second."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from config import Config, ModelConfig, OptimConfig, TrainConfig
from manifests import Manifest
from tokenizer import CharTokenizer, Tokenizer
from writer import ShardWriter

ROOT = Path(__file__).parent.parent
ALPHABET = "\n abcdefghijklmnopqrstuvwxyz."
CHARACTERS = CharTokenizer(ALPHABET)


def make_data(
    directory: Path,
    documents: int = 60,
    shard_tokens: int = 4000,
    tokenizer: Tokenizer = CHARACTERS,
) -> Path:
    """Write shards of made-up words, a training and a validation split."""
    directory.mkdir(parents=True, exist_ok=True)
    manifest = Manifest(
        name="tiny",
        tokenizer=tokenizer.name,
        alphabet=getattr(tokenizer, "alphabet", None),
        vocab_size=tokenizer.vocab_size,
        source={"kind": "test"},
        shard_tokens=shard_tokens,
    )
    writer = ShardWriter(directory, manifest, tokenizer)
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "home", "again"]
    for chunk in range(documents):
        text = " ".join(rng.choice(words, size=int(rng.integers(20, 80)))) + "."
        tokens = np.concatenate([[tokenizer.eot], tokenizer.encode(text)]).astype(np.uint16)
        writer.add(tokens, [chunk * 7919 % 1000], chunk)
    writer.finish()
    return directory


def tiny_config(data: Path, runs_dir: Path, **changes: object) -> Config:
    """Return a config of a 2-layer model and 12 updates of 8 windows of 32 tokens."""
    train = {
        "updates": 12,
        "tokens_per_update": 256,
        "micro_batch": 4,
        "order": "shuffle_windows",
        "val_interval": 5,
        "val_tokens": 1024,
        "checkpoint_interval": 4,
        "keep_checkpoints": 9,
        "sample_tokens": 4,
        "dtype": "float32",
        "device": "cpu",
        "runs_dir": str(runs_dir),
    }
    optim = {"lr": 3e-3, "warmup": 0.25}
    model = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32}
    model["vocab_size"] = len(ALPHABET) + 1
    for name, value in changes.items():
        group = next((g for g in (train, optim, model) if name in g), None)
        if group is None:
            group = next(
                g
                for g, kind in ((train, TrainConfig), (optim, OptimConfig), (model, ModelConfig))
                if name in kind.__dataclass_fields__
            )
        group[name] = value
    return Config(
        "gpt2",
        "nano",
        str(data),
        "tiny",
        ModelConfig(**model),
        OptimConfig(**optim),
        TrainConfig(**train),
    )


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
        for name in getattr(config, group).__dataclass_fields__:
            value = getattr(getattr(config, group), name)
            if isinstance(value, bool):
                options.append(f"--{group}.{'' if value else 'no-'}{name.replace('_', '-')}")
            elif value is not None:
                words = value if isinstance(value, tuple) else (value,)
                options += [f"--{group}.{name.replace('_', '-')}", *map(str, words)]
    return options
