"""FIELD=VALUE: which runs are meant, in `lpsim run --only` and `lpsim runs --where`."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.training.settings import names_near

HELP = "the runs with that value of a field of the report's tables, as optimizer.lr=0.01; also != < > <= >=; repeatable"
COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
MOST_NAMED = 12  # values in a message


def meets(rows: Sequence[Mapping[str, Any]], conditions: Sequence[str], option: str) -> list[bool]:
    """Whether each row meets the conditions: all of them, where several values of one field are alternatives.

    A number equals any spelling of it; a value that is missing is `none`, and neither below nor above any number.
    Raises: ValueError, which begins with the option, for a field that no row has, a value of it that no row has, and
    for conditions that no row meets together; it names what is near.
    """
    fields = list(dict.fromkeys(name for row in rows for name in row))
    tests: dict[tuple[str, str], list[list[bool]]] = {}
    for condition in conditions:
        field, sign, wanted = parts_of(condition, option)
        if field not in fields:
            raise ValueError(f"{option} {condition}: no field {field!r}; there are: {names_near(field, fields)}")
        values = [row.get(field) for row in rows]
        found = _compared(values, sign, wanted, f"{option} {condition}")
        tests.setdefault((field, sign if sign == "=" else condition), []).append(found)
    met = [
        all(any(each[place] for each in alternatives) for alternatives in tests.values()) for place in range(len(rows))
    ]
    if not any(met):
        raise ValueError(f"no run meets {' and '.join(f'{option} {condition}' for condition in conditions)} together")
    return met


def parts_of(condition: str, option: str) -> tuple[str, str, str]:
    """A condition's field, sign and value. Raises ValueError, which begins with the option."""
    parts = re.fullmatch(r"([^=<>!]+)(!=|<=|>=|=|<|>)(.*)", condition, re.DOTALL)
    if parts is None:
        raise ValueError(f"{option} {condition}: expected FIELD=VALUE, such as optimizer=adamw")
    field, sign, wanted = (part.strip() for part in parts.groups())
    return field, sign, wanted


def _compared(values: Sequence[Any], sign: str, wanted: str, what: str) -> list[bool]:
    if sign in COMPARE:
        try:
            bound = float(wanted)
        except ValueError:
            raise ValueError(f"{what}: {sign} compares with a number, not with {wanted!r}") from None
        return [_is_number(value) and COMPARE[sign](value, bound) for value in values]
    equal = [_equals(value, wanted) for value in values]
    if not any(equal):
        known = list(dict.fromkeys(map(text, values)))
        more = f", ... ({len(known)} values)" if len(known) > MOST_NAMED else ""
        near = ", ".join(names_near(wanted, known).split(", ")[:MOST_NAMED]) + more
        raise ValueError(f"{what}: no run has that value; there are: {near}")
    return equal if sign == "=" else [not each for each in equal]


def text(value: Any) -> str:
    """A value as it is written on the command line."""
    if is_missing(value):
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not is_missing(value)


def _equals(value: Any, wanted: str) -> bool:
    if _is_number(value):
        try:
            return float(wanted) == value
        except ValueError:
            return False
    return text(value) == wanted
