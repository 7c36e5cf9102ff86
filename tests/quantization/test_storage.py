"""Storage: decode(encode(x)) is quantize(x) bit for bit; codes are the oracle's, and torch's where it has the type."""

from __future__ import annotations

import dataclasses
import io
import math

import numpy as np
import pytest
import torch

from lpsim import (
    BlockFormat,
    Codebook,
    FixedFormat,
    FloatFormat,
    Key,
    Overflow,
    Quantizer,
    Rounding,
    ScaleRule,
    Specials,
    decode,
    encode,
    formats,
)
from lpsim.formats import reference
from lpsim.quantization.storage import block_scales, pack, unpack
from tests.laws import BLOCK, ODD_ONES, SCALAR, assert_same_bits, hostile_tensors

E2M2 = FloatFormat("e2m2", 2, 2, specials=Specials.NONE)
TILES = BlockFormat("tiles", formats.float6_e3m2fn, formats.float8_e8m0fnu, block_size=(2, 3))
WHOLE = BlockFormat("whole", E2M2, formats.float8_e8m0fnu, block_size=None, scale_rule=ScaleRule.CEIL)
AXIS = BlockFormat("axis", formats.int4_q2, formats.bfloat16, block_size=0, scale_rule=ScaleRule.ROUND)
RCEIL = dataclasses.replace(formats.mxfp4_e2m1, name="rceil", scale_rule=ScaleRule.RCEIL, block_size=5)
EVEN = dataclasses.replace(formats.mxfp8_e4m3, name="even", scale_rule=ScaleRule.EVEN, block_size=7)


def half_amax(amax: float, element: object) -> float:
    return amax / 2


OWN = BlockFormat("own", formats.float4_e2m1fn, formats.float8_e4m3fn, block_size=4, scale_rule=half_amax)
PARTS = BlockFormat(
    "parts", formats.float4_e2m1fn, formats.float8_e8m0fnu, 24, ScaleRule.CEIL, sub_block_size=4, microexponent_bits=2
)
BLOCKS = [*BLOCK, TILES, WHOLE, AXIS, RCEIL, EVEN, OWN, PARTS]


def without_nan(x: torch.Tensor, fmt: object) -> torch.Tensor:
    """x as it is where the format has codes for NaN, else without NaN and Inf."""
    has_nan = fmt.scale.has_nan if isinstance(fmt, BlockFormat) else fmt.has_nan
    return x if has_nan else torch.nan_to_num(x, nan=0.0, posinf=1.0, neginf=-1.0)


@pytest.mark.parametrize("fmt", [*SCALAR, *ODD_ONES, *BLOCKS], ids=lambda fmt: fmt.name)
def test_round_trip_is_quantize(fmt: object) -> None:
    for array in hostile_tensors((5, 33)):
        x = without_nan(torch.from_numpy(array), fmt)
        for axis in (0, -1) if isinstance(fmt, BlockFormat) else (-1,):
            expected = Quantizer(fmt).quantize(x, axis)
            assert_same_bits(decode(encode(x, fmt, axis)).numpy(), expected.numpy(), f"{fmt.name}, axis {axis}")


