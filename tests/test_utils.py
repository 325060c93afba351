"""What all scripts share: mistakes as sentences, output that is lost, files that are old or new."""

import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import recipes
import utils
from config import Config, UserError, to_json
from tests.tiny import ROOT, script

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import utils
from config import UserError

def main():
    {body}

utils.run_script(main)
"""


def run(
    tmp_path: Path, body: str, end: str = "", **environment: str
) -> subprocess.CompletedProcess:
    """Run a script whose main has `body`; `end` goes behind it in the shell."""
    (tmp_path / "script.py").write_text(SCRIPT.format(root=str(ROOT), body=body))
    command = f"set -o pipefail; {sys.executable} script.py {end}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("body", "status", "shown"),
    [
        (
            "raise UserError('a \\x1b[31m mistake\\nin two lines.')",
            1,
            r"error: a \x1b[31m mistake\n",
        ),
        ("open('/')", None, "Traceback"),
        ("open('no' * 300)", 1, "error: nono"),
        ("raise KeyboardInterrupt", 130, "interrupted."),
        ("raise ValueError('a bug')", 1, "Traceback"),
    ],
)
def test_how_a_script_ends(tmp_path, body, status, shown):
    result = run(tmp_path, body)
    assert shown in result.stderr and result.returncode == (1 if status is None else status)
    if status and "Traceback" not in shown:
        assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("end", ["| head -1", ">/dev/full", ">&-", ">&- 2>&-", "2>/dev/full"])
def test_output_that_is_lost_ends_nothing(tmp_path, end):
    body = """for i in range(100_000):
        print(i)
    print("still here", file=sys.stderr, flush=True)
    open("done", "w").close()"""
    result = run(tmp_path, body, end)
    assert result.returncode == 0 and (tmp_path / "done").exists(), result.stderr


def test_what_a_terminal_cannot_show_is_escaped(tmp_path):
    result = run(tmp_path, "print('caf\\xe9', '\\udcff')", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout) == (0, "caf\\xe9 \\udcff\n")


def test_of_several_ranks_the_first_of_a_node_speaks(tmp_path):
    typo = ["main.py", "--model.n-laier", 3]
    assert "n-layer" in script(*typo, cwd=tmp_path, LOCAL_RANK="0").stderr
    assert script(*typo, cwd=tmp_path, LOCAL_RANK="1").stderr == ""


def test_names():
    utils.check_name("gpt2", recipes.RECIPES, "recipe")
    with pytest.raises(UserError, match="no recipe 'quikstart'; did you mean quickstart"):
        utils.check_name("quikstart", recipes.RECIPES, "recipe")
    with pytest.raises(UserError, match=r"choose from a, b\."):
        utils.check_name("xyz", iter("ab"), "thing")
    assert utils.printable("é\x1b[0m\n\udcff") == "é\\x1b[0m\\n\\udcff"


def test_a_file_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "file"
    umask = os.umask(0o027)
    try:
        utils.write_atomically(path, b"one ", memoryview(b"two"))
    finally:
        os.umask(umask)
    assert path.read_bytes() == b"one two" and path.stat().st_mode & 0o777 == 0o640

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"No space left on device.*unchanged"):
        utils.write_atomically(path, b"three")
    assert path.read_bytes() == b"one two" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="could not be written"):
        utils.write_atomically(tmp_path / "nowhere" / "file", b"")


def test_a_lock_names_who_holds_it(tmp_path):
    with utils.locked(tmp_path / "lock"), pytest.raises(UserError) as refused:
        utils.locked(tmp_path / "lock").__enter__()
    assert re.search(f"process {os.getpid()} on .* is writing to", str(refused.value))
    with utils.locked(tmp_path / "lock"):
        pass


def test_a_sealed_record_shows_any_change():
    record = {"a": [1, 2.5, None], "b": {"c": "é"}}
    content = utils.seal(record)
    assert utils.unseal(content) == record
    damaged = [content.replace(b"2.5", b"2.25"), content[:-9], b"3", b"[]", b"{}", b"[" * 100_000]
    for other in damaged:
        with pytest.raises(ValueError):
            utils.unseal(other)


def test_runs_are_found_by_path_and_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_directory = tmp_path / "runs" / "mine"
    run_directory.mkdir(parents=True)
    with pytest.raises(UserError, match="There is no run 'mine'"):
        utils.find_run("mine")
    (run_directory / "config.json").write_text(to_json(Config()))
    assert utils.find_run("mine") == Path("runs/mine")
    assert utils.find_run(run_directory, "elsewhere") == run_directory
    assert utils.load_config(run_directory) == Config()
    for name in ("a" * 300, "nul\0"):
        with pytest.raises(UserError, match="There is no run"):
            utils.find_run(name)
    (run_directory / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: "):
        utils.load_config(run_directory)


def test_digest_of_a_file(tmp_path):
    (tmp_path / "empty").touch()
    assert utils.sha256_file(tmp_path / "empty").startswith("e3b0c44298fc1c14")


# --- Files from the web ---

CONTENT = os.urandom(700_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with an error's number, or the content: whole, its first half, or for ever."""

    def do_GET(self):
        answers = self.server.answers
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        self.server.asked += 1
        if isinstance(answer, int):
            self.send_error(answer)
            return
        self.send_response(200)
        if answer != "endless":
            self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        self.wfile.write(CONTENT[:350_000] if answer == "cut" else CONTENT)
        while answer == "endless" and not self.server.stopped:
            try:
                self.wfile.write(CONTENT)
            except OSError:  # who asked had enough
                break

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on this machine, an empty directory to be in, and no time between attempts."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.asked, server.stopped, server.waits = ["whole"], 0, False, []
    server.url = f"http://127.0.0.1:{server.server_address[1]}/file"
    monkeypatch.setattr(utils.time, "sleep", server.waits.append)
    monkeypatch.delenv("GPT2_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.stopped = True
    server.shutdown()
    server.server_close()
    thread.join()


def unfetched(url: str, *arguments, **options) -> str:
    """Return the sentence of a fetch that fails, which leaves nothing behind."""
    with pytest.raises(UserError) as caught:
        utils.fetch("some/file", url, *arguments, **options)
    assert not any(path.is_file() for path in Path().rglob("*"))
    message = str(caught.value)
    assert message.startswith(f"{url} could not be fetched (") and "\n" not in message
    assert message.endswith("; fetch it in another way and put the file at data/some/file.")
    return message


def test_a_file_is_taken_from_data_then_from_gpt2_data_then_from_the_web(server, monkeypatch):
    path = Path("data/some/file")
    assert utils.fetch("some/file", server.url, len(CONTENT), SHA256) == path
    assert path.read_bytes() == CONTENT and list(path.parent.iterdir()) == [path]
    path.write_bytes(b"mine")
    monkeypatch.setenv("GPT2_DATA", "theirs")
    Path("theirs/some").mkdir(parents=True)
    Path("theirs/some/file").write_bytes(b"theirs")
    assert utils.fetch("some/file", server.url, 5, "0" * 64) == path
    path.unlink()
    assert utils.fetch("some/file", server.url) == Path("theirs/some/file")
    assert server.asked == 1
    Path("theirs/some/file").unlink()
    assert utils.fetch("some/file", server.url) == path and path.read_bytes() == CONTENT


def test_another_file_than_was_meant_is_not_kept(server):
    assert SHA256 in unfetched(server.url, sha256="0" * 64, attempts=1)
    assert "it has more than 5 bytes" in unfetched(server.url, 5, attempts=1)
    assert "it has 700,000 bytes, not 900,000" in unfetched(server.url, 900_000, attempts=1)


def test_a_server_that_never_stops_is_cut_off(server):
    server.answers = ["endless"]
    assert "it has more than 700,000 bytes" in unfetched(server.url, 700_000, SHA256, attempts=1)


def test_a_failure_is_tried_again_up_to_so_many_times(server):
    server.answers = [503, "cut", "whole"]
    assert utils.fetch("some/file", server.url, sha256=SHA256).read_bytes() == CONTENT
    assert (server.asked, server.waits) == (3, [1, 2])
    Path("data/some/file").unlink()
    server.answers, server.asked = ["cut"], 0
    unfetched(server.url)
    assert server.asked == 4
    server.answers, server.asked = [404], 0
    assert "404" in unfetched(server.url, attempts=1)
    assert server.asked == 1


def test_nobody_answers_or_nothing_can_be_written(server, monkeypatch):
    assert "refused" in unfetched("http://127.0.0.1:9/file", attempts=2)
    monkeypatch.setattr(utils, "DATA_DIR", Path("/proc/none"))
    with pytest.raises(UserError, match="put the file at /proc/none/some/file"):
        utils.fetch("some/file", server.url, attempts=1)
