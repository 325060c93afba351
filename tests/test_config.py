"""Configs: JSON and back, divisibility, identity, sizes and recipes."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import config as c
import main
import recipes
from checks import validate
from command_line import parse
from config import Config, UserError, replace
from config_file import from_json, to_json
from counts import flops_per_token
from modern import build_model


@given(
    st.integers(1, 64),
    st.floats(1e-6, 1.0),
    st.sampled_from(["adamw", "muon"]),
    st.text(),
    st.lists(st.text()).map(tuple),
)
def test_json_round_trip(layers, lr, optimizer, name, tasks):
    changes = {
        "train.eval_tasks": tasks,
        "model.n_layer": layers,
        "optim.lr": lr,
        "optim.optimizer": optimizer,
        "name": name,
    }
    config = replace(Config(), changes)
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": {"n_layers": 3}}, "does not know: model.n_layers"),
        ({"model": {"n_layer": "three"}}, "model.n_layer cannot be 'three'"),
        ({"train": {"order": "random"}}, "train.order cannot be 'random'"),
        ({"train": {"seed": True}}, "train.seed cannot be True"),
        ({"train": {"eval_tasks": ["lambada", 3]}}, "train.eval_tasks cannot be ['lambada', 3]"),
        ({"train": {"eval_tasks": "lambada"}}, "train.eval_tasks cannot be 'lambada'"),
        ({"train": {"eval_interval": -1}}, "train.eval_interval must not be negative"),
        ({"train": {"eval_limit": 0}}, "train.eval_limit must be 1 or more"),
        ({"model": 3}, "model. should be a JSON object"),
        ({"model": {"n_head": 7}}, "must be a multiple of model.n_head 7"),
    ],
)
def test_a_config_that_does_not_fit_is_one_sentence(change, sentence):
    raw = dataclasses.asdict(Config())
    for key, value in change.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=re.escape(sentence)):
        from_json(json.dumps(raw))
    with pytest.raises(UserError, match="not valid JSON"):
        from_json("{")


def test_every_field_has_a_one_line_doc():
    source = Path(c.__file__).read_text().splitlines()
    for cls in (c.ModelConfig, c.OptimConfig, c.TrainConfig):
        for field in dataclasses.fields(cls):
            line = next(
                i for i, text in enumerate(source) if text.startswith(f"    {field.name}: ")
            )
            assert source[line + 1].startswith('    """') and source[line + 1].endswith('"""')


def test_accumulation_is_exact_or_refused():
    config = recipes.build("gpt2")  # 512 windows an update
    assert c.accumulation_steps(replace(config, {"train.micro_batch": 64}), 8) == 1
    assert c.accumulation_steps(replace(config, {"train.micro_batch": 64}), 1) == 8
    with pytest.raises(UserError, match=r"valid process counts are 1, 2, 4, 8, 16"):
        c.accumulation_steps(config, 3)
    # Not given, it is the largest that divides, up to the size's limit.
    for processes, fitting in ((1, 16), (8, 16), (64, 8), (512, 1)):
        assert recipes.fit_micro_batch(config, processes).train.micro_batch == fitting
    with pytest.raises(
        UserError, match=r"micro_batch 48 does not divide the 64 .* 1, 2, 4, 8, 16, 32, 64"
    ):
        c.accumulation_steps(replace(config, {"train.micro_batch": 48}), 8)
    with pytest.raises(UserError, match="523264 and 524288 are the nearest"):
        validate(replace(config, {"train.tokens_per_update": 524_000}))


def test_length_of_a_run():
    windows = 9_650_967
    flagship = recipes.build("gpt2")
    assert c.total_updates(flagship, windows) == 18_849
    assert c.total_updates(replace(flagship, {"train.epochs": 2.0}), windows) == 37_698
    assert c.total_updates(replace(flagship, {"train.updates": 5}), windows) == 5
    with pytest.raises(UserError, match="less than one update"):
        c.total_updates(flagship, 100)


def test_identity_is_what_the_run_is():
    config = Config()
    same = replace(
        config, {"train.micro_batch": 2, "train.dtype": "float32", "train.device": "cpu"}
    )
    assert c.identity_digest(config) == c.identity_digest(same)
    assert c.changed_identity(config, same) == []
    other = replace(config, {"model.n_layer": 2, "optim.lr": 1.0, "train.seed": 7})
    assert c.identity_digest(config) != c.identity_digest(other)
    assert c.changed_identity(config, other) == [
        "model.n_layer 12 -> 2",
        "optim.lr 0.0006 -> 1.0",
        "train.seed 1337 -> 7",
    ]


def test_what_is_evaluated_on_the_way_leaves_the_identity_as_it_was():
    """The digests are those of versions that had no benchmarks: their runs can be continued."""
    assert c.identity_digest(Config()) == "fb60ba8258676be7"
    assert c.identity_digest(recipes.build("gpt2")) == "585140382d1ec5d4"
    assert c.identity_digest(recipes.build("quickstart")) == "a2d81727a5588e30"
    changes = {"eval_interval": 10, "eval_tasks": ("lambada", "cbt"), "eval_limit": 100}
    changed = replace(Config(), {f"train.{name}": value for name, value in changes.items()})
    assert c.identity_digest(changed) == c.identity_digest(Config())
    assert c.changed_identity(Config(), changed) == []


def test_a_config_from_before_there_were_benchmarks_goes_on_without():
    raw = json.loads(to_json(recipes.build("gpt2")))
    for name in ("eval_interval", "eval_tasks", "eval_limit"):
        del raw["train"][name]
    config = from_json(json.dumps(raw))
    assert config == replace(recipes.build("gpt2"), {"train.eval_interval": 0})


def test_benchmarks_on_the_command_line():
    default = main.Arguments()
    typed = ["--train.eval-tasks", "hellaswag", "wikitext", "--train.eval-interval", "50"]
    train = parse(main.Arguments, [*typed, "--train.eval-limit", "100"], default).train
    assert (train.eval_tasks, train.eval_interval) == (("hellaswag", "wikitext"), 50)
    assert train.eval_limit == 100
    assert parse(main.Arguments, ["--train.eval-tasks"], default).train.eval_tasks == ()


@pytest.mark.parametrize("recipe", recipes.RECIPES)
@pytest.mark.parametrize("size", recipes.SIZES)
def test_every_recipe_runs_at_every_size(recipe, size):
    config = recipes.build(recipe, size)
    validate(config)
    assert (config.recipe, config.size) == (recipe, size)
    assert c.accumulation_steps(recipes.fit_micro_batch(config, 2), 2) >= 1
    with torch.device("meta"):
        model = build_model(dataclasses.replace(config.model, n_layer=1))
    assert model.config.n_embd == config.model.n_embd


def test_the_flagship_has_the_settings_it_is_known_by():
    config = recipes.build("gpt2")
    assert config.size == "124m" and config.data == "fineweb-edu"
    assert config.optim.lr == pytest.approx(2e-3)
    assert round(config.optim.warmup * 18_849) == 750
    assert (config.optim.weight_decay, config.optim.final_lr) == (0.1, 0.1)
    assert config.train.order == "sequential"
    assert config.train.tokens // config.train.tokens_per_update == 18_849
    assert (config.train.eval_interval, config.train.eval_tasks) == (250, ("hellaswag",))
    assert recipes.build("gpt2", "nano").train.eval_interval == 0


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(UserError, match="no recipe 'quikstart'; did you mean quickstart"):
        recipes.build("quikstart")
    with pytest.raises(UserError, match="no size '125m'; did you mean 124m"):
        recipes.build("gpt2", "125m")


def test_flops_of_gpt2():
    assert flops_per_token(Config().model) == pytest.approx(0.86e9, rel=0.01)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(sorted(c.flatten(Config())))


@given(st.text() | JSON.map(json.dumps))
def test_whatever_a_config_file_holds_a_mistake_is_one_sentence(text):
    with contextlib.suppress(UserError):
        from_json(text)


@given(FIELDS, JSON)
def test_any_value_in_any_field_is_taken_whole_or_refused_by_name(name, value):
    raw = json.loads(to_json(Config()))
    group, _, leaf = name.rpartition(".")
    (raw[group] if group else raw)[leaf] = value
    try:
        config = from_json(json.dumps(raw))
    except UserError as error:
        assert "\n" not in str(error) and leaf in str(error)
    else:
        taken = c.flatten(config)[name]
        assert (list(taken) if isinstance(taken, tuple) else taken) == value
        assert from_json(to_json(config)) == config


@given(st.lists(FIELDS.map(lambda name: f"--{name.replace('_', '-')}") | st.text(), max_size=4))
def test_whatever_is_typed_a_mistake_is_one_sentence(words):
    try:
        parse(main.Arguments, words, main.Arguments())
    except UserError as error:
        assert "\n" not in str(error)
    except SystemExit as end:
        assert end.code in (0, None) and {"-h", "--help"} & set(words)


def test_json_nested_too_deeply_is_a_mistake_too():
    with pytest.raises(UserError, match="not valid JSON"):
        from_json("[" * 100_000)