@pytest.mark.parametrize(
    "fmt", [formats.nvfp4, formats.mxfp6_e3m2, RCEIL, formats.float8_e5m2, OWN], ids=lambda f: f.name
)
@pytest.mark.parametrize("rounding", Rounding, ids=lambda r: r.name)
def test_round_trip_in_every_rounding(fmt: object, rounding: Rounding) -> None:
    q, key = Quantizer(fmt, rounding), Key(7, offset=5)
    for array in hostile_tensors((4, 37)):
        x = torch.from_numpy(array)
        assert_same_bits(decode(encode(x, q, key=key)).numpy(), q.quantize(x, key=key).numpy(), rounding.name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fmt", [formats.float8_e4m3fn, formats.bfloat16, formats.mxfp8_e5m2, formats.nvfp4, TILES])
def test_round_trip_in_every_dtype(fmt: object, dtype: torch.dtype) -> None:
    for array in hostile_tensors((6, 35), np.float64):
        x = torch.from_numpy(array).to(dtype)
        actual, expected = decode(encode(x, fmt)), Quantizer(fmt).quantize(x)
        assert actual.dtype is dtype
        assert_same_bits(actual.double().numpy(), expected.double().numpy(), f"{fmt.name} {dtype}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fmt", [*SCALAR, *ODD_ONES, *BLOCKS], ids=lambda fmt: fmt.name)
def test_a_gpu_stores_the_same_bytes(fmt: object) -> None:
    for array in hostile_tensors((5, 33)):
        x = without_nan(torch.from_numpy(array), fmt)
        for axis in (0, -1) if isinstance(fmt, BlockFormat) else (-1,):
            here, there = encode(x, fmt, axis), encode(x.cuda(), fmt, axis)
            for name in ("codes", "scales", "tensor_scale", "microexponents"):
                assert torch.equal(getattr(there, name).cpu(), getattr(here, name)), f"{fmt.name}, axis {axis}, {name}"
            assert_same_bits(decode(there).cpu().numpy(), decode(here).numpy(), f"{fmt.name}, axis {axis}")


def test_overflow_to_special_keeps_infinities() -> None:
    q = Quantizer(formats.float8_e5m2, overflow=Overflow.SPECIAL)
    x = torch.tensor([1e9, -math.inf, math.nan, 3.0, -0.0])
    assert_same_bits(decode(encode(x, q)).numpy(), q.quantize(x).numpy())


@pytest.mark.parametrize("fmt", [f for f in [*SCALAR, *ODD_ONES] if f.bits <= 8], ids=lambda fmt: fmt.name)
def test_codes_are_the_oracle_s(fmt: object) -> None:
    count = len(fmt.values) if isinstance(fmt, Codebook) else 1 << fmt.bits
    values = [reference.decode(code, fmt) for code in range(count)]
    kept = [v for v in values if (math.isfinite(v) and fmt.min <= v <= fmt.max) or (math.isnan(v) and fmt.has_nan)]
    encoded = encode(torch.tensor(kept, dtype=torch.float64), fmt)
    codes = unpack(encoded.codes, fmt.bits, len(kept)).tolist()
    assert codes == [reference.encode(v, fmt) for v in kept]


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [
        (formats.float8_e4m3fn, torch.float8_e4m3fn),
        (formats.float8_e5m2, torch.float8_e5m2),
        (formats.float8_e4m3fnuz, torch.float8_e4m3fnuz),
        (formats.float8_e5m2fnuz, torch.float8_e5m2fnuz),
        (formats.float16, torch.float16),
        (formats.bfloat16, torch.bfloat16),
        (formats.float32, torch.float32),
    ],
    ids=lambda p: str(p) if isinstance(p, torch.dtype) else p.name,
)
def test_codes_are_torch_s_own(fmt: FloatFormat, dtype: torch.dtype) -> None:
    """Within the format's range, where torch has no other overflow policy."""
    x = torch.from_numpy(hostile_tensors((7, 41))[0]).clamp(-fmt.max, fmt.max)
    codes = encode(x, fmt).codes
    assert torch.equal(codes, x.to(dtype).contiguous().view(torch.uint8).reshape(-1))


def test_four_bits_lie_as_in_torch_s_packed_type() -> None:
    encoded = encode(torch.tensor([0.5, -6.0, 1.5]), formats.float4_e2m1fn)
    assert encoded.codes.tolist() == [0xF1, 0x03]  # codes 1, 15, 3: the first in the low half


def test_mx_scales_are_e8m0_codes() -> None:
    """OCP MX v1.0 §5.4.1: bias 127, 0xFF is NaN."""
    x = torch.tensor([[28.0, -1.0, math.nan, 1.0], [0.0, 0.0, 2.0**-130, 0.0]])
    fmt = dataclasses.replace(formats.mxfp6_e3m2, name="pairs", block_size=2)
    encoded = encode(x, fmt)
    assert encoded.grid == (2, 2)
    assert encoded.scales.tolist() == [127, 255, 0, 0]
    assert encoded.codes.tolist()[:3] == [0b011111 | (0b101100 & 3) << 6, 0b101100 >> 2, 0]


@pytest.mark.parametrize(
    ("fmt", "shape", "bits"),
    [
        (formats.mxfp6_e3m2, (8, 64), 6.25),
        (formats.mxfp4_e2m1, (8, 64), 4.25),
        (formats.mxfp8_e4m3, (8, 64), 8.25),
        (formats.nvfp4, (8, 64), 4.5 + 32 / 512),
        (formats.float6_e2m3fn, (8, 64), 6),
        (E2M2, (8, 64), 5),
        (formats.bfloat16, (8, 64), 16),
        (formats.mxfp4_e2m1, (1, 33), (17 + 2) * 8 / 33),  # a padded half byte, a short block
        (formats.mxfp4_e2m1, (3, 1), (2 + 3) * 8 / 3),
    ],
)
def test_bits_per_element_count_every_stored_byte(fmt: object, shape: tuple[int, ...], bits: float) -> None:
    encoded = encode(torch.ones(shape), fmt)
    assert encoded.bits_per_element == bits
    assert math.isnan(encode(torch.ones(0, 4), fmt).bits_per_element)


