"""The laws, one function each: it returns the number of results tested, or raises with the first counterexample.

The oracle is tested against the definitions (`roundings`, `order`, `codes`), every backend against the oracle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lpsim.adapters import Adapter
from lpsim.conformance.inputs import Array, any_bits, block_inputs, block_shape, ladder, scalar_inputs
from lpsim.formats import BlockFormat, Codebook, Element, FixedFormat, FloatFormat, Format, reference
from lpsim.formats.rounding import Key, Overflow, Rounding, ScaleRule
from lpsim.quantization.quantizer import Quantizer, available_backends, backend
from lpsim.quantization.storage import decode, encode, parts

DETERMINISTIC: list[Rounding] = [r for r in Rounding if r is not Rounding.STOCHASTIC]
KEY = Key(seed=0x0123456789ABCDEF, stream=3, step=5, offset=1000)


class ConformanceError(AssertionError):
    """A format, or a backend that serves it, breaks a law; the message holds the counterexample."""


def same_bits(a: Array, b: Array) -> Array:
    """Equal values with equal signs of zero, or NaN on both sides."""
    return ((a == b) & (np.signbit(a) == np.signbit(b))) | (np.isnan(a) & np.isnan(b))


def demand(
    holds: Array, law: str, fmt: Format, q: Quantizer | None, x: Array, y: Array, wanted: Array | None = None
) -> int:
    """The size of `holds`, all true; else a ConformanceError that shows the first element where it is not."""
    if holds.all():
        return int(holds.size)
    at = np.unravel_index(int(np.argmin(holds)), holds.shape)
    where = f" at {tuple(map(int, at))}" if x.ndim > 1 else ""
    how = ""
    if q is not None:
        how = f", {q.rounding.name}" + (f" with {q.random_bits} bits" if q.random_bits else "")
        how += f", {q.overflow.name}" + (f", backend {q.backend}" if q.backend else "")
    must = f", must be {show(wanted[at])}" if wanted is not None else ""
    raise ConformanceError(
        f"{fmt.name}, {law}{how}: {show(x[at])}{where} ({x.dtype}) becomes {show(y[at])}{must} "
        f"({int((~holds).sum())} of {holds.size} are wrong)"
    )


def show(value: Any) -> str:
    return f"{float(value)!r} = {float(value).hex()}"


# ---------------------------------------------------------------------------------------------- backends


def backends_for(fmt: Format) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """(backends at hand that claim to equal the oracle for `fmt`, those that do not -> their reasons)."""
    compared: list[str] = []
    departing: dict[str, tuple[str, ...]] = {}
    for name in available_backends():
        if name == "reference" or not _devices(Quantizer(fmt, backend=name)):
            continue
        chosen = backend(name)
        reasons = chosen.departures(Quantizer(fmt)) if isinstance(chosen, Adapter) else ()
        if reasons:
            departing[name] = reasons
        else:
            compared.append(name)
    return tuple(compared), departing


def _devices(q: Quantizer) -> list[torch.device]:
    """Where the quantizer's backend serves it, of the devices at hand."""
    names = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    assert q.backend is not None
    return [d for d in map(torch.device, names) if backend(q.backend).supports(q, d)]


def _served(q: Quantizer) -> bool:
    """Whether a kernel serves q; the oracle alone is slow."""
    return any(_devices(replace(q, backend=name)) for name in backends_for(q.format)[0])


def quantizers(fmt: Format, roundings: list[Rounding]) -> Iterator[Quantizer]:
    """A Quantizer for each rounding, overflow policy and some numbers of random bits."""
    policies = [Overflow.SATURATE]
    if not isinstance(fmt, BlockFormat) and (fmt.has_inf or fmt.has_nan):
        policies.append(Overflow.SPECIAL)
    for rounding in roundings:
        for policy in policies:
            for bits in (None, 1, 8, 20) if rounding is Rounding.STOCHASTIC else (None,):
                yield Quantizer(fmt, rounding, policy, bits)


