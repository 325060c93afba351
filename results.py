"""What came of a run: the figure, the table and some text, or a page for a browser.

    python results.py [RUN ...]             # the newest run under runs/ unless some are named
    python results.py RUN --report          # instead: all of a run as one page, report.py
    python results.py RUN RUN --compare     # instead: runs side by side as one page

One run is drawn into its own `figures/results.png` and `.svg`; several are laid over each other in
`figures/overlay.png` and `.svg` of the first. Everything comes from `config.json` and
`metrics.jsonl`: no GPU, no data and no torch are needed, but for the sampler, which is called last.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from config import UserError
from figures import draw
from metrics import (
    Points,
    Run,
    aligned,
    best,
    is_number,
    is_share,
    newest_run,
    points,
    read_run,
    score_text,
    scores,
    short,
)
from report import write_comparison, write_report
from utils import find_run, parse, run_script


@dataclass(frozen=True)
class Options:
    """Show what came of runs: a figure, a table and some text."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Run directories, or names of runs; the newest run when none is given."""
    runs_dir: str = "runs"
    """Directory that holds the run directories."""
    samples: int = 1
    """Texts sampled from each prompt; 0 samples nothing and does not load torch."""
    report: bool = False
    """Write each run's figures/report.html instead: all of it as one page for a browser."""
    compare: bool = False
    """Write the first run's figures/comparison.html instead: all runs on one page."""
    passage: str = ""
    """Text or file whose loss the report shows token by token; by default validation text."""


def main() -> None:
    """Show the runs that the command line names, or the newest."""
    options = parse(Options)
    names = options.runs or [str(newest_run(options.runs_dir))]
    # A run named twice is one run.
    directories = [find_run(name, options.runs_dir) for name in dict.fromkeys(names)]
    if options.report or options.compare:
        write_pages(directories, options)
    elif options.passage:
        raise UserError("--passage is for the page that --report writes; add --report.")
    else:
        report(directories, options.samples)


def write_pages(directories: list[Path], options: Options) -> None:
    """Write the pages that the options ask for, and print where they are."""
    if options.compare and len(directories) < 2:
        raise UserError("--compare needs two runs or more; name them, or take --report for one.")
    if options.passage and not options.report:
        raise UserError("--passage is for the page that --report writes; add --report.")
    if options.report:
        for directory in directories:
            path = write_report(directory, options.passage, loads_model=options.samples > 0)
            print(f"Report: {path}")
    if options.compare:
        print(f"Comparison: {write_comparison(directories)}")


def report(directories: list[Path], samples: int = 1) -> None:
    """Draw the runs, print their table and, unless `samples` is 0, texts sampled from them."""
    runs = [read_run(directory) for directory in directories]
    paths = draw(runs)
    print(table(runs) + "\n")
    for path in paths:
        print(f"Figure: {path}")
    if samples > 0:
        print_samples(runs, samples)


def table(runs: list[Run]) -> str:
    """Return the summary as an aligned Markdown table, a row a run."""
    return aligned([_row(run) for run in runs])


def _row(run: Run) -> dict[str, str]:
    """Return the cells of one run under their headings; "" where the run does not know."""
    # Not the last finite one: a run that diverged should say so.
    last = ["", *(line["loss"] for line in run.metrics if line["kind"] == "val")][-1]
    clock = points(run, "train", "seconds")
    seconds = clock.values[-1] if len(clock.values) else 0
    per_step = run.config.train.batch_tokens
    return {
        "run": run.name,
        "recipe": run.config.recipe,
        "size": run.config.size,
        "data": run.data,
        "steps": run.progress,
        "tokens": short(max(line["step"] for line in run.metrics) * per_step),
        "best train loss (one step)": best(points(run, "train", "loss")),
        "best val loss": best(points(run, "val", "loss")),
        "last val loss": f"{last:.4f}" if is_number(last) else str(last),
        "best bits per byte": best(points(run, "val", "bits_per_byte")),
        "training hours": f"{seconds / 3600:.3g}" if seconds else "",
        "tokens/s": short(clock.steps[-1] * per_step / seconds) if seconds else "",
        **{f"best {' '.join(name)}": _best(name[1], score) for name, score in scores(run).items()},
    }


def _best(metric: str, score: Points) -> str:
    """Return the best value of a score with its standard error."""
    i = score.values.argmax() if is_share(metric) else score.values.argmin()
    return score_text(metric, float(score.values[i]), float(score.errors[i]))


def print_samples(runs: list[Run], count: int) -> None:
    """Print `count` continuations of each fixed prompt by each run's newest weights."""
    # The sampler loads torch, which everything above does without.
    from recipes import PROMPTS
    from sample import generate_text

    for run in runs:
        # A run that cannot speak yet still has its figure and its row.
        try:
            for i in range(count):
                texts = generate_text(str(run.directory), list(PROMPTS), seed=1337 + i)
                for prompt, text in zip(PROMPTS, texts, strict=True):
                    print(f"\n{run.name}, sample {i + 1} of {count}:\n{prompt}{text}")
        except UserError as error:
            print(f"\nNo text from {run.name}: {error}")


if __name__ == "__main__":
    run_script(main)
