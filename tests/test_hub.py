"""The hub's data sets, by the real packages and repositories on the local disk."""

import os
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest

from corpus.sources import HUB, find_source
from load_fineweb import main
from tests import corpora
from tests.corpora import TEXTS, contents, everything, prepared, refuses, run, write

COMMIT, NEWER = "0123456789abcdef0123456789abcdef01234567", "f" * 40
LIMITS = {"shard_tokens": 1000, "max_tokens": 4500}


class Hub:
    """What was asked of it, and whether it answers; its newest commit is `newest`."""

    def __init__(self, root: Path, build):
        self.root, self.build = root, build
        self.asked, self.fetched, self.newest, self.breaks_after = [], [], COMMIT, None
        for commit, texts in ((COMMIT, TEXTS), (NEWER, [text.upper() for text in TEXTS])):
            write(root / f"data@{commit}" / "sample" / "000.parquet", texts[:150])
            write(root / f"data@{commit}" / "sample" / "001.parquet", texts[150:])

    def load_dataset_builder(self, name, subset, revision):
        self.asked.append((name, subset, revision))
        # The real builder, but given a directory; files have addresses such as .../data@COMMIT/...
        return self.build(str(self.root / f"data@{revision or self.newest}"))

    def hf_hub_download(self, repo_id, filename, *, repo_type, revision):
        if len(self.fetched) == self.breaks_after:
            raise ConnectionError("reset\nby a peer")
        self.fetched.append((repo_id, repo_type, revision, filename))
        return str(self.root / f"data@{revision}" / filename)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    import datasets

    hub = Hub(tmp_path / "hub", datasets.load_dataset_builder)
    monkeypatch.setattr(datasets, "load_dataset_builder", hub.load_dataset_builder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
    monkeypatch.setattr("corpus.sources.reach_hub", lambda: None)
    return hub


def test_files_are_asked_for_by_their_commit_and_that_is_recorded(tmp_path, hub):
    manifest = prepared("fineweb", tmp_path / "out", **LIMITS)
    assert np.array_equal(everything(tmp_path / "out"), corpora.tokens_of(TEXTS)[:4500])
    assert hub.asked == [("HuggingFaceFW/fineweb", "sample-10BT", None)]
    names = [f"sample/{i:03d}.parquet" for i in (0, 1)]
    assert set(hub.fetched) == {("HuggingFaceFW/fineweb", "dataset", COMMIT, n) for n in names}
    facts = {"kind": "hub", "repository": "HuggingFaceFW/fineweb", "subset": "sample-10BT"}
    assert manifest.source.items() >= {**facts, "revision": COMMIT, "max_tokens": 4500}.items()
    assert "--subset sample-10BT, not CC-MAIN-2024-10" in refuses(
        "fineweb", tmp_path / "out", subset="CC-MAIN-2024-10", **LIMITS
    )


def test_names_are_those_of_repositories(hub):
    for name in HUB:
        assert len(find_source((name,), None, NEWER).files) == 2
    assert hub.asked == [(*HUB[name][:2], NEWER) for name in HUB]
    assert {name: HUB[name][0] for name in HUB} == {
        "fineweb-edu": "HuggingFaceFW/fineweb-edu",
        "fineweb": "HuggingFaceFW/fineweb",
        "openwebtext": "Skylion007/openwebtext",
        "climbmix": "karpathy/climbmix-400b-shuffle",
    }
    assert HUB["fineweb-edu"][1:] == ("sample-10BT", 9_982_590_278)


def test_an_interrupted_preparation_keeps_its_commit(tmp_path, hub):
    prepared("openwebtext", tmp_path / "whole", **LIMITS)
    with corpora.stopped_after(2):
        prepared("openwebtext", tmp_path / "out", **LIMITS)
    hub.newest = NEWER
    prepared("openwebtext", tmp_path / "out", **LIMITS)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    message = refuses("openwebtext", tmp_path / "out", revision=NEWER, **LIMITS)
    assert f"--revision {COMMIT}, not {NEWER}" in message


def test_a_finished_directory_needs_no_hub(tmp_path, hub, monkeypatch):
    manifest = prepared("climbmix", tmp_path / "out", **LIMITS)

    def unreachable():
        raise ConnectionError("no route")

    monkeypatch.setattr("corpus.sources.reach_hub", unreachable)
    assert prepared("climbmix", tmp_path / "out", **LIMITS) == manifest


def test_a_network_that_fails_is_one_sentence_and_the_same_command_continues(
    tmp_path, hub, small_batches
):
    options = {"shard_tokens": 1000, "workers": 1}
    prepared("fineweb", tmp_path / "whole", **options)
    hub.breaks_after = len(hub.fetched) + 2  # the last file of the pass that writes
    message = refuses("fineweb", tmp_path / "out", **options)
    assert "001.parquet cannot be fetched" in message and "same command continues" in message
    whole, part = contents(tmp_path / "whole"), contents(tmp_path / "out")
    assert 1 < len(part) < len(whole)
    hub.breaks_after = None
    prepared("fineweb", tmp_path / "out", **options)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize(
    "options",
    [(), ("--max-tokens", "1000"), ("--subset", "other"), ("--tokenizer", "char")],
)
def test_the_published_count_is_compared(tmp_path, hub, capsys, monkeypatch, options):
    for count in (1234, len(corpora.tokens_of(TEXTS))):
        monkeypatch.setitem(HUB, "fineweb-edu", ("HuggingFaceFW/fineweb-edu", "s", count))
        monkeypatch.setattr("sys.argv", ["", "--out", str(tmp_path / str(count)), *options])
        main()
        warns = f"warning: {count:,} tokens" in capsys.readouterr().out
        assert warns == (count == 1234 and options == ())
    subset = "other" if "other" in options else "s"
    assert {asked[1] for asked in hub.asked} == {subset}


def test_without_a_network_one_sentence_says_what_to_do(tmp_path):
    result = run("--out", tmp_path / "out", env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert "HuggingFaceFW/fineweb-edu (sample-10BT) cannot be fetched" in result.stderr
    assert "--source pydocs" in result.stderr
    assert not (tmp_path / "out").exists()
