"""What the tests of accumulators share: units of every kind, operands that go wrong easily, how to multiply them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from lpsim import (
    Accumulator,
    Alignment,
    FloatFormat,
    Order,
    Overflow,
    Quantizer,
    Rounding,
    Specials,
    accumulators,
    formats,
)

E8M13 = FloatFormat("e8m13", 8, 13)
E6M9 = FloatFormat("e6m9", 6, 9)
E4M3 = formats.float8_e4m3fn
NARROW_FNUZ = FloatFormat("e4m4_fnuz", 4, 4, specials=Specials.FNUZ)
FINITE = FloatFormat("e5m6_finite", 5, 6, specials=Specials.NONE)
E8M22 = FloatFormat("e8m22", 8, 22)
FORMATS = (formats.float32, formats.float16, formats.bfloat16, E8M13, E8M22, E6M9, E4M3, NARROW_FNUZ, FINITE)
ROUNDINGS = (Rounding.TIES_TO_EVEN, Rounding.TOWARD_ZERO)
PRESETS = {name: value for name, value in vars(accumulators).items() if isinstance(value, Accumulator)}


def units(fmt: FloatFormat) -> Iterator[Accumulator]:
    """Every kind of unit in a format."""
    for rounding, overflow in itertools.product(ROUNDINGS, Overflow):
        if overflow is Overflow.SPECIAL and not (fmt.has_inf or fmt.has_nan):
            continue
        for more in (
            {},
            {"chunk": 5},
            {"chunk": 6, "order": Order.PAIRWISE},
            {"chunk": 4, "alignment": Alignment(fmt.mantissa_bits)},
            {"chunk": 7, "alignment": Alignment(25, Rounding.TOWARD_NEGATIVE)},
            {"chunk": 16, "alignment": Alignment(fmt.mantissa_bits + 1, Rounding.TIES_TO_EVEN)},
        ):
            yield Accumulator(fmt, rounding=rounding, overflow=overflow, **more)  # type: ignore[arg-type]


def hostile_pairs(depth: int = 19) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Matrices [5, depth] and [depth, 6] whose dot products go wrong easily."""
    random = np.random.default_rng(1)
    a, b = random.standard_normal((5, depth)), random.standard_normal((depth, 6))
    spread = np.ldexp(a, random.integers(-60, 60, a.shape)), np.ldexp(b, random.integers(-60, 60, b.shape))
    cancelling = a.copy(), b.copy()
    cancelling[0][:, 1::2], cancelling[1][1::2] = -cancelling[0][:, :-1:2], cancelling[1][:-1:2]
    cancelling[0][:, 5] *= 1 + 2.0**-11
    subnormal = np.ldexp(a, random.integers(-149, -110, a.shape)), np.ldexp(b, random.integers(-30, 10, b.shape))
    mild = np.ldexp(a, random.integers(-9, 2, a.shape)), np.ldexp(b, random.integers(-9, 2, b.shape))
    small_integers = random.integers(-8, 9, a.shape) / 4, random.integers(-8, 9, b.shape) / 8
    huge = np.ldexp(a, random.integers(40, 66, a.shape)), np.ldexp(b, random.integers(40, 62, b.shape))
    zeros = np.where(random.random(a.shape) < 0.6, -0.0, a), np.where(random.random(b.shape) < 0.6, 0.0, b)
    zeros[0][0], zeros[1][:, 0] = -0.0, 1.0
    specials = np.where(random.random(a.shape) < 0.04, np.inf, a), np.where(random.random(b.shape) < 0.04, 0.0, b)
    specials[0][0], specials[0][1, 2], specials[1][4, 1] = np.abs(a[0]), np.nan, -np.inf
    ties = np.ldexp(1.0, random.integers(-30, 1, a.shape)), np.ldexp(1.0, random.integers(-16, 1, b.shape))
    table = dict(
        normal=(a, b), mild=mild, spread=spread, cancelling=cancelling, subnormal=subnormal, huge=huge,
        small_integers=small_integers, zeros=zeros, specials=specials, ties=ties,
    )  # fmt: skip
    return {name: (x.astype(np.float32), y.astype(np.float32)) for name, (x, y) in table.items()}


def multiplied(unit: Accumulator, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return unit.matmul(torch.from_numpy(a), torch.from_numpy(b)).numpy()


Q = Quantizer(formats.mxfp6_e3m2)
UNITS = Accumulator(formats.float16), Accumulator(E8M13, 8), Accumulator(E6M9, 4, Order.PAIRWISE)


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for shape in shapes]
