"""The fused GPU backend: lmd/plain.py's Plan for contiguous float32 tensors, in Triton.

All tensors of a plan take one launch, since a launch and the calls around it cost the host more than a small tensor
costs the GPU. A table on the device has a row of addresses and numbers for each tensor; a program looks up which
tensor's block is its own.

The random words are those of the other backends, bit for bit; the rest is float32 with the device's log, exp, sin and
cos, and differs from lmd/update.py by some units in the last place (tests/lmd/test_gpu.py states how many). The step is
the hyperbolic rotation that lmd/kernels.py explains.
"""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmd import plain
from lmd.priors import PRIORS
from lmd.random import MASK, MULTIPLIERS, ROUNDS, WEYL

if TYPE_CHECKING:
    from lmd.sharded import Shards

BLOCK = 1024  # elements of a program; blocks are those of the whole tensor, of which a part begins at FIRST
# what the table has of a tensor: addresses, then numbers. WHOLE: the elements of all its parts; PROGRAM: the first of
# its PROGRAMS
TENSORS = ("mean", "v", "v_plus", "v_minus", "log_center", "rms")
COLUMNS = (*TENSORS, "first", "count", "whole", "number", "program", "programs")
WIDTH = tl.constexpr(len(COLUMNS))
MEAN, V, V_PLUS, V_MINUS, LOG_CENTER, RMS, FIRST, COUNT, WHOLE, NUMBER, PROGRAM, PROGRAMS = map(
    tl.constexpr, range(len(COLUMNS))
)

M0, M1 = tl.constexpr(MULTIPLIERS[0]), tl.constexpr(MULTIPLIERS[1])
W0, W1 = tl.constexpr(WEYL[0]), tl.constexpr(WEYL[1])
PHILOX_ROUNDS = tl.constexpr(ROUNDS)
QUARTER = tl.constexpr(math.pi * 2.0**-15)
VARYING = ["begin", "k0", "k1", "step", "draw"]  # change from call to call: no kernel is compiled for a value


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


