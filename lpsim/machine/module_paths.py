"""Which module is running, and its path; also while checkpointing recomputes a call in the backward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import nn

from lpsim.machine import checkpoints
from lpsim.machine.frames import OUTSIDE, ROOT, Frame


class ModulePaths:
    """Follows the calls of a model's modules by torch's global forward hooks, while `follow` is entered.

    A module used in several places gets its path below the module that calls it, if it has one there. A module that is
    not part of the model gets its caller's path. Each thread has its own stack of calls.

    guard: a function (module, path) -> context or None, called at each module call; the context is entered for it.
    """

    def __init__(
        self, model: nn.Module, guard: Callable[[nn.Module, str], AbstractContextManager[Any] | None] | None = None
    ) -> None:
        self._guard = guard
        self._known: dict[int, tuple[nn.Module, str]] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            self._known.setdefault(id(module), (module, path or ROOT))
        self._below: dict[tuple[str, int], str] = {}
        self._outside = Frame(None, OUTSIDE)
        self._local = threading.local()
        self.regions = checkpoints.Regions()
        self.before_call: Callable[[], None] | None = None  # called before a module's call

    def follow(self, stack: ExitStack) -> None:
        """Start; `stack` ends it."""
        self._local = threading.local()
        modules = torch.nn.modules.module
        stack.callback(modules.register_module_forward_pre_hook(self._enter).remove)
        stack.callback(modules.register_module_forward_hook(self._leave, always_call=True).remove)

    def current(self) -> Frame | None:
        """The running module's frame, or the frame for code outside every module; None for code of the backward pass.

        Raises RuntimeError where a reentrant checkpoint recomputes ops outside every module: torch does not say where
        it was called.
        """
        frames = self._frames()
        if frames:
            self._note_origin(frames[-1])
            return frames[-1]
        if torch._C._current_graph_task_id() == -1:
            self._note_origin(self._outside)
            return self._outside
        return self._recomputed()

    def training(self) -> bool:
        """Whether the running code is part of training: its outermost call began with gradients enabled.

        A backward pass is training. So is a reentrant checkpoint, although torch disables gradients in its first pass.
        """
        frames = self._frames()
        if frames:
            return frames[-1].training
        if torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return True
        return next(checkpoints.checkpoints_on_the_stack(), None) is not None

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
        if self.before_call is not None:
            self.before_call()
        frames = self._frames()
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError("a scripted module is called in a simulation: its ops cannot be seen. Call the original")
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise TypeError("DataParallel runs copies in threads that cannot be seen; use DistributedDataParallel")
        if frames:
            parent = frames[-1]
            self._note_origin(parent, reentrant=True)
        elif torch._C._current_graph_task_id() == -1:
            if torch._C._len_torch_function_stack() == 0 and self._has(module):
                raise RuntimeError(
                    "the simulated model is called in another thread, where its ops cannot be seen: enter the "
                    "simulation in the thread that calls the model"
                )
            parent = self._outside
            self._note_origin(parent, reentrant=True)
        else:
            parent = self._recomputed(entering=True) or self._outside
        frame = Frame(module, self._path(parent, module), training=self.training())
        frames.append(frame)
        if self._guard is not None:
            frame.guard = self._guard(module, frame.path)
            if frame.guard is not None:
                frame.guard.__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        frames = self._frames()
        while frames:
            frame = frames.pop()
            if frame.guard is not None:
                frame.guard.__exit__(None, None, None)
            if frame.module is module:
                break

    def _has(self, module: nn.Module) -> bool:
        """Whether a module is part of the model; a compiled or distributed wrapper around the model is not."""
        return self._known.get(id(module), (None, ""))[0] is module

    def _path(self, parent: Frame, module: nn.Module) -> str:
        known = self._known.get(id(module))
        if known is None or known[0] is not module:
            return parent.path
        key = (parent.path, id(module))
        path = self._below.get(key)
        if path is None:
            path = known[1]
            if parent.module is not None and parent.module is not module and self._has(parent.module):
                prefix = "" if parent.path == ROOT else f"{parent.path}."
                names = (name for name, m in parent.module.named_modules(remove_duplicate=False) if m is module)
                path = next((prefix + name for name in names), path)
            self._below[key] = path
        return path

    def _note_origin(self, frame: Frame, reentrant: bool = False) -> None:
        """At the first op or module of the checkpointed call that is running, remember its caller."""
        innermost = checkpoints.innermost_by_hooks()
        if innermost is None:
            if not reentrant or torch.is_grad_enabled():  # in a reentrant region's first pass they are disabled
                return
        elif self.regions.of(innermost).origin is not None:
            return
        for identity, _, again in checkpoints.checkpoints_on_the_stack():
            region = self.regions.of(identity)
            if region.origin is None and not again:
                region.origin = frame.copy()

    def _recomputed(self, entering: bool = False) -> Frame | None:
        """The frame that a recomputation runs in: that of its region's caller. None if none is running.

        entering: a module is being entered; then the caller is known even in a reentrant region.
        """
        for identity, reentrant, again in checkpoints.checkpoints_on_the_stack():
            if not again:
                continue
            if reentrant and not entering:
                raise RuntimeError(
                    "a reentrant checkpoint recomputes ops outside every module, so their site is unknown: "
                    "pass use_reentrant=False to torch.utils.checkpoint, or checkpoint a module"
                )
            region = self.regions.of(identity)
            region.begin(torch._C._current_graph_task_id())
            return region.frame
        return None
