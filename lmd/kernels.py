"""The fused CPU backend: lmd/plain.py's sample, step and finite for contiguous float32 tensors, compiled by Numba.

One call serves all tensors of a group: it takes a table of their addresses, cuts them into tiles of at most TILE
elements and shares the tiles out to threads. Every operation is one IEEE float32 operation in a fixed order (fused
multiply-adds are written as such, nothing is reassociated, no libm is called), so tiles, threads and vector width
change no bit of the result. Against lmd/update.py, whose functions are torch's, it differs by some units in the last
place: tests/test_lmd_kernels.py states how many.

The step is update.py's without asinh and sinh. With x = mean / (2 center exp(sigma^2 / 2)) and S = sqrt(x^2 + 1),
(x, S) = (sinh a, cosh a), exp(+-a) = S +- x, and a -> a - y is the hyperbolic rotation x cosh y - S sinh y.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch  # before numba: a Numba thread pool started first would share its OpenMP runtime with torch
from numba import njit
from torch import Tensor

from lmd.elementary import (
    SIGN,
    direction,
    exp,
    exp2,
    fma,
    from_bits,
    inlined,
    load,
    log,
    rotate,
    sqrt,
    store,
    to_bits,
    use_wide_vectors,
)
from lmd.plain import Weight
from lmd.priors import PRIORS
from lmd.random import MASK, MULTIPLIERS, ROUNDS, WEYL

TILE = 2048  # elements; a tile's scratch (a word and two factors each) stays in the first-level cache
SERIAL = 1 << 17  # elements; below, starting a thread costs more than it gives

f32, i32, u32, u64 = np.float32, np.int32, np.uint32, np.uint64
compiled: Any = njit(nogil=True, cache=True)

# --- noise ---


@inlined
def philox_round(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """One round on 64-bit lanes; the upper halves of the outputs are not cleared and not read."""
    p0 = (c0 & u64(MASK)) * u64(MULTIPLIERS[0])
    p1 = (c2 & u64(MASK)) * u64(MULTIPLIERS[1])
    return (p1 >> u64(32)) ^ c1 ^ k0, p1, (p0 >> u64(32)) ^ c3 ^ k1, p0


@inlined
def fill_words(words: Any, first: Any, count: Any, key: Any) -> Any:
    """lmd/random.py's words of the elements first .. first + count - 1, first a multiple of 4; up to 3 more are
    written.
    """
    k0, k1, parameter, step, draw = key
    w0, w1 = u64(WEYL[0]), u64(WEYL[1])
    for j in range((count + 3) // 4):
        c0, c1, c2, c3 = philox_round(u64(first // 4 + j), draw, step, parameter, k0, k1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + w0, k1 + w1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + u64(2) * w0, k1 + u64(2) * w1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + u64(3) * w0, k1 + u64(3) * w1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + u64(4) * w0, k1 + u64(4) * w1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + u64(5) * w0, k1 + u64(5) * w1)
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0 + u64(6) * w0, k1 + u64(6) * w1)
        words[4 * j] = u32(c0)
        words[4 * j + 1] = u32(c1)
        words[4 * j + 2] = u32(c2)
        words[4 * j + 3] = u32(c3)


assert ROUNDS == 7  # written out above: LLVM does not unroll the loop before it vectorizes


@inlined
def noise_factors(word: Any, variance: Any) -> Any:
    """(exp(sigma eps+), exp(sigma eps-)) by lmd/random.py's box_muller; variance = -2 (sigma log2 e)^2.

    The angle is taken about pi / 4: cos = c - s and sin = c + s with c, s = (cos, sin)(t pi / 2) / sqrt 2, |t| < 1/2.
    """
    uniform = fma(f32(i32(word & u32(0xFFFF))), f32(2.0**-16), f32(2.0**-17))
    radius = sqrt(variance * log(uniform))
    t = fma(f32(i32((word >> u32(16)) & u32(0x3FFF))), f32(2.0**-14), f32(2.0**-15 - 0.5))
    z = t * t
    s = fma(fma(f32(0.05491914227604866), z, f32(-0.4565873146057129)), z, f32(1.1107151508331299)) * t
    c = fma(fma(f32(-0.014430884271860123), z, f32(0.1793213188648224)), z, f32(-0.8723555207252502))
    c = fma(c, z, f32(0.7071067690849304))
    plus = from_bits(to_bits(radius * (c - s)) | i32(word & u32(0x80000000)))
    minus = from_bits(to_bits(radius * (c + s)) | i32((word << u32(1)) & u32(0x80000000)))
    return exp2(plus), exp2(minus)


@inlined
def fill_factors(plus: Any, minus: Any, words: Any, first: Any, count: Any, key: Any, variance: Any) -> Any:
    fill_words(words, first, count, key)
    for i in range(count):
        plus[i], minus[i] = noise_factors(words[i], variance)


# --- the kernels: rows of `table` are tensors, their tiles are numbered through, each call does tiles first .. last - 1 ---

COLUMNS = ("first_tile", "count", "number", "mean", "gradient", "out", "v", "v_plus", "v_minus", "log_center")
FIRST_TILE, COUNT, NUMBER, MEAN, GRADIENT, OUT, V, V_PLUS, V_MINUS, LOG_CENTER = range(len(COLUMNS))


@inlined
def momenta(v: Any, g: Any, betas: Any) -> Any:
    """(u, v'); betas = (beta1, 1 - beta1, beta2, 1 - beta2)."""
    return fma(betas[0], v, betas[1] * g), fma(betas[2], v, betas[3] * g)


@inlined
def half_log_ratio(x: Any, s: Any) -> Any:
    """a = asinh x."""
    return from_bits(to_bits(log(abs(x) + s)) | (to_bits(x) & SIGN))


@compiled
def sample_tiles(table: Any, m0s: Any, scales: Any, first: Any, last: Any, key: Any, variance: Any) -> Any:
    """out = center (S (p - q) + x (p + q)), p and q the noise factors: theta+ - theta-."""
    use_wide_vectors()
    words = np.empty(TILE, np.uint32)
    plus = np.empty(TILE, np.float32)
    minus = np.empty(TILE, np.float32)
    k0, k1, step, draw = key
    row = 0
    for tile in range(first, last):
        while row + 1 < len(table) and tile >= table[row + 1, FIRST_TILE]:
            row += 1
        begin = (tile - table[row, FIRST_TILE]) * TILE
        count = min(TILE, table[row, COUNT] - begin)
        fill_factors(plus, minus, words, begin, count, (k0, k1, u64(table[row, NUMBER]), step, draw), variance)
        mean, out = table[row, MEAN] + 4 * begin, table[row, OUT] + 4 * begin
        m0, inverse = m0s[row], f32(1.0) / scales[row]
        if table[row, LOG_CENTER] == 0:
            for i in range(count):
                x = load(mean, i) * inverse
                s = sqrt(fma(x, x, f32(1.0)))
                store(out, i, m0 * fma(s, plus[i] - minus[i], x * (plus[i] + minus[i])))
        else:
            log_center = table[row, LOG_CENTER] + 4 * begin
            for i in range(count):
                c = load(log_center, i)
                x = load(mean, i) * (inverse * exp(-c))
                s = sqrt(fma(x, x, f32(1.0)))
                store(out, i, m0 * exp(c) * fma(s, plus[i] - minus[i], x * (plus[i] + minus[i])))


@compiled
def step_shared_tiles(
    table: Any,
    m0s: Any,
    scales: Any,
    first: Any,
    last: Any,
    key: Any,
    variance: Any,
    expectation: Any,
    lr: Any,
    decay: Any,
    betas: Any,
) -> Any:
    """update.step_shared; decay = lr weight_decay prior.linear, variance 0 stands for gradients at the mean."""
    use_wide_vectors()
    words = np.empty(TILE, np.uint32)
    plus = np.full(TILE, expectation)
    minus = np.full(TILE, expectation)
    k0, k1, step, draw = key
    row = 0
    for tile in range(first, last):
        while row + 1 < len(table) and tile >= table[row + 1, FIRST_TILE]:
            row += 1
        begin = (tile - table[row, FIRST_TILE]) * TILE
        count = min(TILE, table[row, COUNT] - begin)
        if variance < f32(0.0):
            fill_factors(plus, minus, words, begin, count, (k0, k1, u64(table[row, NUMBER]), step, draw), variance)
        mean, gradient, v = table[row, MEAN] + 4 * begin, table[row, GRADIENT] + 4 * begin, table[row, V] + 4 * begin
        m0, scale = m0s[row], scales[row]
        inverse = f32(1.0) / scale
        for i in range(count):
            x = load(mean, i) * inverse
            s = sqrt(fma(x, x, f32(1.0)))
            g = load(gradient, i) * (m0 * fma(s, plus[i] + minus[i], x * (plus[i] - minus[i])))
            u, kept = momenta(load(v, i), g, betas)
            store(v, i, kept)
            store(mean, i, scale * rotate(x, s, fma(decay, half_log_ratio(x, s), direction(u, lr))))


@compiled
def step_split_tiles(
    table: Any,
    m0s: Any,
    scales: Any,
    first: Any,
    last: Any,
    key: Any,
    variance: Any,
    expectation: Any,
    lr: Any,
    lr_decay: Any,
    betas: Any,
    prior: Any,
) -> Any:
    """update.step_split; prior = (linear, power, power^2 sigma^2 / 2, offset)."""
    use_wide_vectors()
    words = np.empty(TILE, np.uint32)
    plus = np.full(TILE, expectation)
    minus = np.full(TILE, expectation)
    k0, k1, step, draw = key
    row = 0
    for tile in range(first, last):
        while row + 1 < len(table) and tile >= table[row + 1, FIRST_TILE]:
            row += 1
        begin = (tile - table[row, FIRST_TILE]) * TILE
        count = min(TILE, table[row, COUNT] - begin)
        if variance < f32(0.0):
            fill_factors(plus, minus, words, begin, count, (k0, k1, u64(table[row, NUMBER]), step, draw), variance)
        mean, gradient = table[row, MEAN] + 4 * begin, table[row, GRADIENT] + 4 * begin
        v_plus, v_minus = table[row, V_PLUS] + 4 * begin, table[row, V_MINUS] + 4 * begin
        log_center = table[row, LOG_CENTER] + 4 * begin
        m0, scale = m0s[row], scales[row]
        inverse = f32(1.0) / scale
        for i in range(count):
            c = load(log_center, i)
            x = load(mean, i) * (inverse * exp(-c))
            s = sqrt(fma(x, x, f32(1.0)))
            a = half_log_ratio(x, s)
            large = abs(x) + s  # exp(|a|)
            small = f32(1.0) / large
            g = load(gradient, i) * (m0 * exp(c))
            theta_plus = plus[i] * (small if x < f32(0.0) else large)
            theta_minus = minus[i] * (large if x < f32(0.0) else small)
            u_plus, kept_plus = momenta(load(v_plus, i), g * theta_plus, betas)
            u_minus, kept_minus = momenta(load(v_minus, i), -g * theta_minus, betas)
            up = direction(u_plus, lr) + lr_decay * regularizer(c + a, prior)
            down = direction(u_minus, lr) + lr_decay * regularizer(c - a, prior)
            c = fma(f32(-0.5), up + down, c)
            store(v_plus, i, kept_plus)
            store(v_minus, i, kept_minus)
            store(log_center, i, c)
            store(mean, i, scale * exp(c) * rotate(x, s, f32(0.5) * (up - down)))


@inlined
def regularizer(d: Any, prior: Any) -> Any:
    """Prior.regularizer."""
    linear, power, moment, offset = prior
    value = fma(linear, d, offset)
    return value + exp(fma(power, d, moment)) if power > f32(0.0) else value


@compiled
def finite_tiles(table: Any, first: Any, last: Any) -> Any:
    """Whether all gradients are finite: no exponent is all ones."""
    use_wide_vectors()
    row = 0
    for tile in range(first, last):
        while row + 1 < len(table) and tile >= table[row + 1, FIRST_TILE]:
            row += 1
        begin = (tile - table[row, FIRST_TILE]) * TILE
        gradient = table[row, GRADIENT] + 4 * begin
        largest = i32(0)
        for i in range(min(TILE, table[row, COUNT] - begin)):
            largest = max(largest, i32(to_bits(load(gradient, i)) & i32(0x7FFFFFFF)))
        if largest >= i32(0x7F800000):
            return False
    return True


# --- the backend's functions ---


def sample(group: dict[str, Any], weights: list[Weight], draw: int) -> list[Tensor]:
    """A posterior sample of every weight, in new tensors."""
    outs = [empty_like(weight.mean) for weight in weights]
    table, m0s, scales = _tabulate(group, weights, OUT, outs)
    _over_tiles(sample_tiles, table, m0s, scales, _key(group, draw), _variance(group))
    return outs


def step(group: dict[str, Any], weights: list[Weight], gradients: list[Tensor], at_sample: bool) -> None:
    """One step of every weight, in place; `at_sample` says that the gradients were taken at draw 0 of the present
    step.
    """
    table, m0s, scales = _tabulate(group, weights, GRADIENT, gradients)
    prior, (beta1, beta2), sigma = PRIORS[group["prior"]], group["betas"], group["noise_scale"]
    betas = (f32(beta1), f32(1.0 - beta1), f32(beta2), f32(1.0 - beta2))
    variance = _variance(group) if at_sample else f32(0.0)
    noise = (_key(group, 0), variance, f32(np.exp(0.5 * sigma**2)))
    lr, decay = group["lr"], group["lr"] * group["weight_decay"]
    if group["parameterization"] == "shared":
        _over_tiles(step_shared_tiles, table, m0s, scales, *noise, f32(lr), f32(decay * prior.linear), betas)
    else:
        terms = (prior.linear, prior.power, 0.5 * (prior.power * sigma) ** 2, prior.offset(group["entropy"]))
        _over_tiles(step_split_tiles, table, m0s, scales, *noise, f32(lr), f32(decay), betas, tuple(map(f32, terms)))
    torch.autograd.graph.increment_version([weight.mean for weight in weights])


def finite(gradients: list[Tensor]) -> bool:
    """Whether every element of every tensor is finite."""
    table = np.zeros((len(gradients), len(COLUMNS)), np.int64)
    _place(table, gradients)
    table[:, GRADIENT] = [gradient.data_ptr() for gradient in gradients]
    return all(_over_tiles(finite_tiles, table))


def empty_like(tensor: Tensor) -> Tensor:
    """An uninitialized tensor of the same shape in numpy's memory, which asks the kernel for huge pages.

    The samples are new memory in every step, and for large tensors most of the cost of new memory is page faults.
    """
    return torch.from_numpy(np.empty(tuple(tensor.shape), np.float32))


def _place(table: np.ndarray, tensors: list[Tensor]) -> None:
    """Numbers the tiles of the tensors through."""
    table[:, COUNT] = [tensor.numel() for tensor in tensors]
    table[1:, FIRST_TILE] = np.cumsum(-(-table[:-1, COUNT] // TILE))


def _tabulate(
    group: dict[str, Any], weights: list[Weight], column: int, tensors: list[Tensor]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The table of the weights with `tensors` under `column`; m0 and 2 m0 exp(sigma^2 / 2) of each weight in float32."""
    table = np.zeros((len(weights), len(COLUMNS)), np.int64)
    _place(table, tensors)
    table[:, NUMBER] = [weight.number for weight in weights]
    table[:, MEAN] = [weight.mean.data_ptr() for weight in weights]
    table[:, column] = [tensor.data_ptr() for tensor in tensors]
    names = ("v",) if group["parameterization"] == "shared" else ("v_plus", "v_minus", "log_center")
    for name in names:
        table[:, COLUMNS.index(name)] = [weight.state[name].data_ptr() for weight in weights]
    m0s = np.array([weight.state["m0"] for weight in weights])
    return table, m0s.astype(f32), (2.0 * np.exp(0.5 * group["noise_scale"] ** 2) * m0s).astype(f32)


def _key(group: dict[str, Any], draw: int) -> tuple[np.uint64, ...]:
    return u64(group["seed"] & MASK), u64(group["seed"] >> 32), u64(group["step"]), u64(draw)


def _variance(group: dict[str, Any]) -> np.float32:
    """-2 (sigma log2 e)^2."""
    return f32(-2.0 * (group["noise_scale"] * np.log2(np.e)) ** 2)


def _over_tiles(kernel: Any, table: np.ndarray, *arguments: Any) -> list[Any]:
    """kernel over all tiles, cut into one range for each of torch's threads; its result for each."""
    tiles = int(table[-1, FIRST_TILE] - (-table[-1, COUNT] // TILE))
    threads = torch.get_num_threads() if tiles * TILE > SERIAL else 1
    heads, tail = arguments[:2], arguments[2:]
    ranges = [(tiles * i // threads, tiles * (i + 1) // threads) for i in range(threads)]
    if threads == 1:
        return [kernel(table, *heads, 0, tiles, *tail)]
    others = [_pool(threads - 1).submit(kernel, table, *heads, *r, *tail) for r in ranges[1:]]
    return [kernel(table, *heads, *ranges[0], *tail), *(other.result() for other in others)]


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    """Threads of our own, since starting Numba's would put a second user on torch's OpenMP runtime."""
    return ThreadPoolExecutor(workers, thread_name_prefix="lmd")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has the pool but not its threads
