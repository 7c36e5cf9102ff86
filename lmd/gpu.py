"""The fused GPU backend: lmd/plain.py's Plan for contiguous float32 tensors, in Triton, one launch a tensor.

The random words are those of the other backends, bit for bit; the rest is float32 with the device's log, exp, sin and
cos, and differs from lmd/update.py by some units in the last place (tests/lmd/test_gpu.py states how many). The step is
the hyperbolic rotation that lmd/kernels.py explains.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmd import plain
from lmd.priors import PRIORS
from lmd.random import MASK, MULTIPLIERS, ROUNDS, WEYL

BLOCK = 1024  # elements of a program; blocks are those of the whole tensor, of which a part begins at `first`

M0, M1 = tl.constexpr(MULTIPLIERS[0]), tl.constexpr(MULTIPLIERS[1])
W0, W1 = tl.constexpr(WEYL[0]), tl.constexpr(WEYL[1])
PHILOX_ROUNDS = tl.constexpr(ROUNDS)
QUARTER = tl.constexpr(math.pi * 2.0**-15)
KEY = ["k0", "k1", "number", "step", "draw"]  # change from call to call: no kernel is compiled for a value


@triton.jit
def draw_words(first, k0, k1, number, step, draw, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """lmd/random.py's words of the COUNT elements from `first`, a multiple of 4, on."""
    block = first // 4 + tl.arange(0, COUNT // 4)
    c0 = block.to(tl.uint32)
    zero = tl.zeros_like(c0)
    c1, c2, c3 = zero + draw.to(tl.uint32), zero + step.to(tl.uint32), zero + number.to(tl.uint32)
    k0, k1 = zero + k0.to(tl.uint32), zero + k1.to(tl.uint32)
    for _ in tl.static_range(PHILOX_ROUNDS):
        high0, high1 = tl.umulhi(c0, M0), tl.umulhi(c2, M1)
        c1, c3, c0, c2 = c2 * M1, c0 * M0, high1 ^ c1 ^ k0, high0 ^ c3 ^ k1
        k0, k1 = k0 + W0, k1 + W1
    return tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))


@triton.jit
def noise_factors(word, sigma):  # type: ignore[no-untyped-def]
    """(exp(sigma eps+), exp(sigma eps-)) by lmd/random.py's box_muller."""
    radius = sigma * tl.sqrt_rn(-2.0 * tl.log(((word & 0xFFFF).to(tl.float32) + 0.5) * 0.0000152587890625))
    angle = ((word >> 16 & 0x3FFF).to(tl.float32) + 0.5) * QUARTER
    plus, minus = radius * tl.cos(angle), radius * tl.sin(angle)
    return tl.exp(tl.where(word >> 31 == 1, -plus, plus)), tl.exp(tl.where(word >> 30 & 1 == 1, -minus, minus))


@triton.jit
def half_log_ratio(x, s):  # type: ignore[no-untyped-def]
    """a = asinh x, with s = sqrt(x^2 + 1); to an absolute 2^-23 near 0."""
    size = tl.log(tl.abs(x) + s)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def rotate(x, s, y):  # type: ignore[no-untyped-def]
    """x cosh y - s sinh y; the series keeps sinh's digits where y is small."""
    z = y * y
    series = y * (1.0 + z / 6.0 * (1.0 + z / 20.0 * (1.0 + z / 42.0)))
    up, down = tl.exp(y), tl.exp(-y)
    sinh = tl.where(tl.abs(y) < 0.5, series, 0.5 * (up - down))
    return x * (0.5 * (up + down)) - s * sinh


@triton.jit
def direction(u, full):  # type: ignore[no-untyped-def]
    """lmd/update.py's; NaN for NaN."""
    usable = (full > 0.0) & (full < float("inf"))
    r = u / tl.where(usable, full, 1.0)
    r = tl.where(r > 1.0, 1.0, tl.where(r < -1.0, -1.0, r))
    return tl.where(usable, r, tl.where(u > 0.0, 1.0, tl.where(u < 0.0, -1.0, u)))


