"""The results of `bench.gpu` as a report that a person can read, with its figures.

python -m bench.gpu_report bench/results/DATE_gpu.jsonl
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from bench.gpu_job import read_results
from config import UserError
from figures import PALETTE, STYLE
from metrics import aligned

Line = dict[str, Any]

TITLES = {
    "machine": "The machine",
    "throughput": "Training speed by micro-batch",
    "against transformers": "Against a plain loop around transformers",
    "evaluation": "Evaluation",
    "profile": "Where one step's time goes",
    "ladder": "The optimisation ladder",
    "attention": "Causal attention, forward and backward",
    "losses": "The loss, forward and backward",
    "host reads": "Reading the loss back",
    "sampling": "Sampling",
    "training": "A short training",
}
# Details that are drawn, not listed.
DRAWN = ("curve",)


@dataclass(frozen=True)
class Arguments:
    """Write the report and the figures of a results file beside it."""

    results: Annotated[Path, tyro.conf.Positional]
    """A file that bench.gpu has written."""


def main() -> None:
    """Write the report of the file that the command line names, and print what was written."""
    for path in write(parse(Arguments).results):
        print(path)


def write(results: Path) -> list[Path]:
    """Write the report and figures of a results file beside it, and return their paths.

    Raises UserError when there is nothing in the file.
    """
    lines = read_results(results)
    if not lines:
        raise UserError(f"There are no results in {results}.")
    stem = results.with_suffix("")
    images = draw(lines, stem)
    report = stem.with_name(f"{stem.name}.md")
    report.write_text(text(lines, images), encoding="utf-8")
    return [results, report, *images.values()]


def text(lines: list[Line], images: dict[str, Path]) -> str:
    """Return the report, Markdown, with the image of each section that has one."""
    first = lines[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    parts = [
        f"# {first['device']}\n\n{versions}; commit {first['commit']}.",
        "## Claims\n\n" + "\n".join(claims(lines)),
    ]
    for section in dict.fromkeys(line["section"] for line in lines):
        parts.append(f"## {TITLES.get(section, section)}")
        mine = [line for line in lines if line["section"] == section]
        found = [line for line in mine if "failed" not in line["details"]]
        if section == "throughput":
            found.sort(
                key=lambda line: (line["details"]["compile"], line["details"]["micro-batch"])
            )
        # Lines whose details begin alike are of one kind, and make a table.
        for kind in dict.fromkeys(next(iter(line["details"])) for line in found):
            parts.append(table([line for line in found if kind in line["details"]]))
        parts += [f"failed: {line['details']['failed']}" for line in mine if line not in found]
        if section in images:
            parts.append(f"![{TITLES[section]}]({images[section].name})")
    return "\n\n".join(parts) + "\n"


def claims(lines: list[Line]) -> Iterator[str]:
    """Yield a sentence on each claim about one H200, with what was measured."""
    for claim, wanted, values in (
        ("MFU of 124M at B=64, T=1024", "at least 0.5", figures_of(lines, "throughput", mfu)),
        (
            "speed over a plain compiled loop around transformers",
            "at least 1.3",
            figures_of(lines, "against transformers", ratio),
        ),
        (
            "seconds for HellaSwag's 10,042 rows",
            "at most 15",
            figures_of(lines, "evaluation", hellaswag_seconds),
        ),
    ):
        least, bound = wanted.startswith("at least"), float(wanted.split()[-1])
        if not values:
            yield f"- {claim}: {wanted}; not measured."
            continue
        best = max(values) if least else min(values)
        met = best >= bound if least else best <= bound
        yield f"- {claim}: {wanted}; **{best:.4g}**, {'met' if met else 'not met'}."


def figures_of(
    lines: list[Line], section: str, figure: Callable[[Line], float | None]
) -> list[float]:
    """Return a figure of each line of a section that has it."""
    found = [figure(line) for line in lines if line["section"] == section]
    return [value for value in found if value is not None]


def mfu(line: Line) -> float | None:
    """Return a line's MFU at the claim's micro-batch."""
    return line["details"].get("MFU") if line["details"].get("micro-batch") == 64 else None


def ratio(line: Line) -> float | None:
    """Return a line's ratio at the claim's micro-batch."""
    return line["ratio"] if line["details"].get("micro-batch") == 64 else None


def hellaswag_seconds(line: Line) -> float | None:
    """Return the seconds of a line that scored all of HellaSwag."""
    whole = line["details"].get("task") == "hellaswag" and line["details"]["examples"] == 10_042
    return line["details"]["seconds"] if whole else None


def table(lines: list[Line]) -> str:
    """Return lines as a Markdown table; a single one has its columns below each other."""
    rows = []
    columns = dict.fromkeys(key for line in lines for key in line["details"] if key not in DRAWN)
    with_ratio = any(line["ratio"] for line in lines)
    for line in lines:
        row = {key: shown(line["details"].get(key)) for key in columns}
        row[line["unit"]] = shown(line["value"])
        if with_ratio:
            row |= {"reference": shown(line["reference"]), "ratio": shown(line["ratio"])}
        rows.append(row)
    if len(rows) == 1:
        rows = [{"figure": key, "measured": value} for key, value in rows[0].items()]
    return aligned(rows)


def shown(value: Any) -> str:
    """Return a value as it stands in a table."""
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else f"{value:g}"
    return str(value)


def draw(lines: list[Line], stem: Path) -> dict[str, Path]:
    """Draw what there is to draw, and return each figure's path by its section."""
    import matplotlib
    from matplotlib.figure import Figure

    paths = {}
    with matplotlib.rc_context(STYLE):
        for section, plot in PLOTS.items():
            mine = [line for line in lines if line["section"] == section and line["value"]]
            if not mine:
                continue
            # A Figure made without pyplot renders through Agg and needs no window system.
            figure = Figure(figsize=(7.2, 4.2), dpi=130, layout="constrained")
            axes = figure.subplots()
            plot(axes, mine)
            axes.set_title(f"{TITLES[section]} ({mine[0]['device'].partition(',')[0]})")
            axes.grid(True)
            paths[section] = stem.with_name(f"{stem.name}_{section}.png")
            figure.savefig(paths[section], metadata={"Software": None})
    return paths


