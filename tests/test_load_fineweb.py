"""Documents to shards: any number of workers, interrupted or not, on a disk that fails."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pytest

import chunks
import preparation
import workers
from corpus.shards import TokenShards, read_manifest
from corpus.tokenizer import gpt2_tokenizer
from load_fineweb import prepare
from tests.conftest import ROOT
from tests.corpora import (
    TEXTS,
    contents,
    everything,
    mount,
    refuses,
    run,
    small_disk,
    tokens_of,
    write_jsonl,
    write_parquet,
)
from writer import ShardWriter

# --- Mistakes ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 1),
        ("shard_tokens", 0),
        ("val_tokens", 0),
        ("workers", 0),
        ("workers", -2),
        ("min_document_tokens", 0),
        ("max_document_tokens", 1),
    ],
)
def test_numbers_that_make_no_sense(tmp_path, name, value):
    message = refuses("pydocs", tmp_path / "out", **{name: value})
    assert f"--{name.replace('_', '-')} must be at least" in message


def test_a_full_disk_is_foreseen(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda path: usage(1000))
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
    assert "cannot be written (Not a directory)" in refuses(str(file), file / "out")
    out.mkdir()
    np.save(out / "edufineweb_train_000001.npy", np.zeros(5, dtype=np.uint16))
    assert "holds other files (edufineweb_train_000001.npy)" in refuses(str(file), out)
    assert "is a file" in refuses(str(file), file)


def test_a_lost_shard_is_noticed(tmp_path):
    file, out = write_jsonl(tmp_path / "a.jsonl"), tmp_path / "out"
    manifest = prepare(str(file), out, shard_tokens=1000, quiet=True)
    (out / manifest.shards[1].file).unlink()
    assert "000001.npy is missing or damaged" in refuses(str(file), out, shard_tokens=1000)


def test_a_finished_directory_loses_its_temporary_files(tmp_path):
    file, out = write_jsonl(tmp_path / "a.jsonl"), tmp_path / "out"
    prepare(str(file), out, shard_tokens=1000, quiet=True)
    before = contents(out)
    for name in ("a_train_000003.npy", "a_val_000000.npy", "manifest.json"):
        (out / f".{name}.0123456789abcdef.tmp").write_bytes(b"half")
    # Somebody else's, who may be writing it.
    (out / ".a_train_000003.npy.tmp").write_bytes(b"mine")
    prepare(str(file), out, shard_tokens=1000, quiet=True)
    assert contents(out) == {**before, ".a_train_000003.npy.tmp": b"mine"}


def test_a_mistake_before_the_first_shard_leaves_nothing(tmp_path):
    file, out = tmp_path / "a.jsonl", tmp_path / "out"
    file.write_text('{"text": "one"}\n{"text"\n')
    assert "line 2, is not JSON" in refuses(str(file), out)
    assert not out.exists()
    # What was there before, stays.
    out.mkdir()
    (out / ".keep").write_text("")
    assert "line 2, is not JSON" in refuses(str(file), out)
    assert list(contents(out)) == [".keep"]
    file.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert prepare(str(file), out, shard_tokens=2, quiet=True).complete


# --- Workers, limits, interruptions ---


def test_the_number_of_workers_changes_nothing(tmp_path):
    texts = [f"{i} {os.urandom(300).hex()}" for i in range(6000)]
    texts[::77] = [""] * len(texts[::77])
    file = write_parquet(tmp_path / "a.parquet", texts, group=1000)
    # Beyond two chunks' worth of text, so that three workers do start.
    jsonl = write_jsonl(tmp_path / "b.jsonl", texts * 3)
    for count in (1, 3):
        manifest = prepare(
            (str(file), str(jsonl)),
            tmp_path / str(count),
            shard_tokens=2_000_000,
            workers=count,
            min_document_tokens=250,
            max_document_tokens=300,
            quiet=True,
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert manifest.left_out["empty"] == 4 * len(texts[::77]) and manifest.left_out["short"] > 1000


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


def test_every_sequence_of_prepared_data_can_be_read(tmp_path):
    file = write_parquet(tmp_path / "a.parquet")
    prepare(str(file), tmp_path / "out", shard_tokens=1000, quiet=True)
    shards = TokenShards(tmp_path / "out", "train")
    found = shards.read(np.arange(0, len(shards) - 64, 64), 65)
    assert np.array_equal(found[:, :-1].ravel(), tokens_of(TEXTS)[1000:][: found[:, 1:].size])


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A source, its shards, and the command that makes them."""
    base = tmp_path_factory.mktemp("killed")
    rng = np.random.default_rng(0)
    words = ["shard", "token", "window", "batch", "model", "loss", "update", "figure"]
    texts = [" ".join(rng.choice(words, 2000)) + f" {i}" for i in range(5000)]
    # Seconds of work, so that a busy machine cannot end it before it is to be stopped.
    file = write_parquet(base / "a.parquet", texts, group=100)
    arguments = ["--source", str(file), "--shard-tokens", "300000", "--workers", "2"]
    prepare(str(file), base / "whole", shard_tokens=300_000, workers=2, quiet=True)
    return base, arguments