def _agreement(fmt: Format, x: Array, axis: int, chosen: list[Quantizer]) -> int:
    """Every backend's result, on every device, against the oracle's."""
    names, _ = backends_for(fmt)
    cases = 0
    for q in chosen:
        key = KEY if q.rounding is Rounding.STOCHASTIC else None
        expected = reference.quantize(x, fmt, axis, q.rounding, q.overflow, q.random_bits, key)
        for name in names:
            served = replace(q, backend=name)
            for device in _devices(served):
                y = served.quantize(torch.from_numpy(x).to(device), axis, key).cpu().numpy()
                law = f"agreement on axis {axis}" if isinstance(fmt, BlockFormat) else "agreement"
                cases += demand(same_bits(y, expected), law, fmt, served, x, y, expected)
    return cases


def scalar_agreement(fmt: Element) -> int:
    """All roundings and policies on the critical inputs of float32, some of float64, bfloat16 and float16."""
    deterministic, stochastic = list(quantizers(fmt, DETERMINISTIC)), list(quantizers(fmt, [Rounding.STOCHASTIC]))
    cases = _agreement(fmt, scalar_inputs(fmt), 0, deterministic)
    cases += _agreement(fmt, scalar_inputs(fmt, count=64), 0, stochastic)
    cases += _agreement(fmt, scalar_inputs(fmt, np.float64, count=128), 0, deterministic + stochastic[:1])
    names, _ = backends_for(fmt)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.from_numpy(scalar_inputs(fmt, count=256)).to(dtype).unique()
        expected = torch.from_numpy(reference.quantize(x.float().numpy(), fmt)).to(dtype).float().numpy()
        for name in names:
            q = Quantizer(fmt, backend=name)
            for device in _devices(q):
                y = q.quantize(x.to(device)).float().cpu().numpy()
                law = f"agreement in {dtype}"
                cases += demand(same_bits(y, expected), law, fmt, q, x.float().numpy(), y, expected)
    return cases


def block_agreement(fmt: BlockFormat) -> int:
    """All roundings on hostile blocks along the last axis and, transposed, along the first."""
    cases = 0
    for number, x in enumerate(block_inputs(fmt)):
        chosen = DETERMINISTIC if number % 4 else list(Rounding)
        cases += _agreement(fmt, x, 1, list(quantizers(fmt, chosen))[:8])
        cases += _agreement(fmt, np.ascontiguousarray(x.T), 0, [Quantizer(fmt)])
        if number < 4:
            cases += _agreement(fmt, x.astype(np.float64) * (1 + 2.0**-40), 1, [Quantizer(fmt)])
    return cases


# ---------------------------------------------------------------------------------------------- definitions


def codes(fmt: Element) -> int:
    """encode(decode(code)) == code for the codes of numbers and infinities; the values ascend with their places."""
    count = len(fmt.values) if isinstance(fmt, Codebook) else 1 << min(fmt.bits, 16)
    tested = 0
    for code in range(count) if fmt.bits <= 16 else np.random.default_rng(0).integers(0, 1 << fmt.bits, count).tolist():
        value = reference.decode(code, fmt)
        unused = isinstance(fmt, FixedFormat) and value < fmt.min
        flushed = isinstance(fmt, FloatFormat) and value == 0 and code not in (0, 1 << (fmt.bits - 1))
        if math.isnan(value) or unused or flushed:
            continue
        if reference.encode(value, fmt) != code:
            again = reference.encode(value, fmt)
            raise ConformanceError(f"{fmt.name}: code {code:#x} decodes to {value!r}, which encodes to {again:#x}")
        tested += 1
    steps = ladder(fmt)
    if not (np.diff(steps.value) > 0).all():
        raise ConformanceError(f"{fmt.name}: the values do not ascend with their codes")
    return tested


