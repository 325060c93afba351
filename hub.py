"""Directories to and from repositories of the Hugging Face hub: models, and token shards.

    push(directory, "owner/name", "model" or "dataset")
    fetch("owner/name", "model", patterns) -> Path                 into the hub's own cache
    push_shards(directory, "owner/name")
    fetch_shards("owner/name", revision, out) -> Manifest          into a data directory

Whoever pushes is logged in as the hub's own client wants it: `hf auth login`, or HF_TOKEN. Nothing
that is fetched is ever run, and shards are compared with the digests of their manifest.
"""

import glob
import hashlib
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from config import UserError
from corpus.shards import MANIFEST, Manifest, check_shard, manifest_sha256, read_manifest
from sources import reach_hub
from utils import locked, sync_directory

Kind = Literal["model", "dataset"]
# Seconds to wait for the hub's first answer; its client would try again and again.
TIMEOUT = 10


def is_repository(name: str) -> bool:
    """Say whether `name` could be that of a repository, owner/name."""
    part = r"[A-Za-z0-9][A-Za-z0-9._-]*"
    return bool(re.fullmatch(f"{part}/{part}", name))


def push(
    directory: Path,
    repository: str,
    kind: Kind = "model",
    private: bool = False,
    patterns: Sequence[str] | None = None,
) -> str:
    """Upload a directory, or its files that fit `patterns`, and return the repository's address.

    The repository is made if there is none. Raises UserError when nobody is logged in, or may not
    write there, or the hub cannot be reached.
    """
    if not is_repository(repository):
        raise UserError(f"'{repository}' cannot be the name of a repository; give OWNER/NAME.")
    import huggingface_hub

    if huggingface_hub.get_token() is None:
        raise UserError(
            "You are not logged in to the Hugging Face hub; run `hf auth login`, or set HF_TOKEN."
        )
    api = huggingface_hub.HfApi()
    try:
        reach_hub()
        made = api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            repo_type=kind,
            folder_path=directory,
            allow_patterns=patterns,
            # Where to begin again is up to the client; nothing of it belongs to the directory.
            ignore_patterns=[".cache/**"],
            commit_message=f"Upload {directory.resolve().name}",
        )
    # The client's error classes differ between its versions; for the reader they are all one.
    except Exception as error:
        raise _unreached(
            f"{directory} could not be pushed to '{repository}'", kind, error
        ) from None
    return str(made)


def fetch(
    repository: str, kind: Kind, patterns: Sequence[str], revision: str | None = None
) -> Path:
    """Return where a repository's files that fit `patterns` lie, as they are on the hub now.

    Without a network, what an earlier fetch brought has to do. Raises UserError when there is no
    such repository, or it cannot be reached and nothing of it is here.
    """
    import huggingface_hub

    try:
        # The download itself would wait without limit for a network that swallows its packets.
        huggingface_hub.HfApi().repo_info(
            repository, repo_type=kind, revision=revision, timeout=TIMEOUT
        )
        return _download(repository, kind, patterns, revision)
    except Exception as error:
        found = None if _is_missing(error) else cached(repository, kind, patterns, revision)
        if found is not None:
            return found
        problem = (
            f"'{repository}' is not in the local Hugging Face cache, and it could not be downloaded"
        )
        raise _unreached(problem, kind, error) from None


def cached(
    repository: str, kind: Kind, patterns: Sequence[str], revision: str | None = None
) -> Path | None:
    """Return where an earlier `fetch` put a repository, or None if it did not."""
    try:
        return _download(repository, kind, patterns, revision, local_files_only=True)
    except Exception:
        return None


def _download(
    repository: str,
    kind: Kind,
    patterns: Sequence[str],
    revision: str | None,
    local_files_only: bool = False,
    local_dir: Path | None = None,
) -> Path:
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(
            repository,
            repo_type=kind,
            revision=revision,
            allow_patterns=list(patterns),
            local_files_only=local_files_only,
            local_dir=local_dir,
        )
    )


def _is_missing(error: Exception) -> bool:
    return type(error).__name__ in ("RepositoryNotFoundError", "RevisionNotFoundError")


