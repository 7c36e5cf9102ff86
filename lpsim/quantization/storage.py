"""Storage: a tensor as packed codes and scales, and back.

`decode(encode(x, q))` equals `q.quantize(x)` bit for bit. Codes of b bits are packed without gaps, the first element
in the lowest bits: two 4-bit codes a byte, four 6-bit codes in three bytes, a 16-bit code in two bytes, low byte first.
So `codes.view(torch.float8_e4m3fn)` is torch's own tensor of that type. Everything here is torch arithmetic on whole
tensors in float64, exact by construction and an order of magnitude slower than quantization alone.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lpsim.formats import BlockFormat, Codebook, Element, FixedFormat, FloatFormat, Format, Specials, reference
from lpsim.formats.rounding import Key, Overflow, ScaleRule
from lpsim.quantization.quantizer import Quantizer, check_memory

CHUNK = 1 << 15  # elements at a time, so that the float64 steps stay in the cache; whole bytes of codes of any width


@dataclass(frozen=True, eq=False)
class Encoded:
    """A tensor in storage.

    codes: uint8, the packed codes of all elements in row-major order. scales: uint8, the packed codes of all block
    scales, row-major over `grid`; empty without blocks. tensor_scale: uint8, the code of the second scale, or empty.
    microexponents: uint8, those of all sub-blocks, packed, row-major over `sub_grid`; empty without sub-blocks.
    shape and dtype: of the tensor that `decode` gives. axis: the axis blocks lie along, from the front.

    torch.save and torch.load store it. If its scale rule is a function, loading needs that, too:
    torch.serialization.add_safe_globals([function]).
    """

    format: Format
    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int
    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor
    microexponents: Tensor

    @property
    def grid(self) -> tuple[int, ...]:
        """The shape of the block scales; (0,) without blocks."""
        return _grid(self.shape, self.format, self.axis) if isinstance(self.format, BlockFormat) else (0,)

    @property
    def sub_grid(self) -> tuple[int, ...]:
        """The shape of the microexponents; (0,) without sub-blocks."""
        if not isinstance(self.format, BlockFormat) or not self.format.sub_block_size:
            return (0,)
        return _grid(self.shape, parts(self.format), self.axis)

    @property
    def bits_per_element(self) -> float:
        """All bytes in storage, scales and the last byte's padding included, over the elements; NaN for no elements."""
        stored = sum(t.numel() for t in (self.codes, self.scales, self.tensor_scale, self.microexponents))
        elements = math.prod(self.shape)
        return 8 * stored / elements if elements else math.nan


# torch.load takes only types that it knows
torch.serialization.add_safe_globals([Encoded, BlockFormat, Codebook, FixedFormat, FloatFormat, Specials, ScaleRule])


def encode(x: Tensor, quantizer: Quantizer | Format, axis: int = -1, key: Key | None = None) -> Encoded:
    """x quantized and stored. A format stands for its Quantizer, ties to even.

    NaN gets the format's NaN code; a block with NaN or Inf gets the NaN of the scale (0xFF in E8M0) and zero codes.

    x, axis, key: as for Quantizer.quantize.

    Raises ValueError where a NaN meets a format that has no code for it, and for elements of more than 32 bits, besides
    the errors of Quantizer.quantize.
    """
    q = quantizer if isinstance(quantizer, Quantizer) else Quantizer(quantizer)
    fmt = q.format
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    if element.bits > 32:
        raise ValueError(f"{fmt.name}: codes of more than 32 bits are not packed; keep the tensor itself")
    axis = q._check(x, axis, key)
    check_memory(x)
    x, shape = x.detach(), tuple(x.shape)
    wide = x.to(_working(x.dtype))
    scales = tensor_scale = microexponents = torch.empty(0, dtype=torch.uint8, device=x.device)
    if isinstance(fmt, BlockFormat):
        scale, outer = block_scales(wide, fmt, axis)
        scales = pack(_codes(scale.double(), fmt.scale), fmt.scale.bits)
        if fmt.tensor_scale is not None:
            tensor_scale = pack(_codes(outer.double(), fmt.tensor_scale), fmt.tensor_scale.bits)
        if fmt.sub_block_size:
            own = sub_block_scales(wide, scale, fmt, axis)
            below = _exponents(blocks_of_parts(scale, shape, fmt, axis)) - _exponents(own)
            microexponents = pack(below, fmt.microexponent_bits)
        spread = element_scales(wide, scale, fmt, axis).reshape(-1)
        q = dataclasses.replace(q, format=element, overflow=Overflow.SATURATE)
    flat = wide.reshape(-1)
    packed = []
    for start in range(0, len(flat), CHUNK):
        part = flat[start : start + CHUNK]
        part = (
            _scaled(part, spread[start : start + CHUNK], outer, fmt) if isinstance(fmt, BlockFormat) else part.double()
        )
        here = None if key is None else dataclasses.replace(key, offset=key.offset + start)
        packed.append(pack(_codes(q.quantize(part, key=here), element), element.bits))
    codes = torch.cat(packed) if packed else scales[:0]
    return Encoded(fmt, shape, x.dtype, axis, codes, scales, tensor_scale, microexponents)


