"""load_fineweb.py: the split, tokenizers, skipped documents, interruptions, full disks."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.shards import TokenShards, read_manifest
from corpus.tokenizer import TOKENIZER_FILE, GPT2Tokenizer, gpt2_tokenizer
from tests import corpora
from tests.conftest import ROOT
from tests.corpora import TEXTS, contents, documents, everything, prepared, refuses, run, write

CODECS = [{}, {"tokenizer": "char"}, {"tokenizer": "bpe", "vocab_size": 280}]

# --- Mistakes ---


@pytest.mark.parametrize(
    "options",
    [
        *({"max_tokens": 1}, {"shard_tokens": 0}, {"val_tokens": 0}, {"workers": 0}),
        *({"workers": -2}, {"min_document_tokens": 0}, {"max_document_tokens": 1}),
        *({"vocab_size": 271, "tokenizer": "bpe"}, {"vocab_size": 65537, "tokenizer": "bpe"}),
        *({"vocab_size": 300}, {"tokenizer": "bpe"}),
        {"min_document_tokens": 17, "max_document_tokens": 16},
    ],
)
def test_numbers_that_make_no_sense(tmp_path, options):
    message = refuses("pydocs", tmp_path / "out", **options).replace("-", "_")
    assert any(name in message for name in options)
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_foreseen(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(1000))
    message = refuses(write(tmp_path / "a.jsonl"), tmp_path / "deep" / "out")
    assert "0.0 MB free" in message and "--max-tokens" in message
    assert not (tmp_path / "deep").exists()
    prepared(tmp_path / "a.jsonl", tmp_path / "out", max_tokens=400)


def test_a_mistake_before_the_first_shard_leaves_nothing(tmp_path):
    file, out = tmp_path / "a.jsonl", tmp_path / "out"
    file.write_text('{"text": "one"}\n{"text"\n')
    assert "line 2" in refuses(file, out)
    assert not out.exists()
    out.mkdir()
    (out / ".keep").write_text("")
    assert "line 2" in refuses(file, out, tokenizer="char")
    file.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert "lower --vocab-size" in refuses(file, out, tokenizer="bpe", vocab_size=999)
    assert "text to train on" in refuses(file, out, tokenizer="char", min_document_tokens=9)
    assert list(contents(out)) == [".keep"]
    assert prepared(file, out).complete


# --- Twice into the same directory ---


def test_a_finished_directory_is_left_alone(tmp_path):
    file, out = write(tmp_path / "a.jsonl"), tmp_path / "out"
    arguments = ("--source", file, "--out", out, "--shard-tokens", 2000)
    first = run(*arguments)
    assert (first.returncode, first.stderr.count("Traceback")) == (0, 0)
    assert "training and 2,000 validation tokens" in first.stdout
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = run(*arguments)
    assert again.returncode == 0
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_what_differs_is_named(tmp_path):
    file, out = write(tmp_path / "a.jsonl"), tmp_path / "out"
    same = {"shard_tokens": 1000, "max_tokens": 3000}
    prepared(file, out, **same)
    before = contents(out)
    for changes, words in (
        ({"shard_tokens": 999}, "--shard-tokens 1000, not 999"),
        ({"max_tokens": None}, "--max-tokens 3000, not None"),
        ({"val_tokens": 7}, "--val-tokens None, not 7"),
        ({"min_document_tokens": 9}, "--min-document-tokens None, not 9"),
        ({"max_document_tokens": 9}, "--max-document-tokens None, not 9"),
        ({"tokenizer": "char"}, "--tokenizer gpt2, not char"),
    ):
        assert words in refuses(file, out, **{**same, **changes})
    other = write(tmp_path / "b.parquet")
    assert "['a.jsonl'], not ['b.parquet']" in refuses(other, out, **same)
    file.write_bytes(file.read_bytes().replace(b"over", b"OVER"))
    assert "digest" in refuses(file, out, **same)
    assert contents(out) == before
    (out / "a_train_000001.npy").unlink()
    assert "a_train_000001.npy" in refuses(file, out, **same)


def test_other_peoples_files_are_never_overwritten(tmp_path):
    file, out = write(tmp_path / "a.jsonl"), tmp_path / "out"
    out.mkdir()
    for name in ("edufineweb_train_000001.npy", "a.csv"):
        (out / name).write_bytes(b"theirs")
        assert f"holds other files ({name})" in refuses(file, out)
        assert contents(out) == {name: b"theirs"}
        (out / name).unlink()
    assert "is a file" in refuses(file, file)
    assert str(file) in refuses(file, file / "out")


def test_what_a_killed_writer_left_is_removed_and_what_others_did_stays(tmp_path):
    file, out = write(tmp_path / "a.jsonl"), tmp_path / "out"
    whole = prepared(file, tmp_path / "whole", shard_tokens=1000)
    with corpora.stopped_after(2):
        prepared(file, out, shard_tokens=1000)
    for name in ("a_train_000003.npy", "manifest.json", "tokenizer.json"):
        (out / f".{name}.0123456789abcdef.tmp").write_bytes(b"half")
    (out / ".a_train_000003.npy.tmp").write_bytes(b"theirs")
    assert prepared(file, out, shard_tokens=1000) == whole
    expected = {**contents(tmp_path / "whole"), ".a_train_000003.npy.tmp": b"theirs"}
    assert contents(out) == expected


# --- What validates ---


@pytest.mark.parametrize("options", CODECS)
@pytest.mark.parametrize("val_tokens", [None, 100])
def test_the_least_hashes_validate_whatever_the_tokenizer(tmp_path, options, val_tokens):
    # Half of a character, which UTF-8 cannot hold, becomes a replacement.
    texts = [text.replace("says", "\ud800") for text in TEXTS]
    prepared(write(tmp_path / "a.jsonl", texts), tmp_path / "out", val_tokens=val_tokens, **options)
    held = corpora.held_out(texts, val_tokens)
    for split in ("val", "train"):
        expected = [text for i, text in enumerate(texts) if (i in held) == (split == "val")]
        assert documents(tmp_path / "out", split) == [t.replace("\ud800", "�") for t in expected]
    assert len(held) > 3


@pytest.mark.parametrize("options", CODECS)
@pytest.mark.parametrize("text", ["Well, well. " * 99 + "So", "東京 «naïve» 😀 " * 99])
def test_the_last_tenth_of_a_single_text_validates(tmp_path, options, text):
    (tmp_path / "a.txt").write_text(text)
    prepared(tmp_path / "a.txt", tmp_path / "out", **options)
    (train,), (val,) = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert train + val == text
    assert not text.isascii() or len(train) == int(0.9 * len(text))
    size = len(text.encode())
    assert 0 <= len(val.encode()) - (size - size * 9 // 10) < 4


def test_of_documents_that_are_all_too_long_the_last_is_cut(tmp_path):
    texts = ["a" * 500, "b" * 400, "c" * 300]
    file = write(tmp_path / "a.jsonl", texts)
    assert "--val-tokens" in refuses(file, tmp_path / "out", val_tokens=300)
    prepared(file, tmp_path / "out")
    assert documents(tmp_path / "out", "train") == [*texts[:2], "c" * 180]
    assert documents(tmp_path / "out", "val") == ["c" * 120]


@pytest.mark.parametrize("limit", [10, 999, 1000, 1001, 2000, 4321, None])
def test_max_tokens_is_exact_and_of_a_large_source_the_first_shard_validates(
    tmp_path, small_batches, limit
):
    file, out, expected = write(tmp_path / "a.jsonl"), tmp_path / "out", corpora.tokens_of(TEXTS)
    manifest = prepared(file, out, shard_tokens=1000, max_tokens=limit)
    assert manifest.tokens() == (limit or len(expected)) and manifest.complete
    if limit is None or limit > 1000:
        assert manifest.tokens("val") == 1000
        assert np.array_equal(everything(out), expected[:limit])
    else:
        found = [*documents(out, "val"), *documents(out, "train")]
        assert manifest.tokens("train") > manifest.tokens("val") > 0
        assert limit < 100 or len(set(found)) == len(found) == len({*found} & {*TEXTS}) + 1


def test_a_few_tokens_of_a_long_text_train_and_validate(tmp_path):
    (tmp_path / "a.txt").write_text("Well, well. " * 9999)
    manifest = prepared(tmp_path / "a.txt", tmp_path / "out", max_tokens=1000)
    assert manifest.tokens() == 1000 and manifest.tokens("train") > manifest.tokens("val") > 0


@settings(max_examples=30)
@given(
    counts=st.lists(st.integers(1, 60), min_size=2, max_size=9),
    shortest=st.integers(1, 30),
    longest=st.integers(2, 40),
)
def test_documents_are_cut_and_skipped_by_length(tmp_path_factory, counts, shortest, longest):
    base, shortest = tmp_path_factory.mktemp("cut"), min(shortest, longest)
    texts = [" ".join(["word"] * count) for count in counts]
    bodies = [gpt2_tokenizer().encode(text) for text in texts]
    starts = [(body, i) for body in bodies for i in range(0, len(body), longest - 1)]
    pieces = [body[i : i + longest - 1] for body, i in starts]
    kept = [[gpt2_tokenizer().eot, *piece] for piece in pieces if len(piece) >= shortest - 1]
    short, size = len(pieces) - len(kept), sum(map(len, kept)) // 3
    if size > 1 and 8 * size <= sum(map(len, texts)):
        limits = {"min_document_tokens": shortest, "max_document_tokens": longest}
        manifest = prepared(
            write(base / "a.jsonl", texts), base / "out", shard_tokens=size, **limits
        )
        assert everything(base / "out").tolist() == [token for piece in kept for token in piece]
        assert list(manifest.skipped.values()) == [short] * (short > 0)


# --- Tokenizers ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A source, and its shards in pairs of bytes that were learnt from it."""
    base = tmp_path_factory.mktemp("trained")
    texts = [f"{text} {i * i} «naïve» {i * 77}" for i, text in enumerate(TEXTS)]
    prepared(write(base / "a.jsonl", texts), base / "out", tokenizer="bpe", vocab_size=600)
    return base / "a.jsonl", base / "out"


