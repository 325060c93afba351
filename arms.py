"""The command line of an experiment: arms, and the runs they ask for.

    read_command(args) -> Options, [Arm]      mistakes in any arm are found here
    planned_runs(options, arms) -> [Planned]  every run, resolved as main.py will resolve it

An arm is a recipe, perhaps with options of its own in the same quoted string, which are laid over
those shared by all: "modern --model.no-qk-norm".
"""

import re
import shlex
import sys
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

import tyro

import load_fineweb
import main
import recipes
from config import Config, OptimConfig, UserError, changed_fields, replace
from corpus.shards import DATA_DIR, find_data
from utils import load_config, parse


@dataclass(frozen=True)
class Options:
    """Train recipes at one size on the same tokens, and compare them with the first of them.

    Every recipe may have options of its own, in one quoted string with it:
    experiments.py gpt2-baseline "modern --model.no-qk-norm" --size nano --data pydocs --name try.
    The same command again continues what was interrupted and reuses what is done.
    """

    recipes: tyro.conf.Positional[tuple[str, ...]] = ()
    """What to train, by its name in recipes.py, before all options; the first is the baseline."""
    size: str = "124m"
    """How big, and how many tokens: d2, d3, d4, d6, d8, nano, 124m, 350m, 774m or 1558m."""
    data: tuple[str, ...] = ("fineweb-edu",)
    """Directories of token shards, or names under data/; several are compared by scores."""
    name: str = ""
    """Name of the experiment: a directory under runs/experiments/."""
    seeds: int = 1
    """Runs of each recipe, with seeds from train.seed on; in a sweep, at its best rate only."""
    lr: tuple[float, ...] = ()
    """Peak rates of AdamW to try; Muon's and an untied head's keep their proportion to it."""
    jobs: int = 1
    """Runs at the same time; on a CPU they share its cores."""
    processes: int = 1
    """Processes of each run, started by torchrun."""
    model: main.ModelOptions = field(default_factory=main.ModelOptions)
    optim: main.OptimOptions = field(default_factory=main.OptimOptions)
    train: main.TrainOptions = field(default_factory=main.TrainOptions)


# What is the same for all, and cannot be an option of one arm.
COMMON = ("--size", "--data", "--name", "--jobs", "--processes", "--train.runs-dir")
# What main.py is not given as it is typed here.
OURS = (*COMMON, "--lr", "--seeds")


@dataclass(frozen=True)
class Arm:
    """A recipe with its options: `arguments` are main.py's, and `config` what comes of them."""

    label: str
    slug: str
    arguments: list[str]
    config: Config
    rates: tuple[float, ...]
    seeds: int


@dataclass(frozen=True)
class Planned:
    """One run: `arguments` are main.py's, and `config` is what that will resolve them to."""

    arm: str
    data: str
    lr: float
    seed: int
    arguments: list[str]
    config: Config
    # Whether it trains at its rate only if that is the best of several.
    waits: bool

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.train.runs_dir) / self.config.name

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.directory.with_name(f"{self.directory.name}.log")


def read_command(args: list[str] | None = None) -> tuple[Options, list[Arm]]:
    """Return the options shared by all, and the arms; raises UserError for what does not fit."""
    args = sys.argv[1:] if args is None else args
    options = parse(Options, args, Options())
    typed = list(takewhile(lambda arg: not arg.startswith("--"), args))
    if tuple(typed) != options.recipes:
        raise UserError("The recipes go before all options; see --help.")
    if not typed:
        known = ", ".join(recipes.RECIPES)
        raise UserError(f"Name the recipes to compare, before all options; there are {known}.")
    _check_shared(options)
    # An arm that is written twice is one arm.
    written = dict.fromkeys(" ".join(arm.split()) for arm in typed)
    arms = [_arm(arm, args[len(typed) :], options) for arm in written]
    labels = [arm.label for arm in arms]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"The arm '{label}' is there twice; name it once, with all its rates.")
    return options, arms


