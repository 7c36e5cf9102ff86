"""Which sites a model's calls have, and what the recipe says of each: made when a call first runs there, then kept."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import partial

from lpsim.machine.frames import BACKWARD, OUTSIDE, ROOT, Frame
from lpsim.machine.ops import WRAPPED, Op, Site
from lpsim.machine.recipes import Recipe

__all__ = ["Place", "Places", "nearest_first"]


class Place:
    """The sites of one product: {part: site}, or {op: site}. left: whether the recipe rounds nothing at any of them."""

    __slots__ = ("first", "left", "sites")

    def __init__(self, op: Op, site: Callable[[str], Site]) -> None:
        if op.parts:
            self.sites = {part: site(f"{op.name}.{part}") for part in op.parts + op.vector_parts}
        else:
            self.sites = {op.name: site(op.name)}
        self.first = next(iter(self.sites.values()))
        self.left = all(
            s.recipe.vector is None if part in op.vector_parts else s.recipe.products_plain
            for part, s in self.sites.items()
        )


class Places:
    """All sites of a model that have run, by module path, op and repetition.

    A product that runs in the backward pass outside every module, as in a user's autograd.Function, may be dgrad or
    wgrad, which nobody can tell. It is left in full precision, unless an override for <backward> says otherwise.

    modules: the paths of the model's modules. Raises ValueError for an override whose path matches none of them or
    whose op there is not, and, when a site first runs, for one that would draw another's random bits.
    """

    def __init__(self, recipe: Recipe, modules: Iterable[str]) -> None:
        self._recipe = recipe
        self._sites: dict[tuple[str, str, int], Site] = {}
        self._places: dict[tuple[str, str, int], Place] = {}
        self._streams: dict[int, str] = {}
        self._rounds_backward = any(not (r.dgrad.plain and r.wgrad.plain) for r in (recipe, *recipe.overrides.values()))
        self.left_in_backward: list[str] = []  # the ops that no override claims, where the recipe rounds dgrad or wgrad
        self._unmatched = {pattern for pattern in recipe.overrides if not pattern.startswith("*/")}
        self._check_overrides([path for path in modules if path])

    def _check_overrides(self, paths: list[str]) -> None:
        for pattern in self._recipe.overrides:
            prefix = pattern.rpartition("/")[0] if "/" in pattern else pattern
            if not any(fnmatchcase(path, prefix) for path in (*paths, ROOT, OUTSIDE, BACKWARD)):
                raise ValueError(
                    f"the override {pattern!r} matches no module; modules are {nearest_first(prefix, paths)}"
                )
            op = pattern.rpartition("/")[2].partition("#")[0] if "/" in pattern else "*"
            if op != "*" and not any(name == op or fnmatchcase(name, op) for name in _op_names()):
                raise ValueError(f"the override {pattern!r} matches no op; ops are {nearest_first(op, _op_names())}")

    def of_product(self, frame: Frame, op: Op) -> Place:
        """Where a product is about to run: its site, or those of its parts."""
        key = (frame.path, op.name, frame.repetition(op.name))
        place = self._places.get(key)
        if place is None:
            place = self._places[key] = Place(op, partial(self._site, frame.path, repetition=key[2]))
        return place

    def of_op(self, frame: Frame, op: str) -> Site:
        """Where an op without parts is about to run."""
        return self._site(frame.path, op, frame.repetition(op))

    def _site(self, path: str, op: str, repetition: int) -> Site:
        key = (path, op, repetition)
        site = self._sites.get(key)
        if site is None:
            site = self._sites[key] = Site(path, op, repetition, self._resolve(path, op, repetition))
            if site.stochastic and self._streams.setdefault(site.stream, site.name) != site.name:
                raise ValueError(
                    f"the sites {site.name} and {self._streams[site.stream]} would draw the same random bits "
                    "(equal CRC-32): rename one of the modules"
                )
        return site

    def _resolve(self, path: str, op: str, repetition: int) -> Recipe:
        pattern = self._recipe.pattern_at(path, op, repetition)
        if path == BACKWARD and (pattern is None or not pattern.startswith(BACKWARD)):
            if self._rounds_backward and op not in self.left_in_backward:
                self.left_in_backward.append(op)
            return _NOTHING
        if pattern is None:
            return self._recipe
        self._unmatched.discard(pattern)
        return self._recipe.overrides[pattern]

    def unmatched(self) -> str | None:
        """What to warn of at the end: overrides that matched no site that ran. None where all did, or nothing ran."""
        if not (self._sites and self._unmatched):
            return None
        return (
            f"overrides matched no site that ran: {', '.join(sorted(self._unmatched))}; "
            f"sites are named like {next(iter(self._sites.values())).name}"
        )


_NOTHING = Recipe()


def _op_names() -> Iterator[str]:
    """Of all sites: the ops, and the parts of those that have some. Not kept, since a user may add an op."""
    for op in WRAPPED.values():
        yield op.name
        yield from (f"{op.name}.{part}" for part in (*op.parts, *op.vector_parts))


def nearest_first(name: str, known: Iterable[str]) -> str:
    """At most nine of the known names, those first that are like it."""
    names = list(dict.fromkeys(known))
    listed = list(dict.fromkeys([*difflib.get_close_matches(name, names, n=3, cutoff=0.3), *names]))
    return ", ".join(listed[:9]) + (", ..." if len(listed) > 9 else "")
