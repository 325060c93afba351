"""config.json: a config written down, and read back with every name and type checked."""

import dataclasses
import json
import typing
from typing import Any, Literal

from checks import validate
from config import Config, ModelConfig, UserError, replace


def to_json(config: Config) -> str:
    """Return the config as indented JSON."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str, where: str = "config.json") -> Config:
    """Rebuild a `Config`; raises UserError naming `where` and the first field that does not fit.

    A field that is not there, as in the file of an earlier version, has its default.
    """
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}).") from error
    config = _build(Config, raw, where, "")
    validate(config)
    return config


def model_from_json(raw: Any, where: str) -> ModelConfig:
    """Return the `ModelConfig` in a JSON object, checked in the same way."""
    model = _build(ModelConfig, raw, where, "model.")
    # Whatever its windows are, they are to fill an update; that is no question here.
    validate(replace(Config(model=model), {"train.tokens_per_update": model.block_size}))
    return model


def _build(cls: type, raw: Any, where: str, prefix: str) -> Any:
    """Build one dataclass from a JSON object, checking names and types on the way."""
    if not isinstance(raw, dict):
        raise UserError(f"{where}: {prefix or 'the file'} should be a JSON object.")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(raw) - set(hints))
    if unknown:
        raise UserError(f"{where} has a field this version does not know: {prefix}{unknown[0]}.")
    values = {}
    for name, value in raw.items():
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(hints[name], value, where, f"{prefix}{name}.")
        elif _fits(value, hints[name]):
            # JSON has no tuples.
            values[name] = tuple(value) if isinstance(value, list) else value
        else:
            raise UserError(f"{where}: {prefix}{name} cannot be {value!r}.")
    return cls(**values)


def _fits(value: Any, hint: Any) -> bool:
    """Say whether a JSON value is one that a field annotated `hint` may hold."""
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        kind, _ = typing.get_args(hint)
        return isinstance(value, list) and all(_fits(item, kind) for item in value)
    kinds = typing.get_args(hint) or (hint,)
    if isinstance(value, bool):
        return bool in kinds
    # JSON writes 1.0 and 1 alike, so an integer is a fine float.
    return any(isinstance(value, (int, float) if kind is float else kind) for kind in kinds)
