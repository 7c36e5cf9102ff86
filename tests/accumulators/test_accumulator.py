"""Accumulators: equal to exact rational arithmetic, to measured hardware, and to themselves however they are run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpsim import (
    Accumulator,
    Alignment,
    FloatFormat,
    Gemm,
    Order,
    Overflow,
    Quantizer,
    Recipe,
    Rounding,
    Specials,
    accumulators,
    formats,
    simulate,
)
from lpsim.accumulators import cpu as accumulator_cpu
from lpsim.accumulators import reference as oracle
from lpsim.accumulators.tiles import BARE, CUT, GUARDED, HALF, NEAR, NONE, ODD, PLAIN, SATURATED, TWO_SUM
from lpsim.formats import reference
from tests.laws import assert_same_bits, critical_inputs

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


# ---------------------------------------------------------------------------------------------- the oracle itself


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


# ---------------------------------------------------------------------------------------------- the kernels


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


def operands(kind: str) -> tuple[Tensor, Tensor]:
    """[53, 300] and [300, 70]: several tiles, blocks of k and columns, all of them ragged."""
    generator = torch.Generator().manual_seed(len(kind))
    a, b = torch.randn(53, 300, generator=generator), torch.randn(300, 70, generator=generator)
    if kind == "narrow":
        return Q.quantize(a), Q.quantize(b, 0)
    if kind == "few bits":
        return (a * 4).round(), (b * 2).round()
    if kind == "underflowing":
        return (a * 2.0**-10).half().float(), (b * 2.0**-8).half().float()
    if kind == "overflowing":
        return (a * 2.0**7).bfloat16().float(), (b * 2.0**5).bfloat16().float()
    if kind == "wild":
        return a * torch.logspace(-30, 30, 300), b * torch.logspace(-20, 20, 70)
    if kind == "infinite":
        a[3, 7] = torch.inf
    return a, b


def test_every_tile_equals_the_kernel_for_anything() -> None:
    """With the instructions of this processor, and without AVX-512; every way of computing is met."""
    native, met = accumulator_cpu.vectors(), set()
    kinds = ("normal", "narrow", "few bits", "underflowing", "overflowing", "wild", "infinite")
    for fmt, chunk, rounding in itertools.product(FORMATS, (1, 32), ROUNDINGS):
        for overflow in (Overflow.SPECIAL, Overflow.SATURATE):
            if overflow is Overflow.SPECIAL and not (fmt.has_inf or fmt.has_nan):
                continue
            unit = Accumulator(fmt, chunk, rounding=rounding, overflow=overflow).unit
            for kind in kinds:
                a, b = (x[None] for x in operands(kind))
                facts = accumulator_cpu.facts(a, b)
                expected = None
                for has in {native, accumulator_cpu.Vectors(False, False)}:
                    chosen = accumulator_cpu.choose(unit, 300, lambda known=facts: known, has)
                    if chosen is None:
                        continue
                    met.add((*chosen, chunk > 1))
                    if expected is None:
                        expected = torch.empty(1, 53, 70)
                        accumulator_cpu.any_unit(a, b, unit, expected)
                    out = torch.empty(1, 53, 70)
                    accumulator_cpu.matmul(a, b, unit, out, has)
                    assert_same_bits(out.numpy(), expected.numpy(), f"{unit} {kind} {chosen}")
    adds = {add for add, *_ in met}
    assert adds == {PLAIN, TWO_SUM} | ({ODD, CUT} if native.directed else set()) | ({HALF} if native.half else set())
    assert {into for _, into, *_ in met} >= {NONE, NEAR} and {guard for *_, guard, _ in met} == {
        BARE,
        GUARDED,
        SATURATED,
    }


@pytest.mark.parametrize("name", [*PRESETS, "narrow output", "ragged"])
def test_aligned_tiles_equal_the_kernel_for_anything(name: str) -> None:
    """Normal numbers, small ones with zeros and subnormals, a wide spread, cancellation, products far below c."""
    given = {
        "narrow output": Accumulator(formats.bfloat16, 4, alignment=Alignment(7), rounding=Rounding.TOWARD_ZERO),
        "ragged": Accumulator(E8M13, 13, alignment=Alignment(25), rounding=Rounding.TOWARD_ZERO),
    }
    accumulator = PRESETS.get(name) or given[name]
    assert accumulator.alignment is not None
    to_lhs, to_rhs = (Quantizer(fmt).quantize for fmt in accumulator.alignment.operands or (E4M3, E4M3))
    lhs, rhs = operands("normal")
    powers = torch.exp2(torch.arange(300.0).remainder(9) - 6)
    sign = torch.where(torch.arange(300) % 64 < 32, 1.0, -1.0)
    for a, b in (
        (lhs, rhs),
        (lhs * 2.0**-7 * (lhs.abs() > 0.3), rhs * 2.0**-13),
        (lhs * powers, rhs * powers.flip(0)[:, None]),
        (lhs[:, :32].repeat(1, 10)[:, :300] * sign, rhs[:32].repeat(10, 1)[:300]),
        (lhs * 2.0 ** -(torch.arange(300) // 60), rhs),
    ):
        a, b, unit = to_lhs(a)[None], to_rhs(b)[None], accumulator.unit
        known = accumulator_cpu.facts(a, b)
        if accumulator_cpu.vectors().directed:
            wide = accumulator_cpu.choose_aligned(unit, 300, lambda known=known: known, accumulator_cpu.vectors())
            assert wide == (unit.chunk * 2**unit.fraction_bits == 2**29)  # HOPPER_FP16 and HOPPER_BF16
        out, expected = torch.empty(1, 53, 70), torch.empty(1, 53, 70)
        accumulator_cpu.matmul(a, b, unit, out)
        accumulator_cpu.any_unit(a, b, unit, expected)
        assert_same_bits(out.numpy(), expected.numpy(), name)


def test_threads_tiles_and_layouts_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(130, 67, generator=generator), torch.randn(67, 190, generator=generator)
    before = torch.get_num_threads()
    for unit in (Accumulator(formats.float16), Accumulator(E8M13, 16), accumulators.HOPPER_BF16):
        x, y = (a.bfloat16().float(), b.bfloat16().float()) if unit.alignment else (a, b)
        whole = unit.matmul(x, y)
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(unit.matmul(x, y), whole)
        finally:
            torch.set_num_threads(before)
        assert torch.equal(unit.matmul(x[7:8], y[:, 3:9]), whole[7:8, 3:9])
        assert torch.equal(unit.matmul(x[:, :], y[:, 100:101]), whole[:, 100:101])
        assert torch.equal(unit.matmul(x.T.contiguous().T, y.T.contiguous().T), whole)
        assert torch.equal(unit.matmul(x.flip(0).flip(0), y.repeat_interleave(2, 1)[:, ::2]), whole)
        assert torch.equal(unit.matmul(y.T, x.T), whole.T)


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


# ---------------------------------------------------------------------------------------------- the GPU's kernel


@pytest.mark.gpu
def test_triton_equals_numba() -> None:
    """Every kind of unit and every kind of number, in turn."""
    gpu = pytest.importorskip("lpsim.accumulators.gpu", exc_type=ImportError)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the interpreter's
    pairs = itertools.cycle(hostile_pairs().items())
    for unit in itertools.chain(units(E8M13), units(NARROW_FNUZ)):
        for name, (a, b) in itertools.islice(pairs, 2 if unit.chunk == 1 else 1):
            lhs, rhs = torch.from_numpy(a)[None], torch.from_numpy(b)[None]
            out, expected = torch.empty(1, 5, 6, device=device), torch.empty(1, 5, 6)
            gpu.matmul(lhs.to(device), rhs.to(device), unit.unit, out)
            accumulator_cpu.any_unit(lhs, rhs, unit.unit, expected)
            assert_same_bits(out.cpu().numpy(), expected.numpy(), f"{name} {unit}")


@pytest.mark.gpu
def test_triton_on_batches_blocks_and_layouts() -> None:
    gpu = pytest.importorskip("lpsim.accumulators.gpu", exc_type=ImportError)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lhs, rhs = tensors((2, 6, 35), (2, 45, 6))
    for unit in (Accumulator(formats.float16), dataclasses.replace(accumulators.HOPPER_FP8, alignment=Alignment(13))):
        out, expected = torch.empty(2, 45, 35, device=device).mT, torch.empty(2, 35, 45)
        gpu.matmul(lhs.mT.to(device), rhs.mT.to(device), unit.unit, out)
        accumulator_cpu.matmul(lhs.mT, rhs.mT, unit.unit, expected)
        assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_80", marks=pytest.mark.full)])
def test_the_triton_kernel_compiles_to_ieee_arithmetic(target: str, tmp_path: Path) -> None:
    """No contracted products, no flushed subnormals, no approximations."""
    pytest.importorskip("lpsim.accumulators.gpu", exc_type=ImportError)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.accumulators.compile_accumulators", target],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 4
    for kernel in kernels:
        inexact = re.search(r"\bfma\.|\bmad\.(rn\.)?f|\.ftz|\.approx|div\.full", kernel["assembly"])
        assert inexact is None, f"{kernel['case']}: {inexact}"


# ---------------------------------------------------------------------------------------------- tensor cores


def row(*terms: tuple[float, float], products: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """One dot product from its pairs of operands, filled up with zeros."""
    filled = [*terms, *[(0.0, 0.0)] * (products - len(terms))]
    return np.float32([[a for a, _ in filled]]), np.float32([[b] for _, b in filled])


HAND_COMPUTED: list[tuple[str, list[tuple[float, float]], float]] = [
    # FP8: the quantum beside 1 is 2^-13, so 31 products of 2^-14 vanish, and 31 of 2^-13 stay
    ("HOPPER_FP8", [(1, 1)] + [(2.0**-7, 2.0**-7)] * 31, 1),
    ("HOPPER_FP8", [(1, 1)] + [(2.0**-6, 2.0**-7)] * 31, 1 + 31 * 2.0**-13),
    # the sum of a step is truncated to 13 bits too: 2 + 2^-13
    ("HOPPER_FP8", [(1, 1), (1, 1), (2.0**-6, 2.0**-7)], 2),
    ("HOPPER_FP8", [(-1, 1), (1, -1), (2.0**-6, -(2.0**-7))], -2),
    # 1.5 · 1.5 counts with exponent 0, though it is 2.25: 2^-13 is kept, and then cut from 2.25 + 2^-13
    ("HOPPER_FP8", [(1.5, 1.5), (2.0**-6, 2.0**-7)], 2.25),
    # 32 products a step: the 33rd meets a sum of 2 + 2^-12
    ("HOPPER_FP8", [(1, 1), (1, 1), (2.0**-6, 2.0**-6)] + [(0, 0)] * 29 + [(2.0**-6, 2.0**-6)], 2 + 2.0**-11),
    # a subnormal operand counts with the exponent of its field, -14: 2^-28 falls below 2^-14-13
    ("HOPPER_FP8_E5M2", [(2.0**-16, 1), (2.0**-16, 2.0**-12)], 2.0**-16),
    ("HOPPER_FP8_E5M2", [(2.0**-16, 1), (2.0**-15, 2.0**-12)], 2.0**-16 + 2.0**-27),
    ("HOPPER_FP8_E5M2", [(57344, 57344), (math.inf, 1)], math.inf),
    ("HOPPER_FP8_E5M2_E4M3", [(2.0**-16, 2.0**-9)], 2.0**-25),
    ("HOPPER_FP8_E4M3_E5M2", [(2.0**-9, 2.0**-16)], 2.0**-25),
    # FP16 on Hopper: quantum 2^-25, 16 products a step, the sum truncated to 23 bits
    ("HOPPER_FP16", [(1, 1)] + [(2.0**-12, 2.0**-13)] * 15, 1 + 3 * 2.0**-23),
    ("HOPPER_FP16", [(1, 1)] + [(2.0**-13, 2.0**-13)] * 15, 1),
    ("HOPPER_FP16", [(1, 1), (2.0**-12, -(2.0**-13))], 1 - 2.0**-24),
    ("HOPPER_FP16", [(1024, 1024), (-1024, 1024), (1, 1)], 1),
    ("HOPPER_FP16", [(32768, 16384), (-32768, 16384), (1, 1)], 0),
    # on Ampere: quantum 2^-24, 8 products a step
    ("AMPERE_FP16", [(1, 1)] + [(2.0**-12, 2.0**-13)] * 15, 1),
    ("AMPERE_FP16", [(1, 1)] + [(2.0**-12, 2.0**-12)] * 7, 1 + 3 * 2.0**-23),
    ("AMPERE_FP16", [(1, 1), (2.0**-12, -(2.0**-13))], 1),
    ("AMPERE_FP16", [(1, 1), *[(0, 0)] * 7, *[(2.0**-12, 2.0**-12)] * 8], 1 + 4 * 2.0**-23),
    # BF16: the same, with float32's exponents
    ("HOPPER_BF16", [(2.0**60, 2.0**60)] + [(2.0**48, 2.0**47)] * 15, 2.0**120 * (1 + 3 * 2.0**-23)),
    ("HOPPER_BF16", [(2.0**64, 2.0**64)], math.inf),
    ("HOPPER_BF16", [(2.0**64, 2.0**64), (-(2.0**64), 2.0**63)], 2.0**127),
    ("HOPPER_BF16", [(math.inf, 1), (-math.inf, 1)], math.nan),
    ("AMPERE_BF16", [(2.0**60, 2.0**60)] + [(2.0**48, 2.0**47)] * 7, 2.0**120),
    ("AMPERE_BF16", [(2.0**-100, 2.0**-49)], 2.0**-149),
    ("AMPERE_BF16", [(2.0**-100, -(2.0**-50))], 0),
]


@pytest.mark.parametrize(("name", "terms", "expected"), HAND_COMPUTED)
def test_presets_give_what_is_computed_by_hand(name: str, terms: list[tuple[float, float]], expected: float) -> None:
    a, b = row(*terms)
    assert_same_bits(multiplied(PRESETS[name], a, b), np.float32([[expected]]))


def test_every_preset_is_computed_by_hand_and_golden() -> None:
    assert {name for name, _, _ in HAND_COMPUTED} == set(PRESETS)
    assert {key.split(".")[0] for key in np.load(GOLDEN)} == set(PRESETS)


GOLDEN = Path(__file__).parents[1] / "golden" / "mma_sim.npz"
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


def golden_operands(name: str, arrays: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    alignment = PRESETS[name].alignment
    assert alignment is not None and alignment.operands is not None
    codes = (torch.from_numpy(arrays[f"{name}.{side}"]) for side in ("lhs", "rhs"))
    a, b = (x.view(DTYPES[fmt.name]).float() for x, fmt in zip(codes, alignment.operands, strict=True))
    return a[:, None, :], b[:, :, None]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_mma_sim(name: str) -> None:
    """48 dot products over three steps: normal, every code, subnormal, cancelling, with NaN and Inf."""
    arrays = np.load(GOLDEN)
    a, b = golden_operands(name, arrays)
    assert_same_bits(PRESETS[name].matmul(a, b).reshape(-1).numpy(), arrays[f"{name}.out"])
    for i in range(0, 48, 5):
        dot = oracle.dot(a[i].reshape(-1).tolist(), b[i].reshape(-1).tolist(), PRESETS[name])
        assert_same_bits(np.float32([dot]), arrays[f"{name}.out"][i : i + 1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_mma_sim_on_a_gpu(name: str) -> None:
    arrays = np.load(GOLDEN)
    a, b = golden_operands(name, arrays)
    assert_same_bits(PRESETS[name].matmul(a.cuda(), b.cuda()).cpu().reshape(-1).numpy(), arrays[f"{name}.out"])


# ---------------------------------------------------------------------------------------------- in a recipe


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for shape in shapes]


Q = Quantizer(formats.mxfp6_e3m2)
UNITS = Accumulator(formats.float16), Accumulator(E8M13, 8), Accumulator(E6M9, 4, Order.PAIRWISE)
RECIPE = Recipe(*(Gemm(Q, Q, accumulate=unit) for unit in UNITS))


def run(function: Callable[..., Tensor], *operands: Tensor, recipe: Recipe = RECIPE) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in operands]
    with simulate(nn.Identity(), recipe) as sim:
        out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, gradient(out))
    assert not sim.audit().escaped
    return out.detach(), *grads


def gradient(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(6))


def explicit(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [.., M, K] · w [.., K, N] and its gradients."""
    fprop, dgrad, wgrad = (unit.matmul for unit in UNITS)
    x_q, w_q = Q.quantize(x, -1), Q.quantize(w, -2)
    out = fprop(x_q, w_q)
    g = gradient(out)
    dx = dgrad(Q.quantize(g, -1), Q.quantize(w_q, -1).mT)
    dw = wgrad(Q.quantize(x_q, -2).mT, Q.quantize(g, -2))
    return out, dx, dw


