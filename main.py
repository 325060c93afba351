"""Command line -> config -> train.

    python main.py [RECIPE] [--size SIZE] [--data NAME_OR_DIR] [--name RUN] [--group.field value]
    python main.py --resume RUN | ... --auto-resume | ... --init-from MODEL | ... --plan
    torchrun --standalone --nproc_per_node=8 main.py ...
Defaults < size < recipe < what is typed. `resolve` reads the command line, `launch` does it.
"""

import contextlib
import dataclasses
import os
import re
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

import config as c
import recipes
from config import Config, UserError, replace
from training import setup
from training.setup import PYDOCS, complete_config, plan, resume_command, with_micro_batch
from utils import check_name, find_run, load_config, locked, parse, printable, run_script


# What is typed is checked over the recipe's values, not over the defaults: no checks before that.
class ModelOptions(c.ModelConfig):
    def __post_init__(self) -> None: ...


class OptimOptions(c.OptimConfig):
    def __post_init__(self) -> None: ...


class TrainOptions(c.TrainConfig):
    def __post_init__(self) -> None: ...


@dataclass(frozen=True)
class Args:
    """Train a GPT-2 from token shards."""

    recipe: Annotated[str, tyro.conf.Positional] = ""
    """What to train: gpt2 (the default), gpt2-baseline, gpt2-periodicity-fix, gpt2-lr-inc,
    gpt2-global-datafix, gpt2-rope, gpt2-swiglu, gpt3-settings, modern, modern-untied, quickstart
    or shakespeare-char, which are documented in recipes.py."""
    size: str = ""  # d2, d3, d4, d6, d8, nano, 124m, 350m, 774m, 1558m; or the recipe's own.
    data: str = ""  # Directory of token shards, or its name under data/; or the recipe's own.
    name: str = ""  # Name of the run directory; recipe and size by default.
    init_from: str = ""
    """Begin with the weights, and so the shape, of any MODEL: run, checkpoint, gpt2, hub name."""
    resume: str = ""  # Continue this run from its config.json and newest intact checkpoint.
    auto_resume: bool = False  # Continue the named run if it exists, else start it.
    verify: bool = False  # Compare the checksums of all data first, not only while training.
    plan: bool = False  # Say what the run would cost in FLOPs, memory, time, disk; start nothing.
    gpus: int | None = None  # GPUs to plan for; by default 8, or 1 for sizes below 124m.
    mfu: float = 0.4  # Fraction of the GPUs' peak to plan with: an assumption.
    price: float | None = None  # What a GPU costs an hour, to plan with.
    model: ModelOptions = field(default_factory=ModelOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    train: TrainOptions = field(default_factory=TrainOptions)


@dataclass(frozen=True)
class Job:
    """A config, the directory of its run, and whether that run is there already."""

    config: Config
    run: Path
    resumes: bool
    verifies: bool = False


def main() -> None:
    """Train as the command line says, or only plan to."""
    args, job = parse(Args), None
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    timeout = c.TrainConfig(timeout=args.train.timeout).timeout
    if args.plan or os.environ.get("WORLD_SIZE", "1") == "1":
        job = resolve(None, restarted)
    if args.plan:
        print(plan(job.config, args.gpus, args.mfu, args.price))
        return
    # torch takes seconds to import; a typing mistake should not have to wait for it.
    from training.distributed import all_reduce_any, init_distributed, on_rank0

    with init_distributed(timeout) as info:
        if job is None:  # rank 0 decides for all, but each node counts its own restarts
            restarted = all_reduce_any(restarted)
            job = on_rank0(lambda: resolve(None, restarted))
        config, step, complete = launch(job, info)
    if info.is_main:  # nobody waits for rank 0 any more, so it may take its time
        conclude(config, job.run, step, complete)


def resolve(words: list[str] | None = None, restarted: bool = False) -> Job:
    """Return the job a command line asks for; raises UserError for whatever does not fit."""
    args = parse(Args, words)
    if not args.plan and (args.gpus, args.price) != (None, None):
        raise UserError("--gpus and --price are for a plan; add --plan, or leave them out.")
    if args.resume:
        return _continue(words, args, find_run(args.resume, args.train.runs_dir))
    config = new_config(words, args)
    run = Path(config.train.runs_dir) / config.name
    if args.plan or not run.exists():
        # The embedded corpus may have yet to be made, and a plan needs no data.
        needs_data = config.data != PYDOCS and not args.plan
        config = complete_config(config) if needs_data else config
        return Job(config, run, resumes=False, verifies=args.verify)
    if args.auto_resume or restarted:
        return _continue(words, args, find_run(run))
    raise UserError(f"The run {run} exists; add --resume {config.name} or choose another --name.")


def _continue(words: list[str] | None, args: Args, run: Path) -> Job:
    """Return the job that continues `run`; raises UserError if what is typed would change it."""
    stored = replace(load_config(run), {"train.stop_at_step": None})  # was that of an earlier start
    given = {name: getattr(args, name) for name in ("recipe", "size", "data", "init_from")}
    config = replace(_override(words, args, stored), {k: v for k, v in given.items() if v})
    if changed := "; ".join(c.changed_fields(stored, config)):
        other = f"The run {run} cannot go on with other settings ({changed}): they make it what it"
        raise UserError(f"{other} is. Leave them out, or start another run with --name.")
    return Job(config, run, resumes=True, verifies=args.verify)


def new_config(words: list[str] | None, args: Args) -> Config:
    """Return the config of a run that begins, without what only its data can tell."""
    base = recipes.build(args.recipe or "gpt2", args.size or None)
    if args.init_from:
        from sample import load

        found = load(args.init_from, args.train.runs_dir)[0].config
        base = setup.with_shape_of(args.init_from, found, base, bool(args.size))
    name = f"{base.recipe}-{base.size}"
    name += f"-from-{Path(args.init_from).name}" if args.init_from else ""
    config = _override(words, args, replace(base, {"name": args.name or name}))
    if args.init_from:
        setup.check_shape(config, base.model)
    if not re.fullmatch(r"(?!\.)[A-Za-z0-9._-]{1,100}", config.name):
        plain = "is not 1 to 100 letters, digits, dots, dashes and underscores"
        raise UserError(f"--name {config.name} {plain}; --train.runs-dir says where it lies.")
    return config


def _override(words: list[str] | None, args: Args, base: Config) -> Config:
    """Return `base` with what is typed: the command line parsed again, over `base`."""
    from tasks import TASKS
    from training.trackers import check_trackers

    options = {"model": ModelOptions(**vars(base.model)), "optim": OptimOptions(**vars(base.optim))}
    options["train"] = TrainOptions(**vars(base.train))
    given = parse(Args, words, dataclasses.replace(args, **options))
    groups = {"model": c.ModelConfig(**vars(given.model)), "data": args.data or base.data}
    groups |= {"optim": c.OptimConfig(**vars(given.optim))}
    config = replace(base, {**groups, "train": c.TrainConfig(**vars(given.train))})
    for name in config.train.eval_tasks:
        check_name(name, TASKS, "benchmark")
    check_trackers(config.train.trackers)
    return config


def launch(job: Job, info: Any) -> tuple[Config, int, bool]:
    """Train with the other ranks; return the config, and the step reached and whether it is it."""
    from sample import load
    from train import train
    from training import checkpoint, distributed
    from training.distributed import on_rank0
    from training.logger import create_run

    config, run, runs_dir = job.config, job.run, job.config.train.runs_dir
    distributed.set_timeout(config.train.timeout)
    info = distributed.choose_device(info, config.train.device)
    on_rank0(lambda: setup.prepare_data(config.data, job.verifies))
    setup.find_data(config.data)  # on every node, before there is a run directory
    if not job.resumes:
        if config.init_from:
            on_rank0(lambda: setup.check_tokenizer(config, load(config.init_from, runs_dir)[1]))
        config = on_rank0(lambda: complete_config(job.config))
    # How a step is divided belongs to this start, not to the run: config.json does not fix it.
    divided = with_micro_batch(config, info.world_size, info.device.type)
    tries_micro_batch = config.train.micro_batch_size is None and info.device.type != "cpu"
    if not job.resumes:
        on_rank0(lambda: create_run(run, config))
    seen = setup.sees(run / "config.json", info.world_size, config.train.timeout)
    if distributed.all_reduce_any(not seen):
        if info.is_main and not job.resumes:  # so that its name is free again
            shutil.rmtree(run)
        raise UserError(f"Some ranks do not see {run}; give a --train.runs-dir that all share.")
    with contextlib.ExitStack() as stack:
        # Only rank 0 writes to a run, so only rank 0 needs to see that no other program does.
        on_rank0(lambda: stack.enter_context(locked(run / "lock")))
        found = on_rank0(lambda: checkpoint.newest_to_resume(run)) if job.resumes else None
        dtype = str(distributed.pick_dtype(config.train.dtype, info.device)).removeprefix("torch.")
        distributed.print0(setup.summary(divided, run, info, dtype))
        return config, *train(divided, run, info, found, tries_micro_batch)


def conclude(config: Config, run: Path, step: int, complete: bool) -> None:
    """Draw the figure and print samples, scores and the commands that follow after `step`."""
    if not complete:
        print(f"stopped after step {step}; continue with: {resume_command(run)}", flush=True)
        return
    try:
        import results

        results.report([run])
    except Exception as error:
        print(printable(f"There is no figure or sample ({type(error).__name__}: {error})."))
    print(f"\nlook again   {shlex.join(['python', 'results.py', str(run)])}")
    sample = ["python", "sample.py", str(run), "--prompt", recipes.PROMPTS[0]]
    print(f"write text   {shlex.join(sample)}")
    if step < config.train.steps:
        print(f"continue     {resume_command(run)}")


if __name__ == "__main__":
    run_script(main)
