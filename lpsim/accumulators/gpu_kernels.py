"""The Triton kernel of Accumulator: `kernels` on a GPU, in float64 and with the same arithmetic.

A program computes BM x BN results, each alone and with k ascending. It relies on IEEE additions and multiplications in
float32 and float64 and on no contraction of a product and a sum (launch with enable_fp_fusion=False).
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from lpsim.quantization.gpu_bits import bits_of, copysign, float_of, tl, triton


@triton.jit
def _power(e):
    """2^e as a float64, e an int64."""
    return float_of((e + 1023) << 52)


@triton.jit
def _add_to_odd(c, t):
    """c + t in float64; where that is inexact, the one of its two neighbours that has an odd last bit."""
    u = c + t
    w = u - c
    rest = (c - (u - w)) + (t - w)
    bits = bits_of(u)
    toward = tl.where((rest > 0) == (u > 0), 1, -1)
    inexact = ((rest < 0) | (rest > 0)) & ((bits & 1) == 0)
    return float_of(bits + tl.where(inexact, toward, 0).to(tl.int64))


@triton.jit
def _round(u, emin, floats, MANTISSA: tl.constexpr, TOWARD_ZERO: tl.constexpr):
    """u rounded to the format; floats: max, what lies beyond it, infinity, and the zero that is added."""
    a = tl.abs(u)
    e = tl.maximum(bits_of(a) & 0x7FF0000000000000, (emin + 1023) << 52)
    finite = e < 0x7FF0000000000000
    e = tl.where(finite, e, 1023 << 52)
    magic = float_of(e + ((52 - MANTISSA) << 52))
    r = (a + magic) - magic
    if TOWARD_ZERO:
        r = tl.where(r > a, r - float_of(e - (MANTISSA << 52)), r)
    r = tl.where(r > tl.load(floats), tl.load(floats + 1), r)
    r = tl.where(finite, r, tl.where(a == a, tl.load(floats + 2), a))
    return copysign(r, u) + tl.load(floats + 3)


@triton.jit
def _exponent(x, emin):
    """The exponent of a float64 in a format whose smallest is emin; -126 for zero. int64."""
    e = tl.maximum((bits_of(tl.abs(x)) >> 52) - 1023, emin)
    return tl.where(x == 0, -126, e)


@triton.jit
def _cut(x, MODE: tl.constexpr):
    """x to an integer: 0 toward zero, 1 toward negative, 2 to nearest even. |x| < 2^51."""
    if MODE == 0:
        return tl.where(x < 0, -tl.floor(-x), tl.floor(x))
    elif MODE == 1:
        return tl.floor(x)
    else:
        return (x + 6755399441055744.0) - 6755399441055744.0


@triton.jit
def dot_products(
    lhs, rhs, out, floats, rows, columns, depth, lhs_strides, rhs_strides, out_strides, emin, emin_lhs, emin_rhs,
    MANTISSA: tl.constexpr, TOWARD_ZERO: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    BITS: tl.constexpr, CUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """out [B, M, N] = lhs [B, M, K] · rhs [B, K, N]. LEVELS: of the adder tree, 0 for none. BITS: 0 or of Alignment."""
    across = (columns + BN - 1) // BN
    tiles = ((rows + BM - 1) // BM) * across
    pid = tl.program_id(0)
    batch, tile = (pid // tiles).to(tl.int64), pid % tiles
    i, j = (tile // across) * BM + tl.arange(0, BM), (tile % across) * BN + tl.arange(0, BN)
    i_inside, j_inside = i < rows, j < columns
    a_at = lhs + batch * lhs_strides[0] + i.to(tl.int64) * lhs_strides[1]
    b_at = rhs + batch * rhs_strides[0] + j.to(tl.int64) * rhs_strides[2]
    emin = tl.full((1, 1), emin, tl.int64)
    wide = tl.zeros((1,), tl.int64)  # places in a tensor may exceed 32 bits
    c = tl.zeros((BM, BN), tl.float64)
    for begin in range(0, depth, CHUNK):
        end = tl.minimum(begin + CHUNK, depth)
        if BITS > 0:
            e = _exponent(c, emin)
            for k in range(begin, end):
                a = tl.load(a_at + (k + wide) * lhs_strides[2], mask=i_inside, other=0).to(tl.float64)
                b = tl.load(b_at + (k + wide) * rhs_strides[1], mask=j_inside, other=0).to(tl.float64)
                e = tl.maximum(e, _exponent(a, emin_lhs)[:, None] + _exponent(b, emin_rhs)[None, :])
            scale = _power(BITS - e)
            total = c
            s = _cut(c * scale, CUT)
            for k in range(begin, end):
                a = tl.load(a_at + (k + wide) * lhs_strides[2], mask=i_inside, other=0).to(tl.float64)
                b = tl.load(b_at + (k + wide) * rhs_strides[1], mask=j_inside, other=0).to(tl.float64)
                product = a[:, None] * b[None, :]
                total += product
                s += _cut(product * scale, CUT)
            u = tl.where(tl.abs(total) < float("inf"), s * _power(e - BITS), total)
            c = _round(u, emin, floats, MANTISSA, TOWARD_ZERO)
            c = tl.where(c == 0, 0.0, c)
        elif CHUNK == 1:
            a = tl.load(a_at + (begin + wide) * lhs_strides[2], mask=i_inside, other=0).to(tl.float64)
            b = tl.load(b_at + (begin + wide) * rhs_strides[1], mask=j_inside, other=0).to(tl.float64)
            c = _round(_add_to_odd(c, a[:, None] * b[None, :]), emin, floats, MANTISSA, TOWARD_ZERO)
        else:
            if LEVELS > 0:
                P: tl.constexpr = 1 << LEVELS
                k = begin + tl.arange(0, P) + wide
                there = k < end
                a = tl.load(
                    a_at[:, None] + k[None, :] * lhs_strides[2], mask=i_inside[:, None] & there[None, :], other=0
                )
                b = tl.load(
                    b_at[:, None] + k[None, :] * rhs_strides[1], mask=j_inside[:, None] & there[None, :], other=0
                )
                tree = tl.where(there[None, None, :], a[:, None, :] * b[None, :, :], 0.0)  # [BM, BN, P]
                for level in tl.static_range(LEVELS):
                    left, right = tl.split(tl.reshape(tree, (BM, BN, P >> (level + 1), 2)))
                    tree = left + right
                s = tl.reshape(tree, (BM, BN)).to(tl.float64)
            else:
                s = tl.zeros((BM, BN), tl.float64)
                for k in range(begin, end):
                    a = tl.load(a_at + (k + wide) * lhs_strides[2], mask=i_inside, other=0).to(tl.float64)
                    b = tl.load(b_at + (k + wide) * rhs_strides[1], mask=j_inside, other=0).to(tl.float64)
                    s = _add_to_odd(s, a[:, None] * b[None, :]).to(tl.float32).to(tl.float64)
            c = _round(_add_to_odd(c, s), emin, floats, MANTISSA, TOWARD_ZERO)
    at = out + batch * out_strides[0] + i.to(tl.int64)[:, None] * out_strides[1]
    at += j.to(tl.int64)[None, :] * out_strides[2]
    tl.store(at, c.to(tl.float32), mask=i_inside[:, None] & j_inside[None, :])
