"""The CPU's fast ways to accumulate: each equals the kernel for any unit, however the product is cut up."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lpsim import Accumulator, Alignment, FloatFormat, Order, Overflow, Quantizer, Rounding, accumulators, formats
from lpsim.accumulators import cpu as accumulator_cpu
from lpsim.accumulators.tiles import BARE, CUT, GUARDED, HALF, NEAR, NONE, ODD, PLAIN, SATURATED, TWO_SUM
from tests.accumulators.units import E4M3, E6M9, E8M13, FORMATS, PRESETS, ROUNDINGS, Q
from tests.laws import assert_same_bits


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


@pytest.mark.parametrize(
    ("fmt", "chunk"), [(E8M13, 32), (formats.bfloat16, 33), (formats.float16, 5), (formats.float32, 2), (E6M9, 1024)]
)
def test_pairwise_tiles_equal_the_kernel_for_anything(fmt: FloatFormat, chunk: int) -> None:
    """Whole trees, ragged ones, such as are one block and such as are many; zeros of both signs."""
    native = accumulator_cpu.vectors()
    for kind in ("normal", "narrow", "zeros", "underflowing", "overflowing", "wild", "infinite"):
        a, b = (x[None] for x in operands(kind))
        if kind == "zeros":
            a, b = a.round() * -0.0, b.abs()
            a[0, ::2, ::7] = 1
        for rounding, has in itertools.product(ROUNDINGS, {native, accumulator_cpu.Vectors(False, False)}):
            unit = Accumulator(fmt, chunk, Order.PAIRWISE, rounding=rounding).unit
            out, expected = torch.empty(1, 53, 70), torch.empty(1, 53, 70)
            accumulator_cpu.matmul(a, b, unit, out, has)
            accumulator_cpu.any_unit(a, b, unit, expected)
            assert_same_bits(out.numpy(), expected.numpy(), f"{unit} {kind}")


def pinned_pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Values of float16, of which products differ as much as their format allows, fill a step, or vanish."""
    generator = torch.Generator().manual_seed(9)
    a, b = torch.randn(53, 300, generator=generator), torch.randn(300, 70, generator=generator)
    spread_a, spread_b = (2.0 ** torch.randint(-24, 16, x.shape, generator=generator) for x in (a, b))
    most = torch.full_like(a, 2 - 2.0**-10), torch.full_like(b, 2 - 2.0**-10)
    signs = torch.where(torch.rand(b.shape, generator=generator) < 0.5, -1.0, 1.0)
    rare = torch.where(torch.rand(a.shape, generator=generator) < 0.02, a, 0.0)
    filling = most[0] * (torch.arange(300) >= 16)
    filling[:, 0] = 1
    lone = torch.zeros_like(a)
    lone[:, 40::50] = 2.0**-24
    return {
        "powers": (spread_a.copysign(a), spread_b.copysign(b)),
        "largest": most,
        "a sum, then the largest": (filling, most[1]),
        "largest, of both signs": (most[0], most[1] * signs),
        "nearly all zero": (rare, b * 2.0**-12),
        "subnormal only": (lone, -(2.0**-24) * (b.abs() > 1)),
        "a huge sum, then small ones": (torch.where(torch.arange(300) < 16, 32768.0, a * 2.0**-8), b.sign() * 2),
        "one magnitude": (a.sign(), b.sign()),
        "negative zeros": (-0.0 * a.abs(), b),
    }


@pytest.mark.parametrize("kind", pinned_pairs())
@pytest.mark.parametrize("bits", [13, 18, 24, 25])
def test_pinned_tiles_equal_the_kernel_for_anything(kind: str, bits: int) -> None:
    """Sums in float32 and in float64, of up to 2^31 quanta and more; either way of coding exponents."""
    a, b = (x.half().float()[None] for x in pinned_pairs()[kind])
    operand = formats.float16
    for chunk, out_format in ((1, formats.float32), (4, E8M13), (16, formats.float32), (64 if bits < 24 else 7, E8M13)):
        alignment = Alignment(bits, operands=(operand, operand))
        unit = Accumulator(out_format, chunk, alignment=alignment, rounding=Rounding.TOWARD_ZERO).unit
        for lhs, rhs in ((a, b), (b.mT, a.mT)):
            out, expected = torch.empty(1, lhs.shape[1], rhs.shape[2]), torch.empty(1, lhs.shape[1], rhs.shape[2])
            accumulator_cpu.matmul(lhs, rhs, unit, out)
            accumulator_cpu.any_unit(lhs, rhs, unit, expected)
            assert_same_bits(out.numpy(), expected.numpy(), f"{unit}")


def test_a_sum_beyond_32_bits_is_noticed() -> None:
    """16 products of nearly 4 and a sum of nearly 2 are more than 2^31 quanta of 2^-25."""
    has, unit = accumulator_cpu.vectors(), accumulators.HOPPER_FP16.unit
    if not has.directed:
        pytest.skip("pinned sums take AVX-512")
    for kind in ("a sum, then the largest", "largest"):
        a, b = (x[None] for x in pinned_pairs()[kind])
        known = accumulator_cpu.facts(a, b)
        plan = accumulator_cpu.choose_pinned(unit, 300, lambda known=known: known, has)
        assert plan is not None and plan.checked
        assert accumulator_cpu._pinned(a, b, unit, torch.empty(1, 53, 70), plan) == (kind == "largest")


def test_when_sums_are_pinned() -> None:
    """The boundaries of what bytes hold: 254 powers of two between exponents; and no wider than zero's exponent."""
    has = accumulator_cpu.vectors()
    if not has.directed:
        pytest.skip("pinned sums take AVX-512")
    generator = torch.Generator().manual_seed(10)
    signs = torch.randn(53, 300, generator=generator).sign(), torch.randn(300, 70, generator=generator).sign()
    unit = Accumulator(formats.float32, 8, alignment=Alignment(20), rounding=Rounding.TOWARD_ZERO).unit
    met = set()
    for low_a, high_a, low_b, high_b in itertools.product((-60, -50, -30, 0), (0, 13, 30), (-56, -40, 0), (0, 26, 40)):
        a = signs[0] * 2.0 ** torch.randint(low_a, high_a + 1, signs[0].shape, generator=generator)
        b = signs[1] * 2.0 ** torch.randint(low_b, high_b + 1, signs[1].shape, generator=generator)
        a, b = (torch.where(torch.rand(x.shape, generator=generator) < 0.1, 0.0, x)[None] for x in (a, b))
        plan = accumulator_cpu.choose_pinned(unit, 300, lambda a=a, b=b: accumulator_cpu.facts(a, b), has)
        met.add(None if plan is None else plan.saturating)
        out, expected = torch.empty(1, 53, 70), torch.empty(1, 53, 70)
        accumulator_cpu.matmul(a, b, unit, out)
        accumulator_cpu.any_unit(a, b, unit, expected)
        assert_same_bits(out.numpy(), expected.numpy(), f"{low_a} {high_a} {low_b} {high_b} {plan}")
    assert met == {None, True, False}


def test_threads_tiles_and_layouts_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(130, 67, generator=generator), torch.randn(67, 190, generator=generator)
    before = torch.get_num_threads()
    for unit in (
        Accumulator(formats.float16),
        Accumulator(E8M13, 16),
        Accumulator(E8M13, 16, Order.PAIRWISE),
        accumulators.HOPPER_BF16,
    ):
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
