"""The readable backend: samples and steps of a group's weights by the equations of lmd/update.py, tensor by tensor.

Serves every device, dtype and layout. lmd/kernels.py and lmd/gpu.py have the same functions, fused.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmd import update
from lmd.priors import PRIORS
from lmd.random import NoiseKey, normal_pair


class Weight(NamedTuple):
    """One parameter in one call: its number through all groups (part of its noise's key), E[w] and its state."""

    number: int
    mean: Tensor  # the parameter itself, or its float32 master
    state: dict[str, Any]

    @property
    def center(self) -> update.Center:
        """sqrt(m+ m-): a number in the shared parameterization, a tensor in the split one."""
        m0: float = self.state["m0"]
        return m0 * torch.exp(self.state["log_center"]) if "log_center" in self.state else m0


def noise(group: dict[str, Any], weight: Weight, draw: int) -> update.Noise:
    """(eps+, eps-) of the group's present step."""
    return normal_pair(NoiseKey(group["seed"], weight.number, group["step"], draw), weight.mean)


def sample(group: dict[str, Any], weights: list[Weight], draw: int) -> list[Tensor]:
    """A posterior sample of every weight, in new tensors."""
    sigma = group["noise_scale"]
    return [update.sample(weight.mean, weight.center, sigma, noise(group, weight, draw)) for weight in weights]


def total(group: dict[str, Any], weights: list[Weight], draw: int) -> list[Tensor]:
    """theta+ + theta- of the same draw, in new tensors."""
    sigma = group["noise_scale"]
    return [update.total(weight.mean, weight.center, sigma, noise(group, weight, draw)) for weight in weights]


def step(group: dict[str, Any], weights: list[Weight], gradients: list[Tensor], at_sample: bool) -> None:
    """One step of every weight, in place; `at_sample` says that the gradients were taken at draw 0 of the present
    step.
    """
    settings = {name: group[name] for name in ("lr", "betas", "weight_decay", "noise_scale")}
    settings["prior"] = PRIORS[group["prior"]]
    for weight, gradient in zip(weights, gradients, strict=True):
        settings["noise"] = noise(group, weight, 0) if at_sample and group["noise_scale"] > 0.0 else None
        mean, state = weight.mean, weight.state
        result: update.Shared | update.Split
        if group["parameterization"] == "shared":
            result = update.step_shared(mean, state["v"], gradient, state["m0"], **settings)
        else:
            moments = (state["log_center"], state["v_plus"], state["v_minus"])
            result = update.step_split(mean, *moments, gradient, state["m0"], entropy=group["entropy"], **settings)
        for name, value in result._asdict().items():
            (mean if name == "mean" else state[name]).copy_(value)


def finite(gradients: list[Tensor]) -> bool:
    """Whether every element of every tensor is finite."""
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
