"""Where documents come from: the Hugging Face hub, local files, a text on the web, or Python's own
documentation.

    open_source(words, subset, revision) -> Source(name, description, chunks, text_bytes)

`words` is what the person asked for: one of the names below, or files. The description goes into
the manifest and tells one source from another; the chunks are read by the workers.
"""

import difflib
import functools
import glob
import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chunks import (
    SUFFIXES,
    Chunk,
    Documents,
    file_chunks,
    file_kind,
    file_size,
    network_errors,
    text_bytes,
)
from config import UserError
from corpus.shards import DATA_DIR
from download import download
from pydocs import pydocs_documents

PYDOCS = "pydocs"
SHAKESPEARE = "shakespeare"


@dataclass(frozen=True)
class HubDataset:
    repository: str
    subset: str
    # Tokens that the subset is known to hold, with one <|endoftext|> a document.
    tokens: int | None = None


HUB = {
    "fineweb-edu": HubDataset("HuggingFaceFW/fineweb-edu", "sample-10BT", 9_982_590_278),
    "fineweb": HubDataset("HuggingFaceFW/fineweb", "sample-10BT"),
    "openwebtext": HubDataset("Skylion007/openwebtext", "plain_text"),
}


@dataclass(frozen=True)
class WebText:
    address: str
    size: int
    # Where nobody publishes one, the record of what was fetched has to do.
    sha256: str | None = None


