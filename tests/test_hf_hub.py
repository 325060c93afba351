"""Directories go to the hub and come back whole, or one sentence says why not."""

import json
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest

import hub
from config import UserError
from corpus.shards import Manifest, read_manifest, write_manifest
from sample import find, load
from tests.exports import assert_same_weights, exported, small
from tests.fake_hub import FakeHub, installed
from tests.small_models import config_of, shaken
from tests.tiny import CHARACTERS, make_data
from utils import seal

NAME = "somebody/something"


@pytest.fixture
def fake_hub(tmp_path, monkeypatch) -> FakeHub:
    return installed(tmp_path / "hub", monkeypatch)


@pytest.fixture
def data(tmp_path) -> Path:
    """A complete data directory of several shards."""
    directory = make_data(tmp_path / "data")
    assert len(read_manifest(directory).shards) > 2
    return directory


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refusal(*arguments, function=hub.fetch_shards) -> str:
    """Return the sentence with which a call ends."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shards_come_back_from_the_hub_byte_for_byte(data, fake_hub, tmp_path):
    (data / "documents_train_0123456789ab.npy").write_bytes(b"an index")
    (data / "notes.txt").write_text("mine")
    address = hub.push_shards(data, NAME, private=True)
    assert address == f"https://huggingface.co/{NAME}"
    assert fake_hub.calls[0] == ("create", NAME, "dataset", True)
    manifest = hub.fetch_shards(NAME, None, tmp_path / "out" / "fetched")
    names = {"manifest.json", *(shard.file for shard in manifest.shards)}
    wanted = {name: content for name, content in files_of(data).items() if name in names}
    assert files_of(tmp_path / "out" / "fetched") == wanted and len(wanted) > 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["fetched"]


def test_nothing_but_the_manifest_and_its_shards_is_fetched(data, fake_hub, tmp_path):
    hub.push_shards(data, NAME)
    (fake_hub.repository(NAME, "dataset") / "setup.py").write_text("harmful")
    (fake_hub.repository(NAME, "dataset") / "more_train_1.npy").write_bytes(b"more")
    hub.fetch_shards(NAME, None, tmp_path / "out")
    assert not {"setup.py", "more_train_1.npy"} & files_of(tmp_path / "out").keys()


def test_an_interrupted_fetch_goes_on_where_it_stopped(data, fake_hub, tmp_path):
    hub.push_shards(data, NAME)
    fake_hub.breaks_after = 2
    assert "the connection was lost" in refusal(NAME, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    first = [name for kind, name, *_ in fake_hub.calls if kind == "fetched"]
    assert len(first) == 3
    fake_hub.breaks_after = None
    hub.fetch_shards(NAME, None, tmp_path / "out")
    fetched = [name for kind, name, *_ in fake_hub.calls if kind == "fetched"]
    assert len(fetched) == len(set(fetched)) > len(first)


def test_a_shard_that_was_damaged_on_the_way_is_named_and_fetched_anew(data, fake_hub, tmp_path):
    hub.push_shards(data, NAME)
    shard = fake_hub.repository(NAME, "dataset") / read_manifest(data).shards[1].file
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2] + b"\x01\x00")
    assert f"{shard.name} of '{NAME}' is damaged" in refusal(NAME, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shard.write_bytes(whole)
    hub.fetch_shards(NAME, None, tmp_path / "out")
    assert (tmp_path / "out" / shard.name).read_bytes() == whole


def test_shards_of_an_earlier_version_do_not_stay(data, fake_hub, tmp_path):
    hub.push_shards(data, NAME)
    partial = tmp_path / ".out.fetched"
    partial.mkdir()
    (partial / "earlier_train_000001.npy").write_bytes(b"earlier")
    hub.fetch_shards(NAME, None, tmp_path / "out")
    assert "earlier_train_000001.npy" not in files_of(tmp_path / "out")


def test_a_shard_that_is_not_there_is_named(data, fake_hub, tmp_path):
    hub.push_shards(data, NAME)
    shard = fake_hub.repository(NAME, "dataset") / read_manifest(data).shards[1].file
    shard.unlink()
    assert f"lacks {shard.name}" in refusal(NAME, None, tmp_path / "out")


def test_a_repository_that_is_no_data_directory_is_refused_and_leaves_nothing(fake_hub, tmp_path):
    repository = fake_hub.repository(NAME, "dataset")
    repository.mkdir(parents=True)
    (repository / "train.npy").write_bytes(b"")
    assert "it has no manifest.json" in refusal(NAME, None, tmp_path / "out")
    unfinished = Manifest("x", "gpt2", None, 50257, {}, 100)
    write_manifest(repository, unfinished)
    assert "does not describe a finished preparation" in refusal(NAME, None, tmp_path / "out")
    (repository / "manifest.json").write_text('{"format": 1}')
    assert "damaged" in refusal(NAME, None, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_a_manifest_that_reaches_outside_is_refused(data, fake_hub, tmp_path):
    hub.push_shards(data, NAME)
    path = fake_hub.repository(NAME, "dataset") / "manifest.json"
    record = json.loads(path.read_text())
    del record["digest"]
    record["shards"][0]["file"] = "../outside.npy"
    path.write_bytes(seal(record))
    assert "not the name of a file" in refusal(NAME, None, tmp_path / "out")


def test_what_is_there_already_is_not_fetched_again_nor_overwritten(data, fake_hub, tmp_path):
    hub.push_shards(data, NAME)
    hub.fetch_shards(NAME, None, tmp_path / "out")
    before = len(fake_hub.calls)
    assert hub.fetch_shards(NAME, None, tmp_path / "out") == read_manifest(data)
    shards = [c for c in fake_hub.calls[before:] if c[0] == "fetched" and c[1] != "manifest.json"]
    assert shards == []
    (tmp_path / "mine").mkdir()
    assert "holds something else" in refusal(NAME, None, tmp_path / "mine")
    other = make_data(tmp_path / "other", documents=30)
    assert "holds something else" in refusal(NAME, None, other)


def test_unfinished_damaged_and_foreign_data_is_not_published(data, fake_hub, tmp_path):
    foreign = tmp_path / "foreign"
    shutil.copytree(data, foreign)
    (foreign / "manifest.json").unlink()
    assert "has no manifest.json" in refusal(foreign, NAME, function=hub.push_shards)
    shard = data / read_manifest(data).shards[0].file
    shard.write_bytes(shard.read_bytes()[:-2])
    assert f"{shard} is not a readable token shard (truncated" in refusal(
        data, NAME, function=hub.push_shards
    )
    assert fake_hub.calls == []


def test_a_model_comes_back_from_the_hub_and_is_found_by_its_name(fake_hub, tmp_path, monkeypatch):
    model = shaken(config_of(pos_emb="rope", vocab_size=CHARACTERS.vocab_size))
    hub.push(exported(model, tmp_path / "out", CHARACTERS), NAME)
    monkeypatch.chdir(tmp_path)
    assert find(NAME) == NAME
    loaded, tokenizer, begins_with_eot = load(NAME)
    assert (loaded.config, begins_with_eot) == (model.config, True)
    assert tokenizer.alphabet == CHARACTERS.alphabet
    assert_same_weights(fake_hub.root / "cache" / "model" / NAME, model)
    # The next time, without a network, what was fetched has to do.
    fake_hub.reachable = False
    assert load(NAME)[0].config == model.config


def test_modeling_files_of_a_repository_are_not_even_fetched(fake_hub, tmp_path):
    hub.push(exported(small("modern"), tmp_path / "out"), NAME)
    assert (fake_hub.repository(NAME, "model") / "modeling_gpt.py").exists()
    with pytest.raises(UserError, match="61 token ids"):
        load(NAME)
    fetched = {path.name for path in (fake_hub.root / "cache" / "model" / NAME).iterdir()}
    assert fetched == {"config.json", "model.safetensors"}


def test_a_repository_that_is_not_there_is_one_sentence(fake_hub, tmp_path):
    assert "no such model repository" in refusal(NAME, "model", ["*"], function=hub.fetch)
    assert "no such dataset repository" in refusal(NAME, None, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_a_run_that_is_not_there_asks_no_hub(fake_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/missing", "missing", "../some/thing", "/a/b", "a/b/c", "hub/missing"):
        (tmp_path / "hub").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="There is no run"):
            find(name)


def test_who_is_not_logged_in_or_may_not_write_is_told_so(fake_hub, tmp_path, monkeypatch):
    directory = exported(small("gpt2"), tmp_path / "out")
    fake_hub.writable = False
    assert "you may not do that" in refusal(directory, NAME, function=hub.push)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "not logged in" in refusal(directory, NAME, function=hub.push)
    assert "cannot be the name" in refusal(directory, "no such/name/here", function=hub.push)


def test_without_a_network_everything_fails_fast(data, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    started = time.perf_counter()
    assert "could not be downloaded" in refusal(NAME, None, tmp_path / "out")
    assert "could not be downloaded" in refusal(NAME, "model", ["*"], function=hub.fetch)
    assert "could not be pushed" in refusal(data, NAME, function=hub.push_shards)
    assert time.perf_counter() - started < 15
