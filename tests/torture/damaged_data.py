"""Shards and manifests that are damaged: refused by name before anything is trained."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

from manifests import MANIFEST, SAMPLED_BLOCK_BYTES, SAMPLED_BLOCKS, Shard, read_manifest
from shards import TokenStream
from tests.torture.common import contents, refusal, refused, require
from tests.torture.runs import DATA, RESUME, RUN, command, make_data
from tests.torture.spoil import flipped, places, put, replaced, wrecks
from verify import verify_data

HEADER_BYTES = 128


def flip_data(rng: random.Random, folder: Path, seen: Counter[str], straight: Path) -> None:
    """Flip every byte of the headers and of the manifest, and many of the tokens."""
    data = folder / DATA
    for shard in read_manifest(data).shards:
        path = data / shard.file
        content = path.read_bytes()
        tokens = places(range(HEADER_BYTES, len(content)), rng, 60)
        for place in [*range(HEADER_BYTES), *tokens]:
            with replaced(path, flipped(content, place, rng)):
                _check_not_opened(data, shard)
                _check_not_verified(data, shard.file)
            seen["damages"] += 1
    _flip_manifest(rng, data, seen)


def _flip_manifest(rng: random.Random, data: Path, seen: Counter[str]) -> None:
    path = data / MANIFEST
    content = path.read_bytes()
    known = read_manifest(data)
    for place in range(len(content)):
        with replaced(path, flipped(content, place, rng)):
            sentence = refusal(lambda: TokenStream(data, "train"))
            if sentence is None:
                # Such as a space that became a tab.
                require(read_manifest(data) == known, f"{MANIFEST}, byte {place}: not noticed")
                seen["without a meaning"] += 1
                continue
        require(MANIFEST in sentence, f"{MANIFEST} is not named: {sentence}")
        seen["damages"] += 1


def flip_large_shards(rng: random.Random, folder: Path, seen: Counter[str], straight: Path) -> None:
    """Flip bytes of shards that are opened on the strength of samples, and verified whole."""
    data = make_data(folder / "large", shards=2, shard_tokens=800_000)
    for shard in read_manifest(data).shards:
        path = data / shard.file
        content = path.read_bytes()
        last = len(content) - SAMPLED_BLOCK_BYTES
        starts = [i * last // (SAMPLED_BLOCKS - 1) for i in range(SAMPLED_BLOCKS)]
        inside = [place for start in starts for place in _both_ends(start, rng)]
        for place in [*inside, *(rng.randrange(len(content)) for _ in range(20))]:
            with replaced(path, flipped(content, place, rng)):
                if any(start <= place < start + SAMPLED_BLOCK_BYTES for start in starts):
                    _check_not_opened(data, shard)
                _check_not_verified(data, shard.file)
            seen["damages"] += 1


def _both_ends(start: int, rng: random.Random) -> tuple[int, int, int]:
    """Return a block's first byte, one inside it, and its last."""
    return start, start + rng.randrange(SAMPLED_BLOCK_BYTES), start + SAMPLED_BLOCK_BYTES - 1


def break_data(rng: random.Random, folder: Path, seen: Counter[str], straight: Path) -> None:
    """Cut, lengthen, empty, remove, replace and exchange shards; cut and replace the manifest."""
    data = folder / DATA
    shards = read_manifest(data).shards
    for shard in shards:
        path = data / shard.file
        other = data / rng.choice([each.file for each in shards if each != shard])
        for wreck in [*wrecks(path, rng, cuts=20), replaced(path, other.read_bytes())]:
            with wreck:
                _check_not_opened(data, shard)
                _check_not_verified(data, shard.file)
            seen["damages"] += 1
    content = (data / MANIFEST).read_bytes()
    lengths = [0, *(rng.randrange(len(content.rstrip())) for _ in range(50))]
    for damaged in (None, *(content[:length] for length in lengths)):
        with replaced(data / MANIFEST, damaged):
            sentence = refusal(lambda: TokenStream(data, "train"))
        require(sentence is not None and MANIFEST in sentence, f"not refused: {sentence}")
        seen["damages"] += 1


def _check_not_opened(data: Path, shard: Shard) -> None:
    sentence = refusal(lambda: TokenStream(data, shard.split))
    require(sentence is not None, f"{shard.file} was opened")
    require(shard.file in sentence, f"{shard.file} is not named: {sentence}")


def _check_not_verified(data: Path, file: str) -> None:
    sentence = refusal(lambda: verify_data(data, quiet=True))
    require(sentence is not None, f"{file} was found intact")
    require(file in sentence, f"{file} is not named: {sentence}")


# --- Through the command line ---


def start_with_damaged_data(
    rng: random.Random, folder: Path, seen: Counter[str], straight: Path
) -> None:
    """Start runs on damaged data: refused by name, and no run directory is made."""
    shutil.rmtree(folder / "runs")
    for file, options in (
        (_some_shard(rng, folder), ()),
        (_some_shard(rng, folder), ("--verify",)),
    ):
        content = file.read_bytes()
        with replaced(file, flipped(content, rng.randrange(len(content)), rng)):
            refused(folder, *command(), *options, naming=file.name)
        made = contents(folder / "runs") if (folder / "runs").exists() else {}
        require(not made, f"a refused command ({' '.join(options)}) made {', '.join(made)}")
        seen.update({"damages": 1, "commands": 1})


def resume_with_damaged_data(
    rng: random.Random, folder: Path, seen: Counter[str], straight: Path
) -> None:
    """Resume a run on damaged data, and on data without its manifest: refused, and unchanged."""
    before = contents(folder / "runs")
    shard, manifest = _some_shard(rng, folder), folder / DATA / MANIFEST
    content = manifest.read_bytes()
    sealed = json.loads(content)
    unsealed = {key: value for key, value in sealed.items() if key != "digest"}
    damages = (
        (shard, flipped(shard.read_bytes(), rng.randrange(HEADER_BYTES), rng), (), shard.name),
        (shard, shard.read_bytes()[:-2], ("--verify",), shard.name),
        (manifest, content[: len(content) // 2], (), MANIFEST),
        # Sound in itself, but another one than the run was trained on.
        (manifest, json.dumps(unsealed).encode(), (), "is not the data"),
    )
    for path, damaged, options, naming in damages:
        intact = path.read_bytes()
        put(path, damaged)
        refused(folder, *RESUME, *options, naming=naming)
        put(path, intact)
        require(contents(folder / "runs") == before, "a refused command changed the run")
        seen.update({"damages": 1, "commands": 1})
    manifest.unlink()
    refused(folder, *RESUME, naming="is not the data")
    require(contents(folder / "runs") == before, "a refused command changed the run")
    require((folder / RUN).is_dir(), "the run is gone")
    seen.update({"damages": 1, "commands": 1})


def _some_shard(rng: random.Random, folder: Path) -> Path:
    return folder / DATA / rng.choice(read_manifest(folder / DATA).shards).file
