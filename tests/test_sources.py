"""Every source: what its documents are, what of it is skipped, and reading on from any place."""

import errno
import gzip
import hashlib
import io
import json
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

import corpus.pydocs
from corpus.pydocs import pydocs_documents
from corpus.shards import TokenShards, read_manifest
from corpus.sources import TEXTS as SHAKESPEARE
from corpus.sources import Skipped, Source, find_source
from corpus.tokenizer import gpt2_tokenizer
from tests.corpora import TEXTS, everything, prepared, refuses, run, tokens_of, write

VALUES = [(3, "not UTF-8"), (40, "empty"), (41, "empty"), (99, "not UTF-8")]
LINES = [(6, "empty"), (7, "not UTF-8")]


def source_of(*words) -> Source:
    return find_source(tuple(map(str, words)), None, None)


def texts_of(*words) -> list[str]:
    return [text for _, text in source_of(*words).documents()]


def rows_of(source: Source, start=(0, 0)) -> list:
    """Return place, text, and whether it is one, of all rows from a place on."""
    rows = [row for batch in source.batches(start) for row in batch]
    return [(place, str(text), isinstance(text, Skipped)) for place, text in rows]


# --- Files ---


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.txt"])
def test_local_files_become_the_plain_tokens(tmp_path, small_batches, name):
    file = write(tmp_path / f"my {name}", TEXTS)
    manifest = prepared(file, tmp_path / "out", shard_tokens=1000)
    assert np.array_equal(everything(tmp_path / "out"), tokens_of(TEXTS))
    assert manifest.shards[0].file == "my-a_val_000000.npy"
    assert manifest.source["kind"] == "files" and manifest.skipped == {}
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
    assert sum(shard.bytes for shard in manifest.shards) == sum(map(len, TEXTS))


def test_each_text_file_of_a_directory_is_a_document(tmp_path):
    texts = ["Ünïcode\r\nand lines", "second", "third " * 200, "fourth"]
    write(tmp_path / "in.txt", texts)
    for name in (".hidden.txt", ".deep/hidden.txt", "deep/z.txt", "README.md"):
        (tmp_path / "in.txt" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in.txt" / name).write_text("last")
    assert texts_of(tmp_path / "in.txt") == [*texts, "last"]


def test_several_paths_keep_their_order_and_patterns_are_sorted(tmp_path):
    for name in ("b.jsonl", "z1.jsonl.gz", "z0.jsonl"):
        write(tmp_path / name, [name])
    expected = ["z0.jsonl", "z1.jsonl.gz", "b.jsonl"]
    assert texts_of(tmp_path / "z*.jsonl*", tmp_path / "b.jsonl") == expected


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Source:
    """A source with files of every kind, and rows of every kind in them."""
    folder, mark = tmp_path_factory.mktemp("mixed"), b"\xef\xbb\xbf"
    values = [text.encode() for text in TEXTS[:100]]
    values[3], values[40], values[41], values[99] = b"\xff", b"", None, b"\xfe"
    column = pa.array(values, pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": column}), folder / "a.parquet", row_group_size=37)
    lines = [json.dumps({"text": text}).encode() for text in TEXTS[100:140]]
    lines[5], lines[6], lines[7], lines[39] = b"", b'{"text": null}', b'{"text": "\xff"}', b" "
    (folder / "b.jsonl").write_bytes(mark + b"\n".join(lines))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines)))
    for i, content in enumerate([mark + b"empty", mark, b"na\xefve", b"two"]):
        (folder / f"d{i}.txt").write_bytes(content)
    return source_of(folder)


def test_rows_that_are_no_documents_are_told_apart(mixed, tmp_path):
    skipped = [(place, why) for place, why, skip in rows_of(mixed) if skip]
    lines = [((file, row), why) for file in (1, 2) for row, why in LINES]
    values = [((0, row), why) for row, why in VALUES]
    assert skipped == [*values, *lines, ((4, 0), "empty"), ((5, 0), "not UTF-8")]
    texts = [text for _, text in mixed.documents()]
    good = [*TEXTS[100:105], *TEXTS[108:139]]
    # A document may say what is said of others.
    assert texts == [*TEXTS[:3], *TEXTS[4:40], *TEXTS[42:99], *good, *good, "empty", "two"]
    folder = mixed.files[0].parent
    result = run("--source", folder, "--out", tmp_path / "out", "--shard-tokens", 1000)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "skipped: 5 empty, 5 not UTF-8"
    assert read_manifest(tmp_path / "out").skipped == {"empty": 5, "not UTF-8": 5}
    assert np.array_equal(everything(tmp_path / "out"), tokens_of(texts))


