"""A run, or several side by side, as one page for a browser: figures/report.html.

The page holds everything it needs, and asks the network for nothing: assets/report.html with the
styles and scripts beside it and the data as JSON put into their places. What comes from a run is
only ever shown as text. The same runs give the same bytes.
"""

import base64
import contextlib
import hashlib
import html
import json
import math
from pathlib import Path
from typing import Any

import run_facts
from config import UserError
from corpus.shards import TokenShards
from curves import baselines, curves
from metrics import Run, read_run
from utils import write_atomically
from window_ranking import rank_sequences

ASSETS = Path(__file__).parent / "assets"
# In this order, since they are one script in the page.
SCRIPTS = ("elements", "axes", "charts", "curves", "insight", "page")


def write_report(directory: Path, passage: str = "", loads_model: bool = True) -> Path:
    """Write the page of one run to its figures/report.html and return the path.

    `passage` is a text, or a file of text, to be read by the newest checkpoint; "" is the beginning
    of the validation split. Without `loads_model` nothing is, and torch is not loaded. Raises
    UserError when the run or the passage cannot be read, or the page not be written.
    """
    run = read_run(directory)
    page = single(run) | {"passage": _passage(run, passage, loads_model)}
    return _write(directory / "figures" / "report.html", page)


def write_comparison(directories: list[Path]) -> Path:
    """Write the page of several runs to the first one's figures/comparison.html."""
    runs = [read_run(directory) for directory in directories]
    return _write(directories[0] / "figures" / "comparison.html", comparison(runs))


def single(run: Run) -> dict[str, Any]:
    """Return all that the page of one run shows, but for the passage."""
    return {
        "title": run.name,
        "baselines": baselines([run]),
        "runs": [_shown(run)],
        "sequences": _sequences(run),
    }


def comparison(runs: list[Run]) -> dict[str, Any]:
    """Return all that the page of several runs shows."""
    return {
        "title": f"{len(runs)} runs compared",
        "baselines": baselines(runs),
        "runs": [_shown(run) for run in runs],
    }


def _shown(run: Run) -> dict[str, Any]:
    """Return one run's part of the page."""
    return {
        "name": run.name,
        "subtitle": run_facts.subtitle(run),
        "remarks": run_facts.remarks(run),
        "headline": run_facts.headline(run),
        "curves": curves(run),
        "evaluations": run_facts.evaluations(run),
        "samples": run_facts.samples(run),
        "settings": run_facts.settings(run.config),
        "counts": run_facts.counted(run),
        "environment": run_facts.environment(run),
        "data": run_facts.data_facts(run),
    }


def _passage(run: Run, given: str, loads_model: bool) -> dict[str, Any]:
    """Return what the model makes of a passage, or a sentence on why there is nothing."""
    if not loads_model:
        return {"skipped": "Left out: with --samples 0 no model is loaded."}
    # The model's side loads torch, which all else does without.
    from passage import read_by_model, read_passage

    text = read_passage(given) if given else ""
    try:
        return read_by_model(run.directory, text, _split(run, "val"))
    except UserError as error:
        # A run without a checkpoint still has its page.
        return {"skipped": f"Left out: {error}"}


def _sequences(run: Run) -> dict[str, Any] | None:
    """Return the ranked sequences, None where none were logged, or a sentence on what is wrong."""
    try:
        ranked = rank_sequences(run, _split(run, "train"))
    except UserError as error:
        return {"skipped": str(error)}
    missing = run_facts.data_directory(run)[1]
    return ranked and ranked | {"missing": missing}


def _split(run: Run, split: str) -> TokenShards | None:
    """Return one split of the run's data, or None where it is not here or not in order."""
    directory, _ = run_facts.data_directory(run)
    try:
        return directory and TokenShards(directory, split)
    except UserError:
        return None


def _write(path: Path, page: dict[str, Any]) -> Path:
    # Where there can be no directory, the writing says so.
    with contextlib.suppress(OSError):
        path.parent.mkdir(exist_ok=True)
    write_atomically(path, render(page).encode())
    return path


def render(page: dict[str, Any]) -> str:
    """Return the page as HTML."""
    template = (ASSETS / "report.html").read_text(encoding="utf-8")
    script = "\n".join((ASSETS / f"report_{name}.js").read_text("utf-8") for name in SCRIPTS)
    parts = {
        "TITLE": html.escape(page["title"].encode("utf-8", "replace").decode()),
        "STYLE": (ASSETS / "report.css").read_text(encoding="utf-8"),
        "SCRIPT": script,
        # The browser runs this script and no other, whatever might be in a run.
        "SCRIPT_HASH": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "DATA": embedded(page),
    }
    # Cut once, so that a name in the data is not taken for a place in the template.
    pieces = template.split("@@")
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def embedded(value: Any) -> str:
    """Return a value as JSON that can stand inside a script element, whatever texts it holds."""
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    # All that is not ASCII is escaped already, line separators of JavaScript among it.
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _finite(value: Any) -> Any:
    """Return a value with None for every number that JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