def begin(arguments, out) -> subprocess.Popen:
    """Start a preparation in a process group of its own, and wait for its third shard.

    SIGINT is ignored when it starts, as in a script's background.
    """
    command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", sys.executable]
    command += [str(ROOT / "load_fineweb.py"), *arguments, "--out", str(out)]
    process = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + 30
    while len(list(out.glob("*.npy"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, process.communicate()[0]
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


@pytest.mark.slow
def test_killed_and_run_again_gives_the_same_bytes(killed):
    base, arguments = killed
    out = base / "again"
    process = begin(arguments, out)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert group_is_gone(process.pid), "workers outlived their parent"
    assert not read_manifest(out).complete
    (out / ".a_train_000009.npy.0123456789abcdef.tmp").write_bytes(b"half a shard")
    result = run(*arguments, "--out", out)
    assert result.returncode == 0, result.stderr
    assert ", continuing after " in result.stdout
    assert contents(out) == contents(base / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "everyone", "status"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143), (signal.SIGTERM, True, 143)],
)
def test_a_signal_ends_it_at_once_with_a_sentence(killed, number, everyone, status):
    base, arguments = killed
    out = base / f"stopped-{status}-{everyone}"
    process = begin(arguments, out)
    (os.killpg if everyone else os.kill)(process.pid, number)
    started = time.monotonic()
    output, _ = process.communicate(timeout=20)
    assert time.monotonic() - started < 5
    assert process.returncode == status, output
    assert "Traceback" not in output
    sentence = "interrupted; the same command continues after the last complete shard."
    assert output.splitlines()[-1] == sentence
    assert group_is_gone(process.pid)
    assert not [name for name in contents(out) if name.startswith(".")]
    result = run(*arguments, "--out", out)
    assert result.returncode == 0
    assert contents(out) == contents(base / "whole")


def test_a_second_preparation_of_the_same_directory_is_refused(killed):
    base, arguments = killed
    out = base / "twice"
    process = begin(arguments, out)
    # Still there, but not about to finish before the second one has begun.
    os.kill(process.pid, signal.SIGSTOP)
    result = run(*arguments, "--out", out)
    os.kill(process.pid, signal.SIGCONT)
    process.communicate(timeout=60)
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
    assert f"Another process (process {process.pid} on " in result.stderr
    assert f" is writing to {out}; wait for it to end" in result.stderr
    assert contents(out) == contents(base / "whole")


@pytest.mark.parametrize("shard_tokens", [61, 350, 1000])
def test_what_is_left_out_is_counted_once_however_often_interrupted(
    tmp_path, monkeypatch, small_chunks, shard_tokens
):
    """Stop after every shard; chunks end inside of shards, at their ends, and without any text."""
    texts = [f"{i} {'word ' * (i % 40)}" for i in range(120)]
    for i in (0, 3, 4, *range(60, 95), 118, 119):
        texts[i] = ""
    write_parquet(tmp_path / "in" / "a.parquet", texts, group=3)
    (tmp_path / "in" / "b.txt").write_bytes(b"\xff")
    arguments = {
        "shard_tokens": shard_tokens,
        "min_document_tokens": 5,
        "max_document_tokens": 20,
        "workers": 1,
        "quiet": True,
    }
    source, part, whole = str(tmp_path / "in"), tmp_path / "part", tmp_path / "whole"
    manifest = prepare(source, whole, **arguments)
    assert manifest.left_out["empty"] == 40 and manifest.left_out["not_utf8"] == 1
    flush, stops = ShardWriter._flush, 0

    def flush_and_stop(writer):
        flush(writer)
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardWriter, "_flush", flush_and_stop)
    while True:
        try:
            prepare(source, part, **arguments)
            break
        except KeyboardInterrupt:
            stops += 1
    # The last shard is not followed by another chunk, but by the end.
    assert stops == len(manifest.shards)
    assert contents(part) == contents(whole)


