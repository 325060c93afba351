"""load_fineweb.py --source shards:OWNER/NAME, which fetches what hf.py DATA --push uploaded."""

import pytest

import hub
from corpus.shards import MANIFEST, read_manifest
from corpus.tokenizer import TOKENIZER_FILE
from tests.corpora import contents, prepared, refuses, write
from tests.fake_hub import FakeHub, installed
from utils import seal, unseal

NAME = "somebody/books"
SOURCE = f"shards:{NAME}"


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A complete data directory of several shards."""
    folder = tmp_path_factory.mktemp("mine")
    options = {"shard_tokens": 5000, "tokenizer": "bpe", "vocab_size": 300}
    prepared(write(folder / "a.jsonl"), folder / "out", **options)
    return folder / "out"


@pytest.fixture
def fake_hub(mine, tmp_path, monkeypatch) -> FakeHub:
    monkeypatch.setattr("load_fineweb.DATA_DIR", tmp_path / "data")
    fake = installed(tmp_path / "hub", monkeypatch)
    hub.push_shards(mine, NAME)
    return fake


@pytest.fixture
def repository(fake_hub):
    return fake_hub.repository(NAME, "dataset")


def files_of(directory) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def fetched(fake_hub) -> list[str]:
    return sorted(name for kind, name, *_ in fake_hub.calls if kind == "fetched")


def test_shards_come_whole_to_where_data_is_found_by_its_name(mine, fake_hub, repository, tmp_path):
    (repository / "setup.py").write_text("harmful")
    (repository / "more_train_1.npy").write_bytes(b"more")
    for _ in range(2):  # again, it is recognized, and nothing is fetched twice
        assert prepared(SOURCE, None) == read_manifest(mine)
        assert files_of(tmp_path / "data" / "books") == contents(mine)
        assert fetched(fake_hub) == sorted(contents(mine))
    assert len(contents(mine)) > 4 and TOKENIZER_FILE in contents(mine)


def test_a_wrong_byte_is_refused_and_the_next_call_repairs_it(mine, repository, tmp_path):
    out, shard = tmp_path / "out", repository / read_manifest(mine).shards[1].file
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert f"{shard.name} of {NAME} is missing or damaged" in refuses(SOURCE, out)
    assert not (out / shard.name).exists()
    shard.write_bytes(whole)
    prepared(SOURCE, out)
    assert files_of(out) == contents(mine)


@pytest.mark.parametrize("count", range(5))
def test_an_interrupted_fetch_goes_on_where_it_stopped(mine, fake_hub, tmp_path, count):
    fake_hub.breaks_after = count
    assert "the connection was lost" in refuses(SOURCE, tmp_path / "out")
    fake_hub.breaks_after = None
    prepared(SOURCE, tmp_path / "out")
    assert files_of(tmp_path / "out") == contents(mine)
    assert fetched(fake_hub) == sorted(contents(mine))


def test_something_else_that_is_there_stays(fake_hub, tmp_path):
    prepared(write(tmp_path / "a.jsonl"), tmp_path / "other")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.npy").write_bytes(b"mine")
    for out in (tmp_path / "other", tmp_path / "notes"):
        before = contents(out)
        assert str(out) in refuses(SOURCE, out)
        assert contents(out) == before and fetched(fake_hub) == []


def test_other_options_and_other_repositories_are_refused(fake_hub, tmp_path):
    for options in ({"max_tokens": 100}, {"subset": "x"}, {"tokenizer": "char"}):
        assert "go --out and --revision only" in refuses(SOURCE, None, **options)
    assert "go --out and --revision only" in refuses((SOURCE, "pydocs"), None)
    assert "nobody/nothing cannot be fetched" in refuses("shards:nobody/nothing", None)
    fake_hub.reachable = False
    assert "cannot be fetched" in refuses(SOURCE, None)
    assert not (tmp_path / "data").exists()


def test_what_is_no_data_directory_is_refused(mine, repository, tmp_path):
    record = unseal((mine / MANIFEST).read_bytes())
    outside = {**record["shards"][0], "file": "../outside.npy"}
    for content, words in (
        (seal({**record, "shards": [outside]}), "not the name of a file"),
        (seal({**record, "complete": False}), NAME),
        (b"{}", MANIFEST),
    ):
        (repository / MANIFEST).write_bytes(content)
        assert words in refuses(SOURCE, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("file", [MANIFEST, TOKENIZER_FILE, "a-bpe-300_train_000001.npy"])
def test_a_file_that_the_repository_lacks_is_named(repository, tmp_path, file):
    (repository / file).unlink()
    assert (NAME if file == MANIFEST else file) in refuses(SOURCE, tmp_path / "out")
