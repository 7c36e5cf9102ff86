"""Accumulators: equal to exact rational arithmetic, for any shape and dtype; which ones there can be."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle

import numpy as np
import pytest
import torch

from lpsim import Accumulator, Alignment, FloatFormat, Order, Overflow, Quantizer, Rounding, formats
from lpsim.accumulators import reference as oracle
from lpsim.formats import reference
from tests.accumulators.units import (
    E4M3,
    E6M9,
    E8M13,
    FINITE,
    FORMATS,
    NARROW_FNUZ,
    PRESETS,
    ROUNDINGS,
    UNITS,
    hostile_pairs,
    multiplied,
    units,
)
from tests.laws import assert_same_bits, critical_inputs


@pytest.mark.parametrize("fmt", [formats.float16, E4M3, NARROW_FNUZ, FINITE], ids=lambda f: f.name)
def test_the_oracle_rounds_as_the_oracle_of_formats_does(fmt: FloatFormat) -> None:
    critical = critical_inputs(fmt)
    inputs = [float(x) for x in critical[:: 1 + len(critical) // 4000] if math.isfinite(x)]
    for rounding, overflow in itertools.product(ROUNDINGS, Overflow):
        if overflow is Overflow.SPECIAL and not (fmt.has_inf or fmt.has_nan):
            continue
        unit = Accumulator(fmt, rounding=rounding, overflow=overflow)
        got = np.array([oracle.round_exact(oracle.Fraction(x), x, unit) for x in inputs])
        expected = np.array([reference.round_value(x, fmt, rounding, overflow) for x in inputs])
        assert_same_bits(got, expected, f"{unit}")


def test_one_rounding_not_two() -> None:
    """1 + (2^-14 + 2^-40) lies above the middle between 1 and 1 + 2^-13; as a float32 it would be the middle."""
    a, b = np.float32([[1, 2.0**-14 + 2.0**-37]]), np.float32([[1], [1]])
    for c in (1, 3):
        terms = a.copy()
        terms[0, 0] = c
        assert multiplied(Accumulator(E8M13), terms, b)[0, 0] == {1: 1 + 2.0**-13, 3: 3}[c]
    exact = Accumulator(formats.float32)
    x = np.float32([[1 + 2.0**-12, -1 - 2.0**-11]])
    y = np.float32([[1 + 2.0**-12], [1]])
    assert multiplied(exact, x[:, :1], y[:1])[0, 0] == 1 + 2.0**-11  # 2^-24 lost: a tie
    assert multiplied(exact, x[:, ::-1].copy(), y[::-1].copy())[0, 0] == 2.0**-24  # not lost: fused


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_equals_exact_rational_arithmetic(fmt: FloatFormat) -> None:
    pairs = hostile_pairs()
    for n, unit in enumerate(units(fmt)):
        for name, (a, b) in list(pairs.items())[n % 3 :: 3]:
            assert_same_bits(multiplied(unit, a, b), oracle.matmul(a, b, unit), f"{name} {unit}")


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 8, 17, 40])
def test_ragged_depths(depth: int) -> None:
    a, b = np.random.default_rng(depth).standard_normal((2, 2, depth)).astype(np.float32)
    for unit in [*units(E8M13)][:6]:
        assert_same_bits(multiplied(unit, a, b.T), oracle.matmul(a, b.T, unit), f"{unit}")


def test_float32_addition_after_every_product_is_sequential_summation() -> None:
    """Products of bfloat16 numbers are exact, so adding them one by one is all there is to round."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator).bfloat16().float() for shape in ((70, 300), (300, 90)))
    total = torch.zeros(70, 90)
    for k in range(300):
        total = total + a[:, k, None] * b[k]
    assert torch.equal(Accumulator(formats.float32).matmul(a, b), total)


