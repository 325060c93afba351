"""Pickles in the places of weights and tokens: never loaded, whatever their names and checksums."""

import contextlib
import dataclasses
import hashlib
import io
import pickle
import random
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import checkpoint
from config import OptimConfig
from files import seal, unseal
from logs import read_config
from manifests import read_manifest, sampled_digest, write_manifest
from model import GPT
from optim import build_optimizers
from shards import TokenStream
from tests.torture.common import refusal, refused, require, succeed
from tests.torture.damaged_runs import NEWEST
from tests.torture.runs import DATA, RESUME, RUN, TENSORS
from tests.torture.spoil import replaced
from verify import verify_data

NAMES = ("model.pt", "pytorch_model.bin", "optimizer.pt", "model.safetensors.pkl")


class Trap:
    """Something whose pickle, when it is loaded, makes a file."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def pickles(marker: Path) -> tuple[bytes, bytes]:
    """Return a plain pickle and one in an archive like torch.save's, both made to spring."""
    plain = pickle.dumps(Trap(marker))
    pickle.loads(plain)
    require(marker.exists(), "the trap does not work")
    marker.unlink()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", plain)
        file.writestr("archive/version", "3")
    return plain, archive.getvalue()


def read_planted(rng: random.Random, folder: Path, seen: Counter[str], straight: Path) -> None:
    """Plant pickles whose checksums are right, and read them."""
    marker = folder / "marker"
    for content in pickles(marker):
        for name in TENSORS:
            path = checkpoint.checkpoint_path(folder / RUN, NEWEST)
            with _planted_in_checkpoint(path, name, content):
                _check_refusal(lambda: _load(folder / RUN, path), name, marker)  # noqa: B023
            seen["pickles"] += 1
    for split in ("train", "val"):
        file = _plant_in_shard(folder / DATA, split, marker)
        _check_refusal(lambda: TokenStream(folder / DATA, split), file, marker)  # noqa: B023
        _check_refusal(lambda: verify_data(folder / DATA, quiet=True), ".npy", marker)
        seen["pickles"] += 1


def _check_refusal(call: Callable[[], object], naming: str, marker: Path) -> None:
    sentence = refusal(call)
    require(not marker.exists(), f"the pickle in {naming} was loaded")
    require(sentence is not None and naming in sentence, f"{naming} is not named: {sentence}")


def _load(run: Path, path: Path) -> None:
    """Read a checkpoint like a run that is resumed."""
    config = read_config(run)
    model = GPT(config.model)
    require(checkpoint.newest(run) == path, "the checksum was to be right")
    checkpoint.load_model(path, model)
    optimizers = build_optimizers(model, OptimConfig(optimizer="adamw"), model.wte.weight.dtype)
    checkpoint.load_optimizers(path, model, optimizers)


@contextlib.contextmanager
def _planted_in_checkpoint(path: Path, name: str, content: bytes) -> Iterator[None]:
    """Give file `name` of a checkpoint other bytes and their checksum while the block lasts."""
    state = unseal((path / checkpoint.STATE).read_bytes())
    state["sha256"][name] = hashlib.sha256(content).hexdigest()
    with replaced(path / name, content), replaced(path / checkpoint.STATE, seal(state)):
        yield


def _plant_in_shard(data: Path, split: str, marker: Path) -> str:
    """Make a split's first shard an array of objects, with its checksums; returns its name."""
    manifest = read_manifest(data)
    shard = next(shard for shard in manifest.shards if shard.split == split)
    path = data / shard.file
    traps = np.array([Trap(marker)] * shard.tokens, dtype=object)
    np.save(path, traps, allow_pickle=True)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    changed = dataclasses.replace(shard, sha256=digest, sampled_sha256=sampled_digest(path))
    shards = tuple(changed if each == shard else each for each in manifest.shards)
    write_manifest(data, dataclasses.replace(manifest, shards=shards))
    return shard.file


def resume_planted(rng: random.Random, folder: Path, seen: Counter[str], straight: Path) -> None:
    """Resume a run with pickles in its checkpoints, its shards, and beside them."""
    marker, path = folder / "marker", checkpoint.checkpoint_path(folder / RUN, NEWEST)
    contents = pickles(marker)
    for name in TENSORS:
        with _planted_in_checkpoint(path, name, rng.choice(contents)):
            refused(folder, *RESUME, naming=name)
        require(not marker.exists(), f"the pickle in {name} was loaded")
        seen.update({"pickles": 1, "commands": 1})
    for name in NAMES:
        (path / name).write_bytes(rng.choice(contents))
    succeed(folder, *RESUME)
    require(not marker.exists(), "a pickle beside the checkpoint was loaded")
    seen.update({"pickles": len(NAMES), "commands": 1})
    _plant_in_shard(folder / DATA, "train", marker)
    refused(folder, *RESUME, naming=str(DATA))
    require(not marker.exists(), "the pickle in a shard was loaded")
    seen.update({"pickles": 1, "commands": 1})