@triton.jit(do_not_specialize=KEY)
def combination_kernel(  # type: ignore[no-untyped-def]
    mean, log_center, out, first, count, m0, scale, sign, sigma, k0, k1, number, step, draw,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """theta+ + sign theta-."""
    block = (first // BLOCK + tl.program_id(0)).to(tl.int64) * BLOCK
    at = block - first + tl.arange(0, BLOCK)
    inside = (at >= 0) & (at < count)
    p, q = noise_factors(draw_words(block, k0, k1, number, step, draw, BLOCK), sigma)
    center = tl.exp(tl.load(log_center + at, inside, 0.0)) if SPLIT else 1.0
    x = tl.load(mean + at, inside, 0.0) / (scale * center)
    s = tl.sqrt_rn(x * x + 1.0)
    q = sign * q
    tl.store(out + at, m0 * center * (s * (p + q) + x * (p - q)), inside)


@triton.jit(do_not_specialize=KEY)
def step_shared_kernel(  # type: ignore[no-untyped-def]
    mean, gradient, v, rms, squares, first, count, m0, scale, prior_a, sigma, k0, k1, number, step, draw,
    saturation, lr, decay, beta1, beta2,
    SCALED: tl.constexpr, NOISY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """lmd/update.py: step_shared; `decay` = lr weight_decay prior.linear. squares: the program's sum of u^2."""
    block = (first // BLOCK + tl.program_id(0)).to(tl.int64) * BLOCK
    at = block - first + tl.arange(0, BLOCK)
    inside = (at >= 0) & (at < count)
    x = tl.load(mean + at, inside, 0.0) / scale
    s = tl.sqrt_rn(x * x + 1.0)
    if NOISY:
        p, q = noise_factors(draw_words(block, k0, k1, number, step, draw, BLOCK), sigma)
        total = m0 * (s * (p + q) + x * (p - q))
    else:
        total = scale * s if SCALED else 2.0 * m0
    g = tl.load(gradient + at, inside, 0.0) * total
    kept = tl.load(v + at, inside, 0.0)
    u = beta1 * kept + (1.0 - beta1) * g
    y = decay * (half_log_ratio(x, s) - prior_a) + lr * direction(u, saturation * tl.load(rms))
    tl.store(squares + tl.program_id(0), tl.sum(tl.where(inside, u * u, 0.0), 0))
    tl.store(v + at, beta2 * kept + (1.0 - beta2) * g, inside)
    tl.store(mean + at, scale * rotate(x, s, y), inside)


@triton.jit
def regularizer(d, linear, power, moment, offset):  # type: ignore[no-untyped-def]
    """Prior.regularizer."""
    return linear * d + offset + tl.where(power > 0.0, tl.exp(power * d + moment), 0.0)


@triton.jit(do_not_specialize=KEY)
def step_split_kernel(  # type: ignore[no-untyped-def]
    mean, gradient, v_plus, v_minus, log_center, rms, squares, first, count, m0, scale, prior_a, sigma, k0, k1, number,
    step, draw, saturation, lr, decay, beta1, beta2, linear, power, moment, offset,
    SCALED: tl.constexpr, NOISY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """lmd/update.py: step_split."""
    block = (first // BLOCK + tl.program_id(0)).to(tl.int64) * BLOCK
    at = block - first + tl.arange(0, BLOCK)
    inside = (at >= 0) & (at < count)
    c = tl.load(log_center + at, inside, 0.0)
    x = tl.load(mean + at, inside, 0.0) / (scale * tl.exp(c))
    s = tl.sqrt_rn(x * x + 1.0)
    a = half_log_ratio(x, s)
    far = tl.abs(x) + s
    if NOISY:
        p, q = noise_factors(draw_words(block, k0, k1, number, step, draw, BLOCK), sigma)
    else:
        p = scale / (2.0 * m0)
        q = p
    g = tl.load(gradient + at, inside, 0.0) * m0
    g_minus = -g
    g_plus = g
    if SCALED:
        g_plus *= tl.exp(c) * p * tl.where(x > 0.0, far, 1.0 / far)
        g_minus *= tl.exp(c) * q * tl.where(x > 0.0, 1.0 / far, far)
    kept_plus, kept_minus = tl.load(v_plus + at, inside, 0.0), tl.load(v_minus + at, inside, 0.0)
    u_plus, u_minus = beta1 * kept_plus + (1.0 - beta1) * g_plus, beta1 * kept_minus + (1.0 - beta1) * g_minus
    full = saturation * tl.load(rms)
    off = a - prior_a
    up = lr * direction(u_plus, full) + decay * regularizer(c + off, linear, power, moment, offset)
    down = lr * direction(u_minus, full) + decay * regularizer(c - off, linear, power, moment, offset)
    tl.store(squares + tl.program_id(0), tl.sum(tl.where(inside, u_plus * u_plus + u_minus * u_minus, 0.0), 0))
    tl.store(v_plus + at, beta2 * kept_plus + (1.0 - beta2) * g_plus, inside)
    tl.store(v_minus + at, beta2 * kept_minus + (1.0 - beta2) * g_minus, inside)
    c -= 0.5 * (up + down)
    tl.store(log_center + at, c, inside)
    tl.store(mean + at, scale * tl.exp(c) * rotate(x, s, 0.5 * (up - down)), inside)


class Plan(plain.Plan):
    """lmd/plain.py's, for parameters with `serves`."""

    @staticmethod
    def serves(mean: Tensor) -> bool:
        return mean.is_cuda and mean.dtype == torch.float32 and mean.is_contiguous()

    def sample(self, group: dict[str, Any], draw: int) -> list[Tensor]:
        return self._combination(group, draw, -1.0)

    def total(self, group: dict[str, Any], draw: int) -> list[Tensor]:
        return self._combination(group, draw, 1.0)

    def _combination(self, group: dict[str, Any], draw: int, sign: float) -> list[Tensor]:
        outs = [torch.empty_like(mean) for mean in self.means]
        for i, (mean, out, state) in enumerate(zip(self.means, outs, self.states, strict=True)):
            center = state.get("log_center", mean)
            noise = (group["noise_scale"], *self._key(group, i, draw))
            arguments = (mean, center, out, self.firsts[i], mean.numel(), *self._scales(group, i), sign, *noise)
            self._launch(combination_kernel, arguments, self._blocks(i), SPLIT="log_center" in state)
        return outs

    def finite(self, gradients: list[Tensor | None]) -> bool:
        present = [gradient for gradient in gradients if gradient is not None and gradient.numel() > 0]
        return not present or bool(torch.nn.utils.get_total_norm(present, math.inf).isfinite())

    def step(self, group: dict[str, Any], gradients: list[Tensor | None], at_sample: bool) -> None:
        sigma, prior, lr = group["noise_scale"], PRIORS[group["prior"]], group["lr"]
        decay, scaled = lr * group["weight_decay"], group["weight_scaling"]
        constants = {"SCALED": scaled, "NOISY": scaled and at_sample and sigma > 0.0}
        terms = (prior.linear, prior.power, 0.5 * (prior.power * sigma) ** 2, prior.offset(group["entropy"]))
        for i, (mean, gradient, state) in enumerate(zip(self.means, gradients, self.states, strict=True)):
            if gradient is None:
                continue
            squares = torch.empty(self._blocks(i), dtype=mean.dtype, device=mean.device)
            place = (self.firsts[i], mean.numel())
            common = (state["rms"], squares, *place, *self._scales(group, i), state["prior_a"], sigma)
            common = (*common, *self._key(group, i, 0), group["saturation"], lr)
            if group["parameterization"] == "shared":
                arguments = (mean, gradient, state["v"], *common, decay * prior.linear, *group["betas"])
                self._launch(step_shared_kernel, arguments, self._blocks(i), **constants)
            else:
                moments = (state["v_plus"], state["v_minus"], state["log_center"])
                arguments = (mean, gradient, *moments, *common, decay, *group["betas"], *terms)
                self._launch(step_split_kernel, arguments, self._blocks(i), **constants)
            count = mean.numel() if self.shards is None else self.shards.counts[i]
            if group["saturation"] > 0.0 and count > 0:
                sides = 1 if group["parameterization"] == "shared" else 2
                total = squares.sum() if self.shards is None else self.shards.sum(squares.sum(dtype=torch.float64))
                state["rms"].copy_((total / (sides * count)).sqrt())

    def _blocks(self, i: int) -> int:
        first, count = self.firsts[i], self.means[i].numel()
        return triton.cdiv(first + count, BLOCK) - first // BLOCK if count > 0 else 0

    def _scales(self, group: dict[str, Any], i: int) -> tuple[float, float]:
        """m0 and 2 m0 exp(sigma^2 / 2)."""
        m0 = self.states[i]["m0"]
        return m0, 2.0 * m0 * math.exp(0.5 * group["noise_scale"] ** 2)

    def _key(self, group: dict[str, Any], i: int, draw: int) -> tuple[int, ...]:
        return group["seed"] & MASK, group["seed"] >> 32, self.numbers[i], group["step"], draw

    def _launch(self, kernel: Any, arguments: tuple[Any, ...], blocks: int, **constants: bool) -> None:
        if blocks > 0:
            with torch.cuda.device_of(arguments[0]):
                kernel[(blocks,)](*arguments, **constants, BLOCK=BLOCK)
