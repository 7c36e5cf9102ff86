"""The training step that follows the optimizers by itself, where the training loop does not set it.

A training step ends when an optimizer that holds parameters of the model has stepped. Of several optimizers each may
step once before that: a step ends when one of them steps again. A step that a gradient scaler skips is none, as the
optimizer sees nothing of it; the next forward pass draws further random bits of the same step.

A new process goes on where the optimizer's state stands: torch's optimizers count in their state (`step`), LMD in its
groups. An optimizer that keeps no count (SGD, Lion) cannot be followed across processes; set `simulation.step` then.
With several optimizers that step in turn, a resumed run counts its steps right, but forward passes between two of their
steps are not told apart: set the step there, too, where a resumed run must draw the same bits.
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
        """The steps that the optimizers of this model have behind them, by their states; 0 where none says so.

        The optimizers are looked for among all live objects, as nothing in torch leads from a parameter to them; that
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
