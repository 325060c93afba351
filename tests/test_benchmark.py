"""Benchmark files: where they are looked for, how they are fetched, what damage is told."""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

import benchmark
from benchmark import WebFile
from config import UserError
from corpus.tokenizer import CharTokenizer, gpt2_tokenizer
from likelihood import encode_request
from tests.tiny import ALPHABET

CONTENT = b'{"text": "one"}\n{"text": "two"}\n'
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def room(tmp_path, monkeypatch):
    """An empty directory to be in, and no other benchmark files."""
    (tmp_path / "room").mkdir()
    monkeypatch.chdir(tmp_path / "room")
    monkeypatch.delenv("GPT2_DATA", raising=False)
    return tmp_path / "room"


@pytest.fixture
def published(monkeypatch):
    """A benchmark's file that can be fetched."""
    file = WebFile("set/part.jsonl", "http://a/b", len(CONTENT), SHA256, 2, ("other/part.jsonl",))

    def fetch(place, *known):
        assert (place, known) == (file.path, (file.address, file.size, file.sha256, 4))
        return put(Path("data", place), CONTENT)

    monkeypatch.setattr(benchmark, "fetch_file", fetch)
    return file


def put(path, content=b"mine\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def refuses(function, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


def test_a_file_is_looked_for_in_data_then_in_gpt2_data_then_on_the_web(
    room, tmp_path, monkeypatch, published
):
    monkeypatch.setenv("GPT2_DATA", str(tmp_path / "mine"))
    fetched = benchmark.find(published)
    assert fetched.resolve() == room / "data" / "set" / "part.jsonl"
    assert fetched.read_bytes() == CONTENT
    fetched.unlink()
    other = put(tmp_path / "mine" / "other" / "part.jsonl")
    assert benchmark.find(published) == other
    own = put(tmp_path / "mine" / "set" / "part.jsonl")
    assert benchmark.find(published) == own
    under_data = put(room / "data" / "other" / "part.jsonl")
    assert benchmark.find(published).resolve() == under_data


def test_a_missing_file_that_is_not_to_be_fetched_is_told_how_to_get(room, published):
    message = refuses(benchmark.find, published, False)
    assert message == (
        f"data/set/part.jsonl is not here; fetch {published.address} and put it there."
    )
    assert not (room / "data").exists()


def test_a_file_of_ones_own_is_used_and_known_not_to_be_the_published_one(
    room, tmp_path, published
):
    assert benchmark.is_published(published, put(tmp_path / "a", CONTENT), 2)
    assert not benchmark.is_published(published, put(tmp_path / "b", CONTENT + b"\n"), 2)
    assert not benchmark.is_published(published, put(tmp_path / "c"), 1)


def test_rows_decide_where_no_checksum_is_known(room, tmp_path):
    file = WebFile("set/part.jsonl", "", rows=2)
    path = put(tmp_path / "a")
    assert benchmark.is_published(file, path, 2)
    assert not benchmark.is_published(file, path, 1)


@pytest.mark.parametrize("sha256", [None, SHA256])
def test_a_file_in_data_that_lacks_rows_is_refused(room, sha256):
    file = WebFile("set/part.jsonl", "", sha256=sha256, rows=10_042)
    put(room / "data" / "set" / "part.jsonl", CONTENT)
    message = refuses(benchmark.is_published, file, benchmark.find(file), 2)
    assert message.startswith(
        "data/set/part.jsonl has 2 rows where 10,042 are published; delete it"
    )


def test_rows_are_read_with_the_numbers_of_their_lines(tmp_path):
    path = put(tmp_path / "a", b'{"a": 1}\n\n \r\n{"b": "\xc3\xa9"}\r\n{}')
    assert list(benchmark.read_json_lines(path)) == [(1, {"a": 1}), (4, {"b": "é"}), (5, {})]
    assert benchmark.count_rows(path) == 3
    path = put(tmp_path / "b", b"one \r\n\n two\x0bthree\n")
    assert list(benchmark.read_lines(path)) == [(1, "one "), (3, " two\x0bthree")]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"text": "cut', "is not valid JSON (Unterminated string starting at, column 10)"),
        (b"[1]", "is not a JSON object"),
        (b'{"text": "\xff"}', "is not UTF-8"),
        (b"[" * 100_000, "is not valid JSON ("),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON ("),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, line, complaint):
    path = put(tmp_path / "a.jsonl", b"{}\n\n" + line + b"\n{}\n")
    message = refuses(list, benchmark.read_json_lines(path))
    assert message.startswith(f"{path}, line 3 {complaint}")
    assert message.endswith("; mend the line or fetch the file again.")


def test_a_file_that_cannot_be_read(tmp_path):
    missing = tmp_path / "missing.jsonl"
    for function in (benchmark.sha256_of, benchmark.count_rows, benchmark.read_bytes):
        assert (
            refuses(function, missing) == f"{missing} cannot be read (No such file or directory)."
        )
    assert "cannot be read (Is a directory)" in refuses(benchmark.read_bytes, tmp_path)


def make_archive(path, **members):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"./deep/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def test_one_file_is_taken_out_of_an_archive(tmp_path):
    noise = np.random.default_rng(0).bytes(200_000)
    archive = make_archive(tmp_path / "all.tar.gz", novels=noise, test=CONTENT, later=noise)
    assert benchmark.read_member(archive, "test") == CONTENT
    assert list(tmp_path.iterdir()) == [archive]
    assert "has no valid in it" in refuses(benchmark.read_member, archive, "valid")


@pytest.mark.parametrize("keep", [0.5, 0.0001, 0])
def test_a_damaged_archive_is_refused(tmp_path, keep):
    noise = np.random.default_rng(0).bytes(200_000)
    archive = make_archive(tmp_path / "all.tar.gz", novels=noise, test=CONTENT)
    whole = archive.read_bytes()
    archive.write_bytes(whole[: int(len(whole) * keep)])
    assert f"{archive} is damaged (" in refuses(benchmark.read_member, archive, "test")
    archive.write_bytes(whole[:100_000] + b"\xff" * 100_000)
    assert f"{archive} is damaged (" in refuses(benchmark.read_member, archive, "test")
    archive.write_bytes(b"an error page")
    assert f"{archive} is damaged (" in refuses(benchmark.read_member, archive, "test")


def test_a_file_is_stored_where_a_download_would_go(room, published):
    path = benchmark.store(published, CONTENT)
    assert path == benchmark.find(published, fetch=False)
    assert benchmark.is_published(published, path, 2)
    assert "cannot be made (" in refuses(benchmark.store, WebFile("set/part.jsonl/a", ""), b"")


def test_a_line_that_cannot_be_scored_is_named(tmp_path):
    tokenizer, path = gpt2_tokenizer(), tmp_path / "a.jsonl"
    request = benchmark.encode_line(tokenizer, path, 7, "a context", [" ending"])
    assert np.array_equal(
        request.endings[0], encode_request(tokenizer, "a context", [" ending"]).endings[0]
    )
    message = refuses(benchmark.encode_line, tokenizer, path, 7, "a context", [" "])
    assert message.startswith(f"{path}, line 7 cannot be scored (an ending is empty")


def test_a_model_that_reads_characters_is_refused():
    benchmark.require_gpt2_vocabulary(gpt2_tokenizer(), "lambada")
    message = refuses(benchmark.require_gpt2_vocabulary, CharTokenizer(ALPHABET), "lambada")
    assert message == "lambada needs GPT-2's vocabulary; this model has char's."


def test_a_benchmark_without_examples_is_refused(tmp_path):
    benchmark.require_examples([1], tmp_path)
    assert f"{tmp_path} has no examples" in refuses(benchmark.require_examples, [], tmp_path)
