"""Frozen settings with strict types and a JSON round trip: the base of every part of a `Config`.

A part is complete when it exists: construction and reading both refuse an unknown field, a missing one and a value of a
wrong type, so that the signature of a run hashes what was really used.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

T = TypeVar("T")


def choose(table: Mapping[str, T], name: object, what: str) -> T:
    """`table[name]`. Raises ValueError that lists what exists, close matches first."""
    if isinstance(name, str) and name in table:
        return table[name]
    raise ValueError(f"unknown {what} {name!r}; there are: {names_near(name, table)}")


def names_near(name: object, known: Iterable[str]) -> str:
    """The known names as one line of text, those close to `name` first."""
    names = list(known)
    near = difflib.get_close_matches(str(name), names, n=3)
    return ", ".join([*near, *(other for other in names if other not in near)])


@dataclass(frozen=True)
class Settings:
    """Base of the frozen parts of a Config: checks its fields' types; an int given for a float becomes that float.

    Raises: ValueError that names the field, the type it wants and the value it got.
    """

    tag: ClassVar[str] = (
        ""  # the name of the class attribute that tells the classes of one section apart in JSON, if any
    )
    later: ClassVar[Mapping[str, Any]] = {}
    """Fields that did not exist once, with what they were then, as JSON. They are written where they differ from it, so
    that runs of that time keep their signatures."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            where = f"{type(self).__name__}.{field.name}"
            object.__setattr__(self, field.name, _checked(getattr(self, field.name), hints[field.name], where))
        self.check()

    def check(self) -> None:
        """Raise ValueError when the fields contradict each other or are out of range."""

    def require(self, condition: bool, message: str) -> None:
        """Raise ValueError with this part's name and `message` unless `condition`."""
        if not condition:
            raise ValueError(f"{type(self).__name__}: {message}")

    def require_of(self, model: Any, *names: str) -> None:
        """Raise ValueError, with all that is missing, unless the model has attributes of these names.

        A model of one's own may lack what the shipped ones have as fields.
        """
        lacking = [name for name in names if getattr(model, name, None) is None]
        self.require(
            not lacking,
            f"the model must have {', '.join(names)}, as fields or class attributes; {model.name} lacks "
            f"{', '.join(lacking)}",
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, the tag first; `from_dict` is the inverse."""
        tag = {self.tag: getattr(self, self.tag)} if self.tag else {}
        return tag | self.written({f.name: _to_json(getattr(self, f.name)) for f in dataclasses.fields(self)})

    def written(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """`data` without the later fields that are what they were before they existed."""
        return {name: value for name, value in data.items() if name not in self.later or value != self.later[name]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The settings that `to_dict` wrote. Raises ValueError for an unknown or missing field and for a wrong type."""
        data = {**cls.later, **data}
        names = [field.name for field in dataclasses.fields(cls)]
        given = [name for name in data if name != cls.tag]
        for name in given:
            if name not in names:
                raise ValueError(f"{cls.__name__} has no field {name!r}; there are: {names_near(name, names)}")
        if missing := [name for name in names if name not in data]:
            raise ValueError(f"{cls.__name__} lacks {', '.join(missing)}")
        return cls(**{name: tuple(data[name]) if isinstance(data[name], list) else data[name] for name in given})


def from_table(table: Mapping[str, type[T]], data: object, what: str) -> T:
    """The settings in `data`, of the class of `table` that its tag names.

    Raises: ValueError as `choose` and `Settings.from_dict` do.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{what} must be an object, is {data!r}")
    tag = next(iter(table.values())).tag  # type: ignore[attr-defined]
    return choose(table, data.get(tag), f"{what} {tag}").from_dict(data)  # type: ignore[attr-defined]


def _to_json(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.to_dict()
    return [_to_json(item) for item in value] if isinstance(value, tuple) else value


def _checked(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            if _matches(value, option):
                return _checked(value, option, where)
    elif origin is tuple:
        if isinstance(value, tuple) and arguments[1:] == (...,):
            return tuple(_checked(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value))
        if isinstance(value, tuple) and len(value) == len(arguments):
            return tuple(_checked(v, a, f"{where}[{i}]") for i, (v, a) in enumerate(zip(value, arguments, strict=True)))
    elif _matches(value, hint):
        if hint is float:
            value = float(value)
            if not math.isfinite(value):
                raise ValueError(f"{where} must be a finite number, is {value!r}")
        return value
    wanted = str(hint) if arguments else getattr(hint, "__name__", str(hint))
    raise ValueError(f"{where} must be {wanted}, is {value!r}")


def _matches(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, type(None) if hint is None else hint)
