"""The laws that number formats obey, one helper each; tests name the law they assert."""

from __future__ import annotations

import itertools

import numpy as np

from lpsim import formats
from lpsim.formats import BlockFormat, Codebook, Element, FixedFormat, FloatFormat, Specials, reference

SCALAR = [f for f in formats.ALL_FORMATS.values() if not isinstance(f, BlockFormat)]
BLOCK = [f for f in formats.ALL_FORMATS.values() if isinstance(f, BlockFormat)]

# properties that no named format has
ODD_ONES: list[Element] = [
    FloatFormat("e3m0", 3, 0, specials=Specials.NONE),
    FloatFormat("e2m2_bias3", 2, 2, bias=3, specials=Specials.NONE),
    FloatFormat("e4m3_flushed", 4, 3, subnormals=False),
    FloatFormat("e2m2_of_integers", 2, 2, bias=-3, specials=Specials.NONE),  # steps above 1
    FloatFormat("e3m2_unsigned", 3, 2, signed=False),
    FloatFormat("e1m4", 1, 4, specials=Specials.NONE),
    FixedFormat("q4_3", bits=8, frac_bits=3),
    Codebook("no_zero", (-3.0, -1.0, 2.0, 5.0)),
    Codebook("log_sqrt2", tuple(float(np.float32(s * 2 ** (k / 2))) for s in (-1, 1) for k in range(-8, 9))),
]


def assert_same_bits(actual: np.ndarray, expected: np.ndarray, what: str = "") -> None:
    """Equal values, equal signs of zero, NaN where NaN is expected."""
    same = (actual == expected) & (np.signbit(actual) == np.signbit(expected))
    same |= np.isnan(actual) & np.isnan(expected)
    if not same.all():
        at = tuple(np.argwhere(~same)[0])
        raise AssertionError(
            f"{what}: {(~same).sum()} of {same.size} differ, at {at}: {actual[at]} is not {expected[at]}"
        )
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what


def critical_inputs(fmt: Element, dtype: type = np.float32) -> np.ndarray:
    """Every value, midpoint and neighbour of these in `dtype`, what surrounds max and zero, and the specials."""
    values = np.array(reference.values(fmt))
    with np.errstate(over="ignore"):
        points = np.concatenate([values, (values[:-1] + values[1:]) / 2, [fmt.max * 1.0625, fmt.max * 2]]).astype(dtype)
        points = np.concatenate([points, -points, dtype([0.0, np.finfo(dtype).smallest_subnormal])])
        points = np.concatenate([np.nextafter(points, dtype(-np.inf)), points, np.nextafter(points, dtype(np.inf))])
    specials = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, np.finfo(dtype).max], dtype)
    return np.concatenate([points[np.isfinite(points)], specials])


def hostile_tensors(shape: tuple[int, ...], dtype: type = np.float32) -> list[np.ndarray]:
    """Tensors that quantizers get wrong: any bit pattern, wide ranges, ties, subnormals, zeros, NaN and Inf."""
    random = np.random.default_rng(0)
    normal = random.standard_normal(shape)
    last = (1,) * (len(shape) - 1) + shape[-1:]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        wide = (normal * np.exp(20 * random.standard_normal(shape))).astype(dtype)
        patterns = random.integers(0, 2**32, shape, dtype=np.uint32).view(np.float32).astype(dtype)
        ties = np.ldexp(random.integers(-64, 64, shape) / 4, random.integers(-140, 120, last)).astype(dtype)
        below_powers = np.nextafter(np.ldexp(1.0, random.integers(-120, 120, shape)).astype(dtype), dtype(0))
        tiny = np.ldexp(normal, random.integers(-149, -110, last)).astype(dtype)
        broken = normal.astype(dtype)
        broken[random.random(shape) < 0.01] = np.inf
        broken[random.random(shape) < 0.01] = np.nan
        broken[:1] = -0.0
    return [wide, patterns, ties, below_powers, tiny, broken]


def assert_idempotent(quantize, x: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    once = quantize(x)
    assert_same_bits(quantize(once), once, "idempotence")


def assert_monotone(quantize, x: np.ndarray) -> None:  # type: ignore[no-untyped-def]
    ordered = np.sort(x[np.isfinite(x)])
    result = quantize(ordered)
    result = result[~np.isnan(result)]
    assert (np.diff(result) >= 0).all()


def assert_nearest(fmt: Element, x: np.ndarray, y: np.ndarray) -> None:
    """|y − x| is the least that any value of the format reaches, for finite x within the format's range."""
    values = np.array(reference.values(fmt))
    inside = np.isfinite(x) & (x >= values[0]) & (x <= values[-1])
    x64, y64 = x[inside].astype(np.float64), y[inside].astype(np.float64)
    place = np.clip(np.searchsorted(values, x64), 1, len(values) - 1)
    least = np.minimum(np.abs(x64 - values[place - 1]), np.abs(values[place] - x64))
    np.testing.assert_array_equal(np.abs(y64 - x64), least)


def assert_neighbours(fmt: Element, x: np.ndarray, y: np.ndarray) -> None:
    """y is one of the two values around x (faithful rounding); x itself where it is a value."""
    values = np.array(reference.values(fmt))
    inside = np.isfinite(x) & (x >= values[0]) & (x <= values[-1])
    x64, y64 = x[inside].astype(np.float64), y[inside].astype(np.float64)
    above = np.searchsorted(values, x64)
    below = np.where(values[above] == x64, above, above - 1)
    assert ((y64 == values[above]) | (y64 == values[below])).all()


def pairs(*choices):  # type: ignore[no-untyped-def]
    """All combinations, as pytest parameters."""
    return list(itertools.product(*choices))
