"""Accumulator.matmul on CPUs: which kernel serves, and the threads that share the tasks."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from lpsim.accumulator import Unit
from lpsim.accumulator_kernels import BLOCK, WIDTH, any_unit

_SERIAL = 1 << 19  # below this many multiply-adds a second thread costs more than it gains


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lpsim-accumulator")


@functools.lru_cache(maxsize=256)
def numbers(unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    """A unit as the kernels' arguments: integers and floats."""
    integers = [unit.mantissa_bits, (unit.emin + 1023) << 52, unit.toward_zero, unit.chunk, unit.pairwise]
    integers += [unit.fraction_bits, unit.aligned_rounding, *unit.operand_emin, unit.emin]
    zero = -0.0 if unit.negative_zero else 0.0
    return np.array(integers, np.int64), np.array([unit.max, unit.beyond, unit.infinite, zero])


def run(work: Callable[[int, int], None], tasks: int, multiply_adds: int) -> None:
    """work(first, last) over all tasks, on torch's number of threads."""
    threads = 1 if multiply_adds < _SERIAL else min(torch.get_num_threads(), tasks)
    if threads == 1:
        work(0, tasks)
        return
    bounds = [tasks * t // threads for t in range(threads + 1)]
    for done in [_pool(threads).submit(work, *span) for span in itertools.pairwise(bounds)]:
        done.result()


def matmul(lhs: Tensor, rhs: Tensor, unit: Unit, out: Tensor) -> None:
    """lhs [B, M, K] · rhs [B, K, N] into out [B, M, N], float32 in any layout; none of B, M, N is 0."""
    if rhs.shape[2] < WIDTH and rhs.shape[2] < lhs.shape[1]:  # columns fill the vectors: let the longer side be columns
        lhs, rhs, out = rhs.mT, lhs.mT, out.mT
        unit = unit._replace(operand_emin=unit.operand_emin[::-1])
    a, b, c = lhs.numpy(), rhs.numpy(), out.numpy()
    integers, floats = numbers(unit)
    batch, rows, depth = a.shape
    tasks = batch * -(-rows // BLOCK) * -(-b.shape[2] // WIDTH)

    def work(first: int, last: int) -> None:
        any_unit(a, b, c, integers, floats, first, last)

    run(work, tasks, batch * rows * depth * b.shape[2])
