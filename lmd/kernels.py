"""The kernels of the fused CPU backend (lmd/cpu.py), compiled by Numba.

One call serves all tensors of a group: it takes a table of their addresses, cuts them into tiles of at most TILE
elements and shares the tiles out to threads. Every operation is one IEEE float32 operation in a fixed order (fused
multiply-adds are written as such, nothing is reassociated, no libm is called), so tiles, threads and vector width
change no bit of the result. Against lmd/update.py, whose functions are torch's, it differs by some units in the last
place: tests/lmd/test_kernels.py states how many.

The step is update.py's without asinh and sinh. With x = mean / (2 center exp(sigma^2 / 2)) and s = sqrt(x^2 + 1),
(x, s) = (sinh a, cosh a), exp(+-a) = s +- x, and a -> a - y is the hyperbolic rotation x cosh y - s sinh y.
"""

from typing import Any, NamedTuple

import numpy as np
import torch  # noqa: F401  before numba: a Numba thread pool started first would share its OpenMP runtime with torch
from numba import njit

from lmd.elementary import (
    bounded,
    exp,
    exp2,
    fma,
    from_bits,
    inlined,
    load,
    log,
    prefetch,
    rotate,
    sqrt,
    store,
    to_bits,
    use_wide_vectors,
    with_sign,
)
from lmd.random import MASK, MULTIPLIERS, ROUNDS, WEYL

TILE = 2048  # elements whose noise is drawn at once; the two factors of each stay in the first-level cache
BLOCK = 128  # elements between two bursts of prefetching
AHEAD = 512  # elements from a prefetch to its use

f32, i32, u32, u64 = np.float32, np.int32, np.uint32, np.uint64
compiled: Any = njit(nogil=True, cache=True, error_model="numpy")


class Noise(NamedTuple):
    """What the tensors of a group have in common in lmd/random.py's counters and keys, and the scale."""

    seed_low: np.uint64
    seed_high: np.uint64
    step: np.uint64
    draw: np.uint64
    variance: np.float32  # -2 (sigma log2 e)^2; 0 stands for expectations in place of noise
    expectation: np.float32  # exp(sigma^2 / 2)


class Settings(NamedTuple):
    """A group's settings, and its prior's R(d) = linear d + [power > 0] exp(power d + moment) + offset."""

    weight_scaling: bool
    measured: bool  # whether the squares of u are summed
    lr: np.float32
    decay: np.float32  # lr weight_decay
    ratio: np.float32  # beta1 / (1 - beta1): ratio v + G = u / (1 - beta1)
    beta2: np.float32
    rest2: np.float32  # 1 - beta2
    linear: np.float32
    power: np.float32
    moment: np.float32
    offset: np.float32


# A row of the table is a tensor; its tiles are numbered on from those of the row before. The address 0 stands for none.
# `first`: the place of the row's first element in its tensor. `edge`: where a row that is a part of a tile puts its u.
COLUMNS = (
    *("first_tile", "count", "number", "mean", "gradient", "out", "v", "v_plus", "v_minus", "log_center"),
    *("first", "edge"),
)
FIRST_TILE, COUNT, NUMBER, MEAN, GRADIENT, OUT, V, V_PLUS, V_MINUS, LOG_CENTER, FIRST, EDGE = range(len(COLUMNS))


@njit
def tiles(table: Any, column: Any, first: Any, last: Any) -> Any:
    """(row, first element, number of elements) of the tiles first .. last - 1 of rows with an address in `column`."""
    row = 0
    for tile in range(first, last):
        while row + 1 < len(table) and tile >= table[row + 1, FIRST_TILE]:
            row += 1
        if table[row, column] != 0:
            begin = (tile - table[row, FIRST_TILE]) * TILE
            yield row, begin, min(TILE, table[row, COUNT] - begin)


# --- noise ---


