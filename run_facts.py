"""What a run directory says of a run besides its curves, as tables of short texts for a page."""

import contextlib
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from config import Config, UserError, flatten
from corpus.shards import find_data, manifest_sha256, read_manifest
from metrics import Run, best, is_number, is_share, points, score_text, scores, short
from published import published
from recipes import RECIPES, SIZES, build

# Rows of a table: a name and a value.
Rows = list[tuple[str, str]]
# The model of OpenAI's that has a size's dimensions; the smallest stands beside a still smaller.
OPENAI = {"124m": "gpt2", "350m": "gpt2-medium", "774m": "gpt2-large", "1558m": "gpt2-xl"}
# Steps whose samples a page holds.
MOST_STEPS = 60


def headline(run: Run) -> Rows:
    """Return the few numbers that one asks for first."""
    rows = [("steps", run.progress)]
    for label, kind, key in (
        ("best validation loss", "val", "loss"),
        ("best bits per byte", "val", "bits_per_byte"),
        ("best loss of a step", "train", "loss"),
    ):
        rows.append((label, best(points(run, kind, key))))
    for (task, metric), score in list(scores(run).items())[:1]:
        i = score.values.argmax() if is_share(metric) else score.values.argmin()
        text = score_text(metric, float(score.values[i]))
        rows.append((f"best {task} {metric}", f"{text} at {score.steps[i]:,}"))
    rows.append(("parameters", f"{run.config.model.num_params:,}"))
    rows.append(("training time", duration(_last(points(run, "train", "seconds").values))))
    return [(label, text) for label, text in rows if text]


def remarks(run: Run) -> list[str]:
    """Return what a reader should know before reading on, in sentences."""
    found, lines = [], [line for line in run.metrics if line["kind"] == "train"]
    if not lines:
        found.append("No step has been recorded yet.")
    for kind, name in (("train", "training"), ("val", "validation")):
        wrong = [
            line["step"]
            for line in run.metrics
            if line["kind"] == kind and not is_number(line["loss"])
        ]
        if wrong:
            found.append(
                f"{len(wrong):,} {name} losses are not finite numbers, the first at step "
                f"{min(wrong):,}: the run has diverged."
            )
    done, total = max(line["step"] for line in run.metrics), run.config.train.steps
    if total is not None and done < (run.config.train.stop_at_step or total):
        found.append(f"It stands at step {done:,} of {total:,}: still running, or interrupted.")
    started = _last_start(run).get("started_at_step")
    if is_number(started) and started > 0:
        found.append(
            f"It was continued at step {started:,}; the environment is that of this last start."
        )
    return found


def counted(run: Run) -> Rows:
    """Return what was computed: parameters, tokens, operations, and how fast."""
    config, done = run.config, max(line["step"] for line in run.metrics)
    tokens, cost = done * config.train.batch_tokens, config.model.flops_per_token
    rows = [
        ("parameters", f"{config.model.num_params:,}"),
        ("tokens trained on", f"{tokens:,}"),
        ("tokens in a step", f"{config.train.batch_tokens:,}"),
        ("operations a token", f"{cost:.4g} FLOP, forward and backward"),
        ("operations so far", f"{tokens * cost:.3g} FLOP"),
    ]
    clock = points(run, "train", "seconds")
    seconds = _last(clock.values)
    if seconds:
        speed = clock.steps[-1] * config.train.batch_tokens / seconds
        rows.append(("training time", f"{duration(seconds)}, without validation and the like"))
        rows.append(("mean speed", f"{speed:,.0f} tokens/s, {speed * cost:.3g} FLOP/s"))
    utilization = points(run, "train", "mfu").values
    if len(utilization):
        rows.append(("share of the peak (MFU)", f"{100 * np.median(utilization):.1f} %, median"))
    return rows


def settings(config: Config) -> list[dict[str, Any]]:
    """Return every field of a config: its value, and the recipe's where that is another one."""
    known = config.recipe in RECIPES and config.size in SIZES
    defaults = flatten(build(config.recipe, config.size) if known else Config())
    return [
        {
            "name": name,
            "value": written(value),
            "default": None if value == defaults[name] else written(defaults[name]),
        }
        for name, value in flatten(config).items()
    ]


def written(value: Any) -> str:
    """Return a field's value as a short text."""
    if isinstance(value, bool) or value is None or value in ("", ()):
        return {True: "yes", False: "no"}.get(value, "none")
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def environment(run: Run) -> Rows:
    """Return the last line of environment.jsonl, the versions one by one; [] without any."""
    rows = []
    for name, value in _last_start(run).items():
        if isinstance(value, dict):
            rows += [(f"{name}: {part}", str(version)) for part, version in value.items()]
        else:
            rows.append((name.replace("_", " "), "none" if value is None else str(value)))
    return rows


def data_directory(run: Run) -> tuple[Path | None, str]:
    """Return the run's data, if what is here is what it was trained on, and a sentence if not."""
    try:
        directory = find_data(run.config.data)
        digest = manifest_sha256(directory)
    except (UserError, OSError):
        return None, "The data is not here, so no text of it is shown."
    recorded = _last_start(run).get("data_sha256", digest)
    if digest != recorded:
        return None, "The data here is not what the run was trained on, so no text of it is shown."
    return directory, ""


