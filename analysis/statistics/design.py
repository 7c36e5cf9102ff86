"""The fixed effects of a task: which differences its grid's factors make, each as a column of a linear model.

Treatment coding against the levels that `tables` compares with: float32, AdamW where the grid has it, and of every
other factor the level that the grid lists first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd

from analysis.statistics.tables import BASELINE, REFERENCE_OPTIMIZER, TASK, factors, text

CROSSED = ("optimizer", "format")  # the factors whose interaction is modelled
REFERENCES = {"optimizer": REFERENCE_OPTIMIZER, "format": BASELINE}
BOTH = " × ".join(CROSSED)


@dataclass(frozen=True)
class Effect:
    """One coefficient: what `level` of `factor` adds to `against`, in the optimizer or format (or both) of `within`."""

    factor: str
    level: str
    against: str
    within: str
    column: np.ndarray  # (runs,) of 0.0 and 1.0
    compared: tuple[np.ndarray, ...] = ()  # (runs,) booleans: the cells that need a counted run each


@dataclass(frozen=True)
class Levels:
    """A factor of a task: the level of every run as a number, 0 the one compared with, and the levels' names."""

    name: str
    codes: np.ndarray  # (runs,)
    labels: Sequence[str]


def varying(runs: pd.DataFrame) -> list[str]:
    """The factors in which the runs of one task differ."""
    return [name for name in factors(runs) if name not in TASK and runs[name].nunique(dropna=False) > 1]


def effects(runs: pd.DataFrame, names: Sequence[str]) -> list[Effect]:
    """The effects of the factors `names` (`varying`) of one task: main effects, and optimizer × format where the grid
    lists every combination.

    With that interaction a format's effect is the one in the first optimizer and an optimizer's the one in the first
    format. A setting whose levels nothing links across optimizers or formats (each optimizer has learning rates of its
    own) has effects within each of them, against the level listed first there; `within` says between which of those
    levels optimizers or formats are compared then.
    """
    crossed = {name: _levels(runs, name) for name in CROSSED}
    cells = len(set(zip(*(levels.codes.tolist() for levels in crossed.values()), strict=True)))
    interacting = set(CROSSED) <= set(names) and cells == np.prod([len(x.labels) for x in crossed.values()])
    settings, at = [], {name: "" for name in CROSSED}
    nested: dict[str, list[Levels]] = {name: [] for name in CROSSED}
    for name in names:
        if name not in CROSSED:
            levels = _levels(runs, name)
            parents = _parents(levels, crossed)
            settings += list(_setting(levels, [crossed[parent] for parent in parents]))
            for parent in parents:
                nested[parent].append(levels)
    out: list[Effect] = []
    for name, other in zip(CROSSED, reversed(CROSSED), strict=True):
        at[name] = crossed[other].labels[0] if interacting else ""
        out += _main(crossed[name], at[name], crossed[other].codes == 0 if interacting else None, nested[name])
    return out + (list(_interaction(crossed)) if interacting else []) + settings


def missing_cells(runs: pd.DataFrame, names: Sequence[str]) -> list[str]:
    """The combinations of optimizer and format that the grid does not list, of a task in which both vary."""
    if not set(CROSSED) <= set(names):
        return []
    crossed = [_levels(runs, name) for name in CROSSED]
    there = set(zip(*(levels.codes.tolist() for levels in crossed), strict=True))
    every = product(*(range(len(levels.labels)) for levels in crossed))
    return [
        f"{crossed[0].labels[one]} × {crossed[1].labels[other]}" for one, other in every if (one, other) not in there
    ]


def _levels(runs: pd.DataFrame, name: str) -> Levels:
    codes, values = pd.factorize(runs[name], use_na_sentinel=False)
    order = list(range(len(values)))
    reference = [code for code in order if values[code] == REFERENCES.get(name)] if name in REFERENCES else []
    order = [*reference, *(code for code in order if code not in reference)]
    return Levels(name, np.argsort(order)[codes], [text(values[code]) for code in order])


def _main(levels: Levels, within: str, here: np.ndarray | None, nested: Sequence[Levels]) -> Iterator[Effect]:
    """The main effects of the optimizer or the format; `here`: the runs that `within` names, None for all."""
    inside = np.ones(len(levels.codes), dtype=bool) if here is None else here
    for code in range(1, len(levels.labels)):
        mine, base = levels.codes == code, levels.codes == 0
        first = [(x.labels[x.codes[mine][0]], x.labels[x.codes[base][0]], x.name) for x in nested]
        at = [f"{name} {one} against {other}" for one, other, name in first if one != other]
        yield Effect(
            levels.name,
            levels.labels[code],
            levels.labels[0],
            "; ".join(filter(None, (within, *at))),
            mine.astype(np.float64),
            (mine & inside, base & inside),
        )


def _interaction(crossed: dict[str, Levels]) -> Iterator[Effect]:
    one, other = crossed.values()
    for a, b in product(range(1, len(one.labels)), range(1, len(other.labels))):
        mine = (one.codes == a) & (other.codes == b)
        yield Effect(
            BOTH,
            f"{one.labels[a]} × {other.labels[b]}",
            f"{one.labels[0]} × {other.labels[0]}",
            "",
            mine.astype(np.float64),
            tuple((one.codes == i) & (other.codes == j) for i in (a, 0) for j in (b, 0)),
        )


def _setting(levels: Levels, parents: Sequence[Levels]) -> Iterator[Effect]:
    """The effects of a setting: of all runs, or within every combination of its parents' levels."""
    for key in product(*(range(len(parent.labels)) for parent in parents)):
        here = np.ones(len(levels.codes), dtype=bool)
        for parent, code in zip(parents, key, strict=True):
            here &= parent.codes == code
        within = ", ".join(parent.labels[code] for parent, code in zip(parents, key, strict=True))
        first, *others = dict.fromkeys(levels.codes[here].tolist()) if here.any() else [0]
        for code in others:
            mine = here & (levels.codes == code)
            yield Effect(
                levels.name,
                levels.labels[code],
                levels.labels[first],
                within,
                mine.astype(np.float64),
                (mine, here & (levels.codes == first)),
            )


def _parents(levels: Levels, crossed: dict[str, Levels]) -> tuple[str, ...]:
    """The fewest of optimizer and format within each of which the setting's levels are linked by cells that share
    them, so that its effects can be told from theirs.
    """
    cells = np.stack([x.codes for x in crossed.values()], axis=1)  # (runs, 2)
    for parents in ((), *((name,) for name in CROSSED)):
        groups = crossed[parents[0]].codes if parents else np.zeros(len(cells), dtype=int)
        if all(_linked(cells[groups == group], levels.codes[groups == group]) for group in set(groups.tolist())):
            return parents
    return CROSSED


def _linked(cells: np.ndarray, levels: np.ndarray) -> bool:
    """Whether one comes from every cell to every other by levels that both have."""
    sets = [set(levels[(cells == cell).all(axis=1)].tolist()) for cell in np.unique(cells, axis=0)]
    reached, left = sets[0], sets[1:]
    while touching := [levels for levels in left if levels & reached]:
        reached = reached.union(*touching)
        left = [levels for levels in left if not levels & reached]
    return not left