@inlined
def philox_round(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """One round on 64-bit lanes; the upper halves of the outputs are not cleared and not read."""
    p0 = (c0 & u64(MASK)) * u64(MULTIPLIERS[0])
    p1 = (c2 & u64(MASK)) * u64(MULTIPLIERS[1])
    return (p1 >> u64(32)) ^ c1 ^ k0, p1, (p0 >> u64(32)) ^ c3 ^ k1, p0


@inlined
def fill_words(words: Any, begin: Any, count: Any, number: Any, noise: Any) -> Any:
    """lmd/random.py's words of `count` elements from `begin`, a multiple of 4, on; up to 3 more are written."""
    use_wide_vectors()
    block, parameter = u64(begin) >> u64(2), u64(number)
    k0, k1, w0, w1 = noise.seed_low, noise.seed_high, u64(WEYL[0]), u64(WEYL[1])
    for j in range((count + 3) // 4):
        c0, c1, c2, c3 = philox_round(block + u64(j), noise.draw, noise.step, parameter, k0, k1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + w0, k1 + w1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + u64(2) * w0, k1 + u64(2) * w1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + u64(3) * w0, k1 + u64(3) * w1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + u64(4) * w0, k1 + u64(4) * w1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + u64(5) * w0, k1 + u64(5) * w1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + u64(6) * w0, k1 + u64(6) * w1)
        store(words, 4 * j, from_bits(i32(c0)))
        store(words, 4 * j + 1, from_bits(i32(c1)))
        store(words, 4 * j + 2, from_bits(i32(c2)))
        store(words, 4 * j + 3, from_bits(i32(c3)))


ONE = i32(0x3F800000)  # the bits of 1.0
assert ROUNDS == 7  # written out above: LLVM vectorizes before it would unroll a loop


@inlined
def noise_factors(word: Any, variance: Any) -> Any:
    """(exp(sigma eps+), exp(sigma eps-)) by lmd/random.py's box_muller.

    Bits of the word become the fraction of a number in [1, 2). The angle is taken about pi / 4: cos = c - s and sin =
    c + s with c, s = (cos, sin)(t pi / 2) / sqrt 2, |t| < 1/2.
    """
    uniform = from_bits(i32((word << i32(7)) & i32(0x7FFF80)) | ONE) - f32(1.0 - 2.0**-17)
    radius = sqrt(variance * log(uniform))
    t = from_bits(i32((word >> i32(7)) & i32(0x7FFE00)) | ONE) - f32(1.5 - 2.0**-15)
    z = t * t
    s = fma(fma(f32(0.05491914227604866), z, f32(-0.4565873146057129)), z, f32(1.1107151508331299)) * t
    c = fma(fma(f32(-0.014430884271860123), z, f32(0.1793213188648224)), z, f32(-0.8723555207252502))
    c = fma(c, z, f32(0.7071067690849304))
    return exp2(with_sign(radius * (c - s), word)), exp2(with_sign(radius * (c + s), i32(word << i32(1))))


@inlined
def fill_noise(plus: Any, minus: Any, begin: Any, count: Any, number: Any, noise: Any) -> Any:
    """exp(sigma eps+) and exp(sigma eps-) of `count` elements from `begin` on, or their expectations."""
    use_wide_vectors()
    if noise.variance < f32(0.0):
        fill_words(minus, begin, count, number, noise)
        for i in range(count):
            p, q = noise_factors(to_bits(load(minus, i)), noise.variance)
            store(plus, i, p)
            store(minus, i, q)
    else:
        for i in range(count):
            store(plus, i, noise.expectation)
            store(minus, i, noise.expectation)


@inlined
def noise_of_tile(scratch: Any, table: Any, row: Any, begin: Any, count: Any, noise: Any) -> Any:
    """The addresses of exp(sigma eps+) and, TILE further on, exp(sigma eps-) of the elements of a tile.

    Words come in fours: a tile that begins within four of them, as the first of a part of a tensor may, skips some.
    """
    plus, minus = scratch.ctypes.data, scratch.ctypes.data + 4 * TILE
    first = table[row, FIRST] + begin
    skipped = first & 3
    fill_noise(plus, minus, first - skipped, count + skipped, table[row, NUMBER], noise)
    return plus + 4 * skipped, minus + 4 * skipped


# --- update.sample ---


@inlined
def sample_shared_block(
    mean: Any, out: Any, plus: Any, minus: Any, count: Any, m0: Any, inverse: Any, sign: Any
) -> Any:
    """theta+ + sign theta- = center ((s + x) p + sign (s - x) q)."""
    use_wide_vectors()
    for i in range(count):
        x = load(mean, i) * inverse
        s = sqrt(fma(x, x, f32(1.0)))
        p, q = load(plus, i), sign * load(minus, i)
        store(out, i, m0 * fma(s, p + q, x * (p - q)))


@compiled
def sample_shared(first: Any, last: Any, scratch: Any, table: Any, scales: Any, noise: Any, sign: Any) -> Any:
    for row, begin, count in tiles(table, OUT, first, last):
        plus, minus = noise_of_tile(scratch, table, row, begin, count, noise)
        m0, inverse = scales[row, 0], f32(1.0) / scales[row, 1]
        for start in range(0, count, BLOCK):
            mean, out = table[row, MEAN] + 4 * (begin + start), table[row, OUT] + 4 * (begin + start)
            for line in range(AHEAD, AHEAD + BLOCK, 16):
                prefetch(mean, line)
                prefetch(out, line)
            here = min(BLOCK, count - start)
            sample_shared_block(mean, out, plus + 4 * start, minus + 4 * start, here, m0, inverse, sign)


@inlined
def sample_split_block(
    mean: Any, log_center: Any, out: Any, plus: Any, minus: Any, count: Any, m0: Any, inverse: Any, sign: Any
) -> Any:
    use_wide_vectors()
    for i in range(count):
        c = load(log_center, i)
        x = load(mean, i) * (inverse * exp(-c))
        s = sqrt(fma(x, x, f32(1.0)))
        p, q = load(plus, i), sign * load(minus, i)
        store(out, i, m0 * exp(c) * fma(s, p + q, x * (p - q)))


@compiled
def sample_split(first: Any, last: Any, scratch: Any, table: Any, scales: Any, noise: Any, sign: Any) -> Any:
    for row, begin, count in tiles(table, OUT, first, last):
        plus, minus = noise_of_tile(scratch, table, row, begin, count, noise)
        m0, inverse = scales[row, 0], f32(1.0) / scales[row, 1]
        offset = 4 * begin
        mean, log_center, out = table[row, MEAN] + offset, table[row, LOG_CENTER] + offset, table[row, OUT] + offset
        sample_split_block(mean, log_center, out, plus, minus, count, m0, inverse, sign)


# --- update.step_shared and update.step_split ---


@inlined
def half_log_ratio(x: Any, s: Any) -> Any:
    """a = asinh x."""
    return with_sign(log(abs(x) + s), to_bits(x))


@inlined
def clear(lanes: Any) -> Any:
    for i in range(BLOCK):
        store(lanes, i, f32(0.0))


@inlined
def add_squares(u: Any, lanes: Any, count: Any) -> Any:
    """Lane i takes the squares of the elements i of every block, so that their order does not depend on vectors."""
    use_wide_vectors()
    for i in range(count):
        store(lanes, i, fma(load(u, i), load(u, i), load(lanes, i)))


@inlined
def sum_of(lanes: Any) -> Any:
    total = 0.0
    for i in range(BLOCK):
        total += np.float64(load(lanes, i))
    return total


@inlined
def copy(source: Any, target: Any, count: Any) -> Any:
    use_wide_vectors()
    for i in range(count):
        store(target, i, load(source, i))


@compiled
def sum_of_squares(us: Any, scratch: Any) -> Any:
    """What a step sums up of a tile: `us` holds its u, in the split parameterization those of both sides, and zeros."""
    lanes = scratch.ctypes.data
    clear(lanes)
    for start in range(0, us.size, BLOCK):
        add_squares(us.ctypes.data + 4 * start, lanes, BLOCK)
    return sum_of(lanes)


@inlined
def step_shared_block(
    mean: Any, gradient: Any, v: Any, factors: Any, count: Any, scales: Any, full: Any, settings: Any
) -> Any:
    """factors: exp(sigma eps+), replaced by u (1 - beta1)^-1 m0^-1, and TILE further on exp(sigma eps-).

    One pointer for both, as LLVM checks a few for overlap only and leaves a loop with more of them scalar.
    """
    use_wide_vectors()
    m0, scale, center = scales[0], scales[1], scales[2]
    inverse = f32(1.0) / scale
    ratio, rest, decay = settings.ratio / m0, settings.rest2 * m0, settings.decay * settings.linear
    for i in range(count):
        x = load(mean, i) * inverse
        s = sqrt(fma(x, x, f32(1.0)))
        p, q = load(factors, i), load(factors, i + TILE)
        g = load(gradient, i) * (fma(s, p + q, x * (p - q)) if settings.weight_scaling else f32(2.0))  # G / m0
        u = fma(ratio, load(v, i), g)
        store(v, i, fma(settings.beta2, load(v, i), rest * g))
        store(factors, i, u)
        y = fma(decay, half_log_ratio(x, s) - center, bounded(u * full, settings.lr))
        store(mean, i, scale * rotate(x, s, y))


@compiled
def step_shared(
    first: Any, last: Any, scratch: Any, table: Any, scales: Any, noise: Any, settings: Any, full: Any, squares: Any
) -> Any:
    """full: lr for each (1 - beta1) m0 in u from which a step has that length, by row. squares: sums, by tile."""
    lanes = scratch.ctypes.data + 8 * TILE
    for row, begin, count in tiles(table, GRADIENT, first, last):
        plus, _ = noise_of_tile(scratch, table, row, begin, count, noise)
        clear(lanes)
        for start in range(0, count, BLOCK):
            offset = 4 * (begin + start)
            mean, gradient, v = table[row, MEAN] + offset, table[row, GRADIENT] + offset, table[row, V] + offset
            for line in range(AHEAD, AHEAD + BLOCK, 16):
                prefetch(mean, line)
                prefetch(gradient, line)
                prefetch(v, line)
            here = min(BLOCK, count - start)
            step_shared_block(mean, gradient, v, plus + 4 * start, here, scales[row], full[row], settings)
            if settings.measured:
                add_squares(plus + 4 * start, lanes, here)
        if table[row, EDGE] != 0:
            copy(plus, table[row, EDGE], count)
        squares[table[row, FIRST_TILE] + begin // TILE] = sum_of(lanes)


@inlined
def regularizer(d: Any, settings: Any) -> Any:
    """Prior.regularizer."""
    value = fma(settings.linear, d, settings.offset)
    return value + exp(fma(settings.power, d, settings.moment)) if settings.power > f32(0.0) else value


@inlined
def split_momentum(
    sign: Any, mean: Any, log_center: Any, gradient: Any, v: Any, factor: Any, count: Any, scales: Any, settings: Any
) -> Any:
    """One side's momentum; `factor`, exp(sigma eps), becomes u / (1 - beta1)."""
    use_wide_vectors()
    m0, inverse = scales[0], f32(1.0) / scales[1]
    for i in range(count):
        c = load(log_center, i)
        x = sign * load(mean, i) * (inverse * exp(-c))
        s = sqrt(fma(x, x, f32(1.0)))
        far = abs(x) + s
        theta = m0 * exp(c) * load(factor, i) * (far if x > f32(0.0) else f32(1.0) / far)
        theta = theta if settings.weight_scaling else m0
        g = sign * load(gradient, i) * theta
        store(factor, i, fma(settings.ratio, load(v, i), g))
        store(v, i, fma(settings.beta2, load(v, i), settings.rest2 * g))


@inlined
def split_step(
    sign: Any, mean: Any, log_center: Any, factor: Any, count: Any, scales: Any, full: Any, settings: Any
) -> Any:
    """`factor`, u / (1 - beta1), becomes what log m of this side goes down by."""
    use_wide_vectors()
    inverse, center = f32(1.0) / scales[1], sign * scales[2]
    for i in range(count):
        c = load(log_center, i)
        x = sign * load(mean, i) * (inverse * exp(-c))
        s = sqrt(fma(x, x, f32(1.0)))
        r = regularizer(c + (half_log_ratio(x, s) - center), settings)
        store(factor, i, fma(settings.decay, r, bounded(load(factor, i) * full, settings.lr)))


@inlined
def split_side(
    sign: Any,
    mean: Any,
    log_center: Any,
    gradient: Any,
    v: Any,
    factor: Any,
    lanes: Any,
    edge: Any,
    count: Any,
    scales: Any,
    full: Any,
    settings: Any,
) -> Any:
    """One side: its momentum, and in place of `factor`, exp(sigma eps), what its log m goes down by."""
    split_momentum(sign, mean, log_center, gradient, v, factor, count, scales, settings)
    if edge != 0:
        copy(factor, edge, count)
    if settings.measured:
        for start in range(0, count, BLOCK):
            add_squares(factor + 4 * start, lanes, min(BLOCK, count - start))
    split_step(sign, mean, log_center, factor, count, scales, full, settings)


@inlined
def split_move(mean: Any, log_center: Any, up: Any, down: Any, count: Any, scale: Any) -> Any:
    """log m+ and log m- go down by `up` and `down`."""
    use_wide_vectors()
    for i in range(count):
        c = load(log_center, i)
        x = load(mean, i) * (exp(-c) / scale)
        s = sqrt(fma(x, x, f32(1.0)))
        c = fma(f32(-0.5), load(up, i) + load(down, i), c)
        store(log_center, i, c)
        y = bounded(f32(0.5) * (load(up, i) - load(down, i)), f32(80.0))
        store(mean, i, scale * exp(c) * rotate(x, s, y))


@compiled
def step_split(
    first: Any, last: Any, scratch: Any, table: Any, scales: Any, noise: Any, settings: Any, full: Any, squares: Any
) -> Any:
    """Some passes a tile: one would have more pointers than LLVM checks for overlap, and stay scalar."""
    lanes = scratch.ctypes.data + 8 * TILE
    for row, begin, count in tiles(table, GRADIENT, first, last):
        plus, minus = noise_of_tile(scratch, table, row, begin, count, noise)
        clear(lanes)
        offset = 4 * begin
        mean, log_center = table[row, MEAN] + offset, table[row, LOG_CENTER] + offset
        gradient, v_plus = table[row, GRADIENT] + offset, table[row, V_PLUS] + offset
        v_minus = table[row, V_MINUS] + offset
        one, numbers, edge = f32(1.0), scales[row], table[row, EDGE]
        other = edge + 4 * TILE if edge != 0 else edge
        split_side(one, mean, log_center, gradient, v_plus, plus, lanes, edge, count, numbers, full[row], settings)
        split_side(-one, mean, log_center, gradient, v_minus, minus, lanes, other, count, numbers, full[row], settings)
        squares[table[row, FIRST_TILE] + begin // TILE] = sum_of(lanes)
        split_move(mean, log_center, plus, minus, count, scales[row, 1])


@compiled
def all_finite(first: Any, last: Any, scratch: Any, table: Any) -> Any:
    """Whether all gradients are finite: no exponent is all ones."""
    use_wide_vectors()
    for row, begin, count in tiles(table, GRADIENT, first, last):
        gradient = table[row, GRADIENT] + 4 * begin
        largest = i32(0)
        for i in range(count):
            largest = max(largest, i32(to_bits(load(gradient, i)) & i32(0x7FFFFFFF)))
        if largest >= i32(0x7F800000):
            return False
    return True
