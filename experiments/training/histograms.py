"""Histograms of a run's weights at its start, middle and end, which the run keeps in weights.json (some kilobytes).

One counts the weights in all matrices (parameters of two and more dimensions) by magnitude. Where the recipe rounds
weights in the forward products, a second one counts those by their magnitude over the scale of their block, to be drawn
beside the values that the format has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.training.config import Config
from lpsim.formats import BlockFormat, Format, reference
from lpsim.machine.arguments import lies_in
from lpsim.machine.ops import Call, Role
from lpsim.machine.simulate import Simulation
from lpsim.quantization import storage
from lpsim.quantization.quantizer import Quantizer

BINS_PER_OCTAVE = 4
LISTED_BITS = 8  # of formats with more bits, the smallest and the largest value stand for all


def recorded_steps(config: Config) -> set[int]:
    """The steps at which histograms are made: 0, the first validation in the second half, and the last one."""
    middle = -(-config.steps // (2 * config.validate_every)) * config.validate_every
    return {0, min(middle, config.steps), config.steps}


class WeightHistograms:
    """Collects what a validation sees of a model's weights; after it, `rows` gives the histograms for weights.json."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = [p for p in model.parameters() if p.dim() > 1]
        self.values: list[float] = []
        self._scaled: dict[int, Tensor] = {}  # by place in memory: each weight once

    @contextmanager
    def watching(self, simulation: Simulation) -> Iterator[None]:
        """A context in which the operands of the forward products are looked at; another observer waits meanwhile."""
        before, simulation.observer = simulation.observer, self._observe
        try:
            yield
        finally:
            simulation.observer = before

    def rows(self) -> list[dict[str, Any]]:
        """One histogram of all matrices; a second one of the rounded ones over their scales, where any was."""
        groups: dict[str, list[Tensor]] = {"all": [*self.parameters], "rounded": [*self._scaled.values()]}
        return [{"of": name, **_histogram(tensors)} for name, tensors in groups.items() if tensors]

    def _observe(
        self, call: Call, role: Role, quantizer: Quantizer | None, axis: int, x: Tensor, result: Tensor
    ) -> None:
        place = x.untyped_storage().data_ptr()
        if role is not Role.FPROP_RHS or quantizer is None or place in self._scaled:
            return
        if lies_in(x, self.parameters):
            self._scaled[place] = _over_scale(x.detach().float(), quantizer.format, axis)
            self.values = self.values or _values(quantizer.format)


def _over_scale(x: Tensor, fmt: Format, axis: int) -> Tensor:
    """The elements over the scales of their blocks; x itself without blocks."""
    if not isinstance(fmt, BlockFormat):
        return x
    axis %= max(x.dim(), 1)
    scale, outer = storage.block_scales(x, fmt, axis)
    return x / storage.expanded(scale * outer, tuple(x.shape), fmt, axis)


def _values(fmt: Format) -> list[float]:
    """The positive values that an element can have."""
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    if element.bits > LISTED_BITS:
        return [element.min_subnormal, element.max]
    return sorted({value for value in reference.values(element) if 0 < value < float("inf")})


def _histogram(tensors: list[Tensor]) -> dict[str, Any]:
    """How many elements are zero, and how many magnitudes lie in each bin; NaN and Inf are left out.

    Bin i begins at 2^log2[i], is a quarter of an octave wide and holds count[i]; empty ones are not listed.
    """
    with torch.no_grad():
        x = np.concatenate([t.detach().abs().double().flatten().cpu().numpy() for t in tensors])
    magnitudes = x[np.isfinite(x) & (x > 0)]
    places, counts = np.unique(np.floor(np.log2(magnitudes) * BINS_PER_OCTAVE).astype(int), return_counts=True)
    return {"zeros": int((x == 0).sum()), "log2": (places / BINS_PER_OCTAVE).tolist(), "count": counts.tolist()}
