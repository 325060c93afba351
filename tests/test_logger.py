"""The record of a run: nothing is lost, nothing is there twice, and no content breaks a start."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest

from config import Config, UserError
from training import logger as logger_module
from training.logger import Logger, append_environment, create_run, read_sequence_losses
from utils import load_config

CONFIG = Config(name="tiny")
LINES = [
    {"kind": "val", "step": 0, "tokens": 0, "loss": 5.5},
    {"kind": "train", "step": 1, "tokens": 64, "loss": 5.25},
    {"kind": "train", "step": 2, "tokens": 128, "loss": 4.5},
    {"kind": "val", "step": 2, "tokens": 128, "loss": 4.25},
    {"kind": "eval", "step": 2, "tokens": 128, "task": "lambada", "accuracy": 0.5},
    {"kind": "train", "step": 3, "tokens": 192, "loss": 4.0},
]


@pytest.fixture
def run(tmp_path) -> Path:
    """The directory of a run without a record."""
    run = tmp_path / "runs" / "tiny"
    create_run(run, CONFIG)
    return run


@pytest.fixture
def recorded(run) -> Path:
    """A run with lines up to step 3, and samples and sequence losses of each step."""
    logger = Logger(run, CONFIG, 0)
    for step in range(4):
        for line in LINES:
            if line["step"] == step:
                logger.log(line)
        logger.samples(step, ["The cat", "A"], [f" sat {step}.\n\n\n\n## Step 9\n", ""])
        if step:
            logger.sequence_losses(step, np.array([7, 8]) * step, np.array([0.5, 0.25]) * step)
    logger.sync()
    logger.close()
    return run


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_appears_with_its_config_and_once(run):
    assert load_config(run) == CONFIG
    assert [path.name for path in run.parent.iterdir()] == ["tiny"]
    mode = stat.S_IMODE((run / "config.json").stat().st_mode)
    assert mode == 0o666 & ~os.umask(os.umask(0o022)) or mode == 0o644
    with pytest.raises(UserError, match="cannot be made"):
        create_run(run, CONFIG)
    assert [path.name for path in run.parent.iterdir()] == ["tiny"]


def test_lines_are_kept_as_they_are(recorded):
    assert metrics(recorded) == LINES
    losses = read_sequence_losses(recorded)
    assert losses["step"].tolist() == [1, 1, 2, 2, 3, 3]
    assert losses["sequence"].tolist() == [7, 8, 14, 16, 21, 24]
    assert losses["loss"].tolist() == [0.5, 0.25, 1.0, 0.5, 1.5, 0.75]
    assert (recorded / "sequence_losses.bin").stat().st_size == 6 * 16


def test_a_line_is_there_as_soon_as_it_is_logged(run):
    logger = Logger(run, CONFIG, 0)
    logger.log(LINES[0])
    assert metrics(run) == LINES[:1]


def test_other_ranks_write_nothing(recorded):
    before = {path.name: path.read_bytes() for path in recorded.iterdir()}
    logger = Logger(recorded, CONFIG, 1, enabled=False)
    logger.log(LINES[0])
    logger.samples(1, ["a"], ["b"])
    logger.sequence_losses(1, np.array([1]), np.array([1.0]))
    logger.sync()
    logger.close()
    assert {path.name: path.read_bytes() for path in recorded.iterdir()} == before


def test_what_is_recorded_of_a_step_is_told(recorded):
    logger = Logger(recorded, CONFIG, 3)
    assert logger.recorded(0) == {"val", "sample"}
    assert logger.recorded(2) == {"train", "val", "eval/lambada", "sample"}
    assert logger.recorded(4) == set()


@pytest.mark.parametrize("step", [0, 1, 2, 3, 9])
def test_rewinding_keeps_all_up_to_the_step_and_goes_on_as_if_nothing_had_been(
    recorded, tmp_path, step
):
    whole = {path.name: path.read_bytes() for path in recorded.iterdir()}
    logger = Logger(recorded, CONFIG, step)
    assert metrics(recorded) == [line for line in LINES if line["step"] <= step]
    assert set(read_sequence_losses(recorded)["step"]) == {s for s in (1, 2, 3) if s <= step}
    for later in range(step + 1, 4):
        for line in LINES:
            if line["step"] == later:
                logger.log(line)
        logger.samples(later, ["The cat", "A"], [f" sat {later}.\n\n\n\n## Step 9\n", ""])
        logger.sequence_losses(later, np.array([7, 8]) * later, np.array([0.5, 0.25]) * later)
    assert {path.name: path.read_bytes() for path in recorded.iterdir()} == whole


def test_what_was_cut_off_anywhere_is_dropped(recorded):
    """As after a power cut while step 3 was written, at each byte of each file."""
    files = {}
    for name in ("metrics.jsonl", "samples.md", "sequence_losses.bin"):
        content = (recorded / name).read_bytes()
        Logger(recorded, CONFIG, 2)
        files[name] = content, len((recorded / name).read_bytes())
    for name, (content, start) in files.items():
        for end in range(start, len(content)):
            for zeros in (b"", bytes(5)):
                (recorded / name).write_bytes(content[:end] + zeros)
                logger = Logger(recorded, CONFIG, 3)
                kept = (recorded / name).read_bytes()
                whole = kept[start:] if name == "sequence_losses.bin" else b""
                assert kept[:start] == content[:start]
                assert len(kept) == start + len(whole) // 16 * 16, (name, end)
                assert "sample" not in logger.recorded(3)
                Logger(recorded, CONFIG, 2)
                assert (recorded / name).read_bytes() == content[:start]


def test_samples_of_the_step_that_were_cut_off_are_made_again(recorded):
    path = recorded / "samples.md"
    content = path.read_bytes()
    Logger(recorded, CONFIG, 2)
    path.write_bytes(content[: len(path.read_bytes()) - 2])
    logger = Logger(recorded, CONFIG, 2)
    assert logger.recorded(2) == {"train", "val", "eval/lambada"}
    logger.samples(2, ["The cat", "A"], [" sat 2.\n\n\n\n## Step 9\n", ""])
    logger.samples(3, ["The cat", "A"], [" sat 3.\n\n\n\n## Step 9\n", ""])
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "note", ["# My notes\n\nsee below\n\n", "no newline between", "\0\xff\r\n"]
)
def test_a_note_on_top_of_the_samples_stays(recorded, note):
    path = recorded / "samples.md"
    path.write_bytes(f"{note}\n".encode("latin-1") + path.read_bytes())
    logger = Logger(recorded, CONFIG, 1)
    assert path.read_bytes().startswith(f"{note}\n".encode("latin-1"))
    assert [logger.recorded(step) >= {"sample"} for step in range(4)] == [True, True, False, False]


@pytest.mark.parametrize(
    "line",
    [
        "a note",
        "[]",
        "{}",
        '{"kind": "train"}',
        '{"kind": 3, "step": 1}',
        '{"kind": "val", "step": "1"}',
        '{"kind": "val", "step": null}',
        '{"kind": "eval", "step": 1}',
        '{"kind": "val", "step": true}',
        "[" * 100_000,
        "\0\0\0",
        "9" * 5000,
    ],
)
def test_a_line_of_wrong_content_ends_nothing(recorded, line):
    path = recorded / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], line + "\n", *lines[1:]]))
    logger = Logger(recorded, CONFIG, 2)
    assert logger.recorded(2) == {"train", "val", "eval/lambada", "sample"}
    assert metrics(recorded) == LINES[:5]


def test_samples_that_cannot_be_kept_end_no_start(recorded):
    (recorded / "samples.md").unlink()
    (recorded / "samples.md").mkdir()
    logger = Logger(recorded, CONFIG, 2)
    assert logger.recorded(2) == {"train", "val", "eval/lambada"}
    logger.sync()
    with pytest.raises(UserError, match=r"samples.md could not be written"):
        logger.samples(3, ["a"], ["b"])


def test_a_full_disk_is_one_sentence_and_leaves_no_part(run, monkeypatch):
    logger = Logger(run, CONFIG, 0)
    logger.log(LINES[0])
    files = []

    class Full:
        """A file with room for ten bytes more."""

        def __init__(self, file):
            self.file, self.room = file, 10
            files.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.file.close()

        def write(self, content):
            if self.room == 0:
                raise OSError(28, "No space left on device")
            written, self.room = self.file.write(content[: self.room]), 0
            return written

        def __getattr__(self, name):
            return getattr(self.file, name)

    def full(*args, **kwargs):
        return Full(open(*args, **kwargs))

    monkeypatch.setattr(logger_module, "open", full, raising=False)
    with pytest.raises(UserError, match=r"No space left.*main.py --resume tiny"):
        logger.log(LINES[1])
    assert files and metrics(run) == LINES[:1]


def test_every_start_has_a_line_and_what_differs_is_told(run):
    assert append_environment(run, 0, {"dtype": "bfloat16", "world_size": 1}) == ""
    assert append_environment(run, 4, {"dtype": "bfloat16", "world_size": 1}) == ""
    told = append_environment(run, 8, {"dtype": "float32", "world_size": 1, "new": [1]})
    assert told == "dtype bfloat16 -> float32"
    starts = [json.loads(line) for line in (run / "environment.jsonl").read_text().splitlines()]
    assert [start["started_at_step"] for start in starts] == [0, 4, 8]
    assert starts[0]["versions"].keys() >= {"torch", "numpy"}
    assert starts[2]["command"] and starts[2]["python"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a note\n", ""),
        ('{"dtype": "fl', ""),
        ("[1]\n\0\n", ""),
        ('{"dtype": "\\u001b[31m", "versions": 3}\n', "dtype \\x1b[31m -> float32"),
        ('{"versions": {"torch": "1.0"}}\nnote', "torch 1.0 -> "),
    ],
)
def test_other_content_of_the_environments_ends_no_start(run, content, told):
    (run / "environment.jsonl").write_text(content)
    assert append_environment(run, 0, {"dtype": "float32"}).startswith(told)
    assert append_environment(run, 1, {"dtype": "tf32"}) == "dtype float32 -> tf32"
    assert (run / "environment.jsonl").read_text().startswith(content)
