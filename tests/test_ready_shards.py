"""load_fineweb.py --source shards:OWNER/NAME, which fetches what hf.py DATA --push uploaded."""

import re

import pytest

import hub
import load_fineweb
from config import UserError
from corpus.shards import manifest_sha256
from load_fineweb import prepare
from tests.fake_hub import FakeHub, installed
from tests.tiny import make_data

NAME = "somebody/books"


@pytest.fixture
def fake_hub(tmp_path, monkeypatch) -> FakeHub:
    monkeypatch.setattr(load_fineweb, "DATA_DIR", tmp_path / "data")
    fake = installed(tmp_path / "hub", monkeypatch)
    hub.push_shards(make_data(tmp_path / "mine"), NAME)
    return fake


def test_shards_of_a_repository_go_where_data_is_found_by_its_name(fake_hub, tmp_path, capsys):
    manifest = prepare(f"shards:{NAME}")
    assert manifest.complete
    assert manifest_sha256(tmp_path / "data" / "books") == manifest_sha256(tmp_path / "mine")
    assert re.search(r"data/books is complete: [\d,]+ training and", capsys.readouterr().out)
    # Again, it is recognized.
    assert prepare(f"shards:{NAME}", quiet=True) == manifest


def test_they_go_elsewhere_where_told(fake_hub, tmp_path):
    prepare(f"shards:{NAME}", tmp_path / "there", quiet=True)
    assert (tmp_path / "there" / "manifest.json").exists()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("source", "options", "sentence"),
    [
        (f"shards:{NAME}", {"max_tokens": 100}, "leave out other sources, and all options but"),
        (f"shards:{NAME}", {"subset": "x"}, "leave out other sources, and all options but"),
        ((f"shards:{NAME}", "pydocs"), {}, "leave out other sources, and all options but"),
        ("shards:books", {}, "'books' is no repository"),
        ("shards:", {}, "'' is no repository"),
        ("shards:nobody/nothing", {}, "no such dataset repository"),
    ],
)
def test_what_cannot_be_is_one_sentence(fake_hub, tmp_path, source, options, sentence):
    with pytest.raises(UserError, match=sentence):
        prepare(source, quiet=True, **options)
    assert not (tmp_path / "data").exists() or not any((tmp_path / "data").iterdir())
