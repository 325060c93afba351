"""Tiny runs for the other parts: their data, their commands, and what they ended with."""

import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import checkpoint
from files import unseal
from manifests import Manifest, Shard, sampled_digest, write_manifest
from recipes import PROMPTS
from tests.tiny import fields, tiny_config
from tests.torture.common import Difference, check_nothing_hidden, require, succeed
from tokenizer import CharTokenizer, Tokenizer

# Some letters take two or three bytes, so that a text can be torn within one.
WORDS = "the cat sät on ä mat añd rän höme again über 猫 眠る 日本 €"
ALPHABET = "".join(sorted(set("\n .").union(WORDS, *PROMPTS)))
NAME = "torture"
# From the folder of a trial, which is where its processes live.
DATA, RUN = Path("data"), Path("runs", NAME)
RESUME = ("main.py", "--resume", NAME)
TENSORS = (checkpoint.WEIGHTS, checkpoint.OPTIMIZER)
# What the clock decides, and what follows from that.
TIMES = {"seconds", "tokens_per_second", "mfu", "digest"}


def make_data(directory: Path, shards: int = 4, shard_tokens: int = 3000) -> Path:
    """Write shards of made-up sentences in the documented format; the first is for validation.

    They are written plainly here, not by the project's own writer.
    """
    directory.mkdir(parents=True)
    tokenizer, rng = CharTokenizer(ALPHABET), np.random.default_rng(0)
    tokens: list[int] = []
    while len(tokens) < shards * shard_tokens:
        words = rng.choice(WORDS.split(), size=int(rng.integers(20, 80)))
        tokens += [tokenizer.eot, *tokenizer.encode(" ".join(words) + ".")]
    rows = np.array(tokens[: shards * shard_tokens], dtype="<u2").reshape(shards, shard_tokens)
    manifest = Manifest(
        name="tiny",
        tokenizer="char",
        alphabet=ALPHABET,
        vocab_size=tokenizer.vocab_size,
        source={"kind": "torture"},
        shard_tokens=shard_tokens,
        shards=tuple(_write_shard(directory, i, row, tokenizer) for i, row in enumerate(rows)),
        complete=True,
    )
    write_manifest(directory, manifest)
    return directory


def _write_shard(directory: Path, number: int, tokens: np.ndarray, tokenizer: Tokenizer) -> Shard:
    split = "train" if number else "val"
    path = directory / f"tiny_{split}_{number:06d}.npy"
    np.save(path, tokens)
    return Shard(
        path.name,
        split,
        len(tokens),
        bytes=int(tokenizer.token_bytes()[tokens].sum()),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        sampled_sha256=sampled_digest(path),
    )


def command(**changes: Any) -> list[str]:
    """Return the command that starts a tiny run, from the folder of its trial."""
    size = len(ALPHABET) + 1
    changes = {"updates": 60, "checkpoint_interval": 2, "keep_checkpoints": 2} | changes
    config = tiny_config(DATA, RUN.parent, vocab_size=size, **changes)
    return ["main.py", "--data", str(DATA), "--name", NAME, *fields(config)]


def straight(folder: Path, processes: int = 1, **changes: Any) -> tuple[Path, float]:
    """Make, anew, a run that nothing disturbs; returns its folder and how long it took."""
    shutil.rmtree(folder, ignore_errors=True)
    make_data(folder / DATA)
    begun = time.monotonic()
    succeed(folder, *command(**changes), processes=processes)
    return folder, time.monotonic() - begun


def check_same_run(folder: Path, straight: Path) -> None:
    """Raise Difference unless the run in a trial's folder ended like that in another's.

    The same are: the tensors and, but for seconds, the state of every checkpoint, the metric lines,
    samples and config, and the names of all files, of which none is hidden.
    """
    check_nothing_hidden(folder / "runs")
    ours, theirs = (_names(each / RUN) for each in (folder, straight))
    require(ours == theirs, f"files on one side only: {sorted(ours ^ theirs)}")
    for name in sorted(theirs):
        check_same_file(folder / RUN / name, straight / RUN / name)


def _names(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}


def check_same_file(path: Path, other: Path) -> None:
    """Raise Difference unless two files of runs say the same, but for what the clock decides."""
    if path.suffix == ".safetensors":
        same = _same_tensors(load_file(path), load_file(other))
    elif path.name == "metrics.jsonl":
        same = metrics(path.parent) == metrics(other.parent)
    elif path.name == checkpoint.STATE:
        same = _timeless(unseal(path.read_bytes())) == _timeless(unseal(other.read_bytes()))
    elif path.name in ("samples.md", "config.json"):
        same = path.read_bytes() == other.read_bytes()
    else:
        # Figures show speeds, and environment.json how often the run was started.
        same = path.stat().st_size > 0
    if not same:
        raise Difference(f"{path} differs from {other}")


def _same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    same_names = ours.keys() == theirs.keys()
    return same_names and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def metrics(run: Path) -> list[dict[str, Any]]:
    """Return a run's metric lines, without what the clock decides."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [_timeless(json.loads(line)) for line in lines]


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMES}


def last_step(folder: Path) -> int:
    """Return the step of the last whole train line of a run that may be going on; 0 before it."""
    try:
        text = (folder / RUN / "metrics.jsonl").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return 0
    whole = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return max((line["step"] for line in whole if line["kind"] == "train"), default=0)
