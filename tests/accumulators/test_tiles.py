"""The CPU's fast ways to accumulate: each equals the kernel for any unit, however the product is cut up."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lpsim import Accumulator, Alignment, Overflow, Quantizer, Rounding, accumulators, formats
from lpsim.accumulators import cpu as accumulator_cpu
from lpsim.accumulators.tiles import BARE, CUT, GUARDED, HALF, NEAR, NONE, ODD, PLAIN, SATURATED, TWO_SUM
from tests.accumulators.units import E4M3, E8M13, FORMATS, PRESETS, ROUNDINGS, Q
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
