"""`product`: the configs of a grid as every combination of some values."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from experiments.training.config import Config
from experiments.training.settings import names_near

Axis = Iterable[Any] | Callable[[Config], Iterable[Any]]


def product(base: Config, where: Callable[[Config], bool] | None = None, /, **axes: Axis) -> list[Config]:
    """`base` with every combination of the axes' values, where `where` is true.

    The first axis is the outermost loop, the last the innermost: with `seed` first, all arms of a seed come before the
    next seed. An axis is named by a field of Config, `optimizer`, or of one of its parts, `**{"optimizer.lr": [...]}`.
    A value that is a mapping sets the fields that it names, so an axis of any name varies several together:
    `task=[{"model": ..., "data": ...}, ...]`. An axis may be a function of the config so far, outer axes filled in:
    `optimizer=lambda config: tuned[config.model.name]`.

    Every arm gets the same seeds, so that the report can pair them. Raises: ValueError for an unknown field, an empty
    axis, and where `where` keeps an arm for some seeds and not for others.
    """
    configs = list(_combined(base, list(axes.items())))
    if where is None:
        return configs
    kept: list[Config] = []
    arms: dict[bool, set[str]] = {True: set(), False: set()}  # kept, left out
    for config in configs:
        keep = bool(where(config))
        kept += [config] if keep else []
        arms[keep].add(replace(config, seed=0).signature())
    if arms[True] & arms[False]:
        raise ValueError("where keeps an arm for some seeds and not for others; no pairs could be made of its runs")
    return kept


def _combined(config: Config, axes: list[tuple[str, Axis]]) -> Iterator[Config]:
    if not axes:
        yield config
        return
    (name, axis), *inner = axes
    values = list(axis(config) if callable(axis) else axis)
    if not values:
        raise ValueError(f"the axis {name} has no values")
    for value in values:
        changes = value if isinstance(value, Mapping) else {name: value}
        yield from _combined(changed(config, changes), inner)


def changed(config: Config, changes: Mapping[str, Any]) -> Config:
    """The config with other values for some fields, of its own or, by a dotted name, of its parts.

    Raises: ValueError for an unknown field, naming the close ones.
    """
    whole = {name: value for name, value in changes.items() if "." not in name}
    parts = [(name.split(".", 1), value) for name, value in changes.items() if "." in name]
    config = replace(config, **_known(config, whole))
    for section, group in itertools.groupby(sorted(parts, key=lambda item: item[0][0]), key=lambda item: item[0][0]):
        _known(config, {section: None})
        part = getattr(config, section)
        inner = {path[1]: value for path, value in group}
        config = replace(config, **{section: replace(part, **_known(part, inner, f"{section}."))})
    return config


def _known(part: Any, changes: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    known = [field.name for field in fields(part)]
    for name in changes:
        if name not in known:
            raise ValueError(f"{type(part).__name__} has no field {prefix}{name}; there are: {names_near(name, known)}")
    return changes
