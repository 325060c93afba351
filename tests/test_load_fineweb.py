"""Documents to shards: every source, any number of workers, interrupted or not."""

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import chunks
import load_fineweb
import sources
from config import UserError
from load_fineweb import prepare
from manifests import read_manifest
from shards import TokenStream
from tests.conftest import ROOT
from tokenizer import gpt2_tokenizer

TEXTS = [f"Document {i} says: {'over and over ' * (i % 7)}\n\nEnd." for i in range(300)]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_parquet(path: Path, texts=TEXTS, group: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"id": list(range(len(texts))), "text": texts})
    parquet.write_table(table, path, row_group_size=group)
    return path


def write_jsonl(path: Path, texts=TEXTS) -> Path:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wb") as file:
        file.write(lines.encode())
    return path


def tokens_of(texts) -> np.ndarray:
    """The plain way: one document after another."""
    gpt2 = gpt2_tokenizer()
    pieces = [np.append(np.uint16(gpt2.eot), gpt2.encode(text)) for text in texts if text]
    return np.concatenate(pieces)


def everything(directory: Path) -> np.ndarray:
    names = [shard.file for shard in read_manifest(directory).shards]
    return np.concatenate([np.load(directory / name) for name in names])


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def run(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "load_fineweb.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def refuses(source, out, **arguments) -> str:
    with pytest.raises(UserError) as caught:
        prepare(source, out, quiet=True, **arguments)
    return str(caught.value)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks so small that every source has many; holds in this process only."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 500)


# --- Sources ---


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
    prepare(str(file), tmp_path / "out", shard_tokens=3, quiet=True)
    assert np.array_equal(everything(tmp_path / "out"), tokens_of(["one", "two"]))


def test_a_source_without_text_is_refused(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", ["", ""])
    assert "holds no text" in refuses(str(file), tmp_path / "out")


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
    found = sources._docstrings(source.encode())
    assert found == ["Module.", "Class.\n\nMore.", "Method.", "Inner.", "Handler."]


# --- The hub ---


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
        "bad.jsonl.gz": "bad.jsonl.gz is a damaged gzip file",
        "cut.jsonl.gz": "cut.jsonl.gz is a damaged gzip file",
        "latin.txt": "latin.txt is not UTF-8 text",
    }
    for name, sentence in expected.items():
        assert sentence in refuses(str(tmp_path / name), tmp_path / f"out-{name}")


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_tokens", 1), ("shard_tokens", 0), ("val_tokens", 0), ("workers", 0), ("workers", -2)],
)
def test_numbers_that_make_no_sense(tmp_path, name, value):
    message = refuses("pydocs", tmp_path / "out", **{name: value})
    assert f"--{name.replace('_', '-')} must be at least" in message


def test_a_full_disk_is_foreseen(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(load_fineweb.shutil, "disk_usage", lambda path: usage(1000))
    file = write_jsonl(tmp_path / "a.jsonl")
    message = refuses(str(file), tmp_path / "deep" / "out")
    assert "its disk has 0.0 MB free" in message
    assert "--max-tokens" in message
    assert not (tmp_path / "deep").exists()


def test_a_mistake_on_the_command_line_is_one_sentence(tmp_path):
    result = run("--source", "pydoc", "--out", tmp_path / "out")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        "error: There is no source and no file 'pydoc'; did you mean 'pydocs'?\n"
    )


# --- Twice into the same directory ---


def test_a_finished_directory_is_left_alone(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl")
    arguments = ("--source", file, "--out", tmp_path / "out", "--shard-tokens", 2000)
    first = run(*arguments)
    assert (first.returncode, first.stderr.count("Traceback")) == (0, 0)
    assert "training and 2,000 validation tokens" in first.stdout
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    again = run(*arguments)
    assert again.returncode == 0
    assert "is already complete" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()} == before


def test_what_differs_is_named(tmp_path):
    file, out = write_jsonl(tmp_path / "a.jsonl"), tmp_path / "out"
    prepare(str(file), out, shard_tokens=1000, max_tokens=3000, quiet=True)
    before = contents(out)
    same = {"shard_tokens": 1000, "max_tokens": 3000}
    assert "--shard-tokens 1000, not 999" in refuses(
        str(file), out, **{**same, "shard_tokens": 999}
    )
    assert "--max-tokens 3000, not None" in refuses(str(file), out, shard_tokens=1000)
    assert "--val-tokens None, not 7" in refuses(str(file), out, **same, val_tokens=7)
    assert "source kind files, not pydocs" in refuses("pydocs", out, **same)
    file.write_bytes(file.read_bytes().replace(b"over", b"OVER"))
    assert "source digest" in refuses(str(file), out, **same)
    assert contents(out) == before


def test_other_peoples_files_are_never_overwritten(tmp_path):
    file, out = write_jsonl(tmp_path / "a.jsonl"), tmp_path / "out"
    out.mkdir()
    np.save(out / "edufineweb_train_000001.npy", np.zeros(5, dtype=np.uint16))
    assert "holds other files (edufineweb_train_000001.npy)" in refuses(str(file), out)
    assert "is a file" in refuses(str(file), file)


