"""The fused CPU backend: lmd/plain.py's Plan for contiguous float32 tensors, with the kernels of lmd/kernels.py."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lmd import kernels, plain
from lmd.kernels import BLOCK, COLUMNS, COUNT, FIRST_TILE, GRADIENT, MEAN, NUMBER, OUT, TILE, Noise, Settings, f32, u64
from lmd.priors import PRIORS
from lmd.random import MASK

if TYPE_CHECKING:
    from lmd.sharded import Shards

HUGE = 1 << 20  # elements; 4 MiB, from which on numpy asks for huge pages
SERIAL = 1 << 17  # elements; below, starting a thread costs more than it gives
SIGN = 3e38  # the slope of a step that has full length for every u but 0


class Plan(plain.Plan):
    """lmd/plain.py's, for parameters with `serves`: their table, and calls of the kernels."""

    @staticmethod
    def serves(mean: Tensor) -> bool:
        return mean.is_cpu and mean.dtype == torch.float32 and mean.is_contiguous()

    def __init__(
        self, numbers: list[int], params: list[Tensor], states: list[dict[str, Any]], shards: Shards | None = None
    ) -> None:
        super().__init__(numbers, params, states, shards)
        self.table = self._rows()
        self.table[1:, FIRST_TILE] = np.cumsum(-(-self.table[:-1, COUNT] // TILE))
        self._place(MEAN, self.means)
        for name in ("v", "v_plus", "v_minus", "log_center"):
            self._place(COLUMNS.index(name), [state.get(name) for state in self.states])
        self.m0 = np.array([[state["m0"]] for state in states])
        self.prior_a = np.array([[state["prior_a"]] for state in states])
        self.rms = [state["rms"].numpy() for state in states]
        self.scales = math.nan, np.empty(0, f32)  # of a noise scale

    def _rows(self) -> np.ndarray:
        """The table of the kernels with a row for each parameter, without addresses."""
        table = np.zeros((len(self.params), len(COLUMNS)), np.int64)
        table[:, COUNT] = [mean.numel() for mean in self.means]
        table[:, NUMBER] = self.numbers
        return table

    def _place(self, column: int, tensors: Sequence[Tensor | None]) -> None:
        """Writes the parameters' addresses into the table, 0 for None."""
        self.table[:, column] = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]

    def sample(self, group: dict[str, Any], draw: int) -> list[Tensor]:
        return self._combination(group, draw, f32(-1.0))

    def total(self, group: dict[str, Any], draw: int) -> list[Tensor]:
        return self._combination(group, draw, f32(1.0))

    def _combination(self, group: dict[str, Any], draw: int, sign: np.float32) -> list[Tensor]:
        outs = [empty_like(mean) for mean in self.means]
        self._place(OUT, outs)
        kernel = kernels.sample_shared if group["parameterization"] == "shared" else kernels.sample_split
        self._run(kernel, self._scales(group), _noise(group, draw), sign)
        return outs

    def finite(self, gradients: list[Tensor | None]) -> bool:
        self._place(GRADIENT, gradients)
        return all(self._run(kernels.all_finite))

    def step(self, group: dict[str, Any], gradients: list[Tensor | None], at_sample: bool) -> None:
        self._place(GRADIENT, gradients)
        noise = _noise(group, 0)
        noise = noise if at_sample and group["weight_scaling"] else noise._replace(variance=f32(0.0))
        kernel = kernels.step_shared if group["parameterization"] == "shared" else kernels.step_split
        full, squares = self._full(group), np.zeros(self._tiles())
        self._run(kernel, self._scales(group), noise, _settings(group), full, squares)
        if group["saturation"] > 0.0:
            self._measured(group, squares, [gradient is not None for gradient in gradients])

    def _unit(self, group: dict[str, Any]) -> np.ndarray:
        """What the kernels have u in units of, by parameter."""
        kept = 1.0 - group["betas"][0]
        return np.full(len(self.rms), kept) if group["parameterization"] == "split" else kept * self.m0[:, 0]

    def _full(self, group: dict[str, Any]) -> np.ndarray:
        """lr over the u, in the kernels' unit, from which a step has full length; SIGN stands for the sign."""
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            slope = group["lr"] * self._unit(group) / (group["saturation"] * np.array(self.rms, np.float64))
        return np.where((slope > 0.0) & (slope < SIGN), slope, SIGN if group["lr"] > 0.0 else 0.0).astype(f32)

    def _measured(self, group: dict[str, Any], squares: np.ndarray, moved: list[bool]) -> None:
        """Keep the root mean square of u of each parameter that moved."""
        self._keep(group, squares, self.table[:, FIRST_TILE], self.table[:, COUNT], moved)

    def _keep(
        self, group: dict[str, Any], squares: np.ndarray, tiles: np.ndarray, counts: np.ndarray, moved: list[bool]
    ) -> None:
        """squares: sums by tile. tiles, counts: the first tile of each parameter, and its elements."""
        rows = np.flatnonzero(counts)
        if not rows.size:
            return
        sides = 2 if group["parameterization"] == "split" else 1
        values = self._unit(group)[rows] * np.sqrt(np.add.reduceat(squares, tiles[rows]) / (counts[rows] * sides))
        for i, value in zip(rows, values, strict=True):
            if moved[i]:
                self.rms[i][...] = value

    def _scales(self, group: dict[str, Any]) -> np.ndarray:
        """m0, 2 m0 exp(sigma^2 / 2) and prior_a of each parameter, float32; kept, since few steps change sigma."""
        sigma = group["noise_scale"]
        if self.scales[0] != sigma:
            scales = np.hstack((self.m0 * (1.0, 2.0 * math.exp(0.5 * sigma**2)), self.prior_a))
            self.scales = sigma, scales.astype(f32)
        return self.scales[1]

    def _tiles(self) -> int:
        return int(self.table[-1, FIRST_TILE] - (-self.table[-1, COUNT] // TILE))

    def _run(self, kernel: Any, *arguments: Any) -> list[Any]:
        """kernel over all tiles, cut into one range for each of torch's threads; its result for each."""
        count = self._tiles()
        threads = torch.get_num_threads() if count * TILE > SERIAL else 1

        def part(i: int) -> Any:
            scratch = np.empty(2 * TILE + BLOCK, f32)
            return kernel(count * i // threads, count * (i + 1) // threads, scratch, self.table, *arguments)

        others = [_pool(threads - 1).submit(part, i) for i in range(1, threads)]
        try:
            return [part(0), *(other.result() for other in others)]
        finally:
            if others:
                wait(others)  # an interrupt must not free memory that they write to


def _noise(group: dict[str, Any], draw: int) -> Noise:
    seed, sigma = group["seed"], group["noise_scale"]
    variance, expectation = -2.0 * (sigma / math.log(2.0)) ** 2, math.exp(0.5 * sigma**2)
    return Noise(u64(seed & MASK), u64(seed >> 32), u64(group["step"]), u64(draw), f32(variance), f32(expectation))


def _settings(group: dict[str, Any]) -> Settings:
    lr, (beta1, beta2), prior = group["lr"], group["betas"], PRIORS[group["prior"]]
    moment = 0.5 * (prior.power * group["noise_scale"]) ** 2
    terms = (prior.linear, prior.power, moment, prior.offset(group["entropy"]))
    decay = lr * group["weight_decay"]
    numbers = (lr, decay, beta1 / (1.0 - beta1), beta2, 1.0 - beta2, *terms)
    return Settings(bool(group["weight_scaling"]), group["saturation"] > 0.0, *(f32(x) for x in numbers))


def empty_like(tensor: Tensor) -> Tensor:
    """An uninitialized tensor of the same shape; a large one in numpy's memory, which asks the kernel for huge pages.

    The samples are new memory in every step, and for large tensors most of the cost of new memory is page faults.
    Small ones stay with torch: glibc before 2.38 does not reuse what aligned and unaligned blocks of a heap leave.
    """
    if tensor.numel() < HUGE:
        return torch.empty_like(tensor)
    return torch.from_numpy(np.empty(tuple(tensor.shape), np.float32))


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads of our own, since starting Numba's would put a second user on torch's OpenMP runtime."""
    return ThreadPoolExecutor(workers, thread_name_prefix="lmd")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has the pool but not its threads