def roundings(fmt: Element) -> int:
    """Each rounding as `Rounding` words it, from the neighbours of x: exact, faithful, nearest, ties, directions."""
    steps, x = ladder(fmt), scalar_inputs(fmt)
    x = x[np.isfinite(x)]
    wide = x.astype(np.float64)
    at = np.clip(np.searchsorted(steps.value, wide), 0, len(steps.value) - 1)
    low = np.maximum(np.where(steps.value[at] > wide, at - 1, at), 0)
    high = np.where(steps.value[low] == wide, low, np.minimum(low + 1, len(steps.value) - 1))
    known = steps.place[high] - steps.place[low] <= 1
    wide, x, low, high = wide[known], x[known], low[known], high[known]
    lo, hi = steps.value[low], steps.value[high]
    below, above = wide - lo, hi - wide
    inward = np.abs(lo) <= np.abs(hi)
    smaller, larger = np.where(inward, lo, hi), np.where(inward, hi, lo)
    settled = np.where(inward, steps.even[low], steps.even[high])  # a format may skip codes above zero's, so ask below
    even, odd = np.where(settled, smaller, larger), np.where(settled, larger, smaller)
    nearest = np.where(below < above, lo, hi)
    outside = (wide <= steps.value[0]) | (wide >= steps.value[-1])
    end = np.clip(wide, steps.value[0], steps.value[-1])
    # The distances are exact but for tables, whose values may lie binades apart: there ties are left to the oracle.
    tie = below == above
    cases = 0
    wanted = {
        Rounding.TIES_TO_EVEN: np.where(tie, even, nearest),
        Rounding.TIES_TO_AWAY: np.where(tie, larger, nearest),
        Rounding.TOWARD_ZERO: smaller,
        Rounding.TOWARD_POSITIVE: hi,
        Rounding.TOWARD_NEGATIVE: lo,
        Rounding.TO_ODD: np.where(lo == hi, lo, odd),
    }
    for rounding, expected in wanted.items():
        q = Quantizer(fmt, rounding)
        y = reference.quantize(x, fmt, 0, rounding)
        rounded = np.where(outside, end, expected).astype(np.float32)
        unclear = tie & (lo != hi) & isinstance(fmt, Codebook) & ("TIES" in rounding.name)
        cases += demand((y == rounded) | unclear, "the rounding's definition", fmt, q, x, y, rounded)
        zero = (y == 0) & (np.signbit(y) != (np.signbit(x) & fmt.has_negative_zero))
        cases += demand(~zero, "the sign of zero", fmt, q, x, y)
    return cases


def order(fmt: Element) -> int:
    """Values stay, rounding twice is rounding once, order is kept, and the sign changes sides: in every rounding."""
    with np.errstate(over="ignore", under="ignore"):
        values = ladder(fmt).subset(1 << 14).astype(np.float32)
    opposite = {Rounding.TOWARD_POSITIVE: Rounding.TOWARD_NEGATIVE, Rounding.TOWARD_NEGATIVE: Rounding.TOWARD_POSITIVE}
    cases = 0
    for q in quantizers(fmt, DETERMINISTIC):
        run = _runner(q)
        x = np.concatenate([scalar_inputs(fmt), any_bits(1 << (14 if _served(q) else 8))])
        ordered = np.sort(x[np.isfinite(x)])
        kept = run(values)
        cases += demand(kept == values, "values stay", fmt, q, values, kept, values)
        once = run(x)
        twice = run(once)
        cases += demand(same_bits(once, twice), "idempotence", fmt, q, once, twice, once)
        cases += demand(np.isnan(once) | ~np.isnan(x), "a NaN stays", fmt, q, x, once)
        y = run(ordered)
        solid = ~np.isnan(y)
        rises = np.append(True, y[solid][1:] >= y[solid][:-1])
        cases += demand(rises, "monotone", fmt, q, ordered[solid], y[solid])
        if _mirrored(fmt):
            other = Quantizer(fmt, opposite.get(q.rounding, q.rounding), q.overflow)
            y = -_runner(other)(-x)
            cases += demand((y == once) | (np.isnan(y) & np.isnan(once)), "odd", fmt, q, x, once, y)
    return cases


