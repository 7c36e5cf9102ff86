"""Accumulator.matmul on CPUs: which kernel serves, and the threads that share the tasks."""

from __future__ import annotations

import functools
import itertools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
import torch
from torch import Tensor

from lpsim.accumulators import aligned, kernels, operands, pinned, tiles
from lpsim.accumulators.kernels import WIDTH
from lpsim.accumulators.registers import BLOCK
from lpsim.accumulators.tiles import (
    BARE,
    CUT,
    GUARDED,
    HALF,
    INTEGER,
    NEAR,
    NONE,
    ODD,
    PLAIN,
    SATURATED,
    TRUNCATE,
    TWO_SUM,
)
from lpsim.accumulators.unit import Unit
from lpsim.formats import FloatFormat

_BYTES = 0x01010101  # a byte four times
_SERIAL = 1 << 19  # below this many multiply-adds a second thread costs more than it gains


class Vectors(NamedTuple):
    """What the processor's vectors can do beyond fused multiply-adds."""

    directed: bool  # rounding modes in the instruction: AVX-512
    half: bool  # float16: AVX-512 FP16


@functools.cache
def vectors() -> Vectors:
    features = llvmlite.binding.get_host_cpu_features()
    return Vectors(
        all(features.get(name, False) for name in ("avx512f", "avx512dq")), bool(features.get("avx512fp16", False))
    )


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="lpsim-accumulator")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process inherits the pool without its threads


def matmul(
    lhs: Tensor, rhs: Tensor, unit: Unit, out: Tensor, has: Vectors | None = None, seen: Seen | None = None
) -> None:
    """lhs [B, M, K] · rhs [B, K, N] into out [B, M, N], float32 in any layout; none of B, M, N is 0.

    has: what the processor can do, if it shall not do all it can. seen: `examine` of lhs and rhs, if it is known.
    """
    if rhs.shape[2] < WIDTH and rhs.shape[2] < lhs.shape[1]:  # columns fill the vectors: let the longer side be columns
        lhs, rhs, out = rhs.mT, lhs.mT, out.mT
        unit = unit._replace(operand_emin=unit.operand_emin[::-1])
        seen = None if seen is None else (seen[1], seen[0])
    find = functools.cache(functools.partial(facts, lhs, rhs, seen))
    if unit.fraction_bits:
        _aligned(lhs, rhs, unit, out, has or vectors(), find)
        return
    chosen = choose(unit, lhs.shape[2], find, has or vectors())
    if chosen is None:
        any_unit(lhs, rhs, unit, out)
        return
    leaves = min(1 << (unit.chunk - 1).bit_length(), tiles.LEAVES) if unit.pairwise else 0
    kernel = tiles.tiles(*chosen, unit.chunk > 1, leaves)
    arguments = unit.chunk, _tile_numbers(unit)
    if chosen[0] != HALF:
        _run(kernel, [lhs, rhs, out], BLOCK, arguments)
        return
    result = torch.empty_like(out, dtype=torch.float16)
    halves = [x.half().view(torch.int16) for x in (lhs, rhs)]
    _run(kernel, [*halves, result.view(torch.int16)], BLOCK, arguments)
    out.copy_(result)


def _aligned(lhs: Tensor, rhs: Tensor, unit: Unit, out: Tensor, has: Vectors, find: Callable[[], Facts | None]) -> None:
    depth = lhs.shape[2]
    plan = choose_pinned(unit, depth, find, has)
    if plan is not None and _pinned(lhs, rhs, unit, out, plan):
        return
    wide = choose_aligned(unit, depth, find, has)
    if wide is None:
        any_unit(lhs, rhs, unit, out)
        return
    exponents = np.empty(tuple(lhs.shape), np.int32)
    aligned.operand_exponents(lhs.numpy(), unit.operand_emin[0], exponents)
    numbers = np.array([unit.fraction_bits, -(1 << (23 - unit.mantissa_bits))], np.int32)
    arguments = exponents, unit.operand_emin[1], unit.chunk, numbers
    _run(aligned.tiles(wide), [lhs, rhs, out], BLOCK, arguments)


def _pinned(lhs: Tensor, rhs: Tensor, unit: Unit, out: Tensor, plan: Plan) -> bool:
    """Whether no sum was too large for the tile of pinned."""
    least_lhs, least_rhs = (emin + 127 for emin in unit.operand_emin)
    fraction, failed = unit.fraction_bits, np.zeros(1, np.int32)
    codes = (-1, plan.top, 255) if plan.saturating else (1, plan.rise - 127, 0)
    own = np.array([least_lhs, *codes, plan.bottom], np.int32)
    theirs = least_rhs, plan.top - 127 if plan.saturating else -plan.rise, fraction + plan.bottom - 173
    pin = ((948 - fraction) << 20) + (1 << 19) if plan.double else ((23 - fraction) << 23) + (1 << 22)
    mask, scale = -(1 << (23 - unit.mantissa_bits)), (254 + fraction) << 23
    step = np.array([plan.least * _BYTES, pin, mask, scale, fraction << 23, _BYTES], np.int64).astype(np.int32)
    kernel = pinned.tiles(plan.double, plan.checked, plan.saturating)
    _run(kernel, [lhs, rhs, out], BLOCK, (own, *theirs, unit.chunk, step, failed))
    return not failed[0]