def test_a_vocabulary_is_learnt_the_same_way_again(trained, tmp_path):
    file, out = trained
    result = run("--source", file, "--out", tmp_path, "--tokenizer", "bpe", "--vocab-size", 600)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path) == contents(out) and TOKENIZER_FILE in contents(out)
    manifest = read_manifest(out)
    assert (manifest.vocab_size, manifest.eot, everything(out).max()) == (600, 599, 599)
    message = refuses(file, tmp_path / "more", tokenizer="bpe", vocab_size=60_000)
    assert "lower --vocab-size" in message


def test_transformers_reads_the_same_tokenizer(trained):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(trained[1])
    ours = TokenShards(trained[1], "val").tokenizer
    for text in (*TEXTS[:20], "  Ünïcode\n\n\t東京 😀 it's ", "<|reserved_1|>x<|endoftext|>"):
        assert theirs.encode(text, split_special_tokens=True) == ours.encode(text).tolist()
    assert len(theirs) == 600 and theirs.convert_tokens_to_ids("<|endoftext|>") == 599
    for i, size in enumerate(ours.token_bytes()):
        assert (theirs.decode([i], skip_special_tokens=True) == "") == (size == 0) == (i >= 584)


@pytest.mark.parametrize("shard_tokens", [100_000, 1000])
def test_what_validates_teaches_the_vocabulary_nothing(tmp_path, shard_tokens):
    """The first shard of a large source validates, and the least hashes of a small one."""
    salted = [f"{i} {'zyxwv ' * 200}" for i in range(999)]
    least, most = min(salted, key=corpora.hash_of), max(salted, key=corpora.hash_of)
    options = {"tokenizer": "bpe", "vocab_size": 320, "shard_tokens": shard_tokens}
    for split, texts in (("val", [least, *TEXTS]), ("train", [*TEXTS, most])):
        prepared(write(tmp_path / f"{split}.jsonl", texts), tmp_path / split, **options)
        assert any("zyxwv" in text for text in documents(tmp_path / split, split))
        vocabulary = json.loads((tmp_path / split / TOKENIZER_FILE).read_text())["model"]["vocab"]
        assert ("Ġzyxwv" in vocabulary) == (split == "train")