@triton.jit
def tensor_at(address, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The float32 tensor at an address; ALIGNED: to 16 bytes, which lets a thread read four numbers at once."""
    pointer = address.to(tl.pointer_type(tl.float32))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def place(table, owners, begin, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """(program, row of the table, first element of the block in the whole tensor, places in this part, which are there)

    ALIGNED: the part is the whole tensor, with a multiple of 4 elements at addresses that are multiples of 16.
    """
    program = begin + tl.program_id(0)
    row = tl.load(owners + program)
    own = table + row * WIDTH
    first, count, block = tl.load(own + FIRST), tl.load(own + COUNT), program - tl.load(own + PROGRAM)
    if ALIGNED:
        count = tl.multiple_of(count, 4)
        block = block * BLOCK
        at = block + tl.arange(0, BLOCK)
    else:
        block = (first // BLOCK + block) * BLOCK
        at = block - first + tl.arange(0, BLOCK)
    return program, row, block, at, (at >= 0) & (at < count)


@triton.jit(do_not_specialize=VARYING)
def combination_kernel(  # type: ignore[no-untyped-def]
    table, scales, owners, begin, outs, sign, sigma, k0, k1, step, draw,
    SPLIT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """theta+ + sign theta-. outs: addresses of the results."""
    _, row, block, at, inside = place(table, owners, begin, ALIGNED, BLOCK)
    own, m0, scale = table + row * WIDTH, tl.load(scales + row * 3), tl.load(scales + row * 3 + 1)
    p, q = noise_factors(draw_words(block, k0, k1, tl.load(own + NUMBER), step, draw, BLOCK), sigma)
    center = tl.exp(tl.load(tensor_at(tl.load(own + LOG_CENTER), ALIGNED) + at, inside, 0.0)) if SPLIT else 1.0
    x = tl.load(tensor_at(tl.load(own + MEAN), ALIGNED) + at, inside, 0.0) / (scale * center)
    s = tl.sqrt_rn(x * x + 1.0)
    q = sign * q
    out = tensor_at(tl.load(outs + row), ALIGNED)
    tl.store(out + at, m0 * center * (s * (p + q) + x * (p - q)), inside)


@triton.jit(do_not_specialize=VARYING)
def step_shared_kernel(  # type: ignore[no-untyped-def]
    table, scales, owners, begin, gradients, squares, sigma, k0, k1, step, draw, saturation, lr, decay, beta1, beta2,
    SCALED: tl.constexpr, NOISY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """lmd/update.py: step_shared; `decay` = lr weight_decay prior.linear. gradients: addresses, 0 where there is none.

    squares: each program's sum of u^2.
    """
    program, row, block, at, inside = place(table, owners, begin, ALIGNED, BLOCK)
    own, m0, scale = table + row * WIDTH, tl.load(scales + row * 3), tl.load(scales + row * 3 + 1)
    inside = inside & (tl.load(gradients + row) != 0)
    mean, v = tensor_at(tl.load(own + MEAN), ALIGNED) + at, tensor_at(tl.load(own + V), ALIGNED) + at
    x = tl.load(mean, inside, 0.0) / scale
    s = tl.sqrt_rn(x * x + 1.0)
    if NOISY:
        p, q = noise_factors(draw_words(block, k0, k1, tl.load(own + NUMBER), step, draw, BLOCK), sigma)
        total = m0 * (s * (p + q) + x * (p - q))
    else:
        total = scale * s if SCALED else 2.0 * m0
    g = tl.load(tensor_at(tl.load(gradients + row), ALIGNED) + at, inside, 0.0) * total
    kept = tl.load(v, inside, 0.0)
    u = beta1 * kept + (1.0 - beta1) * g
    full = saturation * tl.load(tensor_at(tl.load(own + RMS), False))
    y = decay * (half_log_ratio(x, s) - tl.load(scales + row * 3 + 2)) + lr * direction(u, full)
    tl.store(squares + program, tl.sum(tl.where(inside, u * u, 0.0), 0))
    tl.store(v, beta2 * kept + (1.0 - beta2) * g, inside)
    tl.store(mean, scale * rotate(x, s, y), inside)


@triton.jit
def regularizer(d, linear, power, moment, offset):  # type: ignore[no-untyped-def]
    """Prior.regularizer."""
    return linear * d + offset + tl.where(power > 0.0, tl.exp(power * d + moment), 0.0)


@triton.jit(do_not_specialize=VARYING)
def step_split_kernel(  # type: ignore[no-untyped-def]
    table, scales, owners, begin, gradients, squares, sigma, k0, k1, step, draw, saturation, lr, decay, beta1, beta2,
    linear, power, moment, offset,
    SCALED: tl.constexpr, NOISY: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """lmd/update.py: step_split; gradients, squares: as above."""
    program, row, block, at, inside = place(table, owners, begin, ALIGNED, BLOCK)
    own, m0, scale = table + row * WIDTH, tl.load(scales + row * 3), tl.load(scales + row * 3 + 1)
    inside = inside & (tl.load(gradients + row) != 0)
    mean = tensor_at(tl.load(own + MEAN), ALIGNED) + at
    log_center = tensor_at(tl.load(own + LOG_CENTER), ALIGNED) + at
    v_plus, v_minus = tensor_at(tl.load(own + V_PLUS), ALIGNED) + at, tensor_at(tl.load(own + V_MINUS), ALIGNED) + at
    c = tl.load(log_center, inside, 0.0)
    x = tl.load(mean, inside, 0.0) / (scale * tl.exp(c))
    s = tl.sqrt_rn(x * x + 1.0)
    a = half_log_ratio(x, s)
    far = tl.abs(x) + s
    if NOISY:
        p, q = noise_factors(draw_words(block, k0, k1, tl.load(own + NUMBER), step, draw, BLOCK), sigma)
    else:
        p = scale / (2.0 * m0)
        q = p
    g = tl.load(tensor_at(tl.load(gradients + row), ALIGNED) + at, inside, 0.0) * m0
    g_minus = -g
    g_plus = g
    if SCALED:
        g_plus *= tl.exp(c) * p * tl.where(x > 0.0, far, 1.0 / far)
        g_minus *= tl.exp(c) * q * tl.where(x > 0.0, 1.0 / far, far)
    kept_plus, kept_minus = tl.load(v_plus, inside, 0.0), tl.load(v_minus, inside, 0.0)
    u_plus, u_minus = beta1 * kept_plus + (1.0 - beta1) * g_plus, beta1 * kept_minus + (1.0 - beta1) * g_minus
    full = saturation * tl.load(tensor_at(tl.load(own + RMS), False))
    off = a - tl.load(scales + row * 3 + 2)
    up = lr * direction(u_plus, full) + decay * regularizer(c + off, linear, power, moment, offset)
    down = lr * direction(u_minus, full) + decay * regularizer(c - off, linear, power, moment, offset)
    tl.store(squares + program, tl.sum(tl.where(inside, u_plus * u_plus + u_minus * u_minus, 0.0), 0))
    tl.store(v_plus, beta2 * kept_plus + (1.0 - beta2) * g_plus, inside)
    tl.store(v_minus, beta2 * kept_minus + (1.0 - beta2) * g_minus, inside)
    c -= 0.5 * (up + down)
    tl.store(log_center, c, inside)
    tl.store(mean, scale * tl.exp(c) * rotate(x, s, 0.5 * (up - down)), inside)


@triton.jit
def sums_kernel(table, squares, sums, MOST: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """squares of each tensor's programs, at most MOST, added up."""
    own = table + tl.program_id(0) * WIDTH
    begin, programs = tl.load(own + PROGRAM), tl.load(own + PROGRAMS)
    total = tl.zeros((BLOCK,), tl.float64)
    for done in range(0, MOST, BLOCK):
        at = done + tl.arange(0, BLOCK)
        total += tl.load(squares + begin + at, at < programs, 0.0).to(tl.float64)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def rms_kernel(table, gradients, sums, sides):  # type: ignore[no-untyped-def]
    """The root mean square of each tensor that has a gradient."""
    own = table + tl.program_id(0) * WIDTH
    whole = tl.load(own + WHOLE)
    moved = (tl.load(gradients + tl.program_id(0)) != 0) & (whole > 0)
    mean_square = (tl.load(sums + tl.program_id(0)) / tl.maximum(whole * sides, 1)).to(tl.float32)
    tl.store(tensor_at(tl.load(own + RMS), False), tl.sqrt_rn(mean_square), moved)


class Plan(plain.Plan):
    """lmd/plain.py's, for parameters with `serves`, of one device: their table, and launches of the kernels."""

    @staticmethod
    def serves(mean: Tensor) -> bool:
        return mean.is_cuda and mean.dtype == torch.float32 and mean.is_contiguous()

    def __init__(
        self, numbers: list[int], params: list[Tensor], states: list[dict[str, Any]], shards: Shards | None = None
    ) -> None:
        super().__init__(numbers, params, states, shards)
        self.device = self.means[0].device
        counts = [mean.numel() for mean in self.means]
        spans = [
            (first // BLOCK, -(-(first + count) // BLOCK)) for first, count in zip(self.firsts, counts, strict=True)
        ]
        programs = [end - start if count else 0 for (start, end), count in zip(spans, counts, strict=True)]
        self.most = 1 << max(programs).bit_length()  # of one tensor, rounded up, so that few kernels are compiled
        states = [{**state, "mean": mean} for state, mean in zip(self.states, self.means, strict=True)]
        addresses = [[state[name].data_ptr() if name in state else 0 for name in TENSORS] for state in states]
        self.aligned = [
            first == 0 and count % 4 == 0 and not any(address % 16 for address in found[:-1])
            for first, count, found in zip(self.firsts, counts, addresses, strict=True)
        ]
        order = sorted(range(len(counts)), key=lambda i: not self.aligned[i])
        begins = dict(zip(order, accumulate((programs[i] for i in order), initial=0), strict=False))
        whole = counts if self.shards is None else self.shards.counts
        places = zip(self.firsts, counts, whole, numbers, map(begins.get, range(len(counts))), programs, strict=True)
        self.table = self._on_device([[*found, *of_it] for found, of_it in zip(addresses, places, strict=True)])
        owners = torch.tensor(order).repeat_interleave(torch.tensor([programs[i] for i in order]))
        self.owners = owners.int().to(self.device)
        end_aligned = sum(n for n, aligned in zip(programs, self.aligned, strict=True) if aligned)
        # of which programs the tensors are aligned, and of which they are not
        self.launches = (0, end_aligned, True), (end_aligned, sum(programs), False)
        self.scales: tuple[float, Tensor] = math.nan, self.table  # of a noise scale

    def sample(self, group: dict[str, Any], draw: int) -> list[Tensor]:
        return self._combination(group, draw, -1.0)

    def total(self, group: dict[str, Any], draw: int) -> list[Tensor]:
        return self._combination(group, draw, 1.0)

    def _combination(self, group: dict[str, Any], draw: int, sign: float) -> list[Tensor]:
        outs = [torch.empty_like(mean) for mean in self.means]
        moving = (sign, group["noise_scale"], *_key(group, draw))
        self._launch(combination_kernel, group, outs, *moving, SPLIT=group["parameterization"] == "split")
        return outs

    def finite(self, gradients: list[Tensor | None]) -> bool:
        present = [gradient for gradient in gradients if gradient is not None and gradient.numel() > 0]
        return not present or bool(torch.nn.utils.get_total_norm(present, math.inf).isfinite())

    def step(self, group: dict[str, Any], gradients: list[Tensor | None], at_sample: bool) -> None:
        sigma, prior, lr = group["noise_scale"], PRIORS[group["prior"]], group["lr"]
        decay, scaled = lr * group["weight_decay"], group["weight_scaling"]
        constants = {"SCALED": scaled, "NOISY": scaled and at_sample and sigma > 0.0}
        squares = torch.empty(len(self.owners), dtype=torch.float32, device=self.device)
        common = (squares, sigma, *_key(group, 0), group["saturation"], lr)
        if group["parameterization"] == "shared":
            numbers = (decay * prior.linear, *group["betas"])
            given = self._launch(step_shared_kernel, group, gradients, *common, *numbers, **constants)
        else:
            terms = (prior.linear, prior.power, 0.5 * (prior.power * sigma) ** 2, prior.offset(group["entropy"]))
            numbers = (decay, *group["betas"], *terms)
            given = self._launch(step_split_kernel, group, gradients, *common, *numbers, **constants)
        if group["saturation"] > 0.0:
            sums = torch.empty(len(self.means), dtype=torch.float64, device=self.device)
            rows = (len(self.means),)
            with torch.cuda.device_of(self.table):
                sums_kernel[rows](self.table, squares, sums, MOST=self.most, BLOCK=BLOCK)
                sums = sums if self.shards is None else self.shards.sum(sums)
                rms_kernel[rows](self.table, given, sums, 1 if group["parameterization"] == "shared" else 2)

    def _launch(
        self, kernel: Any, group: dict[str, Any], tensors: list[Tensor | None] | list[Tensor], *numbers: Any,
        **constants: bool,
    ) -> Tensor:  # fmt: skip
        """The kernel for all blocks. tensors: what parameters have for this call alone; returns their addresses."""
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        given = self._on_device(addresses)
        fit = not any(x % 16 for x, aligned in zip(addresses, self.aligned, strict=True) if aligned)
        with torch.cuda.device_of(self.table):
            for begin, end, aligned in self.launches:
                if end > begin:
                    arguments = (self.table, self._scales(group), self.owners, begin, given, *numbers)
                    kernel[(end - begin,)](*arguments, **constants, ALIGNED=aligned and fit, BLOCK=BLOCK)
        return given

    def _scales(self, group: dict[str, Any]) -> Tensor:
        """m0, 2 m0 exp(sigma^2 / 2) and prior_a of each parameter; kept, since few steps change sigma."""
        sigma = group["noise_scale"]
        if self.scales[0] != sigma:
            factor = 2.0 * math.exp(0.5 * sigma**2)
            rows = [[state["m0"], state["m0"] * factor, state["prior_a"]] for state in self.states]
            self.scales = sigma, torch.tensor(rows, dtype=torch.float32).to(self.device)
        return self.scales[1]

    def _on_device(self, words: Any) -> Tensor:
        """Integers, without waiting for the device."""
        return torch.tensor(words, dtype=torch.int64).to(self.device, non_blocking=True)


def _key(group: dict[str, Any], draw: int) -> tuple[int, ...]:
    return group["seed"] & MASK, group["seed"] >> 32, group["step"], draw
