"""The oracle against independent implementations and against the definitions."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lpsim import Key, Overflow, Quantizer, Rounding, ScaleRule, formats
from lpsim.formats import BlockFormat, reference
from tests.formats.test_formats import ML_DTYPES, ml_dtype
from tests.laws import (
    ODD_ONES,
    SCALAR,
    assert_idempotent,
    assert_monotone,
    assert_nearest,
    assert_neighbours,
    assert_same_bits,
    critical_inputs,
)

SMALL = [f for f in SCALAR + ODD_ONES if f.bits <= 8]
DETERMINISTIC = [r for r in Rounding if r is not Rounding.STOCHASTIC]


@pytest.mark.parametrize("name", [n for n in ML_DTYPES if n != "float8_e8m0fnu"])
def test_ties_to_even_equals_ml_dtypes(name: str) -> None:
    """Every value, midpoint and neighbour. ml_dtypes overflows to Inf or NaN where a type has them, else saturates."""
    fmt = formats.get(name)
    x = critical_inputs(fmt)
    overflow = Overflow.SPECIAL if fmt.has_inf or fmt.has_nan else Overflow.SATURATE
    x = x if fmt.has_nan else x[~np.isnan(x)]  # a type without NaN cannot keep it; a float32 tensor can
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(ml_dtype(name)).astype(np.float32)
    assert_same_bits(reference.quantize(x, fmt, overflow=overflow), expected, name)
    kernel = Quantizer(fmt, overflow=overflow, backend="numba")
    assert_same_bits(kernel(torch.from_numpy(x)).numpy(), expected, f"{name}, numba")


def test_e8m0_equals_torch_but_for_ties() -> None:
    """torch and ml_dtypes round ties of E8M0 up; here, as in IEEE P3109 and gfloat, they go to the even code."""
    x = critical_inputs(formats.float8_e8m0fnu)
    x = x[(x >= 2.0**-126) & (x <= 2.0**127)]  # torch's conversion of float32 subnormals is not to the nearest
    expected = torch.from_numpy(x).to(torch.float8_e8m0fnu).float().numpy()
    tie = np.frexp(x)[0] == 0.75
    even = np.frexp(x)[1] % 2 == 0  # the lower neighbour 2^(e - 1) has the code e + 126
    assert_same_bits(reference.quantize(x, formats.float8_e8m0fnu), np.where(tie & even, x / np.float32(1.5), expected))


@pytest.mark.parametrize("fmt", SMALL, ids=lambda f: f.name)
@pytest.mark.parametrize("rounding", DETERMINISTIC, ids=lambda r: r.value)
def test_laws_of_rounding(fmt, rounding: Rounding) -> None:
    x = critical_inputs(fmt)
    y = reference.quantize(x, fmt, rounding=rounding)
    assert_neighbours(fmt, x, y)
    assert_idempotent(lambda v: reference.quantize(v, fmt, rounding=rounding), x)
    assert_monotone(lambda v: reference.quantize(v, fmt, rounding=rounding), x)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    if rounding in (Rounding.TIES_TO_EVEN, Rounding.TIES_TO_AWAY):
        assert_nearest(fmt, x, y)


@pytest.mark.parametrize("fmt", [f for f in SMALL if f.has_negative_zero], ids=lambda f: f.name)
def test_symmetric_roundings_are_odd(fmt) -> None:
    x = critical_inputs(fmt)
    for rounding in (Rounding.TIES_TO_EVEN, Rounding.TIES_TO_AWAY, Rounding.TOWARD_ZERO, Rounding.TO_ODD):
        assert_same_bits(reference.quantize(-x, fmt, rounding=rounding), -reference.quantize(x, fmt, rounding=rounding))


@pytest.mark.parametrize(
    "fmt",
    [f for f in SMALL if isinstance(f, formats.FloatFormat) and f.subnormals and f.signed and f.mantissa_bits],
    ids=lambda f: f.name,
)
def test_round_to_odd_makes_a_later_rounding_correct(fmt) -> None:
    """x -> a format with two more bits, to odd -> fmt, nearest: equals x -> fmt, nearest (Boldo and Melquiond 2008)."""
    bias = fmt.bias + 2 ** (fmt.exponent_bits - 1)
    wider = formats.FloatFormat("wider", fmt.exponent_bits + 1, fmt.mantissa_bits + 2, bias=bias)
    x = critical_inputs(fmt)
    x = x[np.abs(x) <= fmt.max]
    through = reference.quantize(reference.quantize(x, wider, rounding=Rounding.TO_ODD), fmt)
    assert_same_bits(through, reference.quantize(x, fmt))


def test_philox_known_answers() -> None:
    """The published vectors of Philox4x32-10 and -7 (Random123, kat_vectors)."""
    ones = 0xFFFFFFFF
    assert reference.philox4x32((0, 0, 0, 0), (0, 0), 10) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert reference.philox4x32((ones,) * 4, (ones,) * 2, 10) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    assert reference.philox4x32((0, 0, 0, 0), (0, 0), 7) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)


def test_stochastic_rounding_takes_the_upper_neighbour_for_exactly_its_share_of_words() -> None:
    """Over all k-bit words, x goes up for floor(r 2^k) of the 2^k: the definition, counted."""
    fmt = formats.float6_e3m2fn
    for x in (1.3, -5.1, 0.07, 0.01, 27.9):
        lo = abs(reference.round_value(x, fmt, Rounding.TOWARD_ZERO))
        hi = next(v for v in reference.values(fmt) if v > lo)
        share = (Fraction(abs(x)) - Fraction(lo)) / (Fraction(hi) - Fraction(lo))
        for k in (1, 3, 8):
            rounded = [
                abs(reference.round_value(x, fmt, Rounding.STOCHASTIC, word=r << (32 - k), random_bits=k))
                for r in range(2**k)
            ]
            assert set(rounded) <= {lo, hi}
            assert rounded.count(hi) == math.floor(share * 2**k)


def test_a_word_depends_on_seed_stream_step_and_place_alone() -> None:
    words = [reference.random_word(Key(1, 2, 3), i) for i in range(300)]
    assert words[40:] == [reference.random_word(Key(1, 2, 3, offset=40), i) for i in range(260)]
    others = [Key(2, 2, 3), Key(1, 3, 3), Key(1, 2, 4), Key(1 + 2**32, 2, 3)]
    for other in others:  # 300 equal words by chance: 2^-9600
        assert [reference.random_word(other, i) for i in range(300)] != words


@pytest.mark.parametrize(
    "rule", [ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.RCEIL, ScaleRule.EVEN], ids=lambda r: r.value
)
@pytest.mark.parametrize("element", [f for f in SMALL if f.max >= 1], ids=lambda f: f.name)
def test_scale_rules_equal_their_formulas(rule: ScaleRule, element) -> None:
    """The formulas of ScaleRule in rational arithmetic, around every power of two and around multiples of max."""

    def floor_log2(v: Fraction) -> int:
        e = v.numerator.bit_length() - v.denominator.bit_length()
        return e if Fraction(2) ** e <= v else e - 1

    def ceil_log2(v: Fraction) -> int:
        return floor_log2(v) + (Fraction(2) ** floor_log2(v) != v)

    fmt = BlockFormat("b", element, formats.float8_e8m0fnu, scale_rule=rule)
    powers = np.ldexp(1.0, np.arange(-149, 128)).astype(np.float32)
    with np.errstate(over="ignore"):
        points = np.concatenate([powers, powers * np.float32(element.max), powers * np.float32(1.9375)])
    points = points[np.isfinite(points) & (points > 0)]
    points = np.concatenate([points, np.nextafter(points, np.float32(0)), np.nextafter(points, np.float32(3e38))])
    emax = floor_log2(Fraction(element.max))
    assert emax == element.emax
    for amax in map(float, points[points > 0]):
        exact = Fraction(amax)
        if rule is ScaleRule.FLOOR:
            e = floor_log2(exact) - emax
        elif rule is ScaleRule.CEIL:
            e = ceil_log2(exact) - emax
        elif rule is ScaleRule.RCEIL:
            e = ceil_log2(exact / Fraction(element.max))
        else:
            step = Fraction(2) ** (floor_log2(exact) - element.mantissa_bits)
            e = floor_log2(math.floor(exact / step + Fraction(1, 2)) * step) - emax
        assert reference.block_scale(amax, fmt) == 2.0 ** min(max(e, -127), 127), amax


@pytest.mark.parametrize("fmt", [formats.FixedFormat("twos", 5, -1), formats.FloatFormat("fours", 2, 2, bias=-3)])
def test_what_is_far_below_a_step_is_not_zero(fmt: formats.FixedFormat | formats.FloatFormat) -> None:
    """Also where the step is so much above 1 that a subnormal number, divided by it, would be 0."""
    smallest = 2.0 if fmt.name == "twos" else 4.0
    for x in (5e-324, 2.0**-1022, 2.0**-149):
        assert reference.round_value(x, fmt, Rounding.TOWARD_POSITIVE) == smallest
        assert reference.round_value(x, fmt, Rounding.TIES_TO_EVEN) == 0
        assert Quantizer(fmt, Rounding.TOWARD_POSITIVE)(torch.tensor(x, dtype=torch.float64)).item() == smallest
