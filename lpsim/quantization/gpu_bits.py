"""Triton functions that know nothing of formats: numbers as bit patterns, memory, and the oracle's random bits."""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from lpsim.formats.reference import PHILOX_ROUNDS

try:
    import triton
    import triton.language as tl
except ImportError as absent:
    raise ImportError("the backend triton needs Triton, which is not installed: pip install triton") from absent

if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
    raise ImportError(
        f"the backend triton needs Triton 3.6 or later, {triton.__version__} is installed: pip install --upgrade triton"
    )

_ROUNDS = tl.constexpr(PHILOX_ROUNDS)


# ---------------------------------------------------------------------------------------------- bits


@triton.jit
def bits_of(x):
    """The bit pattern of a float32 or float64 as an int32 or int64."""
    if x.dtype == tl.float64:
        return x.to(tl.int64, bitcast=True)
    else:
        return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(i):
    """The float32 or float64 with the bit pattern i, an int32 or int64."""
    if i.dtype == tl.int64:
        return i.to(tl.float64, bitcast=True)
    else:
        return i.to(tl.float32, bitcast=True)


@triton.jit
def copysign(magnitude, sign):
    """A magnitude that is not negative, with the sign of `sign`."""
    if magnitude.dtype == tl.float64:
        return float_of(bits_of(magnitude) | (bits_of(sign) & -0x8000000000000000))
    else:
        return float_of(bits_of(magnitude) | (bits_of(sign) & -0x80000000))


@triton.jit
def divide(a, b):
    """a / b rounded to nearest even; `/` is that for float64 only."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def load(x, mask, BFLOAT16: tl.constexpr):
    """A tensor's elements as float64 if they are, else as float32. bfloat16 comes as int16."""
    value = tl.load(x, mask=mask, other=0)
    if BFLOAT16:
        return float_of(value.to(tl.int32) << 16)
    elif value.dtype == tl.float16:
        return value.to(tl.float32)
    else:
        return value


@triton.jit
def store(out, y, mask, BFLOAT16: tl.constexpr):
    """The inverse of load; rounds to nearest even where the tensor's type is narrower."""
    if BFLOAT16:
        b = bits_of(y.to(tl.float32))
        even = (b + 0x7FFF + ((b >> 16) & 1)) >> 16
        tl.store(out, tl.where(y == y, even, (b >> 16) | 0x40).to(tl.int16), mask=mask)
    elif out.dtype.element_ty == tl.float16:
        tl.store(out, y.to(tl.float32).to(tl.float16), mask=mask)
    else:
        tl.store(out, y.to(out.dtype.element_ty), mask=mask)


# ---------------------------------------------------------------------------------------------- random bits


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """reference.philox4x32 with PHILOX_ROUNDS rounds, on uint32."""
    for _ in tl.static_range(_ROUNDS):
        high0, high1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        low0, low1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c1 = low1
        c2 = high0 ^ c3 ^ k1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _four_words(group, selector, k0, k1, stream, step):
    """The Philox call of an int64 group of eight elements; selector 0: upper halves, 1: lower halves."""
    c0 = group.to(tl.uint32)
    c1 = (group >> 32).to(tl.uint32) | (selector << 31)
    zero = c0 ^ c0  # all counters in the shape of the group
    return _philox(c0, c1, zero + stream, zero + step, zero + k0, zero + k1)


@triton.jit
def half_words(position, selector, k0, k1, stream, step):
    """The 16-bit halves of the words at any int64 positions: a Philox call an element."""
    group = (position >> 7) * 16 + (position & 15)
    slot = ((position >> 4) & 7).to(tl.int32)
    w0, w1, w2, w3 = _four_words(group, selector, k0, k1, stream, step)
    word = tl.where(slot < 4, tl.where(slot < 2, w0, w1), tl.where(slot < 6, w2, w3))
    return ((word >> ((slot & 1) * 16).to(tl.uint32)) & 0xFFFF).to(tl.int32)


@triton.jit
def half_words_of_rows(first, selector, k0, k1, stream, step, R: tl.constexpr, G: tl.constexpr):
    """The halves [R, 128·G] for R rows of consecutive elements that start at multiples of 128: a call for eight."""
    group = (first >> 7) * 16 + tl.arange(0, 16 * G)[None, :]  # [R, 16·G]
    w0, w1, w2, w3 = _four_words(group, selector, k0, k1, stream, step)
    word = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [R, 16·G, 2, 2], word 2·i + j at [..., i, j]
    half = tl.join(word & 0xFFFF, word >> 16).to(tl.uint16)  # [R, 16·G, 2, 2, 2]: slot = 4·i + 2·j + h
    by_lane = tl.reshape(half, (R, G, 16, 8))
    return tl.reshape(tl.permute(by_lane, (0, 1, 3, 2)), (R, 128 * G)).to(tl.int32)
