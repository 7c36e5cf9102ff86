"""The cost model against figures computed by hand from its published energies and its counts of cells."""

from __future__ import annotations

import math

import pytest

from lpsim import FixedFormat, formats
from lpsim.formats import cost

INT8, INT32 = FixedFormat("int8", 8, 0), FixedFormat("int32", 32, 0)


@pytest.mark.parametrize(
    ("fmt", "accumulator", "pj"),
    [
        (formats.float32, formats.float32, 3.7 + 0.9),
        (formats.float16, formats.float16, 1.1 + 0.4),
        (formats.float16, formats.float32, 1.1 + 0.9),
        (INT8, INT32, 0.2 + 0.1),
        # MXFP8 E4M3: 4 bits of significand, and an 8-bit addition of exponents for each operand's 32 elements
        (formats.mxfp8_e4m3, formats.float32, 3.7 * (4 / 24) ** (math.log(3.7 / 1.1) / math.log(24 / 11)) + 0.901875),
        # MX9: integers of 7 bits, 8 bits of exponent for 16 elements, 1 bit for 2; a table's two points 2 octaves apart
        (
            formats.mx9,
            formats.float32,
            0.2 * (7 / 8) ** (math.log2(15.5) / 2)
            + 0.9
            + 2 * 0.03 / 16
            + 2 * 0.03 * 8 ** -(math.log2(0.1 / 0.03) / 2) / 2,
        ),
    ],
)
def test_energy_at_the_published_points_and_below(fmt: formats.Format, accumulator: formats.Element, pj: float) -> None:
    assert cost.mac_energy_pj(fmt, accumulator=accumulator) == pytest.approx(pj, rel=1e-12)
    assert cost.mac_energy(fmt, accumulator=accumulator) == pytest.approx(pj / 4.6, rel=1e-12)


@pytest.mark.parametrize(
    ("fmt", "accumulator", "cells"),
    [
        # multiplier, exponents, aligner of w = 24, tree, (24·5 + 24)/64
        (formats.float32, formats.float32, 24 * 24 + 16 + 24 * 5 + 24 + 6 + 2.25),
        (INT8, INT32, 8 * 8 + 16 + 6 + 0.5),
        # w = min(24, 4 + 3 + 3) = 10, ⌈log2 10⌉ = 4; 8 bits of scale for 32 elements of each operand
        (formats.mxfp4_e2m1, formats.float32, 2 * 2 + 4 + 10 * 4 + 10 + 6 + 2.25 + 2 * 8 / 32),
        # the same elements; a scale of 4 significant bits times 10, for 16 elements
        (formats.nvfp4, formats.float32, 2 * 2 + 4 + 10 * 4 + 10 + 6 + 2.25 + 2 * 4 * 10 / 16),
        # 7 bits of magnitude, no exponents; w = 7 + 7 + 1 + 1; a bit's adder and shifter for 2 elements of each operand
        (formats.mx9, formats.float32, 7 * 7 + 16 + 6 + 2.25 + 2 * 8 / 16 + 2 * (1 + 16) / 2),
    ],
)
def test_area_by_hand(fmt: formats.Format, accumulator: formats.Element, cells: float) -> None:
    assert cost.mac_cells(fmt, accumulator=accumulator) == cells
    assert cost.mac_area(fmt, accumulator=accumulator) == cells / 744.25


def test_both_are_symmetric_in_the_operands() -> None:
    pair = formats.mxfp4_e2m1, formats.bfloat16
    assert cost.mac_cells(*pair) == pytest.approx(cost.mac_cells(*reversed(pair)))
    assert cost.mac_energy(*pair) == pytest.approx(cost.mac_energy(*reversed(pair)))


def test_bytes_of_a_step_by_hand() -> None:
    moved = cost.step_bytes(1000, 320, formats.mxfp4_e2m1, states=1)  # 4.25 bits an element
    assert moved == cost.StepBytes(
        weights=3 * 1000 * 4.25 / 8,
        activations=3 * 320 * 4.25 / 8,
        gradients=3 * 320 * 4 + 2 * 1000 * 4,
        optimizer=4 * 1000 * 4,
    )
    plain = cost.step_bytes(1000, 320, formats.float32)
    assert plain.total == 4 * (3 * 1000 + 3 * 320 + 3 * 320 + 2 * 1000 + 6 * 1000)
    with pytest.raises(ValueError, match="must not be negative"):
        cost.step_bytes(-1, 0, formats.float32)


def test_every_format_has_a_cost() -> None:
    for fmt in formats.ALL_FORMATS.values():
        assert 0 < cost.mac_area(fmt) < math.inf and 0 < cost.mac_energy(fmt) < math.inf


@pytest.mark.parametrize(
    "call",
    [
        lambda: cost.mac_area("mxfp4_e2m1"),
        lambda: cost.mac_energy(formats.nvfp4, "mxfp4_e2m1"),
        lambda: cost.mac_cells(formats.nvfp4, accumulator="mxfp4_e2m1"),
        lambda: cost.step_bytes(1, 1, "mxfp4_e2m1"),
        lambda: cost.step_bytes(1, 1, formats.nvfp4, state="mxfp4_e2m1"),
    ],
)
def test_a_name_is_no_format(call) -> None:
    with pytest.raises(TypeError, match=r"did you mean lpsim\.formats\.get\('mxfp4_e2m1'\)"):
        call()


def test_an_accumulator_has_no_blocks() -> None:
    with pytest.raises(TypeError, match="must be a format without blocks, got BlockFormat"):
        cost.mac_area(formats.nvfp4, accumulator=formats.nvfp4)
