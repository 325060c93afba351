"""What is damaged, torn, exchanged or planted is refused by name, and nothing intact is harmed."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import pickle
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from config import OptimConfig
from corpus.shards import MANIFEST, TokenShards, read_manifest, write_manifest
from model import GPT
from tests.faults import common
from tests.faults.common import DATA, RESUME, RUN, Outcome, Trial, check_refused, refusal
from tests.runs import TENSORS
from training import checkpoint
from training.logger import Logger
from training.optim import build_optimizers
from training.verification import Verification
from utils import load_config, seal, unseal

NEWEST, OLDER = RUN / "checkpoints/step_000012", RUN / "checkpoints/step_000008"


@contextlib.contextmanager
def replaced(path: Path, content: bytes) -> Iterator[None]:
    """Put other bytes into a file while the block lasts."""
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def wrecks(content: bytes, rng: random.Random, count: int, header: int = 0) -> Iterator[bytes]:
    """Yield content with bits flipped, all of the header's and `count` others; cut; longer."""
    for place in [*range(header), *(rng.randrange(len(content)) for _ in range(count))]:
        changed = bytearray(content)
        changed[place] ^= rng.randint(1, 255)
        with contextlib.suppress(ValueError):
            if json.loads(changed) == json.loads(content):
                continue  # a space that became a tab means the same
        yield bytes(changed)
    yield from (content[: rng.randrange(len(content) - 2)] for _ in range(count))
    yield b""


def checkpoints(rng: random.Random, folder: Path, seen: Counter[str]) -> None:
    """The damaged checkpoint is named, and the one before it taken."""
    for path in (folder / NEWEST / name for name in (*TENSORS, "state.json")):
        content = path.read_bytes()
        for damaged in wrecks(content, rng, 40, len(content) if path.suffix == ".json" else 100):
            said = io.StringIO()
            with replaced(path, damaged), contextlib.redirect_stderr(said):
                found = checkpoint.newest(folder / RUN)
            assert found == folder / OLDER, f"{found} was taken, with a damaged {path}"
            assert NEWEST.name in said.getvalue(), f"{path} is not named: {said.getvalue()}"
            seen["damages"] += 1


def records(rng: random.Random, folder: Path, seen: Counter[str]) -> None:
    """config.json is read or refused; torn metrics and samples end as they stood at the step."""
    run, config = folder / RUN, load_config(folder / RUN)
    for damaged in wrecks(content := (run / "config.json").read_bytes(), rng, 50, len(content)):
        with replaced(run / "config.json", damaged):
            sentence = refusal(lambda: load_config(run))
        assert not sentence or "config.json" in sentence, sentence
        seen["damages"] += bool(sentence)
    strange = b'[]\nnull\n12\n{"kind": "train"}\n{"step": null}\n{"step": "9"}\n{"step": [9]}'
    for name in ("metrics.jsonl", "samples.md"):
        whole = (run / name).read_bytes()
        Logger(run, config, 8).rewind(8)
        kept = (run / name).read_bytes()
        torn = [whole[:length] for length in range(len(kept), len(whole), 3)]
        if name == "metrics.jsonl":
            torn += [kept + rng.randbytes(rng.randint(1, 300)) + b"\n" for _ in range(50)]
            torn += [kept + line + b"\n" for line in (*strange.splitlines(), b"[" * 100_000)]
        for content in torn:
            (run / name).write_bytes(content)
            Logger(run, config, 8).rewind(8)
            assert (run / name).read_bytes() == kept, f"{name} with {content[len(kept) :][:80]}"
            seen["damages"] += 1


def shards(rng: random.Random, folder: Path, seen: Counter[str]) -> None:
    """A shard, its size or the manifest: every change is found and named."""
    files = [folder / DATA / shard.file for shard in read_manifest(folder / DATA).shards]
    for path in (*files, folder / DATA / MANIFEST):
        content = path.read_bytes()
        others = [files[path == files[0]].read_bytes()]
        header = 128 if path in files else len(content)
        for damaged in (*wrecks(content, rng, 30, header), *others):
            with replaced(path, damaged):
                check_data(folder / DATA, path.name)
            seen["damages"] += 1


def check_data(data: Path, naming: str) -> None:
    """Fail unless the data is refused by the name of a file, now or after all of it was read."""

    def read() -> None:
        for split in ("train", "val"):
            TokenShards(data, split)
        with contextlib.closing(Verification(data)) as verification:
            verification.wait()

    assert naming in (sentence := refusal(read)), f"{naming} is not named: {sentence or 'read'}"