def test_the_queue_is_bounded_in_bytes(monkeypatch):
    """Chunks far larger than usual do not wait in numbers; the order stays."""
    monkeypatch.setattr(workers, "AHEAD_BYTES", 1000)
    begun = []

    def documents():
        for i in range(12):
            begun.append(i)
            yield chunks.Documents((f"{i} " + "x" * 600 * (i % 2),))

    done = []
    for number, result in workers.tokenized(documents(), 2, 2):
        text = gpt2_tokenizer().decode(result.tokens).removeprefix("<|endoftext|>")
        assert int(text.split()[0]) == number
        done.append(number)
        waiting = range(number + 1, begun[-1])
        assert sum(600 * (i % 2) for i in waiting) <= 1000
    assert done == list(range(2, 12))


def test_a_dead_worker_ends_with_a_sentence(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "a.parquet", [f"{i} {'word ' * 4000}" for i in range(1000)])
    real = workers._start_pool

    def start_and_kill(count):
        pool = real(count)
        os.kill(next(iter(pool._processes)), signal.SIGKILL)
        return pool

    monkeypatch.setattr(workers, "_start_pool", start_and_kill)
    message = refuses(str(file), tmp_path / "out", workers=2)
    assert "A worker process died" in message


# --- Disks ---


def test_a_disk_that_fills_keeps_the_shards_it_has(tmp_path):
    # Digits and letters make more tokens than English of that length, so that the estimate fits.
    rng = np.random.default_rng(0)
    texts = [rng.bytes(500).hex() for _ in range(1200)]
    file = write_jsonl(tmp_path / "a.jsonl", texts)
    arguments = ("--source", file, "--shard-tokens", 100_000, "--workers", 1)
    assert run(*arguments, "--out", tmp_path / "whole").returncode == 0
    whole = contents(tmp_path / "whole")
    with small_disk(tmp_path / "disk", "1m") as disk:
        out = disk / "out"
        result = run(*arguments, "--out", out)
        assert (result.returncode, "Traceback" in result.stderr) == (1, False)
        assert result.stderr.splitlines()[-1].startswith(f"error: {out}/a_train_00000")
        assert "could not be written (No space left on device)" in result.stderr
        found = contents(out)
        shards = found.keys() - {"manifest.json"}
        assert len(shards) == 5 and all(found[name] == whole[name] for name in shards)
        assert [shard.file for shard in read_manifest(out).shards] == sorted(
            shards, key=lambda name: name[-10:]
        )
        mount("-o", "remount,size=4m", str(disk))
        assert run(*arguments, "--out", out).returncode == 0
        assert contents(out) == whole


def test_a_disk_that_cannot_be_written(tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl")
    with small_disk(tmp_path / "disk", "4m") as disk:
        done = prepare(str(file), disk / "done", shard_tokens=1000, quiet=True)
        (disk / "empty").mkdir()
        mount("-o", "remount,ro", str(disk))
        for out in (disk / "new", disk / "empty"):
            result = run("--source", file, "--out", out)
            assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
            assert "Read-only file system" in result.stderr
        # Data that is there can be used all the same.
        assert prepare(str(file), disk / "done", shard_tokens=1000, quiet=True) == done
    result = run("--source", file, "--out", "/proc/nowhere")
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1)
