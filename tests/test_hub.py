"""The hub, by the real packages and a repository on the local disk."""

import os

import numpy as np
import pytest

import chunks
import load_fineweb
import sources
from load_fineweb import prepare
from tests.corpora import (
    TEXTS,
    everything,
    refuses,
    run,
    tokens_of,
    write_parquet,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on the local disk: the real builder, but given a directory; returns its calls."""
    import datasets

    repository = tmp_path / f"repository@{COMMIT}"
    write_parquet(repository / "sample" / "000.parquet", TEXTS[:150])
    write_parquet(repository / "sample" / "001.parquet", TEXTS[150:])
    calls, real = [], datasets.load_dataset_builder

    def load_dataset_builder(name, subset, revision):
        calls.append((name, subset, revision))
        builder = real(str(repository))
        # An address rather than a path, as on the hub, so that files are opened through fsspec.
        files = [f"file://{path}" for path in builder.config.data_files["train"]]
        builder.config.data_files = {"train": files}
        return builder

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    monkeypatch.setattr(sources, "reach_hub", lambda: None)
    chunks._open_parquet.cache_clear()
    return calls


@pytest.mark.parametrize("workers", [1, 2])
def test_hub_files_are_read_in_place_and_the_commit_recorded(tmp_path, hub, monkeypatch, workers):
    # Small enough for two workers to start.
    monkeypatch.setattr(load_fineweb, "CHUNK_BYTES", 500)
    out = tmp_path / "out"
    manifest = prepare(
        "fineweb", out, shard_tokens=1000, workers=workers, max_tokens=4000, quiet=True
    )
    assert np.array_equal(everything(out), tokens_of(TEXTS)[:4000])
    assert hub == [("HuggingFaceFW/fineweb", "sample-10BT", None)]
    expected = {
        "kind": "hub",
        "repository": "HuggingFaceFW/fineweb",
        "subset": "sample-10BT",
        "revision": COMMIT,
        "max_tokens": 4000,
    }
    assert manifest.source == expected
    # Finished, it is recognized without asking the hub; another subset is another source.
    prepare("fineweb", out, shard_tokens=1000, max_tokens=4000, quiet=True)
    assert len(hub) == 1
    assert "subset sample-10BT, not CC-MAIN-2024-10" in refuses(
        "fineweb", out, subset="CC-MAIN-2024-10", max_tokens=4000, shard_tokens=1000
    )


def test_an_interrupted_hub_preparation_keeps_its_commit_and_its_limit(tmp_path, hub, monkeypatch):
    finish = load_fineweb.ShardWriter.finish
    limits = {"shard_tokens": 1000, "max_tokens": 4500}
    monkeypatch.setattr(load_fineweb.ShardWriter, "finish", lambda self: self.manifest)
    assert not prepare("openwebtext", tmp_path / "out", **limits, quiet=True).complete
    monkeypatch.setattr(load_fineweb.ShardWriter, "finish", finish)
    prepare("openwebtext", tmp_path / "out", **limits, quiet=True)
    assert [revision for _, _, revision in hub] == [None, COMMIT]
    assert np.array_equal(everything(tmp_path / "out"), tokens_of(TEXTS)[:4500])


def test_the_published_count_is_compared(tmp_path, hub, capsys, monkeypatch):
    monkeypatch.setitem(
        sources.HUB, "fineweb-edu", sources.HubDataset("HuggingFaceFW/fineweb-edu", "s", 1234)
    )
    prepare("fineweb-edu", tmp_path / "a")
    assert "warning: 1,234 tokens were published for this source" in capsys.readouterr().out
    prepare("fineweb-edu", tmp_path / "b", max_tokens=1000)
    prepare("fineweb-edu", tmp_path / "c", subset="other")
    exact = sources.HubDataset("HuggingFaceFW/fineweb-edu", "s", len(tokens_of(TEXTS)))
    monkeypatch.setitem(sources.HUB, "fineweb-edu", exact)
    prepare("fineweb-edu", tmp_path / "d")
    assert "warning" not in capsys.readouterr().out


def test_the_known_count_of_the_flagship_data():
    assert sources.HUB["fineweb-edu"].tokens == 9_982_590_278
    assert sources.HUB["fineweb-edu"].subset == "sample-10BT"


def test_a_failing_network_is_tried_again_and_then_named(tmp_path, hub, monkeypatch):
    waits, failures = [], [ConnectionError("reset")] * 3
    real = chunks._read_row_groups

    def unreliable(path):
        if failures:
            raise failures.pop()
        return real(path)

    monkeypatch.setattr(chunks, "_read_row_groups", unreliable)
    monkeypatch.setattr(chunks.time, "sleep", waits.append)
    prepare("fineweb", tmp_path / "out", shard_tokens=1000, quiet=True)
    assert waits == [1, 2, 4]
    assert np.array_equal(everything(tmp_path / "out"), tokens_of(TEXTS))
    failures.extend([ConnectionError("reset")] * 50)
    message = refuses("fineweb", tmp_path / "again")
    assert "could not be read after 6 attempts (reset)" in message
    assert "run the same command again" in message


def test_without_a_network_one_sentence_says_what_to_do(tmp_path):
    result = run("--out", tmp_path / "out", env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "HuggingFaceFW/fineweb-edu (sample-10BT) could not be found" in result.stderr
    assert "--source pydocs" in result.stderr
    assert not (tmp_path / "out").exists()
