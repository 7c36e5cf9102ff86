"""Formats as data: derived constants, codes, JSON, and what is refused."""

import json
import math

import ml_dtypes
import numpy as np
import pytest

from lpsim import formats
from lpsim.formats import BlockFormat, Codebook, FixedFormat, FloatFormat, Specials, reference
from lpsim.formats.rounding import ScaleRule
from tests.laws import BLOCK, ODD_ONES, SCALAR

ML_DTYPES = [name for name in formats.ALL_FORMATS if hasattr(ml_dtypes, name)] + ["float16"]
SMALL = [f for f in SCALAR + ODD_ONES if f.bits <= 16]


def ml_dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_finfo_equals_ml_dtypes(name: str) -> None:
    fmt, info = formats.get(name), ml_dtypes.finfo(ml_dtype(name))
    assert fmt.max == float(info.max)
    assert fmt.min_normal == float(info.smallest_normal)
    assert fmt.bits == info.bits
    if fmt.subnormals:
        assert fmt.min_subnormal == float(info.smallest_subnormal)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_every_code_decodes_as_in_ml_dtypes(name: str) -> None:
    fmt, dtype = formats.get(name), ml_dtype(name)
    bytes_per_code = np.uint8 if dtype.itemsize == 1 else np.uint16
    codes = np.arange(2**fmt.bits)
    with np.errstate(invalid="ignore"):  # signalling NaNs among the codes
        expected = codes.astype(bytes_per_code).view(dtype).astype(np.float64)
    actual = np.array([reference.decode(int(c), fmt) for c in codes])
    np.testing.assert_array_equal(actual, expected)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.signbit(actual[finite]), np.signbit(expected[finite]))


@pytest.mark.parametrize("fmt", SMALL, ids=lambda f: f.name)
def test_encode_inverts_decode(fmt) -> None:
    canonical = set()
    for code in range(len(fmt.values) if isinstance(fmt, Codebook) else 2**fmt.bits):
        value = reference.decode(code, fmt)
        if math.isnan(value):
            assert math.isnan(reference.decode(reference.encode(value, fmt), fmt))
        elif math.isinf(value) or fmt.min <= value <= fmt.max:  # a symmetric integer leaves its lowest code out
            encoded = reference.encode(value, fmt)
            assert reference.decode(encoded, fmt) == value
            # without subnormals several codes mean zero; the first is the canonical one
            assert encoded == code or encoded in canonical
            canonical.add(encoded)


@pytest.mark.parametrize("fmt", SCALAR + BLOCK + ODD_ONES, ids=lambda f: f.name)
def test_json_round_trip_and_hash(fmt) -> None:
    again = formats.from_dict(json.loads(json.dumps(formats.to_dict(fmt))))
    assert again == fmt and hash(again) == hash(fmt)