def _unreached(problem: str, kind: Kind, error: Exception) -> UserError:
    """Return the sentence for what the hub's client raised."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if _is_missing(error):
        what = "revision" if "Revision" in type(error).__name__ else f"{kind} repository"
        reason = f"there is no such {what}, or it is private and nobody is logged in who may see it"
    elif status in (401, 403):
        reason = "you may not do that there; log in with a token that may, by `hf auth login`"
    else:
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
    return UserError(f"{problem} ({reason}).")


# --- Token shards ---


def push_shards(directory: Path, repository: str, private: bool = False) -> str:
    """Upload a complete data directory's manifest and shards; returns the repository's address.

    Every file is looked at first. Raises UserError for one that is not finished or damaged, and
    as `push` does.
    """
    manifest = read_manifest(directory)
    if not (directory / MANIFEST).is_file():
        raise UserError(
            f"{directory} has no {MANIFEST}, by which whoever fetches it could tell that it is "
            "whole; prepare the data with `python load_fineweb.py`."
        )
    if not manifest.complete:
        raise UserError(f"{directory} is not finished; run its `load_fineweb.py` command again.")
    for shard in manifest.shards:
        check_shard(directory, shard)
    return push(directory, repository, "dataset", private, _shard_patterns(manifest))


def fetch_shards(repository: str, revision: str | None, out: Path) -> Manifest:
    """Fetch a data directory that `push_shards` uploaded to `out`, and return its manifest.

    Only the manifest and the shards it names come. `out` appears when every shard has the sha256
    that its manifest states. What an interrupted call had fetched stays beside it, hidden, and is
    not fetched again. Raises UserError when the repository holds no such directory or cannot be
    reached, when a shard is another, and when something else is at `out`.
    """
    # `out` may be given with a slash or dots at its end.
    out = Path(os.path.abspath(out))
    if out.exists():
        return _already_there(repository, revision, out)
    partial = out.with_name(f".{out.name}.fetched")
    partial.mkdir(parents=True, exist_ok=True)
    with locked(partial / ".lock"):
        _fetch_into(partial, repository, revision, [MANIFEST])
        manifest = _read_fetched(partial, repository)
        _fetch_into(partial, repository, revision, _shard_patterns(manifest))
        for shard in manifest.shards:
            _check_digest(partial / shard.file, shard.sha256, repository)
            check_shard(partial, shard)
        _remove_others(partial, {MANIFEST, *(shard.file for shard in manifest.shards)})
        try:
            os.replace(partial, out)
        except OSError as error:
            raise UserError(f"{out} could not be written ({error.strerror}).") from error
    sync_directory(out.parent)
    return manifest


def _shard_patterns(manifest: Manifest) -> list[str]:
    return [MANIFEST, *(glob.escape(shard.file) for shard in manifest.shards)]


def _already_there(repository: str, revision: str | None, out: Path) -> Manifest:
    """Return the manifest of `out` if it is the repository's; raises UserError if it is not."""
    directory = fetch(repository, "dataset", [MANIFEST], revision)
    if (out / MANIFEST).is_file() and manifest_sha256(out) == manifest_sha256(directory):
        return read_manifest(out)
    raise UserError(f"{out} holds something else already; name another directory with --out.")


def _fetch_into(
    partial: Path, repository: str, revision: str | None, patterns: Sequence[str]
) -> None:
    import huggingface_hub

    try:
        huggingface_hub.HfApi().repo_info(
            repository, repo_type="dataset", revision=revision, timeout=TIMEOUT
        )
        _download(repository, "dataset", patterns, revision, local_dir=partial)
    except Exception as error:
        _discard_empty(partial)
        raise _unreached(f"'{repository}' could not be downloaded", "dataset", error) from None


def _read_fetched(partial: Path, repository: str) -> Manifest:
    """Return the manifest that came; raises UserError unless it is one of finished data."""
    try:
        if not (partial / MANIFEST).is_file():
            raise UserError(f"it has no {MANIFEST}")
        manifest = read_manifest(partial)
        if not manifest.complete or any(shard.sha256 is None for shard in manifest.shards):
            raise UserError(f"its {MANIFEST} does not describe a finished preparation")
    except UserError as error:
        _discard_empty(partial)
        raise UserError(
            f"'{repository}' is not a directory of token shards ({str(error).rstrip('.')})."
        ) from None
    return manifest


def _discard_empty(partial: Path) -> None:
    """Remove what a call leaves that fetched no shard; shards would be fetched again."""
    if not any(path.suffix in (".npy", ".bin") for path in partial.iterdir()):
        shutil.rmtree(partial)


def _remove_others(partial: Path, names: set[str]) -> None:
    """Remove the client's notes, and shards of an earlier version that a call was fetching."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in names:
            path.unlink()


def _check_digest(path: Path, sha256: str, repository: str) -> None:
    """Raise UserError, and remove the file, unless it is the one that the manifest means."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"'{repository}' lacks {path.name}, which its manifest names.") from error
    if found != sha256:
        path.unlink()
        raise UserError(
            f"{path.name} of '{repository}' is damaged: its sha256 is not its manifest's. It was "
            "removed; give the command again to fetch it anew."
        )
