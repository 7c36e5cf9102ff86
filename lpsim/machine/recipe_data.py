"""Recipes as JSON-able data: complete, so that the data alone say what ran, and the recipe can be rebuilt from them.

Each part of a recipe is a dataclass and becomes a dict of its fields. Formats are written by `formats.to_dict`, members
of an enumeration as their values, and overrides as a list of pairs, because their order matters.
"""

from __future__ import annotations

import dataclasses
import enum
import typing
import warnings
from collections.abc import Mapping
from typing import Any

from lpsim import formats
from lpsim.accumulators import Accumulator, Alignment
from lpsim.formats import Format
from lpsim.machine.recipes import Accumulation, Gemm, Recipe
from lpsim.quantization.quantizer import Quantizer, ScaleClipsWarning


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as data; `from_dict` gives an equal recipe back.

    Raises ValueError for what data cannot express: a scale rule that is a function, an accumulator class of your own.
    """
    data: dict[str, Any] = _plain(recipe)
    from_dict(data)
    return data


def from_dict(data: Mapping[str, Any]) -> Recipe:
    """The recipe that `to_dict` described. Raises ValueError for fields that are missing, unknown or of a wrong type.

    Gives no ScaleClipsWarning: that was given, or deliberately silenced, when the recipe was first made.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScaleClipsWarning)
        try:
            recipe: Recipe = _read(Recipe, data)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"this is not the data of a recipe: {error}") from None
    return recipe


def _plain(value: Any) -> Any:
    if isinstance(value, Format):
        return formats.to_dict(value)
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return [[pattern, _plain(recipe)] for pattern, recipe in value.items()]
    if isinstance(value, (Recipe, Gemm, Quantizer, Accumulator, Alignment)):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"data cannot hold {value!r}; an accumulator is to be an lpsim.Accumulator")


def _read(hint: Any, value: Any) -> Any:
    """What `_plain` wrote for a value of the annotated type."""
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    if value is None or hint in (int, str, float, bool):
        return value
    if typing.get_origin(hint) is tuple:
        return tuple(_read(option, item) for option, item in zip(options, value, strict=True))
    if typing.get_origin(hint) is Mapping:
        return {pattern: _read(Recipe, recipe) for pattern, recipe in value}
    if hint == Format or hint in typing.get_args(Format):
        return formats.from_dict(value)
    if options:
        return _read(options[0], value)
    if hint is Accumulation:
        hint = Accumulator
    if issubclass(hint, enum.Enum):
        return hint(value)
    types = typing.get_type_hints(hint)
    names = [field.name for field in dataclasses.fields(hint)]
    if not isinstance(value, Mapping) or sorted(value) != sorted(names):
        raise ValueError(f"a {hint.__name__} has the fields {', '.join(names)}, got {value!r}")
    return hint(**{name: _read(types[name], value[name]) for name in names})