@pytest.mark.parametrize("shard_tokens", [900, 1500, 3000])
def test_a_vocabulary_of_any_alphabet_is_learnt_of_a_large_source(tmp_path, shard_tokens):
    file = write(tmp_path / "a.jsonl", [f"東京は日本の首都です {i}" for i in range(800)])
    options = {"tokenizer": "bpe", "vocab_size": 300, "shard_tokens": shard_tokens}
    assert prepared(file, tmp_path / "out", **options).complete


@pytest.mark.parametrize("options", CODECS)
def test_the_tokenizer_of_other_data_gives_its_ids(tmp_path, options):
    first, other = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", TEXTS[50:250])
    prepared(first, tmp_path / "first", **options)
    theirs = TokenShards(tmp_path / "first", "val").tokenizer
    options = {"tokenizer": str(tmp_path / "first"), "shard_tokens": 1000}
    manifest = prepared(other, tmp_path / "out", **options)
    assert np.array_equal(everything(tmp_path / "out"), corpora.tokens_of(TEXTS[50:250], theirs))
    assert TokenShards(tmp_path / "out", "val").tokenizer.json == theirs.json
    before = contents(tmp_path / "out")
    assert prepared(other, tmp_path / "out", **options) == manifest
    assert contents(tmp_path / "out") == before
    if getattr(theirs, "alphabet", None):
        assert theirs.alphabet == "".join(sorted({*"".join(TEXTS)}))
        odd = write(tmp_path / "c.jsonl", [*TEXTS, "naïve"])
        assert "'ï'" in refuses(odd, tmp_path / "odd", **options)