def test_matmul_and_its_gradients() -> None:
    x, w = tensors((2, 9, 40), (2, 40, 33))
    for got, expected in zip(run(torch.matmul, x, w), explicit(x, w), strict=True):
        assert torch.equal(got, expected)


def test_linear_and_its_gradients() -> None:
    x, w = tensors((9, 40), (33, 40))
    out, dx, dw = explicit(x, w.T)
    for got, expected in zip(run(F.linear, x, w), (out, dx, dw.T), strict=True):
        assert torch.equal(got, expected)


def test_convolution_and_its_gradients() -> None:
    x, w = tensors((2, 3, 8, 8), (5, 3, 3, 3))
    out, dx, dw = run(F.conv2d, x, w)
    rows = F.unfold(x, 3).mT.reshape(-1, 27)  # [B * L, C * 9]
    fprop, dgrad, wgrad = (unit.matmul for unit in UNITS)
    rows_q, w_q = Q.quantize(rows, -1), Q.quantize(w.view(5, 27), -1)
    assert torch.equal(out, fprop(rows_q, w_q.T).view(2, 36, 5).mT.reshape(2, 5, 6, 6))
    g = gradient(out).view(2, 5, 36).mT.reshape(-1, 5)
    d_rows = dgrad(Q.quantize(g, -1), Q.quantize(w_q, 0))
    assert torch.equal(dx, F.fold(d_rows.view(2, 36, 27).mT, (8, 8), 3))
    assert torch.equal(dw, wgrad(Q.quantize(rows_q, 0).T, Q.quantize(g, 0)).T.reshape(5, 3, 3, 3))


