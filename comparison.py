"""Recipes compared: numbers, and Markdown tables, out of finished runs.

    entries(trials) -> [Entry]       an arm on a data set: its sweep, its seeds at the best rate
    compare(entries) -> [facts]      a dictionary an entry, as in table.json
    table(facts) -> str              Markdown, as sweep_table

An arm is a recipe, perhaps with options of its own. The baseline of an arm is the first arm on the
same data. Tokens and seconds are those of training.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from metrics import Run, aligned, points, score_text, scores, short


@dataclass(frozen=True)
class Trial:
    """One run of an arm; `run` is None where the loss ceased to be finite."""

    arm: str
    data: str
    lr: float
    seed: int
    name: str
    run: Run | None


@dataclass(frozen=True)
class Entry:
    """An arm on one data set: the first seed at each rate, and each seed at the best of them."""

    arm: str
    data: str
    lr: float
    sweep: list[Trial]
    trials: list[Trial]

    @property
    def runs(self) -> list[Run]:
        """The runs at the best rate that came to an end."""
        return [trial.run for trial in self.trials if trial.run is not None]


@dataclass(frozen=True)
class Curve:
    """Validation losses of several seeds at the same tokens (K,): one row a seed (seeds, K)."""

    tokens: np.ndarray
    losses: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """The mean over seeds, (K,)."""
        return self.losses.mean(axis=0)


def entries(trials: list[Trial]) -> list[Entry]:
    """Return one entry for each arm and data set, in the order in which they first come.

    The sweep is made with the seed of the first trial.
    """
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.arm, trial.data), []).append(trial)
    found = []
    for (arm, data), group in groups.items():
        sweep = [trial for trial in group if trial.seed == group[0].seed]
        lr = best_trial(sweep).lr
        found.append(Entry(arm, data, lr, sweep, [trial for trial in group if trial.lr == lr]))
    return found


def best_trial(sweep: list[Trial]) -> Trial:
    """Return the trial with the least final loss, of equals that with the lowest rate."""
    return min(sweep, key=lambda trial: (final_loss(trial), trial.lr))


def final_loss(trial: Trial) -> float:
    """Return the last validation loss, in nats a token; infinity for a run that diverged."""
    if trial.run is None:
        return math.inf
    return float(points(trial.run, "val", "loss").values[-1])


def validation_curve(runs: list[Run]) -> Curve:
    """Return the validation losses of runs that differ in their seeds, where all have one."""
    # A run that was interrupted, or saved more often, has some that the others have not.
    found = [points(run, "val", "loss") for run in runs]
    by_step = [dict(zip(p.steps.tolist(), p.values.tolist(), strict=True)) for p in found]
    steps = sorted(set.intersection(*(set(losses) for losses in by_step)))
    tokens = np.array(steps) * runs[0].config.train.batch_tokens
    return Curve(tokens, np.array([[losses[step] for step in steps] for losses in by_step]))


def first_crossing(x: np.ndarray, y: np.ndarray, level: float) -> float | None:
    """Return where the line through the points (x, y) first comes down to `level`, or None."""
    reached = np.flatnonzero(y <= level)
    if not len(reached):
        return None
    i = int(reached[0])
    if i == 0 or y[i] == level:
        return float(x[i])
    share = (y[i - 1] - level) / (y[i - 1] - y[i])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))


def seconds_at(runs: list[Run], tokens: float) -> float:
    """Return the seconds of training that `tokens` took, by the train lines: a mean over runs."""
    return float(np.mean([_seconds_at(run, tokens) for run in runs]))


def _seconds_at(run: Run, tokens: float) -> float:
    clock = points(run, "train", "seconds")
    trained = np.concatenate(([0], clock.steps)) * run.config.train.batch_tokens
    return float(np.interp(tokens, trained, np.concatenate(([0.0], clock.values))))


def trial_facts(trial: Trial) -> dict[str, Any]:
    """Return what is known of one run; its final loss is None where it diverged."""
    facts = {"run": trial.name, "arm": trial.arm, "data": trial.data}
    facts |= {"lr": trial.lr, "seed": trial.seed, "final_loss": None}
    if trial.run is None:
        return facts
    config, tokens = trial.run.config, int(validation_curve([trial.run]).tokens[-1])
    return facts | {
        "final_loss": final_loss(trial),
        "tokens": tokens,
        "seconds": seconds_at([trial.run], tokens),
        "parameters": config.model.num_params,
        "recipe": config.recipe,
    }


def compare(found: list[Entry]) -> list[dict[str, Any]]:
    """Return the facts of each entry beside those of its baseline; None for what is not known."""
    baselines: dict[str, Entry] = {}
    for entry in found:
        baselines.setdefault(entry.data, entry)
    return [_facts(entry, baselines[entry.data]) for entry in found]


def _facts(entry: Entry, baseline: Entry) -> dict[str, Any]:
    """Return what is known of an entry, and the two ways to the baseline's final loss."""
    facts = {
        "arm": entry.arm,
        "data": entry.data,
        "lr": entry.lr,
        "runs": [run.name for run in entry.runs],
        "seeds": len(entry.trials),
        "diverged": len(entry.trials) - len(entry.runs),
    }
    if not entry.runs:
        return facts
    curve, config = validation_curve(entry.runs), entry.runs[0].config
    final = curve.losses[:, -1]
    facts |= {
        "parameters": config.model.num_params,
        "steps": int(curve.tokens[-1]) // config.train.batch_tokens,
        "planned_steps": config.train.steps,
        "tokens": int(curve.tokens[-1]),
        "final_loss": float(curve.mean[-1]),
        "final_loss_deviation": float(final.std(ddof=1)) if len(final) > 1 else None,
        "seconds": seconds_at(entry.runs, float(curve.tokens[-1])),
        "scores": mean_scores(entry.runs),
    }
    return facts | _way_to_baseline(entry, baseline)


