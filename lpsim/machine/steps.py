"""Optimizers in a simulation: the training step as counted from theirs, and the mode that is off while one is running.

A training step ends when an optimizer that holds parameters of the model has stepped. With several optimizers, the
first to step ends it and the others may each step once without ending another; the next one ends when one of them steps
again. A step that a gradient scaler skips does not count, because the optimizer is not called; the next forward pass
draws further random bits of the same step.

A new process takes the step from the optimizer's state: torch's optimizers count in their state (`step`), LMD in its
parameter groups. An optimizer that keeps no count (SGD, Lion) cannot be followed across processes; then set
`simulation.step` yourself. With several optimizers that step in turn, a resumed run counts its steps right, but cannot
tell apart the forward passes between two of their steps: set the step if a resumed run must draw the same bits there.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _len_torch_function_stack

from lpsim.machine.module_paths import ModulePaths


class OptimizerSteps:
    """Counts the training steps of a model by those of its optimizers."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # optimizers that stepped in this training step

    def ended(self, optimizer: Optimizer) -> bool:
        """Whether a training step ends now that `optimizer` has stepped: the first of a round, or one again."""
        if not _holds(optimizer, {id(p) for p in self._model.parameters()}):
            return False
        if self._stepped and optimizer not in self._stepped:
            self._stepped.add(optimizer)
            return False
        self._stepped = weakref.WeakSet([optimizer])
        return True

    def recorded(self) -> int:
        """How many steps the optimizers of this model have taken, according to their states; 0 if none keeps a count.

        They are searched for among all live objects, because torch has no link from a parameter to its optimizer; that
        takes some tenths of a second in a large program.
        """
        parameters = {id(p) for p in self._model.parameters()}
        optimizers = [thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer)]
        return max((_count(optimizer) for optimizer in optimizers if _holds(optimizer, parameters)), default=0)


class RunningSteps:
    """The optimizer steps that are running, innermost last. Their arithmetic is not simulated, so the mode may be off.

    It is switched off for a step that has no closure (which would call the model), if `may_pause()`. It comes back when
    the step ends, also in an exception: when nothing refers to the step's frame any more, or when a module is called.
    after: called with each optimizer whose step has ended.
    """

    def __init__(
        self,
        mode: TorchFunctionMode,
        paths: ModulePaths,
        may_pause: Callable[[], bool],
        after: Callable[[Optimizer], None],
    ) -> None:
        self._mode, self._paths, self._may_pause, self._after = mode, paths, may_pause, after
        self._running: list[Any] = []
        self._paused_above: int | None = None  # how many modes lie below the place of ours; None while it is on

    def follow(self, stack: ExitStack) -> None:
        """Start; `stack` ends it."""
        self._running = []
        stack.callback(torch_optimizer.register_optimizer_step_pre_hook(self._enter).remove)
        stack.callback(torch_optimizer.register_optimizer_step_post_hook(self._leave).remove)

    def any(self) -> bool:
        """Whether an optimizer's step is running."""
        return bool(self._running)

    def _enter(self, optimizer: Any, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._forget(optimizer)  # an earlier step may have ended in an exception
        self._running.append(optimizer)
        with_closure = any(callable(argument) for argument in (*args[1:], *kwargs.values()))
        if with_closure or not self._may_pause() or _get_current_function_mode() is not self._mode:
            return None
        self._mode.__exit__(None, None, None)
        self._paused_above = _len_torch_function_stack()
        self._paths.before_call = self.resume
        arguments = _Arguments(kwargs)  # torch keeps them in the frame of the step
        weakref.finalize(arguments, self._ended_anyhow, optimizer).atexit = False
        return args, arguments

    def _leave(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._forget(optimizer)
        if not self._running:
            self.resume()
        self._after(optimizer)

    def _ended_anyhow(self, optimizer: Any) -> None:
        """The frame of this optimizer's step is gone; after an exception that is the first one hears of it."""
        if self._paused_above == _len_torch_function_stack() and self._running[:1] == [optimizer]:
            self._running.clear()
            self.resume()

    def _forget(self, optimizer: Any) -> None:
        """Note that this optimizer's step has ended, and so have the steps that began inside it."""
        for i, other in enumerate(self._running):
            if other is optimizer:
                del self._running[i:]
                break

    def resume(self) -> None:
        """Switch the mode on again, if a step switched it off.

        Raises RuntimeError where another mode was entered in between, which would be left in the wrong order.
        """
        if self._paused_above is None:
            return
        if self._paused_above != _len_torch_function_stack():
            raise RuntimeError(
                "an optimizer's step ended in an exception, and another torch function mode (such as a default device) "
                "was entered before the model is called again: leave that mode first"
            )
        self._paused_above = None
        self._paths.before_call = None
        self._mode.__enter__()


class _Arguments(dict[str, Any]):
    """Keyword arguments that a weak reference can watch."""

    __slots__ = ("__weakref__",)


def _holds(optimizer: Optimizer, parameters: set[int]) -> bool:
    groups: Iterable[dict[str, Any]] = getattr(optimizer, "param_groups", ())
    return any(id(p) in parameters for group in groups for p in group["params"])


def _count(optimizer: Optimizer) -> int:
    """The largest `step` in its state or its groups."""
    entries = [*optimizer.state.values(), *optimizer.param_groups]
    return max((int(entry["step"]) for entry in entries if isinstance(entry, dict) and "step" in entry), default=0)
