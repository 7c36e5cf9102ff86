"""LMD for some parameters and other optimizers for the rest, as one optimizer for one training loop."""

from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

from torch.optim import Optimizer

from lmd.optimizer import LMD
from lmd.settings import check_state


class _States(ChainMap[Any, Any]):
    """The parts' states by parameter. Looking one up makes none: they are defaultdicts, and ChainMap would ask each.

    What is deleted is deleted from its part; ChainMap would look into the first part only.
    """

    def __getitem__(self, parameter: Any) -> Any:
        return next((state[parameter] for state in self.maps if parameter in state), {})

    def __delitem__(self, parameter: Any) -> None:
        del next((state for state in self.maps if parameter in state), self.maps[0])[parameter]

    def clear(self) -> None:
        for state in self.maps:
            state.clear()


class Combined(Optimizer):
    """`lmd` and `others`, each with parameters of its own:

        optimizer = Combined(LMD(matrices), AdamW(vectors, lr=0.003))

    It is used as LMD is: `sampled_params`, `step`, `zero_grad`, `posterior_samples`. Its groups and its state are those
    of its parts, so schedulers, gradient clipping and GradScaler see them all; a schedule that also cycles betas needs
    others that have some. A group added later is LMD's. Gradients of the others' parameters are taken under LMD's
    sample, too.

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
        # what schedules look into: the settings that every part has
        self.defaults = {name: v for name, v in lmd.defaults.items() if all(name in other.defaults for other in others)}

    @property
    def parts(self) -> tuple[Optimizer, ...]:
        """LMD and the others; none while torch's constructor looks for parameters that are in two of them."""
        return (self.lmd, *self.others) if "lmd" in self.__dict__ else ()

    # Always asked of the parts, which replace theirs when one of them alone loads a state or takes a group.

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups] if self.parts else self._given

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._given = groups

    @property
    def state(self) -> Any:
        return _States(*(part.state for part in self.parts))

    @state.setter
    def state(self, state: Any) -> None:
        pass  # torch's constructor: there is none yet

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group to LMD's."""
        super().add_param_group(param_group)
        if self.parts:
            self.lmd.add_param_group(param_group)

    def sampled_params(self) -> AbstractContextManager[None]:
        """As LMD's; the others' parameters keep their values."""
        return self.lmd.sampled_params()

    def median_params(self) -> AbstractContextManager[None]:
        """As LMD's; the others' parameters keep their values."""
        return self.lmd.median_params()

    def posterior_samples(self, count: int) -> Iterator[AbstractContextManager[None]]:
        """As LMD's; the others' parameters keep their values."""
        return self.lmd.posterior_samples(count)

    @property
    def skipped_steps(self) -> int:
        """As LMD's."""
        return self.lmd.skipped_steps

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters; a closure is evaluated once, under LMD's sample, and its loss returned.

        Raises as LMD's does, before anything changes, but for the lack of a gradient only where the others have none,
        too. Where LMD skips a step (nonfinite="skip"), the others do. LMD looks at its own gradients only.
        """
        skipped = self.skipped_steps
        self.lmd.beside = self.others
        loss = self.lmd.step(closure)
        if self.skipped_steps == skipped:
            for other in self.others:
                other.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As torch's, of all parts: their groups one after the other, the parameters numbered through.

        {"parts": their state dicts, in order} where one of them holds more than torch's state dicts do.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state = self._joined([part.state_dict() for part in self.parts])
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            found = post_hook(self, state)
            state = state if found is None else found
        return state

    @staticmethod
    def _joined(owns: list[dict[str, Any]]) -> dict[str, Any]:
        """The state dict of parts with these."""
        if not all(map(_is_plain, owns)):
            return {"parts": owns}
        whole: dict[str, Any] = {"state": {}, "param_groups": []}
        first = 0
        for own in owns:
            names = {old: first + new for new, old in enumerate(_names(own["param_groups"]))}
            whole["state"] |= {names[old]: state for old, state in own["state"].items()}
            whole["param_groups"] += [
                {**group, "params": [names[old] for old in group["params"]]} for group in own["param_groups"]
            ]
            first += len(names)
        return whole

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ValueError for a state of another number of parts or groups, and as the parts do."""
        parts = self.parts
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            found = pre_hook(self, state_dict)
            state_dict = state_dict if found is None else found
        saved = state_dict["parts"] if "parts" in state_dict else self._divided(state_dict)
        if len(saved) != len(parts):
            raise ValueError(f"this state is of {len(saved)} combined optimizers, not of {len(parts)}")
        for part, own in zip(parts, saved, strict=True):
            part.load_state_dict(own)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _divided(self, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
        """The parts' state dicts, by the number of their groups."""
        check_state(state_dict)
        groups, own, found = state_dict["param_groups"], len(self.param_groups), []
        if len(groups) != own:
            raise ValueError(f"this state has {len(groups)} parameter groups, the combined optimizers have {own}")
        for part in self.parts:
            mine, groups = groups[: len(part.param_groups)], groups[len(part.param_groups) :]
            names = _names(mine)
            state = {name: state_dict["state"][name] for name in names if name in state_dict["state"]}
            found.append({"state": state, "param_groups": mine})
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": self.defaults, "lmd": self.lmd, "others": self.others}


def _names(groups: list[dict[str, Any]]) -> list[Any]:
    """What a state dict calls its parameters, in order."""
    return list(chain.from_iterable(group["params"] for group in groups))


def _is_plain(own: dict[str, Any]) -> bool:
    """Whether a state dict is groups and the state of their parameters, and nothing more."""
    return own.keys() == {"state", "param_groups"} and own["state"].keys() <= set(_names(own["param_groups"]))
