"""Directories go to the hub, and models come back whole, or one sentence says why not."""

import dataclasses
import shutil
from pathlib import Path

import huggingface_hub
import pytest

import hub
from config import UserError
from corpus.shards import read_manifest, write_manifest
from sample import find, load
from tests.exports import assert_same_weights, exported, small
from tests.fake_hub import FakeHub, installed
from tests.small_models import config_of, shaken
from tests.tiny import CHARACTERS, make_data

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


def refusal(function, *arguments) -> str:
    """Return the sentence with which a call ends."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_manifest_its_shards_and_the_tokenizer_are_pushed_and_nothing_else(data, fake_hub):
    (data / "documents_train_0123456789ab.npy").write_bytes(b"an index")
    (data / "notes.txt").write_text("mine")
    address = hub.push_shards(data, NAME, private=True)
    assert address == f"https://huggingface.co/{NAME}"
    assert fake_hub.calls[0] == ("create", NAME, "dataset", True)
    pushed = fake_hub.repository(NAME, "dataset")
    names = {"manifest.json", "tokenizer.json", *(s.file for s in read_manifest(data).shards)}
    assert {path.name for path in pushed.iterdir()} == names
    assert all((pushed / name).read_bytes() == (data / name).read_bytes() for name in names)


def test_unfinished_damaged_and_foreign_data_is_not_published(data, fake_hub, tmp_path):
    foreign = tmp_path / "foreign"
    shutil.copytree(data, foreign)
    (foreign / "manifest.json").unlink()
    assert "has no manifest.json" in refusal(hub.push_shards, foreign, NAME)
    manifest = read_manifest(data)
    write_manifest(data, dataclasses.replace(manifest, complete=False))
    assert f"{data} is not finished" in refusal(hub.push_shards, data, NAME)
    write_manifest(data, manifest)
    shard = data / manifest.shards[0].file
    shard.write_bytes(shard.read_bytes()[:-2])
    assert f"{shard} is not a readable token shard" in refusal(hub.push_shards, data, NAME)
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
    assert "no such model repository" in refusal(hub.fetch, NAME, "model", ["*"])
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
    assert "you may not do that" in refusal(hub.push, directory, NAME)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "not logged in" in refusal(hub.push, directory, NAME)
    assert "cannot be the name" in refusal(hub.push, directory, "no such/name/here")


def test_without_a_network_everything_is_refused(data, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    assert "could not be downloaded" in refusal(hub.fetch, NAME, "model", ["*"])
    assert "could not be pushed" in refusal(hub.push_shards, data, NAME)