def decode(encoded: Encoded) -> Tensor:
    """The tensor in storage: element · (scale · tensor_scale), in float32 or float64 and then in its dtype.

    Raises TypeError for what `encode` did not give.
    """
    if not isinstance(encoded, Encoded):
        raise TypeError(f"decode takes what encode gives, an Encoded, got {type(encoded).__name__}")
    e, fmt = encoded, encoded.format
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    working = _working(e.dtype)
    if isinstance(fmt, BlockFormat):
        scale = _values(unpack(e.scales, fmt.scale.bits, math.prod(e.grid)), fmt.scale).reshape(e.grid).to(working)
        if fmt.tensor_scale is not None:
            scale = scale * _values(unpack(e.tensor_scale, fmt.tensor_scale.bits, 1), fmt.tensor_scale).to(working)
        if fmt.sub_block_size:
            below = unpack(e.microexponents, fmt.microexponent_bits, math.prod(e.sub_grid)).reshape(e.sub_grid)
            own = _ldexp(blocks_of_parts(scale, e.shape, fmt, e.axis).double(), -below).to(working)
            spread = expanded(own, e.shape, parts(fmt), e.axis).reshape(-1)
        else:
            spread = expanded(scale, e.shape, fmt, e.axis).reshape(-1)
    x = torch.empty(e.shape, dtype=e.dtype, device=e.codes.device)
    flat = x.view(-1)
    for start in range(0, len(flat), CHUNK):
        count = min(CHUNK, len(flat) - start)
        bytes_ = e.codes[start * element.bits // 8 : -(-(start + count) * element.bits // 8)]
        values = _values(unpack(bytes_, element.bits, count), element).to(working)
        flat[start : start + count] = values * spread[start : start + count] if isinstance(fmt, BlockFormat) else values
    return x


def _working(dtype: torch.dtype) -> torch.dtype:
    """What scales are computed in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _scaled(x: Tensor, scale: Tensor, outer: Tensor, fmt: BlockFormat) -> Tensor:
    """x over its scales, in float64; 0 in blocks whose scale is NaN."""
    if _has_mantissa(fmt):
        scaled = (x * ((torch.ones_like(outer) / outer) / scale)).double()
    else:
        scaled = x.double() / scale.double()
    limits = torch.finfo(x.dtype)
    least = torch.full_like(scaled, limits.smallest_normal * limits.eps).copysign(x)
    scaled = torch.where((scaled == 0) & (x != 0), least, scaled)  # an underflow stays on its side of zero
    return scaled.masked_fill(torch.isnan(scale), 0.0)


# ---------------------------------------------------------------------------------------------- scales


def _has_mantissa(fmt: BlockFormat) -> bool:
    """Whether scales are quotients, computed in the working precision, and not powers of two."""
    return fmt.scale_rule is ScaleRule.ROUND or not isinstance(fmt.scale_rule, ScaleRule)


def block_scales(x: Tensor, fmt: BlockFormat, axis: int) -> tuple[Tensor, Tensor]:
    """(the scale of every block, the tensor scale): `reference.block_scale` and `tensor_scale` on whole tensors.

    The scale is NaN where a block holds NaN or Inf, everywhere with a tensor scale. x: float32 or float64, which is the
    dtype of both results; axis: from the front. Shapes: the grid of blocks, and ().
    """
    amax = _block_maxima(x, fmt, axis)
    finite = torch.isfinite(amax)
    amax = amax.masked_fill(~finite, 0.0)
    outer = torch.ones((), dtype=x.dtype, device=x.device)
    if fmt.tensor_scale is not None:
        largest = amax.max() if amax.numel() else outer * 0
        wanted = largest / (outer * (fmt.element.max * fmt.scale.max))  # a tensor: CUDA divides by a number inexactly
        outer = Quantizer(fmt.tensor_scale).quantize(wanted)
        least = reference.least_tensor_scale(fmt)
        outer = outer.clamp(least, fmt.tensor_scale.max)
        if not bool(finite.all()):
            outer, finite = outer * math.nan, finite & False
    if _has_mantissa(fmt):
        if fmt.scale_rule is ScaleRule.ROUND:
            wanted = amax / torch.full_like(outer, fmt.element.max)
        else:
            distinct, where = torch.unique(amax, return_inverse=True)
            chosen = [fmt.scale_by_rule(a) for a in distinct.tolist()]
            wanted = torch.tensor(chosen, dtype=x.dtype, device=x.device)[where]
        scale = Quantizer(fmt.scale).quantize(wanted / outer).clamp(fmt.scale.min_normal, fmt.scale.max)
    else:
        scale = _powers_of_two(amax, fmt)
    return scale.masked_fill(~finite, math.nan), outer


def _powers_of_two(amax: Tensor, fmt: BlockFormat) -> Tensor:
    """The scales that a power-of-two rule gives for finite maxima, in their dtype."""
    significand, exponent = torch.frexp(amax.double())  # significand in [1/2, 1)
    exponent = exponent - 1
    if fmt.scale_rule is ScaleRule.CEIL:
        exponent = exponent + (significand > 0.5).int()
    elif fmt.scale_rule is ScaleRule.RCEIL:
        exponent = exponent + (significand > math.frexp(fmt.element.max)[0]).int()
    elif fmt.scale_rule is ScaleRule.EVEN:
        top = 2.0 ** (fmt.element.mantissa_bits + 1)
        exponent = exponent + (torch.floor(significand * top + 0.5) == top).int()
    exponent = torch.where(amax == 0, fmt.scale.emin, exponent - fmt.element.emax)
    exponent = exponent.clamp(fmt.scale.emin, fmt.scale.emax)
    return _ldexp(torch.ones_like(significand), exponent).to(amax.dtype)


def parts(fmt: BlockFormat) -> BlockFormat:
    """The blocks that the sub-blocks of a format are."""
    return dataclasses.replace(fmt, block_size=fmt.sub_block_size, sub_block_size=0, microexponent_bits=0)


def blocks_of_parts(scale: Tensor, shape: tuple[int, ...], fmt: BlockFormat, axis: int) -> Tensor:
    """The block's scale for every sub-block. scale: of `grid`; the result: of the sub-blocks' grid."""
    assert isinstance(fmt.block_size, int)
    grid, d = _grid(shape, parts(fmt), axis), axis if shape else 0
    return scale.repeat_interleave(fmt.block_size // fmt.sub_block_size, d).narrow(d, 0, grid[d])


def sub_block_scales(x: Tensor, scale: Tensor, fmt: BlockFormat, axis: int) -> Tensor:
    """The scale of every sub-block: `reference.sub_block_scale` on whole tensors; NaN in blocks whose scale is NaN.

    x, axis: as for block_scales, which gave `scale`.
    """
    whole = blocks_of_parts(scale, tuple(x.shape), fmt, axis)
    amax = _block_maxima(x, parts(fmt), axis)
    own = _powers_of_two(amax.masked_fill(~torch.isfinite(amax), 0.0), fmt)
    lowest = (whole * 2.0**-fmt.most_lowered).clamp(min=2.0**fmt.scale.emin)
    return torch.minimum(torch.maximum(own, lowest), whole)  # NaN where `whole` is


def element_scales(x: Tensor, scale: Tensor, fmt: BlockFormat, axis: int) -> Tensor:
    """Every element's scale, of x's shape, the tensor scale left out. x, scale, axis: as for sub_block_scales."""
    if not fmt.sub_block_size:
        return expanded(scale, tuple(x.shape), fmt, axis)
    return expanded(sub_block_scales(x, scale, fmt, axis), tuple(x.shape), parts(fmt), axis)


def _block_size(shape: tuple[int, ...], fmt: BlockFormat, axis: int) -> tuple[int, ...]:
    """The extent of a block along every axis of a tensor (one axis where the tensor has none)."""
    size = fmt.block_size
    if not shape:
        return (1,)
    if size is None:
        return tuple(max(n, 1) for n in shape)
    if isinstance(size, tuple):
        return (1,) * (len(shape) - 2) + size[-len(shape) :]
    return tuple((size or max(n, 1)) if d == axis else 1 for d, n in enumerate(shape))


def _grid(shape: tuple[int, ...], fmt: BlockFormat, axis: int) -> tuple[int, ...]:
    return tuple(-(-n // size) for n, size in zip(shape or (1,), _block_size(shape, fmt, axis), strict=True))


def _block_maxima(x: Tensor, fmt: BlockFormat, axis: int) -> Tensor:
    """The largest magnitude in every block; NaN where the block has one. The last block along an axis may be short."""
    maxima = x.abs().reshape(tuple(x.shape) or (1,))
    for d, size in enumerate(_block_size(tuple(x.shape), fmt, axis)):
        if size > 1 and maxima.numel():
            lines = maxima.movedim(d, -1)
            if lines.shape[-1] % size:
                lines = functional.pad(lines, (0, -lines.shape[-1] % size))
            maxima = lines.unflatten(-1, (-1, size)).amax(-1).movedim(-1, d)
    return maxima.reshape(_grid(tuple(x.shape), fmt, axis))


def expanded(scale: Tensor, shape: tuple[int, ...], fmt: BlockFormat, axis: int) -> Tensor:
    """Every element's scale: the grid's entries repeated over their blocks."""
    for d, (size, n) in enumerate(zip(_block_size(shape, fmt, axis), shape or (1,), strict=True)):
        if size > 1:
            scale = scale.repeat_interleave(size, d).narrow(d, 0, n)
    return scale.reshape(shape)


# ---------------------------------------------------------------------------------------------- codes


def _ldexp(values: Tensor, exponent: Tensor) -> Tensor:
    """values · 2^exponent in float64, in two exact steps (torch.ldexp goes through a float32 power)."""
    half = exponent.long() // 2
    for part in (half, exponent.long() - half):
        values = values * ((part + 1023) << 52).view(torch.float64)
    return values


def _exponents(powers: Tensor) -> Tensor:
    """log2 of powers of two, as int64; 0 of NaN."""
    return (torch.frexp(powers.double().nan_to_num(1.0))[1] - 1).long()


def _codes(values: Tensor, fmt: Element) -> Tensor:
    """`reference.encode` of float64 values that the format holds, as int64.

    Raises ValueError for a NaN where the format has no code for it.
    """
    nan = torch.isnan(values)
    if not fmt.has_nan and bool(nan.any()):
        raise ValueError(f"the tensor holds NaN (or a block with NaN or Inf) and {fmt.name} has no code for NaN")
    if isinstance(fmt, Codebook):
        ordered, code_of = torch.tensor(fmt.values, dtype=torch.float64, device=values.device).sort()
        return code_of[torch.searchsorted(ordered, values.contiguous())]
    if isinstance(fmt, FixedFormat):
        return (values * 2.0**fmt.frac_bits).long() & ((1 << fmt.bits) - 1)
    magnitude = values.abs().masked_fill(nan | torch.isinf(values), 0.0)
    exponent = (torch.frexp(magnitude)[1] - 1).clamp(min=fmt.emin)
    steps = _ldexp(magnitude, fmt.mantissa_bits - exponent).long()
    field = torch.where(magnitude >= fmt.min_normal, exponent + fmt._bias, 0).long()
    code = (field << fmt.mantissa_bits) | (steps & ((1 << fmt.mantissa_bits) - 1))
    if fmt.has_inf:
        code = torch.where(torch.isinf(values), reference.encode(math.inf, fmt), code)
    if fmt.signed:
        negative = torch.signbit(values) & (fmt.has_negative_zero | (values != 0))
        code = code | (negative.long() << (fmt.bits - 1))
    return torch.where(nan, reference.encode(math.nan, fmt), code) if fmt.has_nan else code


def _values(codes: Tensor, fmt: Element) -> Tensor:
    """`reference.decode` of int64 codes, as float64."""
    if isinstance(fmt, Codebook):
        return torch.tensor(fmt.values, dtype=torch.float64, device=codes.device)[codes]
    if isinstance(fmt, FixedFormat):
        return (codes - (codes >> (fmt.bits - 1) << fmt.bits)).double() * 2.0**-fmt.frac_bits
    width = fmt.exponent_bits + fmt.mantissa_bits
    negative, code = (codes >> width).bool(), codes & ((1 << width) - 1)
    field, steps = code >> fmt.mantissa_bits, code & ((1 << fmt.mantissa_bits) - 1)
    tiny = (field == 0) & fmt.zero
    implicit = torch.where(tiny, 0, 1 << fmt.mantissa_bits)
    steps = torch.where(tiny & (not fmt.subnormals), 0, steps)
    exponent = torch.where(tiny, fmt.emin, field - fmt._bias)
    values = _ldexp((implicit + steps).double(), exponent - fmt.mantissa_bits)
    values = torch.where(code > fmt._max_code(), math.nan, values)
    if fmt.has_inf:
        values = torch.where(code == fmt._max_code() + 1, math.inf, values)
    values = torch.where(negative, -values, values)
    if fmt.signed and not fmt.has_negative_zero:
        values = torch.where(negative & (code == 0), math.nan, values)
    return values


# ---------------------------------------------------------------------------------------------- packing


def pack(codes: Tensor, bits: int) -> Tensor:
    """The codes, each in `bits` bits from the lowest bit up, as bytes; the last byte is filled up with zeros.

    Several codes make a group of whole bytes: two of 4 bits, four of 6, eight of an odd number.
    """
    flat = codes.reshape(-1)
    group = 8 // math.gcd(bits, 8)
    places = functional.pad(flat, (0, -len(flat) % group)).reshape(-1, group)
    packed = torch.zeros((len(places), bits * group // 8), dtype=torch.uint8, device=codes.device)
    for place, byte, shift in _overlaps(bits, group):
        part = places[:, place] << shift if shift >= 0 else places[:, place] >> -shift
        packed[:, byte] |= (part & 0xFF).to(torch.uint8)
    return packed.reshape(-1)[: -(-len(flat) * bits // 8)]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of `bits` bits in the bytes, as int64: the inverse of `pack`."""
    group = 8 // math.gcd(bits, 8)
    size = bits * group // 8
    groups = functional.pad(packed, (0, -len(packed) % size)).reshape(-1, size)
    codes = torch.zeros((len(groups), group), dtype=torch.int64, device=packed.device)
    for place, byte, shift in _overlaps(bits, group):
        part = groups[:, byte].long()
        codes[:, place] |= part >> shift if shift >= 0 else part << -shift
    return codes.reshape(-1)[:count] & ((1 << bits) - 1)


def _overlaps(bits: int, group: int) -> list[tuple[int, int, int]]:
    """(place in the group, byte, left shift from the code's bits to the byte's) wherever a code and a byte overlap."""
    return [
        (place, byte, place * bits - 8 * byte)
        for place in range(group)
        for byte in range(place * bits // 8, -(-(place + 1) * bits // 8))
    ]
