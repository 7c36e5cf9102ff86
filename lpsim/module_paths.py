"""Which module is running: paths of the current call, also where checkpointing runs it again in the backward pass."""

from __future__ import annotations

import sys
import threading
import weakref
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

OUTSIDE, BACKWARD, ROOT = "<outside>", "<backward>", "<model>"


class Frame:
    """One running call of a module: its path, and how often each op has occurred in it."""

    __slots__ = ("counts", "module", "path")

    def __init__(self, module: nn.Module | None, path: str, counts: dict[str, int] | None = None) -> None:
        self.module = module
        self.path = path
        self.counts = {} if counts is None else counts

    def repetition(self, op: str) -> int:
        """How often `op` occurred in this call before; always 0 outside every module, where no call ends."""
        if self.module is None:
            return 0
        n = self.counts.get(op, 0)
        self.counts[op] = n + 1
        return n


class ModulePaths:
    """Follows the calls of a model's modules by torch's global forward hooks, while `follow` is entered.

    A module used in several places has the path of the current call: below its caller where it is found there. Modules
    that are not the model's have their caller's path. Calls in other threads have stacks of their own.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known: dict[int, tuple[nn.Module, str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._known.setdefault(id(module), (module, path or ROOT))
        self._below: dict[tuple[str, int], str] = {}
        self._outside = Frame(None, OUTSIDE)
        self._local = threading.local()
        # region of a checkpoint -> the frame it was called from, and the frame each backward pass recomputes it in
        self._regions: weakref.WeakKeyDictionary[Any, tuple[Frame, dict[int, Frame]]] = weakref.WeakKeyDictionary()

    def follow(self, stack: ExitStack) -> None:
        """Start; `stack` ends it."""
        self._local = threading.local()
        modules = torch.nn.modules.module
        stack.callback(modules.register_module_forward_pre_hook(self._enter).remove)
        stack.callback(modules.register_module_forward_hook(self._leave, always_call=True).remove)

    def current(self) -> Frame | None:
        """The running module's frame, or that of the code outside; None for code of the backward pass itself.

        Raises RuntimeError in the recomputation of a reentrant checkpoint outside every module: torch does not say
        where it was called.
        """
        frames = self._frames()
        if frames:
            self._note_region(frames[-1])
            return frames[-1]
        if torch._C._current_graph_task_id() == -1:
            return self._outside
        return self._recomputed()

    def inside(self) -> bool:
        """Whether a module is running."""
        return bool(self._frames())

    def _frames(self) -> list[Frame]:
        try:
            return self._local.frames
        except AttributeError:
            self._local.frames = []
            return self._local.frames

    def _enter(self, module: nn.Module, args: Any) -> None:
        frames = self._frames()
        if frames:
            parent = frames[-1]
            self._note_region(parent)
        elif torch._C._current_graph_task_id() == -1:
            parent = self._outside
        else:
            parent = self._recomputed(reentrant_allowed=True) or self._outside
        frames.append(Frame(module, self._path(parent, module)))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        frames = self._frames()
        while frames and frames.pop().module is not module:
            pass

    def _path(self, parent: Frame, module: nn.Module) -> str:
        known = self._known.get(id(module))
        if known is None or known[0] is not module:
            return parent.path
        key = (parent.path, id(module))
        path = self._below.get(key)
        if path is None:
            path = known[1]
            if parent.module is not None and parent.module is not module:
                prefix = "" if parent.path == ROOT else f"{parent.path}."
                names = (name for name, m in parent.module.named_modules(remove_duplicate=False) if m is module)
                path = next((prefix + name for name in names), path)
            self._below[key] = path
        return path

    def _note_region(self, frame: Frame) -> None:
        """Remember the caller of a checkpointed function, at the first op or module of it."""
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        if hooks is None:
            return
        code, cells = getattr(hooks[0], "__code__", None), getattr(hooks[0], "__closure__", None)
        if code is None or not cells or hooks[0].__module__ != "torch.utils.checkpoint":
            return
        region = dict(zip(code.co_freevars, cells, strict=True)).get("frame")
        if region is not None and region.cell_contents not in self._regions:
            self._regions[region.cell_contents] = (Frame(frame.module, frame.path, dict(frame.counts)), {})

    def _recomputed(self, reentrant_allowed: bool = False) -> Frame | None:
        caller: Any = sys._getframe(1)
        while caller is not None:
            if caller.f_globals.get("__name__") == "torch.utils.checkpoint":
                if caller.f_code.co_name == "unpack_hook" and caller.f_locals.get("frame") in self._regions:
                    origin, recomputations = self._regions[caller.f_locals["frame"]]
                    task = torch._C._current_graph_task_id()
                    return recomputations.setdefault(task, Frame(origin.module, origin.path, dict(origin.counts)))
                if caller.f_code.co_name == "backward" and not reentrant_allowed:
                    raise RuntimeError(
                        "a reentrant checkpoint recomputes ops outside every module, so their site is unknown: "
                        "pass use_reentrant=False to torch.utils.checkpoint, or checkpoint a module"
                    )
            caller = caller.f_back
        return None
