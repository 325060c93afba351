"""Command line -> config -> train.

    python main.py [RECIPE] [--size SIZE] [--data DIR_OR_NAME] [--name RUN] [--group.field value]
    python main.py --resume RUN [--group.field value]
    torchrun --standalone --nproc_per_node=8 main.py ...

Defaults < size < recipe < what is typed. `resolve` reads the command line, `launch` does it.
"""

import contextlib
import dataclasses
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

import load_fineweb
import plan
import recipes
from checks import validate
from command_line import parse, run_script
from config import (
    Config,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    UserError,
    accumulation_steps,
    changed_identity,
    flatten,
    replace,
    total_updates,
)
from documents import build_index
from files import locked
from logs import create_run, read_config, run_directory
from manifests import DATA_DIR, find_data, manifest_digest, read_manifest
from rows import training_windows
from shards import TokenStream
from summary import resume_command, summary
from tasks import TASKS
from trackers import check_trackers
from verify import verify_data

if TYPE_CHECKING:
    from distributed import World


@dataclass(frozen=True)
class Arguments:
    """Train a GPT-2 from token shards."""

    recipe: Annotated[str, tyro.conf.Positional] = ""
    """What to train, gpt2 by default; or gpt2-baseline, gpt2-periodicity-fix, gpt2-lr-inc,
    gpt2-global-datafix, gpt2-rope, gpt2-swiglu, gpt3-settings, modern, modern-untied, quickstart,
    shakespeare-char. recipes.py says what each is, costs and gives."""
    size: str = ""
    """How big: nano, 124m, 350m, 774m or 1558m; the recipe's own by default."""
    data: str = ""
    """Directory of token shards, or its name under data/; the recipe's own by default."""
    name: str = ""
    """Name of the run directory; recipe and size by default."""
    init: str = ""
    """Begin with the weights of a run, a checkpoint, gpt2[-medium|-large|-xl], or a directory of
    transformers, which also gives the model its shape."""
    resume: str = ""
    """Continue this run from its config.json and newest intact checkpoint."""
    auto_resume: bool = False
    """Continue the named run if it exists, start it otherwise (implied when torchrun restarts)."""
    verify: bool = False
    """Read all shards and compare their checksums first, not only their sizes and samples."""
    plan: bool = False
    """Say what the run would cost in operations, memory, time and disk, and start nothing."""
    gpus: int | None = None
    """GPUs to plan for; 8 by default, at nano 1."""
    mfu: float | None = None
    """Fraction of the GPUs' peak to plan with, 0.4 by default: an assumption."""
    price: float | None = None
    """What a GPU costs an hour, to plan with."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True)
class Job:
    """A config, the directory of its run, and whether that run is there already."""

    config: Config
    run: Path
    resumes: bool
    verifies: bool = False


def main() -> None:
    """Train as the command line says, or only plan to."""
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
    if alone and (first := parse(Arguments, None, Arguments())).plan:
        print(planned(None, first))
        return
    job = resolve() if alone else resolve_together()
    # torch takes seconds to import; a typing mistake should not have to wait for it.
    from distributed import join_world

    with join_world(job.config.train.device, job.config.train.timeout) as world:
        launch(job, world)


def planned(args: list[str] | None, first: Arguments) -> str:
    """Return the plan of the run a command line asks for, whether or not it or its data exists."""
    if first.resume:
        config = _override(
            args, first, read_config(run_directory(first.resume, first.train.runs_dir))
        )
    else:
        config = new_config(args, first)
    return plan.describe(config, first.gpus, first.mfu, first.price)


def resolve_together() -> Job:
    """Return the job that all processes have; raises UserError on all when one has none or another.

    A node on which nothing died is told here that others were restarted: torchrun's own count of
    restarts is each node's own.
    """
    from roll_call import ask, check_same, together

    first = together("command", lambda: parse(Arguments, None, Arguments()))
    seconds = first.train.timeout
    restarts = ask("restarts", int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), seconds)
    job = together("job", lambda: resolve(restarted=max(restarts) > 0), seconds)
    facts = {"the existing run": str(job.run) if job.resumes else None, **flatten(job.config)}
    check_same("settings", facts, seconds)
    return job


def resolve(args: list[str] | None = None, restarted: bool = False) -> Job:
    """Return the job a command line asks for; raises UserError for whatever does not fit.

    A run that exists is continued when its processes were `restarted`. The schema is parsed twice:
    once to learn recipe, size and run, then again with the config they imply as the defaults, so
    that what is typed overrides it field by field.
    """
    first = parse(Arguments, args, Arguments())
    if first.plan:
        raise UserError(
            "A plan is for one process; run python main.py ... --plan, without torchrun."
        )
    if (first.gpus, first.mfu, first.price) != (None, None, None):
        raise UserError("--gpus, --mfu and --price are for a plan; add --plan, or leave them out.")
    if first.resume:
        return _continue(args, first, run_directory(first.resume, first.train.runs_dir))
    config = new_config(args, first)
    run = Path(config.train.runs_dir) / config.name
    if not run.exists():
        # The embedded corpus may have yet to be made, or finished; `launch` sees to it.
        known = config if config.data == load_fineweb.PYDOCS else complete_config(config)
        return Job(known, run, resumes=False, verifies=first.verify)
    restarted = restarted or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if first.auto_resume or restarted:
        return _continue(args, first, run_directory(str(run)))
    raise UserError(f"The run {run} exists; add --resume {config.name} or choose another --name.")


def new_config(args: list[str] | None, first: Arguments) -> Config:
    """Return the config of a run that begins, without what only its data can tell.

    `first` is what `args` say without the defaults that their recipe and size imply.
    """
    base = recipes.build(first.recipe or "gpt2", first.size or None)
    name = f"{base.recipe}-{base.size}"
    if first.init:
        # torch, which this needs, takes seconds to import.
        import start

        base = replace(base, {"train.runs_dir": first.train.runs_dir})
        base = start.with_shape_of(first.init, base, first.size)
        config = _override(args, first, base)
        start.check_typed(config, base)
        name = f"{base.recipe}-{base.size}-from-{Path(first.init).name}"
    else:
        config = _override(args, first, base)
    config = replace(config, {"name": first.name or name})
    if Path(config.name).name != config.name or config.name.startswith("."):
        raise UserError(f"--name {config.name} is not a plain name; --train.runs-dir says where.")
    return config


def _continue(args: list[str] | None, first: Arguments, run: Path) -> Job:
    """Return the job that continues `run`; raises UserError if what is typed would change it."""
    stored = read_config(run)
    given = {name: getattr(first, name) for name in ("recipe", "size", "data", "init")}
    config = replace(_override(args, first, stored), {n: v for n, v in given.items() if v})
    changed = changed_identity(stored, config)
    if changed:
        raise UserError(
            f"The run {run} cannot go on with other settings ({'; '.join(changed)}): they make "
            "it what it is. Leave them out, or start another run with --name."
        )
    if config.data != load_fineweb.PYDOCS:
        find_data(config.data)
    return Job(config, run, resumes=True, verifies=first.verify)


def _override(args: list[str] | None, first: Arguments, base: Config) -> Config:
    """Return `base` with the fields that are typed."""
    given = parse(Arguments, args, _with_defaults(first, base))
    config = replace(base, {"model": given.model, "optim": given.optim, "train": given.train})
    if first.data:
        config = replace(config, {"data": first.data})
    validate(config)
    for name in config.train.eval_tasks:
        recipes.check_name(name, TASKS, "benchmark")
    check_trackers(config.train.trackers)
    return config


def _with_defaults(first: Arguments, base: Config) -> Arguments:
    """Return the arguments with the groups of `base`, for what is typed to be laid over."""
    return dataclasses.replace(first, model=base.model, optim=base.optim, train=base.train)


def complete_config(config: Config) -> Config:
    """Return the config with what its data decides: vocabulary and number of updates."""
    manifest = read_manifest(find_data(config.data))
    if config.init and manifest.vocab_size != config.model.vocab_size:
        raise UserError(
            f"{config.data} has a vocabulary of {manifest.vocab_size} ids, but {config.init} one "
            f"of {config.model.vocab_size}; prepare the data with its tokenizer."
        )
    config = replace(config, {"model.vocab_size": manifest.vocab_size})
    return replace(config, {"train.updates": total_updates(config, training_windows(config))})


def launch(job: Job, world: "World") -> None:
    """Train the job on this process, together with the others of `world`."""
    from micro_batch import choose_micro_batch
    from roll_call import on_main, together
    from train import train

    config, run, seconds = job.config, job.run, job.config.train.timeout
    accumulation_steps(recipes.fit_micro_batch(config, world.size), world.size)
    on_main("data", lambda: _prepare_data(job), seconds)
    if not job.resumes:
        config = together("config", lambda: complete_config(job.config), seconds)
        _create_run(run, config)
    # How an update is divided belongs to this start, not to the run: config.json does not fix it.
    tries_micro_batch = config.train.micro_batch is None and world.device.type != "cpu"
    config = choose_micro_batch(config, world)
    with contextlib.ExitStack() as stack:
        # Only one process writes to a run, so only one needs to see that no other program does.
        on_main("lock", lambda: stack.enter_context(locked(run)), seconds)
        found = _newest_checkpoint(run, world, seconds) if job.resumes else None
        if world.is_main:
            print(summary(config, run, world), flush=True)
        step, complete = train(config, run, world, found, tries_micro_batch)
        if world.is_main and complete:
            conclude(config, run, step)
        elif world.is_main:
            print(f"stopped after update {step}; continue with: {resume_command(config)}")


def _create_run(run: Path, config: Config) -> None:
    """Make the run directory on one process, and see that all can see it and have the same data."""
    from roll_call import check_same, on_main, see, together

    seconds = config.train.timeout
    check_same("data", {"the data": manifest_digest(find_data(config.data))}, seconds)
    on_main("run", lambda: create_run(run, config), seconds)
    try:
        together("sight", lambda: see(run / "config.json", seconds), seconds)
    except UserError:
        # It would stand in the way of its name when the mistake is mended.
        on_main("removal", lambda: shutil.rmtree(run), seconds)
        raise


def _prepare_data(job: Job) -> None:
    """Make, check and index the data, as far as the job asks for it, on one process."""
    config = job.config
    if config.data == load_fineweb.PYDOCS:
        # The embedded corpus needs no download, so it is made when first asked for.
        load_fineweb.prepare(load_fineweb.PYDOCS, DATA_DIR / config.data, quiet=True)
    directory = find_data(config.data)
    for split in ("train", "val"):
        # Damage shows here, before there is a run directory.
        TokenStream(directory, split)
    if config.init and not job.resumes:
        import start

        start.check_data(config)
    if job.verifies:
        print(verify_data(directory), flush=True)
    if config.train.order == "shuffle_documents" or config.train.rows == "padded":
        build_index(directory, "train")


def _newest_checkpoint(run: Path, world: "World", seconds: float) -> Path | None:
    """Return the newest intact checkpoint, as the main process finds it and all see it."""
    import checkpoint
    from distributed import from_main
    from roll_call import on_main, see, together

    found = on_main("checkpoint", lambda: checkpoint.newest(run), seconds)
    step = from_main(checkpoint.step_of(found) if found else -1, world)
    if step < 0:
        return None
    path = checkpoint.checkpoint_path(run, step)
    together("sight", lambda: see(path / checkpoint.STATE, seconds), seconds)
    return path


def conclude(config: Config, run: Path, step: int) -> None:
    """Draw the figure and print samples, scores and the commands that follow after `step`."""
    import results

    results.report([run])
    again = f"{resume_command(config)}   (where a run was interrupted; this one is done)"
    if step < config.train.updates:
        again = resume_command(replace(config, {"train.stop_at": config.train.updates}))
    print(
        f"\nlook again   python results.py {run}\n"
        f'write text   python sample.py {run} --prompt "{recipes.PROMPTS[0]}"\n'
        f"continue     {again}"
    )


if __name__ == "__main__":
    run_script(main)