def _mirrored(fmt: Element) -> bool:
    """Whether rounding treats both signs alike, by definition."""
    return not isinstance(fmt, Codebook) and fmt.min == -fmt.max and not (isinstance(fmt, FloatFormat) and not fmt.zero)


def _runner(q: Quantizer, axis: int = -1) -> Callable[[Array], Array]:
    """q on arrays, by the backend that serves it by default."""
    return lambda x: q.quantize(torch.from_numpy(x), axis).numpy()


# ---------------------------------------------------------------------------------------------- stochastic rounding

TAIL = math.log(2e12)  # a band is left by chance once in 1e12


def stochastic(fmt: Format) -> int:
    """The frequency of the larger neighbour is ⌊r·2^k⌋/2^k, draws are independent within a call and between keys.

    The band of a sum of n draws is Bernstein's. Neighbours come from the directed roundings.
    """
    draws = 4096 if _served(Quantizer(fmt, Rounding.STOCHASTIC)) else 40
    columns = min(block_shape(fmt)[1], 64) if isinstance(fmt, BlockFormat) else 32
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    random = np.random.default_rng(2)
    with np.errstate(over="ignore", under="ignore"):
        sizes = np.exp2(random.uniform(math.log2(element.min_subnormal / element.max), 0, columns))
        sizes[: columns // 2] = random.uniform(0.02, 1.0, columns // 2)
        sizes[0] = 1.0
        row = (element.max * sizes * random.choice([-1, 1] if element.min < 0 else [1], columns)).astype(np.float32)
    x = np.repeat(row[None], draws, 0)
    directed = (Rounding.TOWARD_ZERO, Rounding.TOWARD_POSITIVE, Rounding.TOWARD_NEGATIVE)
    low, up, down = (_runner(Quantizer(fmt, rounding))(x)[0].astype(np.float64) for rounding in directed)
    high = np.where(low == down, up, down)
    with np.errstate(invalid="ignore", divide="ignore"):
        r = (row - low) / (high - low)
    r = np.where((r > 0) & (r < 1), r, 0.0)  # 0 where x is a value or clipped
    cases = 0
    for bits in (1, 2, 4, 8, None):
        q = Quantizer(fmt, Rounding.STOCHASTIC, random_bits=bits)
        scaled = r * 2.0 ** (bits or 32)
        clear = (r > 0) & ((np.abs(scaled - np.round(scaled)) > 1e-3) | (bits is None))
        if not clear.any():
            continue
        p = (np.floor(scaled) / 2.0 ** (bits or 32))[clear]
        outcomes = []
        for key in (KEY, Key(KEY.seed, KEY.stream, KEY.step + 1), Key(KEY.seed, KEY.stream + 1), Key(KEY.seed + 1)):
            y = q.quantize(torch.from_numpy(x), -1, key).numpy()[:, clear].astype(np.float64)
            taken = y == high[clear]
            cases += demand(taken | (y == low[clear]), "stochastic results are neighbours", fmt, q, x[:, clear], y)
            count = taken.sum(0)
            band = TAIL / 3 + np.sqrt((TAIL / 3) ** 2 + 2 * TAIL * draws * p * (1 - p))
            inside = np.abs(count - draws * p) <= band
            frequency = count / draws
            cases += demand(inside, "the frequency of the larger neighbour", fmt, q, x[0, clear], frequency, p)
            fair = (p > 0.05) & (p < 0.95)
            outcomes.append((taken[:, fair] - p[fair]) / np.sqrt(p[fair] * (1 - p[fair])))
        _independent(fmt, q, outcomes)
    return cases


def _independent(fmt: Format, q: Quantizer, outcomes: list[Array]) -> None:
    """Standardized draws: the variance of the rows' sums is their length; draws of different keys do not correlate.

    Bands of 8 standard errors; a fourth moment below 20 (p in [0.05, 0.95]) bounds the error of the variance.
    """
    draws, columns = outcomes[0].shape
    if columns < 2:
        return
    for z in outcomes:
        variance = float((z.sum(1) ** 2).mean() / columns)
        if abs(variance - 1) > 8 * math.sqrt((2 + 20 / columns) / draws):
            raise ConformanceError(
                f"{fmt.name}, STOCHASTIC with {q.random_bits} bits: sums of {columns} draws have {variance:.3f} times "
                "the variance of independent ones"
            )
    for other in outcomes[1:]:
        correlation = float((outcomes[0] * other).mean())
        if abs(correlation) > 8 / math.sqrt(draws * columns):
            raise ConformanceError(
                f"{fmt.name}, STOCHASTIC with {q.random_bits} bits: draws under two keys correlate by {correlation:.3f}"
            )


# ---------------------------------------------------------------------------------------------- blocks


def blocks(fmt: BlockFormat) -> int:
    """NaN stays in its block, order is kept under one scale; odd and idempotent where that follows."""
    element, cases = fmt.element, 0
    # Under these rules a second scale is the first one or finer, by a power of two. EVEN can move a value past max.
    finer = fmt.scale_rule in (ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.RCEIL)
    stays = finer and _mirrored(element) and element.min_subnormal * fmt.scale.min_subnormal >= 2.0**-149
    for x in block_inputs(fmt, 1 << (17 if _served(Quantizer(fmt)) else 12)):
        broken = np.zeros(x.size, bool)
        same = np.zeros(x.size, np.int64)
        for number, block in enumerate(reference.block_indices(x.shape, fmt, 1)):
            broken[block] = not np.isfinite(x.reshape(-1)[block]).all()
            same[block] = number
        for number, block in enumerate(reference.block_indices(x.shape, parts(fmt), 1) if fmt.sub_block_size else ()):
            same[block] = number  # order is kept under one scale
        if fmt.tensor_scale is not None:
            broken[:] = broken.any()
        broken, same = broken.reshape(x.shape), same.reshape(x.shape)
        for rounding in DETERMINISTIC:
            q = Quantizer(fmt, rounding)
            run = _runner(q)
            y = run(x)
            cases += demand(np.isnan(y) == broken, "NaN in exactly the blocks with NaN or Inf", fmt, q, x, y)
            sorting = np.lexsort((x.reshape(-1), same.reshape(-1)))
            sorting = sorting[~broken.reshape(-1)[sorting]]
            rising, group, source = y.reshape(-1)[sorting], same.reshape(-1)[sorting], x.reshape(-1)[sorting]
            kept = np.append(True, (rising[1:] >= rising[:-1]) | (group[1:] != group[:-1]))
            cases += demand(kept, "monotone under one scale", fmt, q, source, rising)
            if _mirrored(element) and rounding not in (Rounding.TOWARD_POSITIVE, Rounding.TOWARD_NEGATIVE):
                mirrored = -run(-x)
                cases += demand((mirrored == y) | broken, "odd", fmt, q, x, y, mirrored)
            if stays:  # but where max·scale lies beyond float32
                beyond = np.isin(same, same[np.isinf(y)])
                again = run(y)
                cases += demand(same_bits(y, again) | beyond, "idempotence", fmt, q, y, again, y)
    return cases


def storage_round_trip(fmt: Format) -> int:
    """decode(encode(x)) == quantize(x), NaN left out where the format has no code for it."""
    cases = 0
    has_nan = fmt.scale.has_nan if isinstance(fmt, BlockFormat) else fmt.has_nan
    if (fmt.element if isinstance(fmt, BlockFormat) else fmt).bits > 32:
        return 0
    tensors = list(block_inputs(fmt, 1 << 15)) if isinstance(fmt, BlockFormat) else [scalar_inputs(fmt)]
    for x in tensors:
        x = x if has_nan else np.nan_to_num(x, nan=0.0, posinf=1.0, neginf=-1.0)
        for q in (Quantizer(fmt), Quantizer(fmt, Rounding.TO_ODD)):
            y, expected = decode(encode(torch.from_numpy(x), q)).numpy(), _runner(q)(x)
            cases += demand(same_bits(y, expected), "decode(encode(x)) is quantize(x)", fmt, q, x, y, expected)
    return cases