@given(file=st.integers(0, 7), row=st.integers(0, 110), size=st.integers(1, 3000))
def test_reading_on_from_any_place_gives_the_rest(mixed, file, row, size):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corpus.sources.BATCH_BYTES", size)
        expected = [found for found in rows_of(mixed) if found[0] >= (file, row)]
        assert rows_of(mixed, (file, row)) == expected
        for batch in mixed.batches():
            texts = [text for _, text in batch[:-1] if not isinstance(text, Skipped)]
            assert sum(map(len, texts)) < size


# --- Hostile files ---


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_line_without_an_end_is_skipped_and_the_next_one_read(tmp_path, monkeypatch, pack):
    monkeypatch.setattr("corpus.sources.MOST_BYTES", 64)
    lines = []
    for length in (65, 66, 127, 128, 129, 192, 1000):  # bytes, with the line's end
        lines += ['{"text": "' + "x" * (length - 13) + '"}\n', '{"text": "good"}\n']
    file = tmp_path / ("a.jsonl" if pack is bytes else "a.jsonl.gz")
    file.write_bytes(pack("".join([*lines, "z" * 640]).encode()))
    found = [(text, skip) for _, text, skip in rows_of(source_of(file))]
    assert found == [("too long", True), ("good", False)] * 7 + [("too long", True)]


def test_a_small_file_that_unpacks_to_no_end(tmp_path):
    (bomb := tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(bytes(70_000_000)))
    good = write(tmp_path / "b.jsonl", ["good"])
    assert [text for _, text, _ in rows_of(source_of(bomb, good))] == ["too long", "good"]


def test_a_value_of_parquet_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("corpus.sources.MOST_BYTES", 64)
    file = write(tmp_path / "a.parquet", ["a", "x" * 64, "b" * 63])
    assert [text for _, text, _ in rows_of(source_of(file))] == ["a", "too long", "b" * 63]


def table(**columns: list) -> bytes:
    parquet.write_table(pa.table(columns), buffer := io.BytesIO())
    return buffer.getvalue()