def test_chunks_are_float32_sums_rounded_into_the_accumulator() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=generator).bfloat16().float() for shape in ((20, 100), (100, 30)))
    to_format = Quantizer(E8M13, backend="reference").quantize
    total = torch.zeros(20, 30)
    for start in range(0, 100, 32):
        chunk = torch.zeros(20, 30)
        for k in range(start, min(start + 32, 100)):
            chunk = chunk + a[:, k, None] * b[k]
        total = to_format(total.double() + chunk.double()).float()  # 14 and 24 bits, near: exact in float64
    assert torch.equal(Accumulator(E8M13, chunk=32).matmul(a, b), total)


def test_batches_broadcast() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(2, 1, 5, 11, generator=generator), torch.randn(3, 11, 7, generator=generator)
    unit = Accumulator(E6M9)
    out = unit.matmul(a, b)
    assert out.shape == (2, 3, 5, 7) and not out.requires_grad
    for i, j in itertools.product(range(2), range(3)):
        assert torch.equal(out[i, j], unit.matmul(a[i, 0], b[j]))
    assert unit.matmul(a[:0], b).shape == (0, 3, 5, 7)
    assert torch.equal(unit.matmul(torch.ones(2, 0), torch.ones(0, 3)), torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_tensors_are_read_exactly_and_rounded_once_more(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    a, b = torch.randn(9, 33, generator=generator).to(dtype), torch.randn(33, 8, generator=generator).to(dtype)
    unit = Accumulator(E8M13, 8)
    assert torch.equal(unit.matmul(a, b), unit.matmul(a.float(), b.float()).to(dtype))


def test_hashable_and_picklable() -> None:
    for unit in (*UNITS, *PRESETS.values()):
        unit.unit  # noqa: B018, what a call has found out is not part of the value
        again = pickle.loads(pickle.dumps(unit))
        assert again == unit and hash(again) == hash(unit) and dataclasses.replace(unit) == unit
    assert len({*PRESETS.values()}) == len(PRESETS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "float16"}, "formats.get"),
        ({"format": formats.mxfp4_e2m1}, "FloatFormat"),
        ({"format": FloatFormat("unsigned", 4, 3, signed=False)}, "a sign"),
        ({"format": FloatFormat("flushed", 4, 3, subnormals=False)}, "subnormal"),
        ({"format": FloatFormat("wide", 11, 40)}, "23 mantissa bits"),
        ({"chunk": 0}, r"chunk must lie in \[1"),
        ({"chunk": 2.0}, "chunk must be an int"),
        ({"order": "pairwise"}, "an Order"),
        ({"order": Order.PAIRWISE}, "chunks of 2"),
        ({"alignment": 13}, "an Alignment"),
        ({"alignment": Alignment(13), "chunk": 65}, "64 products"),
        ({"rounding": Rounding.STOCHASTIC}, "TIES_TO_EVEN or TOWARD_ZERO"),
        ({"overflow": "special"}, "Overflow.SATURATE"),
        ({"format": FINITE}, "neither Inf nor NaN"),
    ],
)
def test_bad_units_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Accumulator(**{"format": formats.float16, **arguments})


def test_bad_alignments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 40\]"):
        Alignment(0)
    with pytest.raises(ValueError, match="TOWARD_NEGATIVE"):
        Alignment(13, Rounding.TO_ODD)
    with pytest.raises(TypeError, match="lhs and rhs"):
        Alignment(13, operands=(formats.float16,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="does not fit float32"):
        Alignment(13, operands=(formats.float16, FloatFormat("wide", 11, 3)))


def test_bad_tensors_are_refused() -> None:
    unit = Accumulator(formats.float16)
    with pytest.raises(TypeError, match="float64"):
        unit.matmul(torch.ones(2, 2).double(), torch.ones(2, 2).double())
    with pytest.raises(TypeError, match="float16"):
        unit.matmul(torch.ones(2, 2), torch.ones(2, 2).half())
    for a, b in ((torch.ones(3), torch.ones(3, 2)), (torch.ones(2, 3), torch.ones(2, 3))):
        with pytest.raises(ValueError, match="K, N"):
            unit.matmul(a, b)
