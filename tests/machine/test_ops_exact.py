"""Products in the bfloat16 unit: only of values that are bfloat16, only where no number can be subnormal."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lpsim import BlockFormat, Codebook, FixedFormat, FloatFormat, Quantizer, formats
from lpsim.machine.ops import exact

MX = [f for f in formats.ALL_FORMATS.values() if isinstance(f, BlockFormat) and f.element.bits <= 8]


def elements(fmt: FloatFormat | FixedFormat | Codebook) -> Tensor:
    """Every finite value of a format of at most 8 bits, found by rounding a grid finer than it."""
    if isinstance(fmt, Codebook):
        return torch.tensor(fmt.values, dtype=torch.float64)
    if isinstance(fmt, FixedFormat):
        return torch.arange(-(2 ** (fmt.bits - 1)), 2 ** (fmt.bits - 1), dtype=torch.float64) * fmt.eps
    low, high = math.frexp(fmt.min_subnormal)[1] - 2, fmt.emax + 1
    mantissas = torch.arange(2**fmt.mantissa_bits, 2 ** (fmt.mantissa_bits + 1), dtype=torch.float64)
    grid = torch.cat([mantissas * 2.0 ** (e - fmt.mantissa_bits) for e in range(low, high + 1)])
    return Quantizer(fmt, backend="reference").quantize(torch.cat([-grid, grid])).unique()


def significant(values: Tensor) -> int:
    """The most significant bits that any of the values has."""
    fractions = torch.frexp(values[values != 0]).mantissa
    return next(p for p in range(1, 54) if torch.equal(fractions * 2.0**p, (fractions * 2.0**p).round()))


@pytest.mark.parametrize("fmt", MX, ids=lambda f: f.name)
def test_the_bound_on_significant_bits_holds_for_every_value(fmt: BlockFormat) -> None:
    values = elements(fmt.element)
    bound = exact.significant_bits(fmt)
    if fmt.scale.bits > 8:
        assert bound is not None and bound > 8  # wide scales: more than bfloat16 holds
        return
    if fmt.scale.mantissa_bits:
        scales = elements(fmt.scale)
        values = torch.outer(values, scales[scales > 0]).flatten()
    if fmt.tensor_scale is not None:
        assert bound is None and exact.bits_of_product(fmt, fmt) is None
        return
    assert bound is not None and significant(values) <= bound
    if bound <= 8:
        in_range = values[values.abs() >= 2.0**-126]
        assert torch.equal(in_range, in_range.to(torch.bfloat16).to(torch.float64))
        assert exact.bits_of_product(fmt, fmt) == 2 * (bound - 1)


def test_formats_that_are_not_bfloat16_are_left_to_float32() -> None:
    wide = formats.get("float16")
    assert exact.bits_of_product(wide, wide) is None
    assert exact.bits_of_product(formats.get("mxfp4_e2m1"), wide) is None
    assert exact.significant_bits(Codebook("thirds", (0.0, 0.34375, 1.0))) == 4  # 11/32
    assert exact.bits_of_product(formats.get("bfloat16"), formats.get("mxint8")) == 13


def unit(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes every product worth the unit, and records the precision each matmul ran with."""
    if not exact.unit_available():
        pytest.skip("this CPU has no bfloat16 unit")
    monkeypatch.setattr(exact, "WORTHWHILE", 0)
    monkeypatch.setattr(exact, "WIDE", 0)
    used: list[str] = []
    matmul = torch.matmul

    def recorded(a: Tensor, b: Tensor) -> Tensor:
        used.append(exact._precision.fp32_precision)
        return matmul(a, b)

    monkeypatch.setattr(torch, "matmul", recorded)
    return used


def test_sums_that_fit_float32_come_out_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers, so that no order of adding rounds: the unit must give the float64 result bit for bit."""
    used = unit(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-127, 128, (70, 300), generator=generator).float()
    b = torch.randint(-127, 128, (300, 90), generator=generator).float() * 2.0**-40
    assert torch.equal(exact.matmul(a, b, 12).double(), a.double() @ b.double())
    batch = torch.stack([a, a.flip(0)])
    assert torch.equal(exact.matmul(batch, b.expand(2, -1, -1), 12).double(), batch.double() @ b.double())
    assert torch.equal(exact.matmul(a, b.T.contiguous().mT, 12).double(), a.double() @ b.double())
    assert set(used[::2]) == {"bf16"} and exact._precision.fp32_precision == "none"


def test_what_could_be_subnormal_goes_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    used = unit(monkeypatch)
    ones = torch.ones(40, 40)
    cases: list[tuple[Tensor, Tensor, int, str]] = [
        (ones * 2.0**-60, ones * 2.0**-60, 6, "bf16"),  # ulps 2^-63: the last bit of a sum is 2^-126
        (ones * 2.0**-60, ones * 2.0**-61, 6, "none"),
        (ones * 2.0**-126, ones, 0, "bf16"),
        (ones * 2.0**-127, ones * 2.0**60, 0, "none"),  # a subnormal operand
        (torch.zeros(40, 40), ones * 2.0**-100, 6, "bf16"),
        (torch.zeros(40, 40), ones * 2.0**-130, 6, "none"),
    ]
    for a, b, bits, expected in cases:
        product = exact.matmul(a, b, bits)
        assert used.pop() == expected
        assert torch.equal(product, a @ b)
        used.clear()


def test_one_tiny_value_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    used = unit(monkeypatch)
    a = torch.ones(33, 65)
    a[17, 63] = -(2.0**-120)
    exact.matmul(a, a.mT * 2.0**-5, 2)
    assert used == ["none"]


def test_nan_and_inf_as_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    unit(monkeypatch)
    a = torch.ones(40, 40)
    a[0, 0], a[1, 1], a[2, 2] = math.nan, math.inf, -math.inf
    b = torch.ones(40, 40)
    b[1, 5] = 0
    torch.testing.assert_close(exact.matmul(a, b, 2), torch.matmul(a, b), equal_nan=True, rtol=0, atol=0)


def test_the_precision_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    unit(monkeypatch)

    def failing(*_: Any) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(torch, "matmul", failing)
    with pytest.raises(MemoryError):
        exact.matmul(torch.ones(8, 8), torch.ones(8, 8), 2)
    assert exact._precision.fp32_precision == "none"
