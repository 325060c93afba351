"""Downloads from a server in a thread, with everything that happens to them on the way."""

import hashlib
import http.server
import os
import socket
import threading

import pytest

import download as module
from config import UserError
from download import download
from tests.corpora import small_disk

CONTENT = os.urandom(700_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the server's `script` says: one entry a request, the last one for all others.

    Each is a set of words: `cut` ends the connection in the middle, `ranges` sends the part that
    was asked for, `short` is another version of the file, `silent` gives no length, `untagged` no
    version, and a number is an error.
    """

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        words = server.script.pop(0) if len(server.script) > 1 else server.script[0]
        numbers = [word for word in words if isinstance(word, int)]
        if numbers:
            self.send_error(numbers[0])
            return
        version = '"new"' if "short" in words else '"old"'
        content, start = CONTENT[:1000] if "short" in words else CONTENT, 0
        if "ranges" in words and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if self.headers.get("If-Range", version) != version:
                start = 0
        self.send_response(206 if start else 200)
        if "untagged" not in words:
            self.send_header("ETag", version)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if "silent" not in words:
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stop = start + (len(content) - start) // 2 if "cut" in words else len(content)
        self.wfile.write(content[start:stop])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on this machine; `waits` are the seconds that would have passed between attempts."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.script, server.requests, server.waits = [set()], [], []
    server.url = f"http://127.0.0.1:{server.server_address[1]}/file"
    monkeypatch.setattr(module.time, "sleep", server.waits.append)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def refuses(url, path, **arguments) -> str:
    """Return the sentence of a download that fails, which leaves nothing behind."""
    before = sorted(path.parent.iterdir()) if path.parent.is_dir() else None
    with pytest.raises(UserError) as caught:
        download(url, path, **arguments, quiet=True)
    if before is not None:
        assert sorted(path.parent.iterdir()) == before
    message = str(caught.value)
    assert message.startswith(f"{url} could not be ")
    assert message.endswith(f"; fetch it in another way and put the file at {path}.")
    return message


def test_a_whole_file_and_its_directory_appear(tmp_path, server):
    path = tmp_path / "deep" / "down" / "file.txt"
    assert download(server.url, path, SHA256, len(CONTENT)) == path
    assert path.read_bytes() == CONTENT
    assert list(path.parent.iterdir()) == [path]
    assert server.waits == []


def test_nothing_is_fetched_where_something_is(tmp_path, server):
    (tmp_path / "file").write_bytes(b"mine")
    assert download(server.url, tmp_path / "file", SHA256) == tmp_path / "file"
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert server.requests == []


@pytest.mark.parametrize("tagged", [set(), {"untagged"}])
def test_a_broken_connection_is_taken_up_where_it_broke(tmp_path, server, tagged):
    server.script = [{"cut", *tagged}, {"cut", "ranges", *tagged}, {"ranges", *tagged}]
    download(server.url, tmp_path / "file", SHA256, quiet=True)
    assert (tmp_path / "file").read_bytes() == CONTENT
    half = len(CONTENT) // 2
    ranges = [request.get("Range") for request in server.requests]
    assert ranges == [None, f"bytes={half}-", f"bytes={half + half // 2}-"]
    # Each brought something, so none of them counts as one failure more.
    assert server.waits == [1, 1]


def test_a_server_without_ranges_starts_over(tmp_path, server):
    server.script = [{"cut"}, {"cut"}, set()]
    download(server.url, tmp_path / "file", SHA256, quiet=True)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.waits == [1, 2]


@pytest.mark.parametrize("able", [set(), {"ranges"}])
def test_two_versions_of_a_file_are_never_mixed(tmp_path, server, able):
    server.script = [{"cut"}, {"short", *able}]
    download(server.url, tmp_path / "file", quiet=True)
    assert (tmp_path / "file").read_bytes() == CONTENT[:1000]
    assert server.requests[1]["If-Range"] == '"old"'


def test_a_file_of_unknown_length(tmp_path, server):
    server.script = [{"silent"}]
    download(server.url, tmp_path / "file", SHA256, quiet=True)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_connection_that_always_breaks_is_given_up(tmp_path, server):
    server.script = [{"cut"}]
    message = refuses(server.url, tmp_path / "file")
    assert "the connection ended after 350,000 of 700,000 bytes" in message
    assert server.waits == [1, 2, 4]


def test_one_attempt_gives_up_without_waiting(tmp_path, server):
    server.script = [{503}]
    message = refuses(server.url, tmp_path / "file", attempts=1)
    assert "the server answers 503, Service Unavailable" in message
    assert server.waits == [] and len(server.requests) == 1


def test_another_file_than_was_meant(tmp_path, server):
    other = hashlib.sha256(b"other").hexdigest()
    message = refuses(server.url, tmp_path / "file", sha256=other)
    assert f"be used (its sha256 is {SHA256}, not {other})" in message
    message = refuses(server.url, tmp_path / "file", size=5)
    assert "be used (it has 700,000 bytes, not 5)" in message


def test_a_file_that_is_not_there_is_not_asked_for_twice(tmp_path, server):
    server.script = [{404}]
    assert "the server answers 404, Not Found" in refuses(server.url, tmp_path / "file")
    assert len(server.requests) == 1


def test_a_busy_server_is_asked_again(tmp_path, server):
    server.script = [{503}, {429}, set()]
    download(server.url, tmp_path / "file", SHA256, quiet=True)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.waits == [1, 2]


def test_nobody_answers(tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/file"
        assert "(Connection refused)" in refuses(url, tmp_path / "file")
    assert waits == [1, 2, 4]


def test_an_interrupted_download_leaves_nothing(tmp_path, server, monkeypatch):
    def interrupt(seconds):
        raise KeyboardInterrupt

    server.script = [{"cut"}]
    monkeypatch.setattr(module.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download(server.url, tmp_path / "file", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full(tmp_path, server):
    with small_disk(tmp_path / "disk", "256k") as disk:
        message = refuses(server.url, disk / "file")
        assert "be stored (No space left on device)" in message


def test_a_place_that_cannot_be_written(tmp_path, server):
    (tmp_path / "blocked").write_text("a file")
    assert "be stored (" in refuses(server.url, tmp_path / "blocked" / "file")
    assert server.requests == []
