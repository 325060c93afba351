"""Every source: what its documents are, and what of them is left out."""

import errno
import gzip
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import chunks
import pydocs
import sources
from config import UserError
from corpus.shards import TokenShards, read_manifest
from corpus.tokenizer import gpt2_tokenizer
from load_fineweb import prepare
from tests.corpora import (
    TEXTS,
    everything,
    refuses,
    run,
    tokens_of,
    write_jsonl,
    write_parquet,
)
from workers import tokenize

# --- Files ---


@pytest.mark.parametrize("kind", [".parquet", ".jsonl", ".jsonl.gz"])
def test_local_files_become_the_plain_tokens(tmp_path, small_chunks, kind):
    write = write_parquet if kind == ".parquet" else write_jsonl
    file = write(tmp_path / f"my texts{kind}")
    manifest = prepare(str(file), tmp_path / "out", shard_tokens=1000, workers=1, quiet=True)
    assert np.array_equal(everything(tmp_path / "out"), tokens_of(TEXTS))
    assert manifest.shards[0].file == "my-texts_val_000000.npy"
    assert manifest.source["kind"] == "files"
    assert manifest.source["files"] == [file.name]
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()
    assert sum(shard.bytes for shard in manifest.shards) == sum(map(len, TEXTS))


def test_each_text_file_is_a_document(tmp_path, small_chunks):
    texts = ["Ünïcode\r\nand lines", "second", "", "third " * 200, "fourth"]
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for i, text in enumerate(texts):
        (tmp_path / "in" / f"{i}.txt").write_bytes(text.encode())
    (tmp_path / "in" / "deep" / "z.txt").write_text("last")
    (tmp_path / "in" / ".hidden.txt").write_text("not this")
    (tmp_path / "in" / "README.md").write_text("nor this")
    prepare(str(tmp_path / "in"), tmp_path / "out", shard_tokens=50, workers=1, quiet=True)
    assert np.array_equal(everything(tmp_path / "out"), tokens_of([*texts, "last"]))


def test_several_paths_keep_their_order_and_patterns_are_sorted(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ["b"])
    write_jsonl(tmp_path / "z1.jsonl", ["z1"])
    write_jsonl(tmp_path / "z0.jsonl", ["z0"])
    words = (str(tmp_path / "z*.jsonl"), str(tmp_path / "b.jsonl"))
    prepare(words, tmp_path / "out", shard_tokens=2, quiet=True)
    assert np.array_equal(everything(tmp_path / "out"), tokens_of(["z0", "z1", "b"]))