@pytest.mark.parametrize("count", [65_536, 65_537])
def test_a_vocabulary_that_is_too_large_for_shards(tmp_path, count):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    tokens += [f"{i:06d}" for i in range(count - len(tokens))]
    library = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.save(str(tmp_path / TOKENIZER_FILE))
    file, options = write(tmp_path / "a.jsonl"), {"tokenizer": str(tmp_path)}
    if count > 65_536:
        assert "65,537 ids" in refuses(file, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    else:
        assert prepared(file, tmp_path / "out", **options).vocab_size == 65_536


# --- Workers and interruptions ---


@pytest.mark.parametrize(
    "options",
    [
        *({"shard_tokens": 61}, {"shard_tokens": 350}, {"shard_tokens": 1000}),
        *({"shard_tokens": 2500, "tokenizer": "char"}, {"shard_tokens": 100_000}),
        *({"shard_tokens": 350, "max_tokens": 1001}, {"shard_tokens": 350, "max_tokens": 1050}),
    ],
)
def test_workers_and_interruptions_change_nothing(tmp_path, monkeypatch, small_batches, options):
    """Batches end inside of shards, at their ends, and without any text; each takes its time."""
    encode, rng = GPT2Tokenizer.encode_batch, random.Random(0)

    def slow(tokenizer, texts):
        time.sleep(rng.random() / 200)
        return encode(tokenizer, texts)

    monkeypatch.setattr(GPT2Tokenizer, "encode_batch", slow)
    texts = [f"{i} {'word ' * (i % 40)}" for i in range(120)]
    for i in (0, 3, 4, *range(60, 95), 118, 119):
        texts[i] = ""
    source, part = write(tmp_path / "in" / "a.parquet", texts).parent, tmp_path / "part"
    (source / "b.txt").write_bytes(b"\xff")
    options = {**options, "min_document_tokens": 5, "max_document_tokens": 20}
    for workers in (1, 2, 3):
        whole = prepared(source, tmp_path / str(workers), workers=workers, **options)
        assert contents(tmp_path / str(workers)) == contents(tmp_path / "1")
    assert whole.skipped.get("empty") == 40 or options["max_tokens"]
    for number in range(len(whole.shards)):
        with corpora.stopped_after(1):
            prepared(source, part, workers=number % 3 + 1, **options)
            pytest.fail("it was to be interrupted")
        assert not read_manifest(part).complete
    assert prepared(source, part, **options) == whole
    assert contents(part) == contents(tmp_path / "1")


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """A source that takes seconds, so that a busy machine does not end it before it is stopped."""
    rng, base = np.random.default_rng(0), tmp_path_factory.mktemp("long")
    words = ["shard", "token", "window", "batch", "model", "loss", "update", "figure"]
    texts = [" ".join(rng.choice(words, 2000)) + f" {i}" for i in range(4000)]
    return write(base / "a.parquet", texts)


def begin(source, out, shards: int, workers: int = 2) -> subprocess.Popen:
    """Start a preparation in a process group of its own, and wait until it has so many shards.

    SIGINT is ignored when it starts, as in a script's background.
    """
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable, ROOT / "load_fineweb.py"]
    command += ["--source", source, "--out", out, "--shard-tokens", 100_000, "--workers", workers]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(list(map(str, command)), start_new_session=True, **options)
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.npy"))) < shards and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]
    return process