def any_unit(lhs: Tensor, rhs: Tensor, unit: Unit, out: Tensor) -> None:
    """`matmul` by the kernel that serves everything."""
    _run(kernels.any_unit, [lhs, rhs, out], kernels.BLOCK, _any_numbers(unit))


def _run(kernel: Any, tensors: list[Tensor], block: int, arguments: tuple[Any, ...]) -> None:
    """The kernel over all tasks, of `block` rows each, on torch's number of threads."""
    lhs, rhs, out = (x.numpy() for x in tensors)
    batch, rows, depth = lhs.shape
    columns = rhs.shape[2]
    tasks = batch * -(-rows // block) * -(-columns // WIDTH)
    threads = 1 if batch * rows * depth * columns < _SERIAL else min(torch.get_num_threads(), tasks)
    if threads == 1:
        kernel(lhs, rhs, out, *arguments, 0, tasks)
        return
    bounds = [tasks * t // threads for t in range(threads + 1)]
    pool = _pool(threads)
    for done in [pool.submit(kernel, lhs, rhs, out, *arguments, *span) for span in itertools.pairwise(bounds)]:
        done.result()


@functools.lru_cache(maxsize=256)
def _any_numbers(unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    integers = [unit.mantissa_bits, (unit.emin + 1023) << 52, unit.toward_zero, unit.chunk, unit.pairwise]
    integers += [unit.fraction_bits, unit.aligned_rounding, *unit.operand_emin, unit.emin]
    zero = -0.0 if unit.negative_zero else 0.0
    return np.array(integers, np.int64), np.array([unit.max, unit.beyond, unit.infinite, zero])


@functools.lru_cache(maxsize=256)
def _tile_numbers(unit: Unit) -> np.ndarray:
    below = 23 - unit.mantissa_bits
    numbers = np.array([2.0**below, 1.5 * 2.0**below, unit.max, unit.infinite, 0, 0, 0], np.float32)
    numbers.view(np.int32)[4:] = (unit.emin + 127) << 23, -(1 << below), below
    return numbers


class Extremes(NamedTuple):
    """Of one operand: the largest magnitude (NaN or Inf if there is one), log2 of the smallest last bit, the most
    significant bits."""

    most: float
    last: int
    bits: int

    def fit(self, fmt: FloatFormat) -> bool:
        """Whether all numbers are certainly values of a signed format with subnormal numbers."""
        return self.most <= fmt.max and self.last >= fmt.emin - fmt.mantissa_bits and self.bits <= fmt.mantissa_bits + 1


Seen = tuple[Extremes, Extremes]


class Facts(NamedTuple):
    """What is known of finite operands and their products.

    log2 of the largest |a·b| at most; the products are multiples of 2^last; bits: significant ones at most; half:
    whether the operands are float16 numbers; sides: what is known of lhs and of rhs.
    """

    top: float
    last: int
    bits: int
    half: bool
    sides: Seen


def facts(lhs: Tensor, rhs: Tensor, seen: Seen | None = None) -> Facts | None:
    """None where there is NaN or Inf."""
    both = seen or (examine(lhs), examine(rhs))
    (a_most, a_last, a_bits), (b_most, b_last, b_bits) = both
    if not (math.isfinite(a_most) and math.isfinite(b_most)):
        return None
    half = all(most < 65520 and last >= -24 and bits <= 11 for most, last, bits in both)
    top = sum(math.log2(max(most, 2.0**-149)) for most in (a_most, b_most)) + 1e-6
    return Facts(top, a_last + b_last, a_bits + b_bits, half, both)


def examine(x: Tensor) -> Extremes:
    """The extremes of a tensor in any layout, whose dimensions of stride 0 are read once."""
    x = x[tuple(slice(1) if stride == 0 else slice(None) for stride in x.stride())]
    order = sorted(range(x.dim()), key=lambda d: -x.stride()[d])
    words = x.permute(order).contiguous().view(-1).numpy().view(np.int32)
    largest, last, bits = operands.extremes(words)
    return Extremes(float(np.int32(largest).view(np.float32)), last, bits)


class Plan(NamedTuple):
    """A tile of pinned: whether its sums are float64, and are checked; what its codes are counted from.

    top: the largest field of an exponent in lhs; bottom: log2 of the smallest last bit there, plus 150; least: what
    the exponents of products other than zero are not less than, plus 127. saturating: codes of exponents are
    subtracted, where zeros make 0; else those of rhs are fields − rise, those of lhs fields + rise − 127, and of zeros
    0, of which all sums that count for nothing are at most `least`.
    """

    double: bool
    checked: bool
    saturating: bool
    top: int
    bottom: int
    least: int
    rise: int


def choose_pinned(unit: Unit, depth: int, find: Callable[[], Facts | None], has: Vectors) -> Plan | None:
    """The tile of pinned that is exact for these numbers; None: there is none."""
    fraction, chunk = unit.fraction_bits, unit.chunk
    like_float32 = unit.emin == -126 and unit.emax == 127 and unit.negative_zero
    truncating = unit.toward_zero and unit.aligned_rounding == 0
    products, own = chunk * 2 ** (fraction + 2), 2 ** (fraction + 1)  # at most, in quanta, of a step
    if not (like_float32 and truncating and has.directed) or products > 2**31 or fraction > 30:
        return None
    known = find()
    if known is None or known.last < -126 or any(side.most == 0 for side in known.sides):
        return None
    double = products + own + chunk > 2**22
    if known.top + math.log2(max(depth, 1)) + 2 + max(23 - fraction, 0) > 127:
        return None
    tops = [max(math.frexp(side.most)[1] - 1, emin) for side, emin in zip(known.sides, unit.operand_emin, strict=True)]
    bottoms = [max(side.last, emin) for side, emin in zip(known.sides, unit.operand_emin, strict=True)]
    least = sum(bottoms)
    fits_bytes = tops[0] + bottoms[1] >= -126 and tops[0] - known.sides[0].last <= 254 and least - fraction >= -126
    if not fits_bytes or max(tops) - 126 > least:  # a zero counts with the exponent -126: that must never matter
        return None
    spans = [top - bottom for top, bottom in zip(tops, bottoms, strict=True)]
    rise = bottoms[1] + 127 - spans[0]
    saturating = 127 - rise > bottoms[0] + 127 - spans[1]
    checked, bottom = products + own > 2**31, known.sides[0].last + 150
    return Plan(double, checked, saturating, tops[0] + 127, bottom, least + 127, rise)


def choose_aligned(unit: Unit, depth: int, find: Callable[[], Facts | None], has: Vectors) -> bool | None:
    """Whether the tile of aligned needs 64 bits; None: any_unit."""
    like_float32 = unit.emin == -126 and unit.emax == 127 and unit.negative_zero
    truncating = unit.toward_zero and unit.aligned_rounding == 0
    term = 2 ** (unit.fraction_bits + 2)  # a product is less than 4 times its power of two

    def fits(products: int) -> bool:
        return products * term + term // 2 < 2**31  # the accumulator is one more, less than twice its power of two

    wide = not fits(unit.chunk)
    half = aligned.WIDE_PRODUCTS
    if not (like_float32 and truncating and has.directed) or (wide and not (unit.chunk <= 2 * half and fits(half))):
        return None
    known = find()
    if known is None or known.bits > 24 or known.last < -126:
        return None
    return wide if known.top + math.log2(max(depth, 1)) + 1 <= 127 else None


def choose(unit: Unit, depth: int, find: Callable[[], Facts | None], has: Vectors) -> tuple[int, int, int] | None:
    """(add, into, guard) of the tile that is exact for these numbers, see tiles; None: any_unit."""
    m, chunked = unit.mantissa_bits, unit.chunk > 1
    if not unit.negative_zero:
        return None
    inf = math.isinf(unit.infinite)
    like_float32 = unit.emin == -126 and unit.emax == 127 and inf
    if like_float32 and m == 23 and not unit.toward_zero:
        return PLAIN, NONE, BARE
    if like_float32 and unit.toward_zero and has.directed:
        return CUT, TRUNCATE, BARE
    anything = like_float32 and chunked and has.directed and m <= 21  # the chunks' float32 sums may be anything, too
    if anything and unit.chunk >= 64:  # seldom enough to do without the facts
        return ODD, INTEGER, BARE
    known = find()
    if known is None:
        return (ODD, INTEGER, BARE) if anything else None
    like_float16 = (m, unit.emin, unit.emax, inf) == (10, -14, 15, True)
    if like_float16 and known.half and has.half and not chunked and not unit.toward_zero:
        return HALF, NONE, BARE
    last, terms = known.last, max(depth, 1)
    # each rounding lets a sum grow by 1 + 2^-(m+1); and a sum of 2^(m+2) products grows no more
    highest = known.top + min(math.log2(terms) + 1.5 * terms * 2.0 ** -(m + 1), m + 3)
    widest_term = known.top + math.log2(min(unit.chunk, terms)) + 0.01 if chunked else known.top
    if widest_term >= 127 or (chunked and unit.chunk > 2**15):  # sums in float32 grow by less than that 0.01
        return (ODD, INTEGER, BARE) if anything else None
    within = highest <= unit.emax and last >= unit.emin - m
    if unit.toward_zero:
        return (CUT, TRUNCATE, BARE) if within and has.directed else None
    exact_sums = last >= -149 and highest - last <= 24
    harmless = not chunked and m <= 10 and known.bits <= m + 1 and last >= -149
    if exact_sums or harmless:
        add = PLAIN
    elif m > 21:
        return None
    elif has.directed:
        add = ODD
    elif chunked or (known.bits <= 24 and last >= -149):
        add = TWO_SUM
    else:
        return None
    if within:
        return add, NEAR, BARE
    if anything:
        return ODD, INTEGER, BARE
    if min(highest, max(unit.emax + 1, widest_term) + 1) + 24 - m >= 127:
        return None
    return add, NEAR, GUARDED if unit.infinite != unit.max else SATURATED