# Shakespeare: the lines that Karpathy's char-rnn came with, and the complete works.
TEXTS = {
    "tiny": WebText(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    "large": WebText(
        "https://gist.githubusercontent.com/blakesanie/dde3a2b7e698f52f389532b4b52bc254/raw/"
        "76fe1b5e9efcf0d2afdfd78b0bfaa737ad0a67d3/shakespeare.txt",
        5_458_199,
    ),
}
TEXT_FILES = tuple(f"{name}.txt" for name in TEXTS)


@dataclass(frozen=True)
class Source:
    """Documents to tokenize; `text_bytes` estimates their length, `description` identifies them."""

    name: str
    description: dict[str, Any]
    chunks: Callable[[], Iterable[Chunk]]
    text_bytes: Callable[[], int]
    published_tokens: int | None = None


NAMED = (*HUB, SHAKESPEARE, PYDOCS)


def source_name(words: tuple[str, ...], subset: str | None) -> str:
    """Return the name a source's directory and shards get; raises UserError for a mixture."""
    if words and words[0] in HUB and subset not in (None, HUB[words[0]].subset):
        return f"{words[0]}-{subset}"
    if len(words) > 1 and (named := [word for word in words if word in NAMED]):
        raise UserError(f"--source takes one named source or several files; '{named[0]}' is named.")
    if not words:
        raise UserError("--source needs a name or at least one file.")
    if words[0] in NAMED:
        return words[0]
    path = Path(words[0])
    name = path.parent.resolve().name if glob.has_magic(words[0]) else path.resolve().name
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    return re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.") or "data"


def open_source(words: tuple[str, ...], subset: str | None, revision: str | None) -> Source:
    """Find a source by its name or its files; raises UserError when there is no such thing."""
    name = source_name(words, subset)
    if words[0] in HUB:
        return _hub_source(name, HUB[words[0]], subset or HUB[words[0]].subset, revision)
    if subset is not None or revision is not None:
        raise UserError("--subset and --revision go with the hub sources only: " + ", ".join(HUB))
    if words[0] == SHAKESPEARE:
        return _shakespeare_source()
    return _pydocs_source() if words[0] == PYDOCS else _file_source(name, words)


# --- The Hugging Face hub ---


def _hub_source(name: str, dataset: HubDataset, subset: str, revision: str | None) -> Source:
    @functools.cache
    def files() -> list[str]:
        return _hub_files(dataset.repository, subset, revision)

    # With a commit already known, a finished directory can be recognized without the network.
    commit = revision if revision and _COMMIT.fullmatch(revision) else _commit(files())
    description = {
        "kind": "hub",
        "repository": dataset.repository,
        "subset": subset,
        "revision": commit,
    }
    return Source(
        name,
        description,
        chunks=lambda: file_chunks(files()),
        # One footer is enough for an estimate: a data set's files are of about equal length.
        text_bytes=lambda: text_bytes(files()[0]) * len(files()),
        published_tokens=dataset.tokens if subset == dataset.subset else None,
    )


_COMMIT = re.compile(r"[0-9a-f]{40}")


def _commit(files: list[str]) -> str | None:
    """Return the commit in paths such as hf://datasets/NAME@COMMIT/sample/000.parquet."""
    match = re.search(r"@([0-9a-f]{40})/", files[0])
    return match[1] if match else None


def _hub_files(repository: str, subset: str, revision: str | None) -> list[str]:
    """Return the paths of a subset's training files, pinned to a commit."""
    try:
        reach_hub()
        import datasets

        builder = datasets.load_dataset_builder(repository, subset, revision=revision)
        return [str(path) for path in builder.config.data_files["train"]]
    except (*network_errors(), ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(
            f"{repository} ({subset}) could not be found on the Hugging Face hub ({reason}); "
            f"without a network, use --source {PYDOCS} or local files."
        ) from error


def reach_hub() -> None:
    """Ask the hub for a sign of life, once: its own packages would retry for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    get_session().head(constants.ENDPOINT, timeout=10)


# --- Local files ---


def _file_source(name: str, words: tuple[str, ...]) -> Source:
    try:
        files = [file for word in words for file in _matching(word)]
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from error
    paths, names = [str(file) for file in files], [file.name for file in files]
    # A directory of many small texts is told by its digest; a manifest need not list them all.
    description = {"kind": "files", "files": names[:100], "count": len(files)}
    return Source(
        name,
        {**description, "digest": _files_digest(files)},
        chunks=lambda: file_chunks(paths),
        text_bytes=lambda: sum(map(text_bytes, paths)),
    )


def _matching(word: str) -> list[Path]:
    """Return the files that a path, a directory or a pattern names, sorted."""
    path = Path(word)
    if path.is_dir():
        found = _inside(path)
    elif path.exists():
        found = [path]
    else:
        found = [Path(name) for name in sorted(glob.glob(word, recursive=True))]
    if not found:
        raise UserError(_not_found(word, path))
    for file in found:
        if not file_kind(file) or file.is_dir():
            raise UserError(f"{file} cannot be read; these can: {', '.join(SUFFIXES)}.")
    return found


def _inside(directory: Path) -> list[Path]:
    """Return the files in a directory and those below it, sorted; hidden ones are left alone."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}).") from error

    found = []
    for place, folders, names in os.walk(directory, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(place, name) for name in names if file_kind(name) and not name.startswith(".")
        ]
    return sorted(found)


def _not_found(word: str, path: Path) -> str:
    if path.is_dir():
        return f"The directory {word} holds no {', '.join(SUFFIXES)} files."
    if glob.has_magic(word) or path.suffix or len(path.parts) > 1:
        return f"There is no file {word}."
    near = difflib.get_close_matches(word, NAMED, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"the named sources are {', '.join(NAMED)}."
    return f"There is no source and no file '{word}'; {hint}"


def _files_digest(files: list[Path]) -> str:
    """Return a sha256 over each file's name, size, and first and last mebibyte.

    Reading 30 GB only to identify it would take minutes; a Parquet file's end describes the rest.
    """
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name}\0".encode())
        try:
            digest.update(_ends(path))
        except OSError as error:
            # A text that cannot be read is left out; any other file is needed.
            if file_kind(path) != ".txt":
                raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    return digest.hexdigest()


def _ends(path: Path) -> bytes:
    """Return a file's size and its first and last mebibyte."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        ends = f"{size}\0".encode()
        for start in (0, max(size - 2**20, 0)):
            file.seek(start)
            ends += file.read(2**20)
    return ends


# --- Texts on the web ---


def fetch_text(name: str) -> Path:
    """Return the file of a text in `TEXTS`, fetched unless it is there; raises UserError."""
    text = TEXTS[name]
    return download(text.address, _text_file(name), text.sha256, text.size)


def _text_file(name: str) -> Path:
    return DATA_DIR / SHAKESPEARE / f"{name}.txt"


def _shakespeare_source() -> Source:
    path, known = _text_file("tiny"), TEXTS["tiny"]
    # The digest being known, a finished directory is recognized without the text.
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else known.sha256
    return Source(
        SHAKESPEARE,
        {"kind": SHAKESPEARE, "digest": digest},
        chunks=lambda: file_chunks([str(fetch_text("tiny"))]),
        text_bytes=lambda: file_size(str(path)) or known.size,
    )


# --- Python's own documentation ---


def _pydocs_source() -> Source:
    documents = pydocs_documents()
    text = json.dumps(documents).encode()
    description = {
        "kind": PYDOCS,
        "python": platform.python_version(),
        "digest": hashlib.sha256(text).hexdigest(),
    }
    chunks = [Documents(tuple(documents))]
    return Source(PYDOCS, description, lambda: chunks, lambda: len(text))