def _check_shared(options: Options) -> None:
    for name in ("seeds", "jobs", "processes"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1.")
    if not options.name:
        raise UserError("An experiment needs a --name, for its directory under runs/experiments/.")
    if Path(options.name).name != options.name or options.name.startswith("."):
        raise UserError(f"--name {options.name} is not a plain name; --train.runs-dir says where.")
    if not options.data:
        raise UserError("--data needs a directory of token shards, or its name under data/.")
    names = [data_name(data) for data in options.data]
    for name in names:
        if not name or names.count(name) > 1:
            raise UserError(
                f"--data needs directories of different names, not '{name}' {names.count(name)} "
                "times: the runs are named after them."
            )


def data_name(data: str) -> str:
    """Return what a data set is called: the last part of its path."""
    return Path(data).name


def _arm(written: str, shared: list[str], options: Options) -> Arm:
    """Return the arm that is written as "modern --model.no-qk-norm --lr 1e-2"."""
    try:
        recipe, *own = shlex.split(written) or [""]
    except ValueError as error:
        raise UserError(f"The arm '{written}' cannot be read: {str(error).lower()}.") from error
    recipes.check_name(recipe, recipes.RECIPES, "recipe")
    if own and not own[0].startswith("--"):
        raise UserError(f"The arm '{written}' is not one recipe and options of its own.")
    for option in map(option_name, own):
        if option in COMMON:
            raise UserError(
                f"The arm '{written}' sets {option}, which is the same for all; give it outside."
            )
    given = parse(Options, [*shared, *own], Options())
    if given.seeds < 1:
        raise UserError(f"The arm '{written}' has --seeds {given.seeds}; that must be at least 1.")
    arguments = [
        *(recipe, "--size", options.size, *_budget(recipe, options.size)),
        *(word for group in _groups([*shared, *own]) for word in group),
    ]
    config = main.new_config(arguments, parse(main.Args, arguments))
    runs_dir = Path(given.train.runs_dir) / "experiments" / options.name
    config = replace(config, {"train.runs_dir": str(runs_dir)})
    rates = tuple(dict.fromkeys(given.lr)) or (config.optim.lr,)
    label = " ".join(_name_words(recipe, own))
    return Arm(label, _slug(label), arguments, config, rates, given.seeds)


def option_name(word: str) -> str:
    """Return the option that a word is, as --help spells it, or the word itself."""
    name = word.partition("=")[0]
    return name.replace("_", "-") if name.startswith("--") else word


def _groups(words: list[str], left_out: tuple[str, ...] = OURS) -> list[list[str]]:
    """Return each option with its values, but for those that are left out."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            groups.append([])
        groups[-1].append(word)
    return [group for group in groups if option_name(group[0]) not in left_out]


def _budget(recipe: str, size: str) -> list[str]:
    """Return the options that give a recipe the tokens and validations of its size.

    Whatever is typed comes after them, and so before them in precedence.
    """
    recipes.check_name(size, recipes.SIZES, "size")
    asked, words = recipes.build(recipe, size).train, []
    for name in ("steps", "epochs", "tokens", "val_tokens", "val_interval"):
        wanted = getattr(recipes.SIZES[size], name, None)
        if getattr(asked, name) != wanted:
            words += [f"--train.{name.replace('_', '-')}", str(wanted)]
    return words


def _name_words(recipe: str, own: list[str]) -> list[str]:
    """Return recipe and own options but for rates and seeds, which tables have columns for."""
    return [recipe, *(word for group in _groups(own, ("--lr", "--seeds")) for word in group)]


def _slug(label: str) -> str:
    """Return a label as a part of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", label.lower()).strip("-")


def planned_runs(options: Options, arms: list[Arm]) -> list[Planned]:
    """Return the runs of all arms, data sets, rates and seeds, resolved to the last field.

    Seeds but the first are there at every rate; which of them train depends on the sweep. The
    embedded corpus is made if it is asked for. Raises UserError when arms would not be comparable,
    when data is missing, and when a run is there that was trained with other settings.
    """
    for data in options.data:
        if data == "pydocs":
            asked = load_fineweb.Arguments((data,), DATA_DIR / data)
            load_fineweb.prepare(asked, quiet=True)
        find_data(data)
    runs = [
        _planned(arm, data, lr, i, options)
        for arm in arms
        for data in options.data
        for lr in arm.rates
        for i in range(arm.seeds)
    ]
    _check_comparable(runs)
    _check_names(runs)
    return runs


def _planned(arm: Arm, data: str, lr: float, i: int, options: Options) -> Planned:
    """Return the run of an arm with the i-th of its seeds."""
    rates, seed = _rates(arm.config.optim, lr), arm.config.train.seed + i
    name = f"{arm.slug}-{data_name(data)}-lr{lr:g}-seed{seed}"
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    if len(name) > 100:
        raise UserError(
            f"The run {name} would have too long a name; give '{arm.label}' fewer options."
        )
    config = replace(arm.config, {**rates, "data": data, "train.seed": seed, "name": name})
    config = main.complete_config(config)
    main.with_micro_batch(config, options.processes)
    extra = {**rates, "train.seed": seed, "train.runs_dir": config.train.runs_dir}
    if len(options.data) > 1 and config.train.eval_interval == 0:
        # Losses on different data say nothing of each other, but scores do.
        extra["train.eval_interval"] = config.train.steps
        config = replace(config, {"train.eval_interval": config.train.steps})
    arguments = [*arm.arguments, "--data", data, "--name", name, "--auto-resume"]
    for field_name, value in extra.items():
        arguments += [f"--{field_name.replace('_', '-')}", str(value)]
    waits = i > 0 and len(arm.rates) > 1
    return Planned(arm.label, data_name(data), lr, seed, arguments, config, waits)


def _rates(optim: OptimConfig, lr: float) -> dict[str, float]:
    """Return the rates that differ from an arm's own where AdamW's peak rate is `lr`."""
    if lr == optim.lr:
        return {}
    rates = {"optim.lr": lr}
    if optim.optimizer == "muon":
        rates["optim.muon_lr"] = optim.muon_lr * lr / optim.lr
    if optim.lm_head_lr is not None:
        rates["optim.lm_head_lr"] = optim.lm_head_lr * lr / optim.lr
    return rates


def _check_comparable(runs: list[Planned]) -> None:
    """Raise UserError unless runs on the same data train and validate on as many tokens."""
    first: dict[str, Planned] = {}
    for run in runs:
        other = first.setdefault(run.data, run)
        for what, mine, its in (
            ("tokens of training", _tokens(run.config), _tokens(other.config)),
            ("tokens of validation", run.config.train.val_tokens, other.config.train.val_tokens),
        ):
            if mine != its:
                raise UserError(
                    f"'{run.arm}' would have {mine:,} {what} on {run.data} and '{other.arm}' "
                    f"{its:,}; give all arms the same with --train.tokens, --train.val-tokens or "
                    "--train.batch-tokens."
                )


def _tokens(config: Config) -> int:
    return config.train.steps * config.train.batch_tokens


def _check_names(runs: list[Planned]) -> None:
    """Raise UserError where a run's name stands, here or on disk, for one with other settings."""
    configs: dict[str, Config] = {}
    for run in runs:
        other = configs.setdefault(run.config.name, run.config)
        changed = changed_fields(other, run.config)
        if changed:
            raise UserError(
                f"Two arms would both be called {run.config.name}, and differ "
                f"({'; '.join(changed)}); write one of them in another way."
            )
        if (run.directory / "config.json").is_file():
            changed = changed_fields(load_config(run.directory), run.config)
            if changed:
                raise UserError(
                    f"{run.directory} was trained with other settings ({'; '.join(changed)}); "
                    "choose another --name."
                )
