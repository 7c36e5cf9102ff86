"""The inputs that quantizers get wrong: values and midpoints with their neighbours, edges, specials, hostile blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from lpsim.formats import BlockFormat, Codebook, Element, FixedFormat

Array = np.ndarray[Any, Any]

MANY = 1 << 16  # formats of more values are sampled


@dataclass(frozen=True)
class Ladder:
    """The finite values of an element format in ascending order, all of them or neighbouring pairs from everywhere.

    place: consecutive numbers for neighbours. even: whether the code counts as even. complete: whether all are there.
    """

    value: Array
    place: Array
    even: Array
    complete: bool

    def subset(self, count: int) -> Array:
        """At most about `count` values, in runs of two neighbours, the ends and the surroundings of zero included."""
        return self.value[_sample(len(self.value), count, int(np.abs(self.value).argmin()))]


def _sample(size: int, count: int, middle: int) -> Array:
    """Indices below `size`: all, or pairs spread evenly, with 32 more at both ends and around `middle`."""
    if size <= count:
        return np.arange(size)
    spread = np.linspace(0, size - 2, count // 2).astype(np.int64)
    near = np.arange(32)
    chosen = np.concatenate([spread, spread + 1, near, size - 1 - near, middle - 16 + near])
    return np.unique(chosen[(chosen >= 0) & (chosen < size)])


def ladder(fmt: Element) -> Ladder:
    """The values of `fmt`, from its definition alone."""
    if isinstance(fmt, Codebook):
        place = np.arange(len(fmt.values))
        return Ladder(np.array(fmt.sorted_values), place, (place - fmt.origin) % 2 == 0, True)
    if isinstance(fmt, FixedFormat):
        lowest, highest = (int(math.ldexp(v, fmt.frac_bits)) for v in (fmt.min, fmt.max))
        steps = lowest + _sample(highest - lowest + 1, MANY, -lowest)
        return Ladder(
            np.ldexp(steps.astype(np.float64), -fmt.frac_bits), steps, steps % 2 == 0, len(steps) > highest - lowest
        )
    first = fmt._min_normal_code() if not fmt.subnormals else 1
    size = fmt._max_code() - first + 1  # codes of the magnitudes above zero
    code = first + _sample(size, MANY // 2, min(fmt._min_normal_code(), size - 1))
    magnitude = np.array([fmt._magnitude(int(c)) for c in code])
    place, even = code - first + 1, code % 2 == 0
    zero = int(fmt.zero)
    value = np.concatenate([np.zeros(zero), magnitude])
    place, even = np.concatenate([np.zeros(zero, np.int64), place]), np.concatenate([np.ones(zero, bool), even])
    if fmt.signed:
        value = np.concatenate([-magnitude[::-1], value])
        place, even = np.concatenate([-place[:0:-1], place]), np.concatenate([even[:0:-1], even])
    return Ladder(value, place, even, len(code) == size)


def _with_neighbours(points: Array, dtype: Any) -> Array:
    """The points in `dtype`, and the numbers of `dtype` next to each on both sides, of both signs."""
    with np.errstate(over="ignore", under="ignore"):
        points = points.astype(dtype)
        points = np.concatenate([points, -points])
        return np.concatenate([np.nextafter(points, dtype(-np.inf)), points, np.nextafter(points, dtype(np.inf))])


def scalar_inputs(fmt: Element, dtype: Any = np.float32, count: int = 1 << 10) -> Array:
    """Values, midpoints, binade edges, the surroundings of max, with their neighbours; specials; some of any size.

    In float64 also points that a detour through float32 or a few more bits would move onto a midpoint.
    """
    random, limits = np.random.default_rng(0), np.finfo(dtype)
    specials = [0.0, -0.0, np.inf, -np.inf, np.nan, limits.max, -limits.max]
    specials += [limits.tiny, -limits.tiny, limits.smallest_subnormal, -limits.smallest_subnormal]
    with np.errstate(all="ignore"):
        values = ladder(fmt).subset(count)
        middles = (values[:-1] + values[1:]) / 2
        smallest, largest = math.frexp(fmt.min_subnormal)[1], math.frexp(fmt.max)[1]
        edges = np.ldexp(1.0, np.unique(np.linspace(smallest - 4, largest + 3, 96).astype(np.int64)))
        beyond = fmt.max * np.array([1.0 + 2.0**-20, 1.03125, 1.0625, 1.125, 1.5, 2.0, 2.5])
        sizes = fmt.max * np.exp2(random.uniform(math.log2(fmt.min_subnormal / fmt.max) - 3, 1, 128))
        points = [values, middles, edges, beyond, sizes]
        if dtype is np.float64:
            points += [middles * (1 + 2.0**-k) for k in (12, 26, 45)] + [middles * (1 - 2.0**-k) for k in (12, 26, 45)]
        near = _with_neighbours(np.concatenate(points), dtype)
    return np.concatenate([near[np.isfinite(near)], np.array(specials, dtype)])


def any_bits(count: int, seed: int = 0) -> Array:
    """float32 numbers with random bit patterns."""
    return np.random.default_rng(seed).integers(0, 2**32, count, dtype=np.uint32).view(np.float32)


def block_shape(fmt: BlockFormat) -> tuple[int, int]:
    """(rows, columns) of a tensor with several blocks along its axis, the last one short."""
    size = fmt.block_size
    if isinstance(size, tuple):
        down, across = (max(24 // side, 1) * side + max(min(side // 2, 8), 1) for side in size)
        return down, across
    columns = max(64 // size, 2) * size + max(size // 3, 1) if size else 24
    return max(2, min(8, 4096 // columns)), columns


def block_inputs(fmt: BlockFormat, budget: int = 12_000) -> Iterator[Array]:
    """float32 tensors of the shape `block_shape`, about `budget` elements together, of blocks that scales get wrong."""
    rows, columns = block_shape(fmt)
    element = fmt.element
    top = slice(None, None, min(columns, 8))  # where block maxima are put: at least one a block of 8 and more
    random = np.random.default_rng(1)
    critical = scalar_inputs(element, count=256)
    critical = critical[np.isfinite(critical) & (np.abs(critical) <= 2 * element.max)]
    for number in range(min(max(budget // (rows * columns), 4), 64)):
        kind = number % 4
        exponent = random.integers(-60, 60, (rows, 1)).astype(np.float64)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            if kind == 0:  # element by element: its critical inputs, under a block maximum of max
                x = random.choice(critical, (rows, columns)).clip(-element.max, element.max)
                x[:, top] = element.max
                x = np.ldexp(x, exponent.astype(np.int64) // 3)
            elif kind == 1:  # block maxima at, just below and just above powers of two and the element's own edges
                x = random.standard_normal((rows, columns)) / 8
                largest = [1.0, element.max, 2 - 2.0 ** -(element.mantissa_bits + 1)]  # the last: where EVEN rounds up
                largest += [float(np.nextafter(np.float32(v), np.float32(to))) for v in largest for to in (0, 1e9)]
                x[:, top] = random.choice(np.append(largest, np.negative(largest)), (rows, 1))
                x = np.ldexp(x, exponent.astype(np.int64))
            elif kind == 2:  # any magnitudes side by side, subnormals, zeros, the largest number
                x = random.standard_normal((rows, columns)) * np.exp2(random.uniform(-150, 127, (rows, columns)))
                x[random.random(rows) < 0.1] = -0.0
                x[:1] = np.ldexp(random.standard_normal(columns), -140)
                x[-1:, :3] = 3.4028234663852886e38
                x = x.clip(-3.4028234663852886e38, 3.4028234663852886e38)
            else:  # NaN and Inf in some blocks
                x = random.standard_normal((rows, columns)) * np.exp2(exponent / 8)
                x.flat[random.integers(0, x.size, 2)] = random.choice([np.nan, np.inf, -np.inf], 2)
            yield x.astype(np.float32)
