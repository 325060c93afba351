"""Shared set-up: tests never reach the network, and real evaluation data is optional."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Before any test imports a Hugging Face package.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parent.parent

# How long an example takes says more about what else the machine does than about the code.
settings.register_profile("any-machine", deadline=None)
settings.load_profile("any-machine")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Threads that wait for each other make tiny products very slow on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture
def real_data() -> Path:
    """The directory of real evaluation sets and text that GPT2_DATA names; skips without it."""
    path = Path(os.environ.get("GPT2_DATA", ""))
    if not os.environ.get("GPT2_DATA") or not path.is_dir():
        pytest.skip("GPT2_DATA does not name a directory of evaluation data")
    return path.resolve()


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches so small that every source has many."""
    monkeypatch.setattr("corpus.sources.BATCH_BYTES", 500)
