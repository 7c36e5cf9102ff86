"""LMD for some parameters and other optimizers for the rest, as one optimizer for one training loop."""

from collections import ChainMap
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

from torch.optim import Optimizer

from lmd.optimizer import LMD


class _States(ChainMap[Any, Any]):
    """The parts' states by parameter. Looking one up makes none: they are defaultdicts, and ChainMap would ask each."""

    def __getitem__(self, parameter: Any) -> Any:
        return next((state[parameter] for state in self.maps if parameter in state), {})


class Combined(Optimizer):
    """`lmd` and `others`, each with parameters of its own:

        optimizer = Combined(LMD(matrices), AdamW(vectors, lr=0.003))

    It is used as LMD is: `sampled_params`, `step`, `zero_grad`. Its groups and its state are those of its parts, so
    schedulers, gradient clipping and GradScaler see them all. A group added later is LMD's; median_params and
    posterior_samples are at `lmd`. Gradients of the others' parameters are taken under LMD's sample, too.

    Raises ValueError for a parameter in two of them, TypeError for a second LMD (their noise would coincide: use
    groups), ValueError for mc_samples above 1, which averages LMD's own gradients only.
    """

    def __init__(self, lmd: LMD, *others: Optimizer) -> None:
        if not isinstance(lmd, LMD) or any(isinstance(other, LMD | Combined) for other in others):
            raise TypeError("Combined takes one LMD, with as many groups as wanted, and then optimizers of other kinds")
        if lmd.mc_samples > 1:
            raise ValueError("mc_samples averages the gradients of LMD's own parameters only; it must be 1 here")
        super().__init__([group for part in (lmd, *others) for group in part.param_groups], {})
        self.lmd, self.others = lmd, others
        self._gather()

    def _gather(self) -> None:
        """Takes the groups and the state from the parts, which replace theirs when they load."""
        parts = (self.lmd, *self.others)
        self.param_groups[:] = chain.from_iterable(part.param_groups for part in parts)
        self.state = _States(*(part.state for part in parts))  # type: ignore[assignment]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to LMD's."""
        super().add_param_group(param_group)
        if "lmd" in self.__dict__:  # not while torch's constructor gathers the parts' groups
            self.lmd.add_param_group(self.param_groups.pop())
            self._gather()

    def sampled_params(self) -> AbstractContextManager[None]:
        """As LMD's; the others' parameters keep their values."""
        return self.lmd.sampled_params()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters; a closure is evaluated once, under LMD's sample, and its loss returned.

        Raises as LMD's does, before anything changes; where LMD skips a step (nonfinite="skip"), the others do. LMD
        looks at its own gradients only.
        """
        skipped = self.lmd.skipped_steps
        loss = self.lmd.step(closure)
        if self.lmd.skipped_steps == skipped:
            for other in self.others:
                other.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The parts' state dicts, in order."""
        return {"parts": [part.state_dict() for part in (self.lmd, *self.others)]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError for a state of another number of parts, and as the parts do."""
        parts, saved = (self.lmd, *self.others), state_dict.get("parts", ())
        if len(saved) != len(parts):
            raise ValueError(f"this state is of {len(saved)} combined optimizers, not of {len(parts)}")
        for part, own in zip(parts, saved, strict=True):
            part.load_state_dict(own)
        self._gather()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "lmd": self.lmd, "others": self.others}