def data_facts(run: Run) -> Rows:
    """Return where the data is from and its digest, as far as they are known."""
    directory, missing = data_directory(run)
    recorded = _last_start(run).get("data_sha256")
    rows = [("data", run.config.data), ("digest of the manifest", str(recorded or ""))]
    if directory is None:
        return [*rows, ("", missing)]
    try:
        manifest = read_manifest(directory)
    except UserError as error:
        return [*rows, ("", str(error))]
    rows += [(f"source: {name}", str(value)) for name, value in manifest.source.items()]
    rows += [("tokenizer", f"{manifest.tokenizer}, {manifest.vocab_size:,} ids")]
    for split, name in (("train", "training tokens"), ("val", "validation tokens")):
        rows.append((name, f"{manifest.tokens(split):,}"))
    return rows


def evaluations(run: Run) -> list[dict[str, Any]]:
    """Return every score as a row, with what is published for OpenAI's model of that size.

    First those made in training, the best and the last, then those of evals.json.
    """
    rows, whole = [], run.config.train.eval_limit is None
    for (task, metric), score in scores(run).items():
        top = int(score.values.argmax() if is_share(metric) else score.values.argmin())
        for how, i in {"best in training": top, "last in training": len(score.steps) - 1}.items():
            rows.append(_score_row(run, task, metric, how, whole))
            rows[-1]["score"] = score_text(metric, float(score.values[i]), float(score.errors[i]))
            rows[-1]["at"] = int(score.steps[i])
    for key, results in _objects(read_json(run.directory / "evals.json")):
        for setting, facts in _objects(results):
            found = dict(_objects(facts)).get("metrics", {})
            for metric, value in found.items():
                if metric.endswith("_stderr") or not isinstance(value, float):
                    continue
                error = found.get(f"{metric}_stderr")
                whole = " " not in setting and facts.get("limit") is None
                rows.append(_score_row(run, setting, metric, "evaluate.py", whole))
                rows[-1]["score"] = score_text(metric, value, error if is_number(error) else 0.0)
                rows[-1]["at"] = int(step[1]) if (step := re.search(r"(\d+)$", key)) else key
    return rows


def _objects(value: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the items of an object that are objects."""
    return [(name, item) for name, item in value.items() if isinstance(item, dict)]


def _score_row(run: Run, task: str, metric: str, how: str, whole: bool) -> dict[str, Any]:
    """Return a row without its score; published are scores of all examples only."""
    model = OPENAI.get(run.config.size, "gpt2")
    figures = published(model, task.split()[0], metric) if whole else []
    texts = [f"{figure.value:g} ({figure.source})" for figure in figures]
    return {"task": task, "metric": metric, "how": how, "published": texts}


def samples(run: Run) -> list[dict[str, Any]]:
    """Return what samples.md holds: for each step the prompts and the texts that begin with them.

    Of a step written twice the later counts; of very many steps some are left out.
    """
    try:
        # Not as a text file: line breaks of other systems in a sample are no line breaks here.
        text = (run.directory / "samples.md").read_bytes().decode("utf-8", errors="replace")
    except OSError:
        return []
    _, *parts = re.split(r"(?m)^## Step (\d+)\r?$", text)
    steps = {int(step): _texts(body) for step, body in zip(parts[::2], parts[1::2], strict=True)}
    found = [{"step": step, "texts": texts} for step, texts in sorted(steps.items()) if texts]
    kept = np.unique(
        np.linspace(0, len(found) - 1, min(MOST_STEPS, len(found))).round().astype(int)
    )
    return [found[i] for i in kept]


def _texts(body: str) -> list[dict[str, str]]:
    """Return the prompts of a section and their texts, or all of it where it has no prompts."""
    _, *parts = re.split(r"(?m)^\*\*(.*)\*\* \.\.\.\r?$", body)
    texts = [
        {"prompt": prompt, "text": re.sub(r"(?m)^    ", "", block).strip("\r\n").rstrip()}
        for prompt, block in zip(parts[::2], parts[1::2], strict=True)
    ]
    rest = body.strip()
    return texts or ([{"prompt": "", "text": rest}] if rest else [])


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; {} where there is none, since a page can do without."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _last_start(run: Run) -> dict[str, Any]:
    """Return the last whole line of environment.jsonl, which has one a start; {} without any."""
    try:
        lines = (run.directory / "environment.jsonl").read_text("utf-8", "replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(line)
            return found if isinstance(found, dict) else {}
    return {}


def duration(seconds: float | None) -> str:
    """Return seconds as "3 h 25 min", "12.4 min" or "8.1 s"; "" for none."""
    if seconds is None or not math.isfinite(seconds):
        return ""
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def _last(values: np.ndarray) -> float | None:
    return float(values[-1]) if len(values) else None


def subtitle(run: Run) -> str:
    """Return what a run is, in a line."""
    config = run.config
    tokens = max(line["step"] for line in run.metrics) * config.train.batch_tokens
    return f"{config.recipe} {config.size} on {run.data}, {short(tokens)} tokens"
