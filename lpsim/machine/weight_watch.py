"""What an update does to a rounded weight: is it swallowed, does the weight flip to a neighbouring value and back?

A weight is noted in a sampled step t, with its rounded value, and looked at again in steps t + 1 and t + 2. That is all
that is kept, and for no longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lpsim.formats import BlockFormat, Format
from lpsim.quantization import storage
from lpsim.quantization.quantizer import Quantizer

Key = tuple[str, str]  # site and role
STEPS = 2  # for which a weight is looked at after the sampled step


class WeightRow(Protocol):
    """The part of telemetry's Row that is filled in here."""

    step: int
    swallowed: float
    oscillated: float


@dataclass
class _Noted:
    row: WeightRow
    x: Tensor
    rounded: Tensor
    after_one: Tensor | None = None  # the rounded value one step later


class WeightWatch:
    """The weights of the last sampled steps, and what became of them."""

    def __init__(self) -> None:
        self._noted: dict[Key, list[_Noted]] = {}

    def due(self, step: int) -> bool:
        """Whether a noted weight is to be looked at in this step; what is too old to be is forgotten."""
        self._noted = {
            key: kept for key, mine in self._noted.items() if (kept := [n for n in mine if step - n.row.step <= STEPS])
        }
        return bool(self._noted)

    def note(self, key: Key, row: WeightRow, x: Tensor, rounded: Tensor) -> None:
        """Begin with a weight x of a sampled step, of which a copy is kept, and its rounded value."""
        self._noted.setdefault(key, []).append(_Noted(row, x.clone(), rounded))

    def look(self, key: Key, step: int, fmt: Format, axis: int, x: Tensor, rounded: Tensor) -> None:
        """Fill in the rows of the steps one and two before this one, at the first call in the step."""
        for noted in list(self._noted.get(key, ())):
            age = step - noted.row.step
            if age == 1 and noted.after_one is None:
                noted.row.swallowed = swallowed(noted.x, noted.rounded, x, rounded)
                noted.after_one = rounded
            elif age == STEPS and noted.after_one is not None:
                noted.row.oscillated = oscillated(noted.x, (noted.rounded, noted.after_one, rounded), fmt, axis)
                self._noted[key].remove(noted)

    def state(self, step: int) -> list[tuple[Any, ...]]:
        """What a run that goes on with `step` needs; torch.save can store it."""
        kept = [(key, noted) for key, mine in self._noted.items() for noted in mine if step - noted.row.step <= STEPS]
        return [(*key, noted.row.step, noted.x, noted.rounded, noted.after_one) for key, noted in kept]

    def load(self, state: list[tuple[Any, ...]], rows: dict[tuple[int, str, str], Any]) -> None:
        """Continue from a `state`; rows: those of the table, by step, site and role."""
        self._noted = {}
        for site, role, step, x, rounded, after_one in state:
            noted = _Noted(rows[step, site, role], x, rounded, after_one)
            self._noted.setdefault((site, role), []).append(noted)


def swallowed(before: Tensor, rounded_before: Tensor, after: Tensor, rounded_after: Tensor) -> float:
    """Of the weights that an update changed, the share whose rounded value stayed the same; NaN if none changed."""
    changed = after.detach() != before
    n = int(changed.sum())
    return int((changed & (rounded_after.detach() == rounded_before)).sum()) / n if n else math.nan


def oscillated(x: Tensor, rounded: tuple[Tensor, Tensor, Tensor], fmt: Format, axis: int) -> float:
    """The share of all weights that flipped to a neighbouring value in one update and back in the next.

    x: the weights before; rounded: what they were rounded to before, after one update and after two. Back is exactly
    the first value. Neighbouring: no value of x's block or sub-block (its scale that of x) lies between the two. NaN
    for no weights.
    """
    first, second, third = (t.detach() for t in rounded)
    back = (third == first) & (second != first)
    if not x.numel():
        return math.nan
    if not bool(back.any()):
        return 0.0
    scale = torch.ones((), dtype=torch.float64, device=x.device)
    element: Format = fmt
    if isinstance(fmt, BlockFormat):
        element = fmt.element
        wide = x if x.dtype is torch.float64 else x.float()
        axis %= max(x.dim(), 1)
        blocks, outer = storage.block_scales(wide, fmt, axis)
        scale = (storage.element_scales(wide, blocks, fmt, axis) * outer)[back].double()
    one, two = (t[back].double() / scale for t in (first, second))
    nearest = Quantizer(element).quantize
    between = nearest((one + two) / 2)  # one of the two, unless a value lies between them
    neighbours = (between == nearest(one)) | (between == nearest(two))
    return int(neighbours.sum()) / x.numel()
