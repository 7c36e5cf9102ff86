"""The training step as counted from the optimizers, unless the training loop sets it.

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
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer


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


def _holds(optimizer: Optimizer, parameters: set[int]) -> bool:
    groups: Iterable[dict[str, Any]] = getattr(optimizer, "param_groups", ())
    return any(id(p) in parameters for group in groups for p in group["params"])


def _count(optimizer: Optimizer) -> int:
    """The largest `step` in its state or its groups."""
    entries = [*optimizer.state.values(), *optimizer.param_groups]
    return max((int(entry["step"]) for entry in entries if isinstance(entry, dict) and "step" in entry), default=0)
