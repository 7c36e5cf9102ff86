"""The readable backend over whole groups: lmd/plain.py's Plan with all parameters laid end to end in one vector.

As many calls as one parameter takes, whatever their number, for devices and dtypes without a fused backend; the price
is memory for some vectors of the group's size. Equal to lmd/plain.py to rounding: centers are tensors here, numbers
there.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lmd import plain, update

CENTERS = ("m0", "prior_a")  # numbers of a parameter's state


class Plan(plain.Plan):
    """For parameters whose means have one dtype and device."""

    def sample(self, group: dict[str, Any], draw: int) -> list[Tensor]:
        return self._combination(update.sample, group, draw)

    def total(self, group: dict[str, Any], draw: int) -> list[Tensor]:
        return self._combination(update.total, group, draw)

    def _combination(self, function: Callable[..., Tensor], group: dict[str, Any], draw: int) -> list[Tensor]:
        every = range(len(self.means))
        center = join([self.center(i) * torch.ones_like(self.means[i]) for i in every])
        noise = self._noise(group, every, draw)
        return self._parts(function(join(self.means), center, group["noise_scale"], noise), every)

    def finite(self, gradients: list[Tensor | None]) -> bool:
        present = [gradient for gradient in gradients if gradient is not None]
        return not present or bool(torch.isfinite(join(present)).all())

    def step(self, group: dict[str, Any], gradients: list[Tensor | None], at_sample: bool) -> None:
        chosen = [i for i, gradient in enumerate(gradients) if gradient is not None]
        if not chosen:
            return
        mean = join([self.means[i] for i in chosen])
        state = {
            name: join([self.states[i][name] for i in chosen])
            for name, value in self.states[chosen[0]].items()
            if isinstance(value, Tensor) and name not in ("master", "rms")
        }
        m0, prior_a = (join([torch.full_like(self.means[i], self.states[i][k]) for i in chosen]) for k in CENTERS)
        full = join([(group["saturation"] * self.states[i]["rms"]).expand_as(self.means[i]) for i in chosen])
        noise = self._noise(group, chosen, 0) if at_sample and group["noise_scale"] > 0.0 else None
        gradient = join([gradient for gradient in gradients if gradient is not None])
        result = plain.stepped(group, mean, state, gradient, m0, noise, full, prior_a)
        for name in ("mean", *state):
            kept = [self.means[i] if name == "mean" else self.states[i][name] for i in chosen]
            torch._foreach_copy_(kept, self._parts(getattr(result, name), chosen))
        if group["saturation"] > 0.0:
            for i, *us in zip(chosen, *(self._parts(u, chosen) for u in result.us), strict=True):
                self.measure(i, tuple(us))

    def _noise(self, group: dict[str, Any], chosen: Sequence[int], draw: int) -> update.Noise:
        pairs = [self.noise(group, i, draw) for i in chosen]
        return join([plus for plus, _ in pairs]), join([minus for _, minus in pairs])

    def _parts(self, vector: Tensor, chosen: Sequence[int]) -> list[Tensor]:
        """The vector cut into tensors of the chosen parameters' shapes."""
        parts = vector.split([self.means[i].numel() for i in chosen])
        return [part.view(self.means[i].shape) for part, i in zip(parts, chosen, strict=True)]


def join(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