@pytest.mark.slow
def test_killed_ten_times_and_run_again_gives_the_same_bytes(long, tmp_path):
    out, rng = tmp_path / "out", random.Random(0)
    prepared(long, tmp_path / "whole", shard_tokens=100_000)
    for workers in range(1, 11):
        before = len(list(out.glob("*.npy")))
        process = begin(long, out, before + rng.randint(1, 4), workers % 4 + 1)
        time.sleep(rng.random() / 50)
        process.kill()
        process.communicate()
        assert not read_manifest(out).complete
        (out / f".a_train_{workers:06d}.npy.0123456789abcdef.tmp").write_bytes(b"half a shard")
    assert prepared(long, out, shard_tokens=100_000) == read_manifest(tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "everyone"),
    [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGTERM, True)],
)
def test_a_signal_ends_it_with_a_sentence(long, tmp_path, number, everyone):
    process = begin(long, tmp_path / "out", 2)
    (os.killpg if everyone else os.kill)(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    assert "Traceback" not in output
    sentence = "interrupted; the same command continues after the last complete shard."
    assert output.splitlines()[-1] == sentence
    assert not read_manifest(tmp_path / "out").complete
    assert not [name for name in contents(tmp_path / "out") if name.startswith(".")]


def test_a_second_preparation_at_the_same_time_is_refused(long, tmp_path):
    out = tmp_path / "out"
    process = begin(long, out, 1)
    # Still there, but not about to finish before the second one has begun.
    os.kill(process.pid, signal.SIGSTOP)
    before = contents(out)
    result = run("--source", long, "--out", out, "--shard-tokens", 100_000)
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert f"Another process (process {process.pid} on " in result.stderr
    assert contents(out) == before
    process.kill()
    process.communicate()


# --- Disks ---


def test_a_disk_that_fills_keeps_the_shards_it_has(tmp_path):
    # Digits and letters make more tokens than English of that length, so that the estimate fits.
    rng = np.random.default_rng(0)
    file = write(tmp_path / "a.jsonl", [rng.bytes(500).hex() for _ in range(1200)])
    prepared(file, tmp_path / "whole", shard_tokens=100_000)
    whole = contents(tmp_path / "whole")
    with corpora.small_disk(tmp_path / "disk", "1m") as disk:
        out, arguments = disk / "out", ("--source", file, "--shard-tokens", 100_000)
        result = run(*arguments, "--out", out)
        assert (result.returncode, "Traceback" in result.stderr) == (1, False)
        assert result.stderr.splitlines()[-1].startswith(f"error: {out}/a_train_00000")
        assert "(No space left on device)" in result.stderr
        found, manifest = contents(out), read_manifest(out)
        assert len(manifest.shards) == 5
        assert found.keys() == {"manifest.json", *(shard.file for shard in manifest.shards)}
        assert all(found[shard.file] == whole[shard.file] for shard in manifest.shards)
        corpora.mount("-o", "remount,size=4m", str(disk))
        assert run(*arguments, "--out", out).returncode == 0
        assert contents(out) == whole


def test_a_disk_that_cannot_be_written(tmp_path):
    file = write(tmp_path / "a.jsonl")
    with corpora.small_disk(tmp_path / "disk", "4m") as disk:
        done = prepared(file, disk / "done", shard_tokens=1000)
        (disk / "empty").mkdir()
        corpora.mount("-o", "remount,ro", str(disk))
        for out in (disk / "new", disk / "empty"):
            result = run("--source", file, "--out", out)
            assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
            assert "Read-only file system" in result.stderr
        # Data that is there can be used all the same.
        assert prepared(file, disk / "done", shard_tokens=1000) == done
