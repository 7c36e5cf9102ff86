"""Tables against independent definitions: the posit standard's formula, closed forms, the published NF4 derivation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from lpsim import Codebook, Quantizer, Specials, formats
from lpsim.formats import codebooks, p3109, reference
from lpsim.formats.codebooks import logarithmic, posit


def standard_posit(pattern: int, bits: int, es: int) -> float:
    """Posit Standard 2022, §4.1, on the two's complement bit string S R0..Rk E F: with s the sign bit, k the length of
    the run of equal bits after it (R0 its value), and F's value f, ((1 − 3s) + f)·2^((1 − 2s)·(2^es·r + e + s)), where
    r = −k if R0 = 0 and k − 1 if R0 = 1.
    """
    if pattern == 0:
        return 0.0
    string = f"{pattern:0{bits}b}"
    s, rest = int(string[0]), string[1:]
    k = len(rest) - len(rest.lstrip(rest[0]))
    r = k - 1 if rest[0] == "1" else -k
    tail = rest[k + 1 :]
    e = int(tail[:es].ljust(es, "0") or "0", 2)
    fraction = tail[es:]
    f = int(fraction, 2) / 2 ** len(fraction) if fraction else 0.0
    return ((1 - 3 * s) + f) * 2.0 ** ((1 - 2 * s) * (2**es * r + e + s))


@pytest.mark.parametrize(
    ("bits", "es"), [(2, 0), (3, 0), (4, 0), (5, 1), (6, 1), (8, 0), (8, 1), (8, 2), (8, 3), (16, 2)]
)
def test_posits_are_the_standard_s_values(bits: int, es: int) -> None:
    not_real = 1 << (bits - 1)
    patterns = [pattern for pattern in range(1 << bits) if pattern != not_real]
    assert posit(bits, es).values == tuple(standard_posit(pattern, bits, es) for pattern in patterns)


def test_posit_landmarks() -> None:
    """Gustafson 2017: 0000110111011101 with es = 3 is 477/134217728. Standard of 2022: maxpos is 2^(4n − 8)."""
    assert posit(16, 3).values[0b0000110111011101] == 477 / 134217728
    assert posit(16).max == 2.0**56
    assert codebooks.posit8.max == 2.0**24 and codebooks.posit8.min_subnormal == 2.0**-24


def test_logarithmic_steps_are_the_base() -> None:
    fmt = logarithmic("log5", 5)
    values = np.array(fmt.sorted_values)
    assert fmt.bits == 5 and len(values) == 31 and fmt.max == 1.0
    np.testing.assert_array_equal(values, -values[::-1])
    positive = values[16:]
    np.testing.assert_array_equal(positive, np.float32(2.0 ** (np.arange(-14, 1) / 2)))
    wide = logarithmic("wide", 8, base=2.0, largest=2.0**60)
    assert wide.max == 2.0**60 and wide.min_subnormal == 2.0**-66
    assert codebooks.lns8.values[127 - 8] == 0.5  # eight steps of 2^(1/8) below 1


def test_nf4_is_its_published_derivation() -> None:
    """QLoRA, appendix E, with the offset of its code, 0.9677083: quantiles of the normal distribution, scaled to ±1."""
    offset = 0.9677083
    positive = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    negative = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    values = np.sort(np.concatenate([positive, negative, [0.0]])) / positive.max()
    np.testing.assert_allclose(codebooks.nf4.values, values, atol=1e-6, rtol=0)
    assert codebooks.nf4_block64.bits == 4.5


def test_nf4_blocks_scale_to_the_largest_magnitude() -> None:
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    y = Quantizer(codebooks.nf4_block64).quantize(x).reshape(-1, 64)
    largest = x.reshape(-1, 64).abs().amax(1, keepdim=True)
    levels = torch.tensor(codebooks.nf4.values) * largest
    assert (y.unsqueeze(-1) == levels.unsqueeze(1)).any(-1).all()


@pytest.mark.parametrize(
    "name", ["posit8", "lns8", "nf4", "nf4_block64", "binary8p3se", "binary8p4se", "float4_e3m0fn"]
)
def test_named_formats_are_known(name: str) -> None:
    assert formats.get(name).name == name


def test_e3m0_is_powers_of_two() -> None:
    assert reference.values(formats.float4_e3m0fn) == [-(2.0**k) for k in range(4, -3, -1)] + [0.0] + [
        2.0**k for k in range(-2, 5)
    ]


@pytest.mark.parametrize(
    ("bits", "precision", "signed", "extended", "largest", "smallest", "inf", "nan"),
    [  # IEEE P3109's value tables
        (4, 2, True, True, 2.0, 0.25, 0x7, 0x8),
        (4, 2, True, False, 3.0, 0.25, None, 0x8),
        (4, 4, False, True, 1.625, 0.125, 0xE, 0xF),
        (4, 1, False, True, 2.0**5, 2.0**-7, 0xE, 0xF),
        (8, 3, True, True, 49152.0, 2.0**-17, 0x7F, 0x80),
        (8, 4, True, True, 224.0, 2.0**-10, 0x7F, 0x80),
        (8, 4, True, False, 240.0, 2.0**-10, None, 0x80),
        (8, 1, True, True, 2.0**62, 2.0**-63, 0x7F, 0x80),
    ],
)
def test_p3109_landmarks(  # type: ignore[no-untyped-def]
    bits, precision, signed, extended, largest, smallest, inf, nan
) -> None:
    fmt = p3109(bits, precision, signed, extended)
    assert (fmt.bits, fmt.max, fmt.min_subnormal) == (bits, largest, smallest)
    assert fmt.has_inf is extended and fmt.has_nan and not fmt.has_negative_zero
    assert reference.encode(math.nan, fmt) == nan and math.isnan(reference.decode(nan, fmt))
    if inf is not None:
        assert reference.encode(math.inf, fmt) == inf and reference.decode(inf, fmt) == math.inf
        if signed:
            assert reference.decode((1 << bits) - 1, fmt) == -math.inf


def test_p3109_finite_formats_are_fnuz() -> None:
    assert p3109(8, 4, extended=False).specials is Specials.FNUZ
    assert reference.values(p3109(8, 4, extended=False)) == reference.values(formats.float8_e4m3fnuz)
    assert reference.values(p3109(8, 3, extended=False)) == reference.values(formats.float8_e5m2fnuz)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: posit(17), "2 to 16 bits"),
        (lambda: posit(8, 5), "0 to 4 exponent bits"),
        (lambda: posit(16, 4), "not exact in float32"),
        (lambda: logarithmic("x", 4, base=1.0), "base must be above 1"),
        (lambda: logarithmic("x", 17), "2 to 16 bits"),
        (lambda: logarithmic("x", 8, base=4.0), "holds each value once"),
        (lambda: p3109(8, 8), "precision must lie in"),
        (lambda: p3109(17, 8), "bits must lie in"),
    ],
)
def test_refusals(make, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        make()


def test_a_format_nobody_has_takes_one_line() -> None:
    for fmt in (posit(6, 1), logarithmic("log4", 4)):
        assert isinstance(fmt, Codebook)
        x = torch.linspace(-3, 3, 101)
        assert set(Quantizer(fmt).quantize(x).tolist()) <= set(fmt.values)
