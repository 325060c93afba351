"""A Hugging Face hub on the local disk, in place of what its client would ask over the network."""

import fnmatch
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError


class FakeHub:
    """Repositories as directories, `root/KIND/OWNER/NAME`; what was asked of it is in `calls`."""

    def __init__(self, root: Path):
        self.root, self.calls = root, []
        # Fails after so many files of a download, as a network may.
        self.breaks_after: int | None = None
        self.reachable, self.writable = True, True

    def repository(self, name: str, kind: str) -> Path:
        return self.root / kind / name

    def repo_info(self, name: str, *, repo_type: str, revision: str | None, timeout: float) -> None:
        self._reach(name, repo_type)

    def create_repo(self, name: str, *, repo_type: str, private: bool, exist_ok: bool) -> object:
        self.calls.append(("create", name, repo_type, private))
        if not self.writable:
            raise error_of(HfHubHTTPError, 403)
        self.repository(name, repo_type).mkdir(parents=True, exist_ok=exist_ok)
        address = f"https://huggingface.co/{name}"
        return type("Address", (str,), {"repo_id": name})(address)

    def upload_folder(
        self,
        *,
        repo_id: str,
        repo_type: str,
        folder_path: Path,
        allow_patterns: list[str] | None,
        ignore_patterns: list[str],
        commit_message: str,
    ) -> None:
        for path in sorted(Path(folder_path).rglob("*")):
            name = path.relative_to(folder_path).as_posix()
            if path.is_file() and _fits(name, allow_patterns) and not _fits(name, ignore_patterns):
                target = self.repository(repo_id, repo_type) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        self.calls.append(("upload", repo_id, repo_type, commit_message))

    def snapshot_download(
        self,
        name: str,
        *,
        repo_type: str,
        revision: str | None,
        allow_patterns: list[str],
        local_files_only: bool = False,
        local_dir: Path | None = None,
    ) -> str:
        place = Path(local_dir) if local_dir else self.root / "cache" / repo_type / name
        if local_files_only:
            if not place.exists():
                raise FileNotFoundError(name)
            return str(place)
        self._reach(name, repo_type)
        place.mkdir(parents=True, exist_ok=True)
        if local_dir:
            (place / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        fetched = 0
        for path in sorted(self.repository(name, repo_type).rglob("*")):
            target = place / path.relative_to(self.repository(name, repo_type))
            if not _fits(path.name, allow_patterns) or target.exists():
                continue
            if fetched == self.breaks_after:
                raise ConnectionError("the connection was lost")
            shutil.copy(path, target)
            self.calls.append(("fetched", path.name))
            fetched += 1
        return str(place)

    def hf_hub_download(
        self, name: str, filename: str, *, repo_type: str, revision: str | None
    ) -> str:
        self._reach(name, repo_type)
        found, place = self.repository(name, repo_type), self.root / "cache" / repo_type / name
        if not (found / filename).exists():
            raise error_of(EntryNotFoundError, 404)
        place.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(found / filename, place / filename))

    def _reach(self, name: str, kind: str) -> None:
        if not self.reachable:
            raise ConnectionError("no route to the hub")
        if not self.repository(name, kind).exists():
            raise error_of(RepositoryNotFoundError, 404)


def error_of(kind: type, status: int) -> Exception:
    """Return one of the client's errors, without a response that a server would have sent."""
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status} Client Error.\n\nA link for details.")
    error.response = SimpleNamespace(status_code=status)
    return error


def _fits(name: str, patterns: list[str] | None) -> bool:
    return patterns is None or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def installed(root: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """Put a hub under `root` in place of the real one, and return it; somebody is logged in."""
    fake = FakeHub(root)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    for module in ("hub", "corpus.sources"):
        monkeypatch.setattr(f"{module}.reach_hub", lambda: None)
    return fake