def draw_throughput(axes: Any, lines: list[Line]) -> None:
    """Draw tokens/s over micro-batches, a line each with and without compile."""
    for colour, mode in zip(PALETTE, ("on", "off"), strict=False):
        mine = [line for line in lines if line["details"]["compile"] == mode]
        points = sorted((line["details"]["micro-batch"], line["value"]) for line in mine)
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=f"compile {mode}")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("sequences in a micro-batch")
    axes.set_ylabel("tokens/s")
    axes.legend()


def draw_ladder(axes: Any, lines: list[Line]) -> None:
    """Draw the rungs as bars, the first on top, each with its speed over the first one's."""
    rungs = [line["details"]["rung"] for line in lines]
    bars = axes.barh(rungs, [line["value"] for line in lines], color=PALETTE[0])
    axes.bar_label(bars, [f" {line['details']['times the first']:g}x" for line in lines])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("tokens/s, each with everything above it")


def draw_curve(axes: Any, lines: list[Line]) -> None:
    """Draw the losses of the short training over its tokens."""
    curve = lines[-1]["details"]["curve"]
    for kind, colour, style in (("train", PALETTE[5], "-"), ("val", PALETTE[1], "o-")):
        if curve[kind]:
            axes.plot(*zip(*curve[kind], strict=True), style, color=colour, label=kind, lw=1.2)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("loss, nats a token")
    axes.legend()


PLOTS: dict[str, Callable[[Any, list[Line]], None]] = {
    "throughput": draw_throughput,
    "ladder": draw_ladder,
    "training": draw_curve,
}


if __name__ == "__main__":
    # Not at the top: bench.gpu and its processes import this module, and parse their own options.
    from utils import parse, run_script

    run_script(main)