def test_empty_documents_and_missing_values_are_skipped(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", ["one", "", None, "two"])
    manifest = prepare(str(file), tmp_path / "out", shard_tokens=3, quiet=True)
    assert np.array_equal(everything(tmp_path / "out"), tokens_of(["one", "two"]))
    assert manifest.left_out == {"empty": 2}


def test_a_source_without_text_is_refused(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", ["", ""])
    message = refuses(str(file), tmp_path / "out")
    assert "holds no text to use (left out: 2 empty documents)" in message
    # With nothing in the way, the next source may have the directory.
    assert not (tmp_path / "out").exists()


def test_a_large_row_group_is_cut_into_ranges(tmp_path, monkeypatch):
    file = write_parquet(
        tmp_path / "a.parquet", [f"{i} {os.urandom(20).hex()}" for i in range(2500)]
    )
    whole = parquet.read_table(file).column("text").to_pylist()
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 600)
    ranges = list(chunks.file_chunks([str(file)]))
    assert len(ranges) > 2500 / 40
    assert [text for piece in ranges for text in piece.texts()] == whole
    one_group = write_parquet(tmp_path / "b.parquet", whole, group=2500)
    ranges = list(chunks.file_chunks([str(one_group)]))
    assert len(ranges) == chunks.RANGES_PER_ROW_GROUP
    assert [text for piece in ranges for text in piece.texts()] == whole


def test_pydocs_is_python_prose_in_a_fixed_order(tmp_path):
    manifest = prepare("pydocs", tmp_path / "pydocs", quiet=True)
    assert [shard.split for shard in manifest.shards] == ["val", "train"]
    assert 350_000 < manifest.tokens("train") + manifest.tokens("val") < 900_000
    assert manifest.source["kind"] == "pydocs"
    assert manifest.source["python"] == "{}.{}.{}".format(*sys.version_info)
    text = gpt2_tokenizer().decode(everything(tmp_path / "pydocs"))
    assert json.__doc__.strip()[:200] in text
    assert 'The "assert" statement' in text
    assert (
        sources.open_source(("pydocs",), None, None).description.items() <= manifest.source.items()
    )


def test_docstrings_in_the_order_of_the_source():
    source = '''"""Module."""
if True:
    class A:
        """  Class.

        More.
        """
        def f(self):
            "Method."
            def g(): "Inner."
            return 1
try:
    pass
except ValueError:
    async def h(): "Handler."
def none(): pass
'''
    found = pydocs._docstrings(source.encode())
    assert found == ["Module.", "Class.\n\nMore.", "Method.", "Inner.", "Handler."]


# --- Mistakes ---


def test_sources_that_do_not_exist(tmp_path):
    out = tmp_path / "out"
    assert "did you mean 'fineweb-edu'?" in refuses("finweb-edu", out)
    assert "the named sources are fineweb-edu, fineweb" in refuses("xyzzy", out)
    assert "There is no file nowhere/a.jsonl" in refuses("nowhere/a.jsonl", out)
    assert "There is no file" in refuses(str(tmp_path / "*.jsonl"), out)
    assert "takes one named source" in refuses(("pydocs", "a.txt"), out)
    assert "--subset and --revision go with" in refuses("pydocs", out, subset="x")
    (tmp_path / "a.csv").write_text("text")
    assert "a.csv cannot be read" in refuses(str(tmp_path / "a.csv"), out)
    (tmp_path / "folder.txt").mkdir()
    assert "holds no .parquet" in refuses(str(tmp_path / "folder.txt"), out)
    assert "folder.txt cannot be read" in refuses(str(tmp_path / "*.txt"), out)
    (tmp_path / "empty").mkdir()
    assert "holds no .parquet" in refuses(str(tmp_path / "empty"), out)
    assert not out.exists()


def test_files_that_are_not_what_their_name_says(tmp_path):
    table = pa.table({"url": ["a"], "body": ["b"]})
    parquet.write_table(table, tmp_path / "columns.parquet")
    parquet.write_table(pa.table({"text": [1]}), tmp_path / "numbers.parquet")
    (tmp_path / "noise.parquet").write_bytes(b"no parquet at all")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n\n{"text": \n')
    (tmp_path / "field.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    (tmp_path / "bad.jsonl.gz").write_bytes(b"no gzip")
    whole = gzip.compress(os.urandom(1000))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    expected = {
        "columns.parquet": "no column 'text'; its columns are url, body",
        "numbers.parquet": "holds int64, not text",
        "noise.parquet": "noise.parquet is not a readable Parquet file",
        "bad.jsonl": "bad.jsonl, line 3, is not JSON",
        "field.jsonl": 'field.jsonl, line 2, is no object with a "text" string',
        "deep.jsonl": "deep.jsonl, line 1, is not JSON",
        "bad.jsonl.gz": "bad.jsonl.gz is a damaged gzip file",
        "cut.jsonl.gz": "cut.jsonl.gz is a damaged gzip file",
        "latin.txt": "holds no text to use (left out: 1 not UTF-8: ",
    }
    for name, sentence in expected.items():
        assert sentence in refuses(str(tmp_path / name), tmp_path / f"out-{name}")


def test_a_file_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    for name in ("a.parquet", "a.jsonl", "a.jsonl.gz"):
        path = tmp_path / name
        path.symlink_to(tmp_path / "gone")
        assert f"{name} cannot be read (No such file" in refuses(str(tmp_path), tmp_path / "out")
        path.unlink()


# --- Left out ---


def test_what_cannot_be_used_is_counted_and_named(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    for i in range(7):
        (folder / f"latin{i}.txt").write_bytes("naïve".encode("latin-1"))
    (folder / "empty.txt").write_bytes(b"")
    (folder / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    (folder / "good.txt").write_bytes(b"\xef\xbb\xbfgood")
    lines = [b'{"text": "one"}', b'{"text": "na\xefve"}', b'{"text": null}', b"", b'{"text": ""}']
    (folder / "lines.jsonl").write_bytes(b"\n".join(lines))
    result = run("--source", folder, "--out", tmp_path / "out", "--shard-tokens", 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == (
        "left out: 4 empty documents; 8 not UTF-8: notes/latin0.txt, notes/latin1.txt, "
        "notes/latin2.txt, notes/latin3.txt, notes/latin4.txt and 3 more; "
        "1 unreadable: notes/gone.txt."
    )
    manifest = read_manifest(tmp_path / "out")
    assert manifest.left_out == {"empty": 4, "not_utf8": 8, "unreadable": 1}
    assert np.array_equal(everything(tmp_path / "out"), tokens_of(["good", "one"]))
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text()


def test_a_text_whose_disk_fails_is_left_out(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl")
    (tmp_path / "bad.txt").write_text("bad sectors")
    read = Path.read_bytes

    def fail(path):
        if path.name == "bad.txt":
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    manifest = prepare(str(tmp_path), tmp_path / "out", shard_tokens=1000, quiet=True)
    assert manifest.left_out == {"unreadable": 1}
    assert np.array_equal(everything(tmp_path / "out"), tokens_of(TEXTS))


def test_a_line_is_named_by_its_number_in_the_file(tmp_path, small_chunks):
    lines = [json.dumps({"text": text}).encode() for text in TEXTS]
    lines[117] = b'{"text": "\xff"}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    manifest = prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", workers=1, quiet=True)
    assert manifest.left_out == {"not_utf8": 1}
    assert manifest.left_out_names["not_utf8"][0].endswith("a.jsonl line 118")


def test_a_parquet_row_that_is_not_utf8(tmp_path, small_chunks):
    texts = [b"text %d" % i for i in range(300)]
    texts[203] = b"\xff\xfe"
    column = pa.array(texts, pa.binary()).view(pa.string())
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=100)
    manifest = prepare(str(tmp_path / "a.parquet"), tmp_path / "out", quiet=True, shard_tokens=99)
    assert manifest.left_out == {"not_utf8": 1}
    assert manifest.left_out_names["not_utf8"][0].endswith("a.parquet row 204")
    good = [text.decode() for text in texts if text.isascii()]
    assert np.array_equal(everything(tmp_path / "out"), tokens_of(good))


def plain_pieces(texts, shortest, longest) -> tuple[list[list[int]], int]:
    """Return the pieces of all documents, and how many are too short."""
    pieces = []
    for text in texts:
        body = gpt2_tokenizer().encode(text).tolist()
        while body:
            pieces.append([gpt2_tokenizer().eot, *body[: longest - 1]])
            body = body[longest - 1 :]
    kept = [piece for piece in pieces if len(piece) >= shortest]
    return kept, len(pieces) - len(kept)


@given(
    words=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    shortest=st.integers(1, 30),
    longest=st.integers(2, 40),
)
@settings(max_examples=60, deadline=None)
def test_documents_are_cut_and_left_out_by_length(words, shortest, longest):
    texts = [" ".join(["word"] * count) for count in words]
    tokens, hashes, left_out = tokenize(chunks.Documents(tuple(texts)), shortest, longest)
    kept, short = plain_pieces(texts, shortest, longest)
    assert tokens.tolist() == [token for piece in kept for token in piece]
    assert left_out.counts == ({"short": short} if short else {})
    assert len(hashes) == len(kept)


def test_without_limits_a_document_is_one_piece():
    texts = ("a", "b " * 5000)
    assert np.array_equal(tokenize(chunks.Documents(texts)).tokens, tokens_of(texts))


def test_document_limits_are_recorded(tmp_path):
    file, out = write_jsonl(tmp_path / "a.jsonl"), tmp_path / "out"
    limits = {"min_document_tokens": 10, "max_document_tokens": 16, "shard_tokens": 500}
    manifest = prepare(str(file), out, **limits, quiet=True)
    kept, short = plain_pieces(TEXTS, 10, 16)
    assert everything(out).tolist() == [token for piece in kept for token in piece]
    assert manifest.left_out == {"short": short} and short > 0
    assert "--min-document-tokens 10, not 9" in refuses(
        str(file), out, **{**limits, "min_document_tokens": 9}
    )
    assert "--max-document-tokens 16, not None" in refuses(
        str(file), out, **{**limits, "max_document_tokens": None}
    )
    message = refuses(str(file), tmp_path / "b", min_document_tokens=17, max_document_tokens=16)
    assert "--min-document-tokens 17 is above --max-document-tokens 16" in message
    message = refuses(str(file), tmp_path / "b", min_document_tokens=10**6)
    assert "holds no text to use (left out: 300 pieces below the minimum length)" in message


# --- Shakespeare ---


def test_shakespeare_is_the_text_that_lies_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "shakespeare").mkdir(parents=True)
    text = "First Citizen:\nSpeak, speak.\n\n" * 50
    (tmp_path / "data" / "shakespeare" / "tiny.txt").write_text(text)
    prepare("shakespeare", quiet=True)
    # In the folder of the text, which is no obstacle and stays.
    found = TokenShards("data/shakespeare", "train"), TokenShards("data/shakespeare", "val")
    tokens = np.concatenate([shards.read([0], len(shards))[0] for shards in found])
    assert np.array_equal(tokens, tokens_of([text]))
    assert (tmp_path / "data" / "shakespeare" / "tiny.txt").read_text() == text


def test_shakespeare_is_fetched_where_it_belongs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []

    def fetch(url, path, sha256, size):
        calls.append((url, path, sha256, size))
        raise UserError("no network")

    monkeypatch.setattr(sources, "download", fetch)
    assert refuses("shakespeare", None) == "no network"
    assert calls[0][0].endswith("char-rnn/master/data/tinyshakespeare/input.txt")
    assert calls[0][1] == Path("data/shakespeare/tiny.txt")
    assert calls[0][3] == 1_115_394
    assert not (tmp_path / "data" / "shakespeare").exists()


def test_the_pinned_shakespeare(real_data):
    content = (real_data / "shakespeare" / "tiny.txt").read_bytes()
    assert hashlib.sha256(content).hexdigest() == sources.TEXTS["tiny"].sha256
    assert len(content) == sources.TEXTS["tiny"].size
    assert (real_data / "shakespeare" / "large.txt").stat().st_size == sources.TEXTS["large"].size


# --- Real data ---


def test_fineweb_edus_first_documents(real_data, tmp_path):
    file = real_data / "fineweb_edu" / "sample.parquet"
    prepare(str(file), tmp_path / "out", shard_tokens=100_000, quiet=True)
    tokens = everything(tmp_path / "out")
    assert np.count_nonzero(tokens == gpt2_tokenizer().eot) == 165
    assert gpt2_tokenizer().decode(tokens).count("<|endoftext|>") == 165
