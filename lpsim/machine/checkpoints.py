"""Checkpointed calls (torch.utils.checkpoint), called regions: makes a recomputation repeat the first pass exactly.

A region is recomputed in the backward pass, possibly after other recomputations and new forward passes. To compute the
same, it needs two things from the first pass: the module that called the region, and the call numbers at each site,
which key the random bits. Torch's own objects identify a region, and the Python stack tells which regions are running:
reentrant and non-reentrant ones, nested or not.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from lpsim.machine.frames import Frame
from lpsim.machine.ops.site import Site

_MODULE = "torch.utils.checkpoint"


class Region:
    """One checkpointed call. origin: the frame it was called from, with its counts at that time; None before its first
    op or module.

    The other attributes belong to the latest recomputation: its graph task, its frame, and how many of each site's
    draws it has repeated.
    """

    __slots__ = ("_draws", "_repeated", "_task", "frame", "origin")

    def __init__(self) -> None:
        self.origin: Frame | None = None
        self.frame: Frame | None = None
        self._draws: dict[str, list[tuple[int, int]]] = {}
        self._task: int | None = None
        self._repeated: dict[str, int] = {}

    def begin(self, task: int) -> None:
        """Begin the recomputation that a graph task asks for, unless it is already running."""
        if task != self._task:
            self._task, self._repeated = task, {}
            self.frame = None if self.origin is None else self.origin.copy()

    def note(self, site: str, draw: tuple[int, int]) -> None:
        """Record a draw of the first pass."""
        self._draws.setdefault(site, []).append(draw)

    def repeat(self, site: str) -> tuple[int, int] | None:
        """The first pass's next draw at that site; None if it made no more."""
        draws, n = self._draws.get(site, ()), self._repeated.get(site, 0)
        self._repeated[site] = n + 1
        return draws[n] if n < len(draws) else None


class Regions:
    """The checkpointed regions whose graphs are alive."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Any, Region] = weakref.WeakKeyDictionary()

    def of(self, identity: Any) -> Region:
        """The region that torch's object stands for."""
        region = self._known.get(identity)
        if region is None:
            region = self._known[identity] = Region()
        return region

    def draw(self, site: Site, step: int, calls: int, evaluation: bool) -> tuple[int, int]:
        """(step, number) of a site's next call; in a recomputation those of the call that it repeats.

        calls: how many consecutive numbers the call takes. evaluation: count it among the calls of evaluations.
        """
        running = []
        drawn = None
        for identity, _, again in checkpoints_on_the_stack():
            region = self.of(identity)
            if again:
                region.begin(torch._C._current_graph_task_id())
                drawn = region.repeat(site.name)
            else:
                running.append(region)
        if drawn is None:
            drawn = step, site.reserve(step, calls, evaluation)
        for region in running:
            region.note(site.name, drawn)
        return drawn


def checkpoints_on_the_stack() -> Iterator[tuple[Any, bool, bool]]:
    """Each checkpointed call that is running, innermost first: (torch's object for it, reentrant, recomputed).

    A recomputed call comes last: below it on the stack is the backward pass.
    """
    caller: Any = sys._getframe(1)
    while caller is not None:
        if caller.f_globals.get("__name__") == _MODULE:
            name = caller.f_code.co_name
            if name == "checkpoint":
                suspended = getattr(caller.f_locals.get("gen"), "gi_frame", None)
                if suspended is not None and "new_frame" in suspended.f_locals:
                    yield suspended.f_locals["new_frame"], False, False
            elif name == "forward" and "ctx" in caller.f_locals:
                yield caller.f_locals["ctx"], True, False
            elif name == "unpack_hook" and "frame" in caller.f_locals:
                yield caller.f_locals["frame"], False, True
                return
            elif name == "backward" and "ctx" in caller.f_locals:
                yield caller.f_locals["ctx"], True, True
                return
        caller = caller.f_back


def innermost_by_hooks() -> Any:
    """Torch's object for the innermost non-reentrant region in its first pass, or None. Does not walk the stack."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return None
    code, cells = getattr(hooks[0], "__code__", None), getattr(hooks[0], "__closure__", None)
    if code is None or not cells or hooks[0].__module__ != _MODULE:
        return None
    cell = dict(zip(code.co_freevars, cells, strict=True)).get("frame")
    return None if cell is None else cell.cell_contents