def test_a_lost_shard_is_noticed(tmp_path):
    file, out = write_jsonl(tmp_path / "a.jsonl"), tmp_path / "out"
    manifest = prepare(str(file), out, shard_tokens=1000, quiet=True)
    (out / manifest.shards[1].file).unlink()
    assert "000001.npy is missing or damaged" in refuses(str(file), out, shard_tokens=1000)


# --- Workers, limits, interruptions ---


def test_the_number_of_workers_changes_nothing(tmp_path):
    texts = [f"{i} {os.urandom(300).hex()}" for i in range(9000)]
    file = write_parquet(tmp_path / "a.parquet", texts, group=1000)
    # Beyond two chunks' worth of text, so that three workers do start.
    jsonl = write_jsonl(tmp_path / "b.jsonl", texts * 2)
    for workers in (1, 3):
        prepare(
            (str(file), str(jsonl)),
            tmp_path / str(workers),
            shard_tokens=2_000_000,
            workers=workers,
            quiet=True,
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


@pytest.mark.parametrize("limit", [2, 999, 1000, 2000, 2001, 4321])
def test_max_tokens_is_exact(tmp_path, small_chunks, limit):
    file = write_parquet(tmp_path / "a.parquet")
    prepare(str(file), tmp_path / "out", shard_tokens=1000, max_tokens=limit, quiet=True)
    found = everything(tmp_path / "out")
    if limit > 1000:
        assert np.array_equal(found, tokens_of(TEXTS)[:limit])
    assert len(found) == limit


def test_a_limit_past_the_end_takes_everything(tmp_path):
    file = write_parquet(tmp_path / "a.parquet")
    prepare(str(file), tmp_path / "out", shard_tokens=1000, max_tokens=10**9, quiet=True)
    assert np.array_equal(everything(tmp_path / "out"), tokens_of(TEXTS))


def test_every_window_of_prepared_data_can_be_read(tmp_path):
    file = write_parquet(tmp_path / "a.parquet")
    prepare(str(file), tmp_path / "out", shard_tokens=1000, quiet=True)
    stream = TokenStream(tmp_path / "out", "train")
    windows = stream.windows(np.arange(0, len(stream) - 64, 64), 65)
    assert np.array_equal(windows[:, :-1].ravel(), tokens_of(TEXTS)[1000:][: windows[:, 1:].size])


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A source, its shards, and the command that makes them."""
    base = tmp_path_factory.mktemp("killed")
    rng = np.random.default_rng(0)
    words = ["shard", "token", "window", "batch", "model", "loss", "update", "figure"]
    texts = [" ".join(rng.choice(words, 2000)) + f" {i}" for i in range(6000)]
    file = write_parquet(base / "a.parquet", texts, group=100)
    arguments = ["--source", str(file), "--shard-tokens", "300000", "--workers", "2"]
    prepare(str(file), base / "whole", shard_tokens=300_000, workers=2, quiet=True)
    return base, arguments


def begin(arguments, out) -> subprocess.Popen:
    """Start a preparation in a process group of its own, and wait for its third shard."""
    command = [sys.executable, str(ROOT / "load_fineweb.py"), *arguments, "--out", str(out)]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 30
    while len(list(out.glob("*.npy"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    return process


def group_is_gone(group: int) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, 0)
            time.sleep(0.05)
            continue
        return True
    return False


def test_killed_and_run_again_gives_the_same_bytes(killed):
    base, arguments = killed
    out = base / "again"
    process = begin(arguments, out)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert group_is_gone(process.pid), "workers outlived their parent"
    assert not read_manifest(out).complete
    (out / ".a_train_000009.npy.tmp").write_bytes(b"half a shard")
    result = run(*arguments, "--out", out)
    assert result.returncode == 0, result.stderr
    assert ", continuing after " in result.stdout
    assert contents(out) == contents(base / "whole")


def test_ctrl_c_ends_at_once_without_a_traceback(killed):
    base, arguments = killed
    process = begin(arguments, base / "stopped")
    os.killpg(process.pid, signal.SIGINT)
    started = time.monotonic()
    output, _ = process.communicate(timeout=20)
    assert time.monotonic() - started < 5
    assert process.returncode == 130
    assert "Traceback" not in output
    assert "interrupted." in output
    assert group_is_gone(process.pid)
    result = run(*arguments, "--out", base / "stopped")
    assert result.returncode == 0
    assert contents(base / "stopped") == contents(base / "whole")


def test_a_dead_worker_ends_with_a_sentence(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "a.parquet", [f"{i} {'word ' * 4000}" for i in range(1000)])
    real = load_fineweb._start_pool

    def start_and_kill(workers):
        pool = real(workers)
        os.kill(next(iter(pool._processes)), signal.SIGKILL)
        return pool

    monkeypatch.setattr(load_fineweb, "_start_pool", start_and_kill)
    message = refuses(str(file), tmp_path / "out", workers=2)
    assert "A worker process died" in message


# --- Real data ---


def test_fineweb_edus_first_documents(real_data, tmp_path):
    file = real_data / "fineweb_edu" / "sample.parquet"
    prepare(str(file), tmp_path / "out", shard_tokens=100_000, quiet=True)
    tokens = everything(tmp_path / "out")
    assert np.count_nonzero(tokens == gpt2_tokenizer().eot) == 165
    assert gpt2_tokenizer().decode(tokens).count("<|endoftext|>") == 165
