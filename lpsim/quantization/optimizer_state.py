"""Keeps an optimizer's parameters and state in chosen formats: `store` has them rounded after every step.

    stored = store(optimizer, {"parameters": bfloat16_stochastic, "exp_avg": float8}, seed=0)

The step itself runs in the dtype of its tensors; its results are rounded afterwards, as if stored in memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lpsim.formats.rounding import Key, Rounding
from lpsim.quantization.quantizer import Quantizer

PARAMETERS = "parameters"


def store(optimizer: Optimizer, formats: Mapping[str, Quantizer], seed: int = 0) -> Stored:
    """Round the parameters and named state of `optimizer` after each of its steps, and the parameters now.

    formats: {"parameters" or the name of a state tensor ("exp_avg", "momentum_buffer", "u"): its quantizer}; blocks
    lie along the last axis. seed: of stochastic rounding; each tensor has a stream of its own, named by its group, its
    place in the group and its name.

    Raises TypeError for something else than a Quantizer; a step raises ValueError for a name that no state has.
    """
    for name, quantizer in formats.items():
        if not isinstance(quantizer, Quantizer):
            raise TypeError(f"formats[{name!r}] must be a Quantizer, got {quantizer!r}")
    return Stored(optimizer, dict(formats), seed)


class Stored:
    """The hook on an optimizer; made by `store`.

    step: keys the random bits; counts the optimizer's steps, and is to be set when a run is resumed.
    swallowed: of the parameters that the last step changed, the fraction that rounding put back to where they were;
    NaN before the first step and when parameters are not stored rounded.
    """

    def __init__(self, optimizer: Optimizer, formats: dict[str, Quantizer], seed: int) -> None:
        self.optimizer = optimizer
        self.formats = formats
        self.seed = seed
        self.step = 0
        self.swallowed = float("nan")
        self._before: list[Tensor] = []
        self._hooks = [optimizer.register_step_pre_hook(self._remember), optimizer.register_step_post_hook(self._store)]
        self._round(name for name in formats if name == PARAMETERS)

    def remove(self) -> None:
        """Stop rounding; what is rounded stays."""
        for hook in self._hooks:
            hook.remove()

    def _tensors(self) -> Iterator[tuple[str, Tensor, dict[str, Any]]]:
        for g, group in enumerate(self.optimizer.param_groups):
            for i, p in enumerate(group["params"]):
                yield f"{g}/{i}", p, self.optimizer.state.get(p, {})

    @torch.no_grad()
    def _remember(self, *_: Any) -> None:
        if PARAMETERS in self.formats:
            self._before = [p.detach().clone() for _, p, _ in self._tensors()]

    def _store(self, *_: Any) -> None:
        self.step += 1
        self._round(self.formats)

    @torch.no_grad()
    def _round(self, names: Any) -> None:
        with torch._C.DisableTorchFunction():
            changed = swallowed = 0
            for name in names:
                found = False
                for n, (place, p, state) in enumerate(self._tensors()):
                    tensor = p if name == PARAMETERS else state.get(name)
                    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() == 0:
                        continue
                    found = True
                    wide = tensor.detach().clone() if name == PARAMETERS and self._before else tensor
                    self._replace(f"{place}/{name}", self.formats[name], tensor)
                    if name == PARAMETERS and self._before:
                        moved = wide != self._before[n]
                        changed += int(moved.sum())
                        swallowed += int((moved & (tensor == self._before[n])).sum())
                if not found:
                    known = sorted({key for _, _, state in self._tensors() for key in state})
                    raise ValueError(f"no parameter has a state tensor {name!r}; there are {known}")
            if self._before:
                self.swallowed = swallowed / changed if changed else float("nan")
                self._before = []

    def _replace(self, place: str, quantizer: Quantizer, tensor: Tensor) -> None:
        key = None
        if quantizer.rounding is Rounding.STOCHASTIC:
            key = Key(self.seed, zlib.crc32(f"optimizer/{place}".encode()), self.step)
        tensor.copy_(quantizer.quantize(tensor, key=key))
