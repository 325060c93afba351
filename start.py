"""Weights to begin with: another model's, whose training goes on with other data or another aim.

    python main.py --init gpt2 --data mine        OpenAI's weights; or a run, a checkpoint, a
                                                  directory saved by transformers

The model's shape is the source's. What may differ is what weights do not depend on: dropout, the
document mask, and the context, where the table of positions is long enough.
"""

import dataclasses

import recipes
from config import Config, ModelConfig, UserError, replace
from manifests import find_data, read_manifest
from model import GPT
from sample import load

FREE = ("dropout", "attention_dropout", "document_mask", "zero_init")
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


def with_shape_of(source: str, config: Config, size: str) -> Config:
    """Return a recipe's config with the shape of the model that `source` names.

    Where no `size` is asked for, it is that of the model's width and depth, if there is one. Raises
    UserError when there is no such model, or the recipe's parts are others.
    """
    found = load(source, config.train.runs_dir)[0].config
    same = [name for name, s in recipes.SIZES.items() if _fits(s, found)]
    if not size and same:
        config = recipes.build(config.recipe, same[0])
    default = ModelConfig()
    for name, value in vars(found).items():
        asked = getattr(config.model, name)
        if name not in (*FREE, *SIZES) and asked not in (value, getattr(default, name)):
            raise UserError(
                f"The recipe {config.recipe} has model.{name} {asked}, but {source} has {value}; "
                "choose a recipe that leaves it as it is."
            )
    kept = {name: getattr(config.model, name) for name in FREE}
    return dataclasses.replace(
        replace(config, {"init": source}), model=dataclasses.replace(found, **kept)
    )


def _fits(size: recipes.Size, model: ModelConfig) -> bool:
    names = ("n_layer", "n_head", "n_embd")
    return all(getattr(size, name) == getattr(model, name) for name in names)


def check_typed(config: Config, shaped: Config) -> None:
    """Raise UserError unless what was typed leaves a model that the weights of `shaped` fit."""
    for name, value in vars(shaped.model).items():
        asked = getattr(config.model, name)
        if name == "block_size" and (asked <= value or config.model.positions == "rotary"):
            continue
        if name not in FREE and asked != value:
            raise UserError(
                f"model.{name} {asked} does not fit {config.init}, which has {value}; leave it out."
            )


def check_data(config: Config) -> None:
    """Raise UserError unless the data's ids mean what they mean to the model begun with."""
    _, tokenizer, _ = load(config.init, config.train.runs_dir)
    manifest = read_manifest(find_data(config.data))
    theirs = (tokenizer.name, getattr(tokenizer, "alphabet", None), tokenizer.vocab_size)
    if (manifest.tokenizer, manifest.alphabet, manifest.vocab_size) != theirs:
        raise UserError(
            f"{config.data} has the {manifest.vocab_size} ids of the tokenizer "
            f"{manifest.tokenizer}, but {config.init} was trained with the {tokenizer.vocab_size} "
            f"of {tokenizer.name}{', others' if manifest.tokenizer == tokenizer.name else ''}; "
            "prepare the data with that tokenizer."
        )


def load_start(config: Config, model: GPT) -> None:
    """Give a new model the weights it begins with; raises UserError when they are not there."""
    source = load(config.init, config.train.runs_dir)[0]
    weights = source.state_dict()
    if "wpe.weight" in weights:
        weights["wpe.weight"] = weights["wpe.weight"][: model.config.block_size]
    model.load_state_dict(weights)