def _way_to_baseline(entry: Entry, baseline: Entry) -> dict[str, float | None]:
    """Return tokens and seconds to the baseline's final loss, and how they compare with its own."""
    if not baseline.runs:
        return {}
    curve, other = validation_curve(entry.runs), validation_curve(baseline.runs)
    level = float(other.mean[-1])
    way: dict[str, float | None] = {"difference": float(curve.mean[-1]) - level}
    # What the baseline needed is its whole budget, unless its loss went up again.
    needed = first_crossing(other.tokens, other.mean, level)
    tokens = first_crossing(curve.tokens, curve.mean, level)
    if tokens is None:
        return way
    seconds, needed_seconds = seconds_at(entry.runs, tokens), seconds_at(baseline.runs, needed)
    return way | {
        "tokens_to_baseline": tokens,
        "share_of_tokens": tokens / needed if needed else None,
        "seconds_to_baseline": seconds,
        "share_of_seconds": seconds / needed_seconds if needed_seconds else None,
    }


def mean_scores(runs: list[Run]) -> dict[str, dict[str, float]]:
    """Return the last value of each score and its standard error, both as means over the runs.

    The examples are the same for every seed, so that seeds do not make the error smaller.
    """
    found = [scores(run) for run in runs]
    return {
        " ".join(name): {
            "value": float(np.mean([of[name].values[-1] for of in found])),
            "standard_error": float(np.mean([of[name].errors[-1] for of in found])),
        }
        for name in found[0]
        if all(name in of for of in found)
    }


def sweep_rows(found: list[Entry]) -> list[dict[str, Any]]:
    """Return the final loss at each rate, for the entries that have several; None if diverged."""
    return [
        {
            "arm": entry.arm,
            "data": entry.data,
            "lr": trial.lr,
            "final_loss": final_loss(trial) if trial.run else None,
            "best": trial.lr == entry.lr and trial.run is not None,
        }
        for entry in found
        if len(entry.sweep) > 1
        for trial in sorted(entry.sweep, key=lambda trial: trial.lr)
    ]


def warnings(found: list[Entry]) -> list[str]:
    """Return a sentence for every sweep that should go on, or from which nothing came."""
    sentences = []
    for entry in found:
        rates, name = [trial.lr for trial in entry.sweep], _name(entry, found)
        if not entry.runs:
            sentences.append(f"{name}: every run diverged; lower the rate.")
        elif len(rates) > 1 and entry.lr in (min(rates), max(rates)):
            sentences.append(
                f"{name}: the best rate, {entry.lr:g}, is at the edge of the sweep; widen it."
            )
    return sentences


def _name(entry: Entry, found: list[Entry]) -> str:
    several = len({other.data for other in found}) > 1
    return f"{entry.arm} on {entry.data}" if several else entry.arm


def table(rows: list[dict[str, Any]]) -> str:
    """Return the facts of all entries as an aligned Markdown table, a row an entry."""
    several = len({row["data"] for row in rows}) > 1
    return aligned([_cells(row, several) for row in rows])


def _cells(row: dict[str, Any], several: bool) -> dict[str, str]:
    """Return the cells of one entry under their headings; "" for what is not known."""
    known = {name: value for name, value in row.items() if value is not None}
    cells = {"recipe": row["arm"], "data": row["data"] if several else "", "lr": f"{row['lr']:g}"}
    if "final_loss" not in known:
        return cells | {"final val loss": "diverged"}
    difference = f"{row['difference']:+.4f}" if "difference" in known else ""
    return cells | {
        "final val loss": loss_text(row),
        "difference": difference,
        "tokens": short(row["tokens"]),
        "tokens to the baseline's loss": _reached(known, "tokens", short),
        "seconds to it": _reached(known, "seconds", _seconds),
        "seconds in all": _seconds(row["seconds"]),
        "parameters": f"{row['parameters']:,}",
        **{
            name: score_text(name.split()[1], score["value"], score["standard_error"])
            for name, score in row["scores"].items()
        },
        "remark": "; ".join(_remarks(row)),
    }


def loss_text(row: dict[str, Any]) -> str:
    """Return a final loss in words, with its sample standard deviation over two seeds or more."""
    deviation = row.get("final_loss_deviation")
    spread = f" ± {deviation:.4f} (n = {len(row['runs'])})" if deviation is not None else ""
    return f"{row['final_loss']:.4f}{spread}"


def _reached(known: dict[str, Any], what: str, text: Any) -> str:
    """Return tokens or seconds to the baseline's final loss, and their share of the baseline's."""
    if f"{what}_to_baseline" not in known:
        return ""
    share = f" ({100 * known[f'share_of_{what}']:.1f} %)" if f"share_of_{what}" in known else ""
    return text(known[f"{what}_to_baseline"]) + share


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def _remarks(row: dict[str, Any]) -> list[str]:
    remarks = []
    if row["steps"] < row["planned_steps"]:
        remarks.append(f"stopped early at {row['steps']:,} of {row['planned_steps']:,}")
    if row["diverged"]:
        remarks.append(f"{row['diverged']} of {row['seeds']} seeds diverged")
    return remarks


def sweep_table(rows: list[dict[str, Any]]) -> str:
    """Return the sweeps as an aligned Markdown table, a row a rate; the best rates are marked."""
    several = len({row["data"] for row in rows}) > 1
    return aligned(
        [
            {
                "recipe": row["arm"],
                "data": row["data"] if several else "",
                "lr": f"{row['lr']:g}",
                "final val loss": "diverged"
                if row["final_loss"] is None
                else f"{row['final_loss']:.4f}",
                "": "best" if row["best"] else " ",
            }
            for row in rows
        ]
    )