@dataclasses.dataclass
class Trap:
    """Something whose pickle, when it is loaded, makes a file."""

    marker: Path

    def __reduce__(self):
        return Path.touch, (self.marker,)


def pickles(rng: random.Random, folder: Path, seen: Counter[str]) -> None:
    """Pickles in the places of weights and tokens, with the right digests, are never loaded."""
    marker, path, data = folder / "marker", folder / NEWEST, folder / DATA
    content = pickle.dumps(Trap(marker))
    pickle.loads(content)
    marker.unlink()

    def load() -> None:
        model = GPT(load_config(folder / RUN).model)
        checkpoint.load_model(path, model)
        optimizers = build_optimizers(model, OptimConfig(), model.wte.weight.dtype)
        checkpoint.load_optimizers(path, model, optimizers)

    for name in TENSORS:
        state = unseal((path / "state.json").read_bytes())
        state["sha256"][name] = hashlib.sha256(content).hexdigest()
        with replaced(path / name, content), replaced(path / "state.json", seal(state)):
            assert name in refusal(load), name
    manifest = read_manifest(data)
    file = manifest.shards[0].file
    np.save(data / file, np.array([Trap(marker)] * manifest.shards[0].tokens, dtype=object))
    digest = hashlib.sha256((data / file).read_bytes()).hexdigest()
    first = dataclasses.replace(manifest.shards[0], sha256=digest)
    write_manifest(data, dataclasses.replace(manifest, shards=(first, *manifest.shards[1:])))
    check_data(data, file)
    assert not marker.exists(), "a pickle was loaded"
    seen["pickles"] += 3


def resumed(rng: random.Random, folder: Path, seen: Counter[str]) -> None:
    """Through main.py: what is intact is gone on from; else one sentence, and nothing changes."""
    run, wanted = folder / RUN, folder / "wanted"
    shutil.copytree(run, wanted / RUN)
    for name in (*TENSORS, "state.json"):
        path = folder / NEWEST / name
        path.write_bytes(rng.choice([*wrecks(path.read_bytes(), rng, 3)]))
        assert NEWEST.name in common.succeed(folder, *RESUME), f"{name} is not named"
        common.check_same_run(folder, wanted)
    shutil.rmtree(folder / NEWEST)
    for name in ("metrics.jsonl", "samples.md"):
        content = (run / name).read_bytes()[: -rng.randint(1, 150)]
        (run / name).write_bytes(content + (rng.randbytes(200) if "metrics" in name else b""))
    common.succeed(folder, *RESUME)
    common.check_same_run(folder, wanted)
    config, manifest = run / "config.json", folder / DATA / MANIFEST
    shard = folder / DATA / "tiny_train_000001.npy"
    unsealed = {k: v for k, v in json.loads(manifest.read_bytes()).items() if k != "digest"}
    for path, damaged, *words in (
        (config, config.read_bytes().replace(b"0.003", b"0.004")),
        (config, config.read_bytes()[:200]),
        (shard, shard.read_bytes()[:-2]),
        (shard, shard.read_bytes()[:-2] + b"\0\0", "--verify"),
        (manifest, json.dumps(unsealed).encode()),
    ):
        naming = "config" if path == config else str(DATA)
        with replaced(path, damaged):
            check_refused(folder, *RESUME, *words, naming=naming)
            if words:
                check_refused(folder, *common.command(), "--name", "new", *words, naming=naming)
    for path in checkpoint.all_checkpoints(run):
        (path / "state.json").write_bytes(b"{")
    check_refused(folder, *RESUME, naming="checkpoint")
    seen.update({"damages": 13, "commands": 13})


TRIALS = (checkpoints, records, shards, pickles, resumed)


def run(seed: int, _: int, directory: Path, trials: tuple[Trial, ...] = TRIALS) -> Outcome:
    """Damage everything in turn, each a copy of the same run and its data."""
    settings = {"steps": 12, "checkpoint_interval": 4, "keep_checkpoints": 9}
    wanted, _ = common.straight(directory / "straight", **settings)

    def on_a_copy(damage: Trial, rng: random.Random, folder: Path, seen: Counter[str]) -> None:
        for name in (DATA, "runs"):
            shutil.copytree(wanted / name, folder / name)
        damage(rng, folder, seen)

    damages = {damage.__name__: functools.partial(on_a_copy, damage) for damage in trials}
    return common.each(seed, directory, damages)
