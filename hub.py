"""Directories to repositories of the Hugging Face hub, models and token shards, and models back.

    push(directory, "owner/name", "model" or "dataset")
    fetch("owner/name", "model", patterns) -> Path                 into the hub's own cache
    push_shards(directory, "owner/name")

Whoever pushes is logged in as the hub's own client wants it: `hf auth login`, or HF_TOKEN. Nothing
that is fetched is ever run.
"""

import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from config import UserError
from corpus.shards import MANIFEST, open_shard, read_manifest
from corpus.sources import reach_hub
from corpus.tokenizer import TOKENIZER_FILE

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
) -> Path:
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(
            repository,
            repo_type=kind,
            revision=revision,
            allow_patterns=list(patterns),
            local_files_only=local_files_only,
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
    """Upload a complete data directory: manifest, tokenizer and shards; returns the address.

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
        open_shard(directory / shard.file, shard.tokens)
    patterns = [MANIFEST, TOKENIZER_FILE, *(glob.escape(shard.file) for shard in manifest.shards)]
    return push(directory, repository, "dataset", private, patterns)
