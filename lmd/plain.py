"""The readable backend: samples and steps of a group's parameters by the equations of lmd/update.py, one by one.

Serves every device, dtype and layout. lmd/cpu.py and lmd/gpu.py have the same Plan, fused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lmd import update
from lmd.priors import PRIORS
from lmd.random import NoiseKey, normal_pair

if TYPE_CHECKING:
    from lmd.sharded import Shards

MASTER_DTYPE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


class Plan:
    """Parameters of one group that are handled together, kept from call to call.

    `numbers` number the parameters through all groups, and key their noise. The lists that methods take and return are
    in the parameters' order. `shards`: how the parameters are sharded, where they are; means, states, samples and
    gradients are then this process's rows.
    """

    def __init__(
        self, numbers: list[int], params: list[Tensor], states: list[dict[str, Any]], shards: Shards | None = None
    ) -> None:
        self.numbers, self.params, self.shards = numbers, params, shards
        self.states = states if shards is None else [shards.rows_of(state) for state in states]
        # what the parameters point at, except while a sample is in place
        self.memory = [p.data for p in params] if shards is None else shards.memory
        self.firsts = [0] * len(params) if shards is None else shards.firsts  # the places of the first elements
        self.means = [state.get("master", own) for state, own in zip(self.states, self.memory, strict=True)]
        self.kept = [tuple(state.values()) for state in states]  # alive as long as their addresses are used
        self.masters = [i for i, state in enumerate(states) if "master" in state]

    def replace(self, values: list[Tensor]) -> None:
        """Puts values in place of the means, until `restore`."""
        if self.shards is None:
            self._point(values)
        else:
            self.shards.replace(values)

    def restore(self) -> None:
        """Puts the means back, exactly."""
        if self.shards is None:
            self._point(self.memory)
        else:
            self.shards.restore()

    def _point(self, values: list[Tensor]) -> None:
        """Points the parameters at other memory; graphs that have saved one are told, so that their backward raises."""
        for p, value in zip(self.params, values, strict=True):
            p.data = value
        increment_version(self.params)

    def rounded(self, values: list[Tensor]) -> list[Tensor]:
        """`values`, in the precision of the means, in that of the parameters."""
        for i in self.masters:
            values[i] = values[i].to(self.memory[i].dtype)
        return values

    def gradients(self) -> list[Tensor | None]:
        """The parameters' gradients, in the dtype and the layout of the means; None where there is none."""
        found: list[Tensor | None] = []
        for p, mean in zip(self.params, self.means, strict=True):
            gradient = p.grad
            if gradient is not None:
                if self.shards is not None:
                    gradient = self.shards.rows(gradient)
                if gradient.is_sparse:
                    gradient = gradient.to_dense()  # a row without a gradient moves on by its momentum and its prior
                if gradient.dtype != mean.dtype:
                    gradient = gradient.to(mean.dtype)
                if gradient.shape != mean.shape:
                    raise ValueError(
                        f"a gradient has shape {tuple(gradient.shape)}, its parameter {tuple(mean.shape)}: it is from "
                        "before the parameter changed its shape; call zero_grad()"
                    )
                if not gradient.is_contiguous() and mean.is_contiguous():
                    gradient = gradient.contiguous()
            found.append(gradient)
        return found

    def noise(self, group: dict[str, Any], i: int, draw: int) -> update.Noise:
        """(eps+, eps-) of parameter i in the group's present step."""
        key = NoiseKey(group["seed"], self.numbers[i], group["step"], draw)
        return normal_pair(key, self.means[i], self.firsts[i])

    def center(self, i: int) -> update.Center:
        """sqrt(m+ m-) of parameter i: a number in the shared parameterization, a tensor in the split one."""
        m0: float = self.states[i]["m0"]
        return m0 * torch.exp(self.states[i]["log_center"]) if "log_center" in self.states[i] else m0

    def sample(self, group: dict[str, Any], draw: int) -> list[Tensor]:
        """A posterior sample of every parameter, in new tensors."""
        return [
            update.sample(mean, self.center(i), group["noise_scale"], self.noise(group, i, draw))
            for i, mean in enumerate(self.means)
        ]

    def total(self, group: dict[str, Any], draw: int) -> list[Tensor]:
        """theta+ + theta- of the same draw, in new tensors."""
        return [
            update.total(mean, self.center(i), group["noise_scale"], self.noise(group, i, draw))
            for i, mean in enumerate(self.means)
        ]

    def finite(self, gradients: list[Tensor | None]) -> bool:
        """Whether every element of every gradient is finite."""
        return all(gradient is None or bool(torch.isfinite(gradient).all()) for gradient in gradients)

    def agreed(self, finite: bool) -> bool:
        """Whether `finite` holds in all processes that have a part of these parameters."""
        return finite if self.shards is None else self.shards.all(finite)

    def step(self, group: dict[str, Any], gradients: list[Tensor | None], at_sample: bool) -> None:
        """One step of every parameter that has a gradient, in place.

        `at_sample`: the gradients were taken at draw 0 of the group's present step, not at the means.
        """
        for i, (mean, state, gradient) in enumerate(zip(self.means, self.states, gradients, strict=True)):
            if gradient is not None:
                noise = self.noise(group, i, 0) if at_sample and group["noise_scale"] > 0.0 else None
                full = group["saturation"] * state["rms"]
                result = stepped(group, mean, state, gradient, state["m0"], noise, full, state["prior_a"])
                for name, kept in (("mean", mean), *state.items()):
                    if name in result._fields:
                        kept.copy_(getattr(result, name))
                if group["saturation"] > 0.0:
                    self.measure(i, result.us)

    def measure(self, i: int, us: tuple[Tensor, ...]) -> None:
        """Keeps the root mean square of parameter i's u."""
        if self.shards is None:
            value = update.root_mean_square(*us)
        else:
            squares = torch.stack([u.double().square().sum() for u in us]).sum()
            value = (self.shards.sum(squares) / (len(us) * self.shards.counts[i])).sqrt()
        self.states[i]["rms"].copy_(value)

    def publish(self, gradients: list[Tensor | None]) -> None:
        """After a step: masters are rounded into their parameters, and graphs that have saved a parameter are told."""
        for i in self.masters:
            if gradients[i] is not None:
                self.memory[i].copy_(self.means[i])
        increment_version([p for p, gradient in zip(self.params, gradients, strict=True) if gradient is not None])


def stepped(
    group: dict[str, Any],
    mean: Tensor,
    state: dict[str, Any],
    gradient: Tensor,
    m0: update.Center,
    noise: update.Noise | None,
    full: update.Center,
    prior_a: update.Center,
) -> update.Shared | update.Split:
    """lmd/update.py's step of the group's parameterization, with the group's settings."""
    settings = {name: group[name] for name in ("lr", "betas", "weight_decay", "noise_scale", "weight_scaling")}
    settings |= {"prior": PRIORS[group["prior"]], "noise": noise, "full": full, "prior_a": prior_a}
    if group["parameterization"] == "shared":
        return update.step_shared(mean, state["v"], gradient, m0, **settings)
    moments = (state["log_center"], state["v_plus"], state["v_minus"])
    return update.step_split(mean, *moments, gradient, m0, entropy=group["entropy"], **settings)
