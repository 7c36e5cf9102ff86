"""Formats as JSON-able data and back, for configs and run folders."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from lpsim.formats.definitions import BlockFormat, Codebook, FixedFormat, FloatFormat, Format, Specials
from lpsim.formats.rounding import ScaleRule


def to_dict(fmt: Format) -> dict[str, Any]:
    """The complete definition as JSON-able data; `from_dict` gives an equal format back.

    A scale rule that is a function is named as module.qualname: enough to tell runs apart, not to rebuild it. Fields of
    sub-blocks are left out where there are none, since run folders are named by this data.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Format):
            return to_dict(value)
        if isinstance(value, enum.Enum):
            return value.value
        if isinstance(value, tuple):
            return list(value)
        return f"{value.__module__}.{value.__qualname__}" if callable(value) else value

    fields = {field.name: plain(getattr(fmt, field.name)) for field in dataclasses.fields(fmt)}
    if isinstance(fmt, BlockFormat) and not fmt.sub_block_size:
        del fields["sub_block_size"], fields["microexponent_bits"]
    return {"kind": fmt.kind, **fields}


def from_dict(data: dict[str, Any]) -> Format:
    """The format that `to_dict` described. Raises ValueError for unknown kinds or fields and for functions."""
    kinds = {cls.kind: cls for cls in (FloatFormat, FixedFormat, Codebook, BlockFormat)}
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"unknown kind of format {kind!r}; known: {', '.join(kinds)}")
    unknown = set(fields) - {field.name for field in dataclasses.fields(kinds[kind])}
    if unknown:
        raise ValueError(f"a {kind} format has no field {', '.join(sorted(unknown))}")
    if kind == "float":
        fields["specials"] = Specials(fields["specials"])
    elif kind == "codebook":
        fields["values"] = tuple(fields["values"])
    elif kind == "block":
        for name in ("element", "scale", "tensor_scale"):
            fields[name] = from_dict(fields[name]) if fields.get(name) is not None else None
        try:
            fields["scale_rule"] = ScaleRule(fields["scale_rule"])
        except ValueError:
            raise ValueError(
                f"{fields['name']}: the scale rule {fields['scale_rule']!r} is a function; files cannot hold it"
            ) from None
    return kinds[kind](**fields)