DAMAGED = {
    "noise.parquet": b"no parquet at all",
    "pages.parquet": table(text=["a"])[:4] + b"\xff" * 20 + table(text=["a"])[24:],
    "numbers.parquet": table(text=[1]),
    "url.parquet": table(url=["a"], body=["b"]),
    "bad line 3.jsonl": b'{"text": "a"}\n\n{"text": \n',
    "field line 2.jsonl": b'{"text": "a"}\n{"body": "b"}\n',
    "number.jsonl": b'{"text": 7}\n',
    "list.jsonl": b'{"text": ["a"]}\n',
    "array.jsonl": b'["text"]\n',
    "deep.jsonl": b"[" * 100_000,
    "bad.jsonl.gz": b"no gzip",
    "cut.jsonl.gz": gzip.compress(random.Random(0).randbytes(1000))[:500],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_files_that_are_not_what_their_name_says(tmp_path, name):
    (tmp_path / name).write_bytes(DAMAGED[name])
    message = refuses(tmp_path / name, tmp_path / "out")
    where = re.findall("line .|url", name)
    assert name in message and all(words in message.replace(name, "") for words in where)
    assert not (tmp_path / "out").exists()


def test_sources_that_do_not_exist(tmp_path):
    out = tmp_path / "out"
    assert "did you mean fineweb-edu?" in refuses("finweb-edu", out)
    assert "fineweb-edu, fineweb" in refuses("xyzzy", out)
    assert "There is no file nowhere/a.jsonl" in refuses("nowhere/a.jsonl", out)
    assert "There is no file" in refuses(tmp_path / "*.jsonl", out)
    assert "--source needs" in refuses((), out)
    assert "takes one named source" in refuses(("pydocs", "a.txt"), out)
    assert "--subset and --revision go with" in refuses("pydocs", out, subset="x")
    (tmp_path / "a.csv").write_text("text")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone")
    for name in ("a.csv", "folder.txt", "*.txt", "b.jsonl"):
        assert f"{name.replace('*', 'folder')} cannot be read" in refuses(tmp_path / name, out)
    assert not out.exists()


def test_a_text_whose_disk_fails_is_skipped(tmp_path, monkeypatch):
    folder, read = write(tmp_path / "a.txt", ["one", "bad sectors", "two"]), Path.read_bytes

    def fail(path):
        if path.name == "000001.txt":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    found = [(text, skip) for _, text, skip in rows_of(source_of(folder))]
    assert found == [("one", False), ("unreadable", True), ("two", False)]


# --- Python's documentation ---


DOCSTRINGS = '''"""Module."""
raise SystemExit("never run")
class A:
    """  Class.

    More.
    """
    def f(self):
        "Method."
        def g(): "Inner."
        return 1
try: pass
except ValueError:
    async def h(): "Handler."
def none(): pass
'''


def test_pydocs_is_python_prose(tmp_path, monkeypatch):
    shutil.copytree(Path(json.__file__).parent, tmp_path / "json")  # a library soon read
    monkeypatch.setattr(corpus.pydocs.sysconfig, "get_path", lambda name: str(tmp_path))
    manifest = prepared("pydocs", tmp_path / "out")
    assert [shard.split for shard in manifest.shards] == ["val", "train"]
    version = "{}.{}.{}".format(*sys.version_info)
    assert (manifest.source["kind"], manifest.source["python"]) == ("pydocs", version)
    text = gpt2_tokenizer().decode(everything(tmp_path / "out"))
    assert json.__doc__.strip()[:200] in text and 'The "assert" statement' in text


def test_docstrings_come_in_the_order_of_the_sources_and_once(tmp_path, monkeypatch):
    files = {name: f'"Of {name}."' for name in ("test/a.py", "b/tests/a.py", "sitecustomize.py")}
    files["a.py"] = DOCSTRINGS
    files |= {"site-packages/a.py": '"Theirs."', "b/c.py": '"C."', "z.py": '"C."\ndef f(): "Last."'}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(corpus.pydocs.sysconfig, "get_path", lambda name: str(tmp_path))
    expected = "|Module.|Class.\n\nMore.|Method.|Inner.|Handler.|C.|Last."
    assert "|".join(pydocs_documents()).endswith(expected)
    assert "|".join(pydocs_documents()).count("|Of ") == 0


# --- Shakespeare ---


@pytest.mark.parametrize("root", ["data", "elsewhere"])
def test_shakespeare_is_the_text_that_lies_there(tmp_path, monkeypatch, root):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT2_DATA", str(tmp_path / "elsewhere"))
    path, text = tmp_path / root / "shakespeare" / "tiny.txt", "First Citizen:\nSpeak.\n\n" * 50
    path.parent.mkdir(parents=True)
    path.write_text(text)
    prepared("shakespeare", None)
    # In the folder of the text, which is no obstacle and stays.
    found = TokenShards("data/shakespeare", "train"), TokenShards("data/shakespeare", "val")
    ids = np.concatenate([shards.read([0], len(shards))[0] for shards in found])
    assert gpt2_tokenizer().decode(ids).replace("<|endoftext|>", "") == text
    assert path.read_text() == text


def test_shakespeare_is_fetched_where_it_belongs(tmp_path, monkeypatch):
    calls, file = [], tmp_path / "a.txt"
    file.write_text("Speak. " * 99)
    monkeypatch.setattr("corpus.sources.fetch", lambda *asked: calls.append(asked) or file)
    prepared("shakespeare", tmp_path / "out")
    assert calls == [SHAKESPEARE["shakespeare"]]
    assert calls[0][0] == "shakespeare/tiny.txt" and calls[0][1].endswith("/input.txt")


def test_the_pinned_shakespeare(real_data):
    place, _, size, sha256 = SHAKESPEARE["shakespeare"]
    content = (real_data / place).read_bytes()
    assert (len(content), hashlib.sha256(content).hexdigest()) == (size, sha256)
    place, _, size, _ = SHAKESPEARE["shakespeare-large"]
    assert (real_data / place).stat().st_size == size


# --- Real data ---


def test_fineweb_edus_first_documents(real_data, tmp_path):
    file = real_data / "fineweb_edu" / "sample.parquet"
    prepared(file, tmp_path / "out", shard_tokens=10_000)
    texts = parquet.read_table(file).column("text").to_pylist()
    assert len(texts) == 165
    assert np.array_equal(everything(tmp_path / "out"), tokens_of(texts))