def test_constants_stated_by_the_specifications() -> None:
    """OCP OFP8 v1.0 table 2, OCP MX v1.0 tables 3-5: max, min normal, min subnormal."""
    f = formats
    stated = {
        f.float8_e4m3fn: (448.0, 2.0**-6, 2.0**-9),
        f.float8_e5m2: (57344.0, 2.0**-14, 2.0**-16),
        f.float6_e3m2fn: (28.0, 0.25, 0.0625),
        f.float6_e2m3fn: (7.5, 1.0, 0.125),
        f.float4_e2m1fn: (6.0, 1.0, 0.5),
        f.float8_e8m0fnu: (2.0**127, 2.0**-127, 2.0**-127),
    }
    for fmt, constants in stated.items():
        assert (fmt.max, fmt.min_normal, fmt.min_subnormal) == constants
    assert [f.mxfp8_e4m3.bits, f.mxfp6_e3m2.bits, f.mxfp4_e2m1.bits, f.nvfp4.bits] == [8.25, 6.25, 4.25, 4.5]
    assert [f.mx9.bits, f.mx6.bits, f.mx4.bits, f.msfp16.bits, f.msfp12.bits] == [9, 6, 4, 8.5, 4.5]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FloatFormat("", 3, 2), "name"),
        (lambda: FloatFormat("f", 0, 2), "exponent_bits"),
        (lambda: FloatFormat("f", 3, -1), "mantissa_bits"),
        (lambda: FloatFormat("f", 3, 2, specials=Specials.FNUZ, signed=False), "FNUZ"),
        (lambda: FloatFormat("f", 1, 2), "no normal number"),
        (lambda: FloatFormat("f", 5, 2, bias=1200), "float64"),
        (lambda: FloatFormat("f", 3, 2, signed=False, zero=False), "subnormals=False"),
        (lambda: FloatFormat("f", 3, 2, subnormals=False, zero=False), "signed=False"),
        (lambda: FixedFormat("f", 1, 0), "bits"),
        (lambda: Codebook("f", (1.0,)), "2 to 65536"),
        (lambda: Codebook("f", (0.0, math.nan)), "finite"),
        (lambda: Codebook("f", (0.0, -0.0, 1.0)), "once"),
        (lambda: Codebook("f", (0.0, 0.1)), "numpy.float32"),
        (lambda: BlockFormat("f", formats.float4_e2m1fn, formats.float8_e8m0fnu, block_size=-1), "block_size"),
        (lambda: BlockFormat("f", formats.float4_e2m1fn, formats.float8_e8m0fnu, block_size=(0, 4)), "block_size"),
        (
            lambda: BlockFormat("f", formats.float4_e2m1fn, formats.float8_e8m0fnu, scale_rule=ScaleRule.ROUND),
            "FLOOR, CEIL, RCEIL or EVEN",
        ),
        (
            lambda: BlockFormat("f", formats.float4_e2m1fn, FloatFormat("s", 2, 0, bias=9, specials=Specials.NONE)),
            "2^0",
        ),
        (lambda: formats.get("mxfp6_e3m3"), "mxfp6_e3m2"),
        (lambda: formats.get("MXFP4"), "did you mean mxfp4_e2m1?"),
        (lambda: formats.get("nonsense"), "known"),
        (lambda: formats.from_dict({"kind": "other"}), "known"),
        (lambda: formats.register(FloatFormat("bfloat16", 5, 2)), "another name"),
    ],
)
def test_contradictions_are_refused_with_what_would_be_right(build, message: str) -> None:
    with pytest.raises(ValueError, match="(?s).*" + message.replace("^", r"\^")):
        build()


def test_wrong_types_are_refused() -> None:
    with pytest.raises(TypeError, match="mantissa_bits"):
        FloatFormat("f", 3, 2.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="element"):
        BlockFormat("f", formats.mxfp4_e2m1, formats.float8_e8m0fnu)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="format"):
        formats.register("mxfp4_e2m1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        *(
            (lambda flag=flag: FloatFormat("f", 2, 2, **{flag: "no"}), flag)
            for flag in ("signed", "subnormals", "zero")
        ),
        (lambda: FixedFormat("f", 4, 2, symmetric=1), "symmetric"),
        (lambda: formats.p3109(8, 3, signed=0), "signed"),
        (lambda: formats.p3109(8, 3, extended=None), "extended"),
    ],
)
def test_flags_are_true_or_false(build, message: str) -> None:
    with pytest.raises(TypeError, match=f"{message} must be True or False"):
        build()


@pytest.mark.parametrize("values", [("1", 2.0), "12", (None, 1.0), 3])
def test_a_codebook_holds_numbers(values) -> None:
    with pytest.raises(TypeError, match="f: values must be a tuple of numbers"):
        Codebook("f", values)


def test_scales_that_are_0_in_float32_are_refused() -> None:
    deep = FloatFormat("deep", 8, 0, bias=151, specials=Specials.FN, signed=False, subnormals=False, zero=False)
    with pytest.raises(ValueError, match=r"deep goes down to 2\^-151, which is 0 in float32; .* at least 2\^-149"):
        BlockFormat("below", formats.float6_e3m2fn, deep)
