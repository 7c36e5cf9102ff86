"""Formats compared on tensors: against integrals over the distribution, and against an independent float64 block
format; what is no number is told.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from lpsim import BlockFormat, FixedFormat, formats
from lpsim.compare import compare, pareto_front, product_counts
from lpsim.formats import reference

RNG = np.random.default_rng(0)
NORMAL = torch.from_numpy(RNG.standard_normal((512, 512))).float()


def grid(element: formats.FloatFormat) -> np.ndarray:
    """All finite values, from the definition of its fields."""
    e, m = np.divmod(np.arange(2 ** (element.exponent_bits + element.mantissa_bits)), 2**element.mantissa_bits)
    fraction = m / 2**element.mantissa_bits
    values = np.where(e == 0, fraction * 2.0**element.emin, (1 + fraction) * 2.0 ** (e - element.bias))
    values = values[values <= element.max]
    return np.unique(np.concatenate([-values, values]))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float6_e2m3fn", "float4_e2m1fn"])
def test_qsnr_of_normal_data_is_the_integral_over_the_density(name: str) -> None:
    values = grid(formats.get(name))
    edges = np.concatenate([[-40], (values[1:] + values[:-1]) / 2, [40]])
    noise = sum(
        integrate.quad(lambda x, v=v: (x - v) ** 2 * stats.norm.pdf(x), a, b)[0]
        for v, a, b in zip(values, edges[:-1], edges[1:], strict=True)
    )
    row = compare([formats.get(name)], {"normal": NORMAL}).iloc[0]
    assert row["qsnr_db"] == pytest.approx(-10 * math.log10(noise), abs=0.1)


@pytest.mark.parametrize("name", ["mxfp8_e4m3", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4_e2m1"])
def test_qsnr_of_mx_is_that_of_an_independent_monte_carlo(name: str) -> None:
    """OCP MX v1.0 §6.3 in float64, on other draws: scale 2^(⌊log2 amax⌋ − emax), nearest value, saturated."""
    fmt = formats.get(name)
    assert isinstance(fmt, BlockFormat) and isinstance(fmt.element, formats.FloatFormat)
    values = grid(fmt.element)
    x = np.random.default_rng(1).standard_normal((1 << 13, 32))
    scale = 2.0 ** (np.floor(np.log2(np.abs(x).max(1, keepdims=True))) - fmt.element.emax)
    rounded = values[np.searchsorted((values[1:] + values[:-1]) / 2, x / scale)] * scale
    expected = 10 * math.log10((x**2).sum() / ((rounded - x) ** 2).sum())
    assert compare([fmt], {"normal": NORMAL}).iloc[0]["qsnr_db"] == pytest.approx(expected, abs=0.1)


def test_a_row_is_what_the_oracle_gives() -> None:
    x = torch.tensor([[0.1, -3.0, 0.7, 1e-9], [0.0, 9.0, -100.0, 2.0]])
    row = compare([formats.float4_e2m1fn], {"w": x}).iloc[0]
    q = reference.quantize(x.numpy(), formats.float4_e2m1fn, -1).astype(np.float64)
    a = x.numpy().astype(np.float64)
    assert row["qsnr_db"] == pytest.approx(10 * math.log10((a**2).sum() / ((q - a) ** 2).sum()))
    assert row["largest_relative_error"] == 1.0
    assert (row["clipped"], row["underflowed"], row["bits"], row["flag"]) == (2 / 8, 2 / 8, 4, "")


def test_bits_count_short_blocks_and_the_tensor_s_scale() -> None:
    x = torch.ones(3, 40)  # two blocks of 32, or three of 16, a row
    bits = compare([formats.mxfp4_e2m1, formats.nvfp4], {"w": x})["bits"]
    assert list(bits) == [4 + 6 * 8 / 120, 4 + (9 * 8 + 32) / 120]


def test_microexponents_count_in_bits_and_clipping() -> None:
    """Rows of 37: three blocks of 16 and 19 pairs. A pair below 1 holds up to 127/128, one with a 1 up to 127/64."""
    x = torch.full((2, 37), 0.5)
    x[:, 0] = 1.0
    x[:, 2:5] = torch.tensor([0.995, 0.99, 0.999])
    row = compare([formats.mx9], {"w": x}).iloc[0]
    assert row["bits"] == 8 + (3 * 8 + 19) / 37
    assert row["clipped"] == 2 * 2 / 74  # 0.995 and 0.999; the next blocks have a shared exponent of their own


def test_nothing_lost_is_infinite_and_zeros_are_flagged() -> None:
    rows = compare([formats.float32], {"w": NORMAL, "zero": torch.zeros(4)})
    assert rows.loc[0, "qsnr_db"] == math.inf and rows.loc[0, "flag"] == ""
    assert math.isnan(rows.loc[1, "qsnr_db"]) and rows.loc[1, "flag"] == "all zero"


def test_what_a_format_without_scale_clips_is_flagged_and_in_no_front() -> None:
    frame = compare([FixedFormat("q", 8, 7), formats.mxint8], {"wide": 10 * NORMAL})
    assert frame.loc[0, "flag"].startswith("clips half") and frame.loc[0, "clipped"] > 0.9
    assert list(pareto_front(frame, "bits")["format"]) == ["mxint8"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_tensor_with_nan_or_inf_is_named(bad: float) -> None:
    with pytest.raises(ValueError, match=r"^layer\.weight holds NaN or Inf"):
        compare([formats.mxfp4_e2m1], {"fine": NORMAL, "layer.weight": torch.tensor([1.0, bad])})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f, x: compare([f], x), TypeError, "tensors must be a dict of names to tensors, got Tensor"),
        (lambda f, x: compare([f], {"a": 3}), TypeError, "a: a floating-point tensor is needed, got int"),
        (lambda f, x: compare([f.name], {"a": x}), TypeError, r"formats\.get\('mxfp4_e2m1'\)"),
        (
            lambda f, x: pareto_front(compare([f], {"a": x}), price="cost"),
            ValueError,
            "no column 'cost'; it has format, .*, bits, area, energy, flag",
        ),
    ],
)
def test_mistakes_are_told(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(formats.mxfp4_e2m1, NORMAL)


def test_no_row_of_the_front_is_beaten_and_every_other_is() -> None:
    frame = compare([f for f in formats.ALL_FORMATS.values() if f.bits < 17], {"normal": NORMAL})
    frame = frame[frame["flag"] == ""]
    front = pareto_front(frame, "area")
    for _, row in frame.iterrows():
        at_most = front[front["area"] <= row["area"]]
        assert at_most["qsnr_db"].max() >= row["qsnr_db"]
    assert front["qsnr_db"].is_monotonic_increasing and front["area"].is_monotonic_increasing


def test_what_products_take_is_counted() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    assert product_counts(model, torch.randn(8, 64)) == (64 * 16 + 16 * 4, 8 * 64 + 8 * 16)