def test_einsum_and_attention_use_the_unit() -> None:
    unit = UNITS[0]
    recipe = Recipe(Gemm(accumulate=unit), Gemm(accumulate=unit), Gemm(accumulate=unit))
    q, k, v = tensors((2, 5, 8), (2, 7, 8), (2, 7, 8))
    assert torch.equal(
        run(lambda a, b: torch.einsum("bqd,bkd->bqk", a, b), q, k, recipe=recipe)[0], unit.matmul(q, k.mT)
    )
    out, _, _, dv = run(F.scaled_dot_product_attention, q, k, v, recipe=recipe)
    weights = torch.softmax(unit.matmul(q, k.mT) * (1 / math.sqrt(8)), -1)
    assert torch.equal(out, unit.matmul(weights, v))
    assert torch.equal(dv, unit.matmul(weights.mT, gradient(out)))


def test_an_accumulator_gets_its_operands_in_the_order_of_the_gemm() -> None:
    """The formats of a tensor core's operands hold for gradients of transposed weights too."""
    e4m3, e5m2 = Quantizer(formats.float8_e4m3fn), Quantizer(formats.float8_e5m2)
    recipe = Recipe(
        Gemm(e4m3, e4m3, accumulators.HOPPER_FP8),
        Gemm(e5m2, e4m3, accumulators.HOPPER_FP8_E5M2_E4M3),
        Gemm(e4m3, e5m2, accumulators.HOPPER_FP8_E4M3_E5M2),
    )
    x, w = tensors((9, 40), (33, 40))
    x, w = x / 8, w / 32  # with subnormal numbers
    out, dx, dw = run(F.linear, x, w, recipe=recipe)
    g = e5m2.quantize(gradient(out))
    x_q, w_q = e4m3.quantize(x), e4m3.quantize(w)
    assert torch.equal(out, accumulators.HOPPER_FP8.matmul(x_q, w_q.T))
    assert torch.equal(dx, accumulators.HOPPER_FP8_E5M2_E4M3.matmul(g, w_q))
    assert torch.equal(dw, accumulators.HOPPER_FP8_E4M3_E5M2.matmul(x_q.T, g).T)
    with pytest.raises(ValueError, match="lhs has values that are not in float8_e4m3fn"):
        run(F.linear, x, w, recipe=Recipe(Gemm(None, e4m3, accumulators.HOPPER_FP8)))


# ---------------------------------------------------------------------------------------------- as a value


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