@pytest.mark.parametrize("bits", range(1, 33))
def test_packing_is_a_string_of_bits(bits: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, 27)
    packed = pack(torch.from_numpy(codes), bits)
    string = sum(int(code) << (bits * place) for place, code in enumerate(codes))
    assert bytes(packed.tolist()) == string.to_bytes(-(-27 * bits // 8), "little")
    assert unpack(packed, bits, 27).tolist() == codes.tolist()


@pytest.mark.parametrize("fmt", BLOCKS, ids=lambda fmt: fmt.name)
def test_scales_are_the_oracle_s(fmt: BlockFormat) -> None:
    for array in hostile_tensors((5, 33)):
        flat = array.reshape(-1)
        amax = float(np.abs(flat).max())
        broken = fmt.tensor_scale is not None and not math.isfinite(amax)
        second = math.nan if broken else reference.tensor_scale(amax, fmt)
        expected = []
        for block in reference.block_indices(array.shape, fmt, 1):
            largest = float(np.abs(flat[block]).max())
            known = math.isfinite(largest) and not broken
            expected.append(reference.block_scale(largest, fmt, second) if known else math.nan)
        scale, outer = block_scales(torch.from_numpy(array), fmt, 1)
        np.testing.assert_array_equal(scale.reshape(-1).double().numpy(), expected)
        if fmt.tensor_scale is not None:
            np.testing.assert_array_equal(outer.double().numpy(), second)


@pytest.mark.parametrize("fmt", [formats.mxfp6_e3m2, TILES, WHOLE, AXIS, formats.nvfp4, formats.float6_e3m2fn])
def test_layouts(fmt: object) -> None:
    base = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    layouts = [base.t(), base[:, ::3], base[0, 0], base[:0], base[:, :0], base[0].expand(4, 40), base.requires_grad_()]
    for x in layouts:
        assert_same_bits(decode(encode(x, fmt)).numpy(), Quantizer(fmt).quantize(x).numpy())


def test_refusals() -> None:
    with pytest.raises(ValueError, match="float6_e3m2fn has no code for NaN"):
        encode(torch.tensor([math.nan]), formats.float6_e3m2fn)
    with pytest.raises(ValueError, match="keep the tensor itself"):
        encode(torch.ones(2), FloatFormat("float64", 11, 52))
    with pytest.raises(ValueError, match="needs a key"):
        encode(torch.ones(2), Quantizer(formats.float8_e5m2, Rounding.STOCHASTIC))
    with pytest.raises(TypeError, match="tensor is quantized"):
        encode(torch.ones(2, dtype=torch.int32), formats.float8_e5m2)
    with pytest.raises(TypeError, match="format must be a format"):
        encode(torch.ones(2), "float8_e5m2")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dense tensors with values .*, got a torch.sparse_coo tensor"):
        encode(torch.ones(2).to_sparse(), formats.float8_e5m2)
    with pytest.raises(TypeError, match="decode takes what encode gives, an Encoded, got Tensor"):
        decode(torch.ones(2))  # type: ignore[arg-type]


@pytest.mark.parametrize("fmt", [*SCALAR, *ODD_ONES, *BLOCKS], ids=lambda fmt: fmt.name)
def test_torch_saves_and_loads_it(fmt: object) -> None:
    encoded = encode(torch.linspace(0, 3, 48).reshape(2, 24).bfloat16(), fmt)
    torch.save(encoded, file := io.BytesIO())
    file.seek(0)
    with torch.serialization.safe_globals([half_amax] if fmt is OWN else []):
        loaded = torch.load(file, weights_only=True)
    assert loaded.format == fmt and torch.equal(decode(loaded), decode(encoded))


def test_codes_are_exact_where_float32_is_not() -> None:
    """The largest 32-bit integer is stored as such and rounded to float32 only on the way back, as quantize does."""
    fmt, x = FixedFormat("int32", 32, 0), torch.tensor([-3.0, 2.0**31])
    encoded = encode(x, fmt)
    assert bytes(encoded.codes.tolist()) == (2**32 - 3).to_bytes(4, "little") + (2**31 - 1).to_bytes(4, "little")
    assert torch.equal(decode(encoded), Quantizer(fmt).quantize(x))
