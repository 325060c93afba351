"""Checkpoints, config and records that are damaged: the run goes on from what is intact."""

import contextlib
import io
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import checkpoint
import logs
from tests.torture.common import contents, refusal, refused, require, succeed
from tests.torture.runs import RESUME, RUN, check_same_run
from tests.torture.spoil import flipped, put, replaced, safetensors_places, wrecks

NEWEST, OLDER = 12, 8
FILES = (checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.STATE)


# --- Read here ---


def flip_checkpoints(rng: random.Random, folder: Path, seen: Counter[str], straight: Path) -> None:
    """Flip single bytes of the newest checkpoint: all of state.json's, many of the tensors'."""
    for name in FILES:
        path = checkpoint.checkpoint_path(folder / RUN, NEWEST) / name
        content = path.read_bytes()
        tensors = name != checkpoint.STATE
        for place in safetensors_places(content, rng, 40) if tensors else range(len(content)):
            damaged = flipped(content, place, rng)
            # Such as a space that became a tab.
            if not tensors and _same_json(damaged, content):
                seen["without a meaning"] += 1
                continue
            with replaced(path, damaged):
                _check_passed_over(folder / RUN, path)
            seen["damages"] += 1


def _same_json(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def break_checkpoints(rng: random.Random, folder: Path, seen: Counter[str], straight: Path) -> None:
    """Cut, empty, remove or replace each file of the newest checkpoint."""
    for name in FILES:
        path = checkpoint.checkpoint_path(folder / RUN, NEWEST) / name
        for wreck in wrecks(path, rng, cuts=30):
            with wreck:
                _check_passed_over(folder / RUN, path)
            seen["damages"] += 1


def _check_passed_over(run: Path, damaged: Path) -> None:
    """Raise Difference unless a damaged file is named, and the checkpoint before it is taken."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        found = checkpoint.newest(run)
    wanted = checkpoint.checkpoint_path(run, OLDER)
    require(found == wanted, f"{found} was taken, with a damaged {damaged}")
    require(str(damaged) in said.getvalue(), f"{damaged} is not named: {said.getvalue()}")


def flip_config(rng: random.Random, folder: Path, seen: Counter[str], straight: Path) -> None:
    """Flip each byte of config.json, and cut it: it is read, or refused by its name."""
    path = folder / RUN / "config.json"
    content = path.read_bytes()
    damaged = [flipped(content, place, rng) for place in range(len(content))]
    for other in [*damaged, *(content[:length] for length in range(0, len(content) - 2, 7))]:
        with replaced(path, other):
            sentence = refusal(lambda: logs.read_config(folder / RUN))
        require(sentence is not None or _is_json(other), f"read, though no JSON: {other!r}")
        # A sound config with another number is noticed where it meets a checkpoint.
        seen["damages" if sentence else "without a meaning"] += 1


def _is_json(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except ValueError:
        return False


def spoil_metrics(rng: random.Random, folder: Path, seen: Counter[str], straight: Path) -> None:
    """Tear metrics.jsonl anywhere after the step that is resumed, and add rubbish to it."""
    path = folder / RUN / logs.METRICS
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = b"".join(line for line in lines if json.loads(line)["step"] <= OLDER)
    torn = [whole[:length] for length in range(len(kept), len(whole), 3)]
    rubbish = [kept + _rubbish(rng) for _ in range(100)]
    strange = [kept + line for line in STRANGE]
    _check_mended(path, [*torn, *rubbish, *strange], kept, seen)


def spoil_samples(rng: random.Random, folder: Path, seen: Counter[str], straight: Path) -> None:
    """Tear samples.md anywhere after the step that is resumed, and add rubbish to it."""
    path = folder / RUN / logs.SAMPLES
    whole = path.read_bytes()
    kept = whole[: re.search(rb"(?m)^## Step (?:9|1\d)$", whole).start()]
    torn = [whole[:length] for length in range(len(kept), len(whole))]
    _check_mended(path, torn, kept, seen)


# Lines of sound JSON that are no metric lines, and one too deep to be read.
STRANGE = (
    *(b"[]\n", b"null\n", b"12\n", b'{"kind": "train"}\n', b'{"step": null}\n'),
    *(b'{"step": "9"}\n', b'{"step": [9]}\n', b"[" * 100_000 + b"\n"),
)


def _rubbish(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randint(1, 300)) + rng.choice([b"", b"\n", b"\n\n"])


def _check_mended(path: Path, damages: list[bytes], kept: bytes, seen: Counter[str]) -> None:
    """Raise Difference unless rewinding to the older step leaves what the file held up to it."""
    for content in damages:
        path.write_bytes(content)
        logs.rewind(path.parent, OLDER)
        found = path.read_bytes()
        added = content[len(kept) :][:80]
        require(found == kept, f"{path.name} with {added!r} after step {OLDER}: {found[-160:]!r}")
        seen["damages"] += 1


# --- Through the command line ---


def resume_damaged(rng: random.Random, folder: Path, seen: Counter[str], straight: Path) -> None:
    """Damage the newest checkpoint of a run and resume it: it ends as it did before."""
    newest = checkpoint.checkpoint_path(folder / RUN, NEWEST)
    for name in FILES:
        content = (newest / name).read_bytes()
        damages: tuple[Callable[[], bytes], ...] = (
            lambda: flipped(content, rng.randrange(len(content) - 2), rng),  # noqa: B023
            lambda: content[: rng.randrange(len(content) - 2)],  # noqa: B023
        )
        put(newest / name, rng.choice(damages)())
        errors = succeed(folder, *RESUME)
        require(str(Path(newest.name, name)) in errors, f"{newest / name} is not named: {errors}")
        check_same_run(folder, straight)
        seen.update({"damages": 1, "commands": 1})


def resume_without_any(
    rng: random.Random, folder: Path, seen: Counter[str], straight: Path
) -> None:
    """Damage every checkpoint of a run: resuming it is refused, and changes no file."""
    for path in checkpoint.all_checkpoints(folder / RUN):
        file = path / rng.choice(FILES)
        content = file.read_bytes()
        put(file, content[: rng.randrange(len(content) - 2)])
    _check_refused(folder, "None of the 3 checkpoints")
    seen.update({"damages": 1, "commands": 1})


def resume_other_config(
    rng: random.Random, folder: Path, seen: Counter[str], straight: Path
) -> None:
    """Damage the config of a run: resuming it is refused, and changes no file."""
    path = folder / RUN / "config.json"
    content = path.read_bytes()
    rate = content.replace(b'"lr": 0.003', b'"lr": 0.004')
    require(rate != content, "config.json has no such rate")
    for damaged in (rate, content[: len(content) // 2], b"\xff" + content, b""):
        path.write_bytes(damaged)
        _check_refused(folder, "config.json")
        seen.update({"damages": 1, "commands": 1})


def _check_refused(folder: Path, naming: str) -> None:
    before = contents(folder / "runs")
    refused(folder, *RESUME, naming=naming)
    require(contents(folder / "runs") == before, "the refused command changed the run")


def resume_spoiled_records(
    rng: random.Random, folder: Path, seen: Counter[str], straight: Path
) -> None:
    """Resume a run whose records end in rubbish and a torn text, from an older checkpoint."""
    shutil.rmtree(checkpoint.checkpoint_path(folder / RUN, NEWEST))
    metrics, samples = folder / RUN / logs.METRICS, folder / RUN / logs.SAMPLES
    metrics.write_bytes(metrics.read_bytes()[: -rng.randint(1, 150)] + _rubbish(rng))
    samples.write_bytes(samples.read_bytes()[: -rng.randint(1, 150)])
    succeed(folder, *RESUME)
    check_same_run(folder, straight)
    seen.update({"damages": 2, "commands": 1})
