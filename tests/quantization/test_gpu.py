"""The Triton backend against the oracle: in Triton's interpreter, or on the GPU where there is one (see conftest)."""

import json

import numpy as np
import pytest
import torch

from lpsim import Key, Overflow, Quantizer, Rounding, ScaleRule, formats
from lpsim.formats import BlockFormat, Codebook, FixedFormat, FloatFormat, reference
from lpsim.quantization.quantizer import backend
from tests.formats.test_golden import ELEMENTS, FOLDER, ROUNDINGS, expected_output
from tests.laws import ODD_ONES, SCALAR, assert_same_bits, critical_inputs, hostile_tensors, pairs

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KEY = Key(seed=2**40 + 5, stream=2**32 - 1, step=9, offset=256)
TYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def triton(
    x: torch.Tensor, fmt: formats.Format, axis: int = 0, rounding: Rounding = Rounding.TIES_TO_EVEN, **rest
) -> torch.Tensor:
    """x quantized by the backend under test. rest: overflow, random_bits, key."""
    key = rest.pop("key", KEY)
    return Quantizer(fmt, rounding, backend="triton", **rest)(x.to(DEVICE), axis=axis, key=key).cpu()


def assert_equals_the_oracle(
    x: torch.Tensor, fmt: formats.Format, axis: int = 0, rounding: Rounding = Rounding.TIES_TO_EVEN, **rest
) -> None:
    """Bit equality with reference.quantize on a tensor of any float type and layout."""
    actual = triton(x, fmt, axis, rounding, **dict(rest))
    assert actual.dtype is x.dtype and actual.shape == x.shape
    wide = torch.float64 if x.dtype is torch.float64 else torch.float32
    key = rest.pop("key", KEY)
    array = np.ascontiguousarray(x.detach().to(wide).numpy()).reshape(tuple(x.shape))
    expected = torch.from_numpy(reference.quantize(array, fmt, axis, rounding, key=key, **rest)).to(x.dtype)
    actual = actual.detach()
    what = f"{fmt.name} {tuple(x.shape)} {x.dtype} axis {axis} {rounding.name} {rest}"
    assert_same_bits(actual.to(wide).numpy(), expected.to(wide).numpy(), what)


def overflows(fmt: formats.Format) -> list[Overflow]:
    return list(Overflow) if fmt.has_inf or fmt.has_nan else [Overflow.SATURATE]


# ---------------------------------------------------------------------------------------------- formats


@pytest.mark.parametrize("fmt", [f for f in [*SCALAR, *ODD_ONES] if f.bits <= 8], ids=lambda f: f.name)
def test_every_rounding_of_a_small_format(fmt) -> None:
    """On every value, midpoint and neighbour in float32."""
    x = torch.from_numpy(critical_inputs(fmt))
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:600]] if len(x) > 600 else x
    for rounding, overflow in pairs(Rounding, overflows(fmt)):
        quantizer = Quantizer(fmt, rounding, overflow)
        if backend("triton").supports(quantizer, DEVICE):
            assert_equals_the_oracle(x, fmt, rounding=rounding, overflow=overflow)


@pytest.mark.full
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("fmt", [f for f in [*SCALAR, *ODD_ONES] if f.bits <= 16], ids=lambda f: f.name)
def test_every_rounding_of_every_format_and_type(fmt, dtype: str) -> None:
    number = np.float64 if dtype == "float64" else np.float32
    x = torch.from_numpy(np.concatenate([critical_inputs(fmt, number)[::7], *hostile_tensors((200,), number)]))
    for rounding, overflow in pairs(Rounding, overflows(fmt)):
        if backend("triton").supports(Quantizer(fmt, rounding, overflow), DEVICE):
            assert_equals_the_oracle(x.to(TYPES[dtype]), fmt, rounding=rounding, overflow=overflow)


@pytest.mark.parametrize("fmt", [f for f in SCALAR if f.bits > 8], ids=lambda f: f.name)
def test_wide_formats_on_hostile_tensors(fmt) -> None:
    x = np.concatenate(hostile_tensors((40,)))
    for turn, (rounding, overflow) in enumerate(pairs(Rounding, overflows(fmt))):
        assert_equals_the_oracle(
            torch.from_numpy(x.astype((np.float32, np.float64)[turn % 2])), fmt, rounding=rounding, overflow=overflow
        )


def a_third(amax: float, element: object) -> float:
    """A user's own scale rule."""
    return amax / 3


BLOCK_ELEMENTS = [
    formats.float6_e3m2fn,
    formats.float4_e2m1fn,
    formats.int8_q6,
    formats.bfloat16,
    *(f for f in ODD_ONES if f.name in ("e4m3_flushed", "e3m0", "e3m2_unsigned", "log_sqrt2", "no_zero")),
]
SCALES = [
    *((formats.float8_e8m0fnu, rule, None) for rule in ScaleRule if rule is not ScaleRule.ROUND),
    (formats.float8_e4m3fn, ScaleRule.ROUND, formats.float32),
    (formats.float8_e4m3fn, ScaleRule.FLOOR, None),
    (formats.float32, ScaleRule.ROUND, None),
    (FloatFormat("far", 8, 0, bias=150), ScaleRule.RCEIL, None),
    (formats.float8_e8m0fnu, a_third, formats.bfloat16),
]
BLOCK_SIZES = (8, 32, 5, 0, None, (3, 5), (1, 4), (4, 1))


def block_cases():  # type: ignore[no-untyped-def]
    """Every element with every scale; block sizes, tensors, axes, roundings and types take turns of coprime lengths."""
    tensors = hostile_tensors((2, 3, 37))
    for turn, (element, scale) in enumerate(pairs(BLOCK_ELEMENTS, SCALES)):
        for more in range(2):
            n = 2 * turn + more
            fmt = BlockFormat("b", element, scale[0], BLOCK_SIZES[n % 8], scale[1], scale[2])
            x = torch.from_numpy(tensors[n // 2 % 6]).to(list(TYPES.values())[n // 9 % 4])
            yield x, fmt, n % 3, list(Rounding)[n % 7]


@pytest.mark.parametrize(
    ("fmt", "shape", "axis"),
    [
        (formats.mx9, (3, 37), 1),
        (formats.mx9, (37, 3), 0),
        (BlockFormat("b", formats.int8_q6, formats.float8_e8m0fnu, 12, ScaleRule.CEIL, None, 4, 3), (2, 5, 27), 1),
        (BlockFormat("b", ODD_ONES[-1], formats.float8_e8m0fnu, 9, ScaleRule.RCEIL, None, 1, 2), (2, 2, 27), 2),
        (
            BlockFormat(
                "b", formats.float4_e2m1fn, formats.float8_e8m0fnu, 20480, sub_block_size=128, microexponent_bits=1
            ),
            (20481,),
            0,
        ),
    ],
)
def test_sub_blocks(fmt: BlockFormat, shape: tuple[int, ...], axis: int) -> None:
    for turn, x in enumerate(hostile_tensors(shape)[: 1 if len(shape) == 1 else None]):
        rounding = Rounding.STOCHASTIC if turn == 1 else Rounding.TIES_TO_EVEN
        assert_equals_the_oracle(torch.from_numpy(x).to(list(TYPES.values())[turn % 4]), fmt, axis, rounding)


def test_blocks_of_every_kind() -> None:
    for case in block_cases():
        assert_equals_the_oracle(*case)


@pytest.mark.full
@pytest.mark.parametrize("size", BLOCK_SIZES, ids=str)
@pytest.mark.parametrize("scale", range(len(SCALES)))
def test_blocks_of_every_kind_in_all_combinations(scale: int, size: int | tuple[int, int] | None) -> None:
    """By what the kernels are compiled for: the elements share them, so that no two processes compile the same."""
    tensors = hostile_tensors((2, 3, 37))
    turn = 7 * (scale * len(BLOCK_SIZES) + BLOCK_SIZES.index(size))
    for element, (n, rounding) in pairs(BLOCK_ELEMENTS, list(enumerate(Rounding))):
        fmt = BlockFormat("b", element, SCALES[scale][0], size, SCALES[scale][1], SCALES[scale][2])
        assert_equals_the_oracle(torch.from_numpy(tensors[(turn + n) % 6]), fmt, turn // 7 % 3, rounding)


@pytest.mark.parametrize("fmt", formats.ALL_FORMATS.values(), ids=lambda f: f.name)
def test_every_named_format_in_every_rounding_and_type_on_every_axis(fmt) -> None:
    """All of it on a GPU; in the interpreter, where a call takes milliseconds, each format takes a turn."""
    turns, shape = (1, (3, 40, 96)) if DEVICE.type == "cuda" else (84, (2, 5, 33))
    tensors = hostile_tensors(shape)
    first = list(formats.ALL_FORMATS).index(fmt.name) % turns
    for turn, (rounding, dtype, axis) in enumerate(pairs(Rounding, TYPES.values(), range(3))):
        quantizer = Quantizer(fmt, rounding)
        if turn % turns == first and backend("triton").supports(quantizer, DEVICE):
            x = torch.from_numpy(tensors[turn % 6]).to(dtype)
            expected = quantizer(x, axis, key=KEY)  # by the CPU's kernels, which are compared with the oracle elsewhere
            actual = triton(x, fmt, axis, rounding)
            assert_same_bits(
                actual.double().numpy(), expected.double().numpy(), f"{fmt.name} {rounding} {dtype} {axis}"
            )


@pytest.mark.parametrize(
    ("shape", "axis", "block_size"),
    [
        ((2, 20000), 1, 0),
        ((20000, 2), 0, 0),
        ((700, 40), 0, 0),
        ((2, 300, 130), 0, (150, 128)),
        ((1, 40000), 0, (1, 17000)),
        ((19999,), 0, None),
        ((9, 4097), 0, None),
        ((7, 2500), 1, 32),
        ((70, 300), 0, 32),
    ],
)
def test_tiles_larger_than_a_program_and_programs_of_many_tiles(shape, axis: int, block_size) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, shape[-1])
    for scale, rule in ((formats.float8_e8m0fnu, ScaleRule.FLOOR), (formats.float8_e4m3fn, ScaleRule.ROUND)):
        fmt = BlockFormat("b", formats.float6_e3m2fn, scale, block_size, rule)
        expected = Quantizer(fmt, Rounding.STOCHASTIC, backend="numba")(x, axis, key=KEY)
        assert_same_bits(triton(x, fmt, axis, Rounding.STOCHASTIC).numpy(), expected.numpy(), f"{rule}")
    x.view(-1)[-1] = torch.nan
    assert_same_bits(triton(x, fmt, axis).numpy(), Quantizer(fmt, backend="numba")(x, axis).numpy())


# ---------------------------------------------------------------------------------------------- random bits


@pytest.mark.parametrize("random_bits", [1, 2, 4, 8, 15, 16, 17, 31, None])
def test_stochastic_bits_are_the_oracle_s(random_bits: int | None) -> None:
    """Aligned and not; in blocks of rows and of columns; with offsets beyond 32 bits; in two halves."""
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    for fmt, axis in ((formats.mxfp4_e2m1, 0), (formats.mxfp4_e2m1, 1), (formats.float8_e4m3fn, 0), (ODD_ONES[-1], 0)):
        for offset in (0, 77, 2**39 + 128):
            key = Key(2**63 + 11, stream=1, step=2**32 - 1, offset=offset)
            assert_equals_the_oracle(x, fmt, axis, Rounding.STOCHASTIC, key=key, random_bits=random_bits)
    fmt, key = formats.mxfp6_e3m2, Key(3)
    whole = triton(x, fmt, 1, Rounding.STOCHASTIC, key=key, random_bits=random_bits)
    halves = [
        triton(part, fmt, 1, Rounding.STOCHASTIC, key=Key(3, offset=start), random_bits=random_bits)
        for part, start in ((x[:3], 0), (x[3:], 3 * 128))
    ]
    assert torch.equal(torch.cat(halves), whole)


@pytest.mark.parametrize(
    "fmt", [formats.float4_e2m1fn, formats.bfloat16, Codebook("c", (0.0, 1.0, 1.5, 2.0))], ids=lambda f: f.name
)
def test_the_lower_half_of_a_word_decides_where_the_upper_half_cannot(fmt) -> None:
    """x between 1 and the next value so that the upper 16 bits of its fraction and of its word add up to 2^16 − 1."""
    gap = 2.0**-7 if fmt is formats.bfloat16 else 0.5
    words = np.array([reference.random_word(KEY, i) for i in range(512)])
    fraction = (0xFFFF - (words >> 16)) / 2**16 + np.arange(512) % 64 / 2**22
    for dtype, bits in ((np.float64, None), (np.float64, 20), (np.float32, None)):
        x = (1 + gap * fraction).astype(dtype)
        rounded = triton(torch.from_numpy(x), fmt, rounding=Rounding.STOCHASTIC, random_bits=bits)
        assert len(rounded.unique()) == 2
        assert_equals_the_oracle(torch.from_numpy(x), fmt, rounding=Rounding.STOCHASTIC, random_bits=bits)


# ---------------------------------------------------------------------------------------------- tensors


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "transposed": x.mT,
        "strided": x.repeat_interleave(2, dim=1)[:, ::2],
        "flipped": x.flip(0),
        "expanded": x[:, :1].expand(-1, 10),
        "permuted": x.reshape(2, 3, -1).permute(1, 2, 0),
        "empty": x[:0],
        "0-d": x[0, 0],
        "1-d": x[0],
        "one column": x[:, :1].contiguous(),
        "gradient": x.clone().requires_grad_(),
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(6, 24)))
def test_every_layout(layout: str) -> None:
    x = layouts(torch.randn(6, 24, generator=torch.Generator().manual_seed(3)))[layout]
    tiles = BlockFormat("tiles", formats.float6_e3m2fn, formats.float8_e8m0fnu, (5, 7))
    for axis in range(max(x.dim(), 1)):
        for fmt in (formats.mxfp4_e2m1, formats.nvfp4, tiles, formats.float8_e5m2):
            for rounding in (Rounding.TIES_TO_EVEN, Rounding.STOCHASTIC):
                assert_equals_the_oracle(x, fmt, axis, rounding)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_numbers(dtype: torch.dtype) -> None:
    """Read and written without loss, and rounded to nearest even where the result needs more bits (NVFP4)."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    for fmt in (
        formats.mxfp6_e2m3,
        formats.float32,
        BlockFormat("b", formats.int8_q6, formats.float8_e4m3fn, 16, ScaleRule.ROUND),
    ):
        expected = Quantizer(fmt, backend="numba")(x)
        assert_same_bits(triton(x, fmt).float().numpy(), expected.float().numpy(), f"{fmt.name}")


def test_out_and_in_place() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    whole = BlockFormat("whole", formats.float8_e4m3fn, formats.float8_e8m0fnu, None)
    for fmt, rounding in pairs(
        (formats.mxfp6_e3m2, formats.nvfp4, whole, formats.float8_e4m3fn), (Rounding.STOCHASTIC, Rounding.TO_ODD)
    ):
        quantizer = Quantizer(fmt, rounding, backend="triton")
        expected = quantizer.quantize(x, key=KEY)
        in_place, strided = x.clone(), torch.empty(8, 128, device=DEVICE)[:, ::2]
        assert quantizer.quantize(in_place, key=KEY, out=in_place) is in_place
        assert quantizer.quantize(x, key=KEY, out=strided) is strided
        assert torch.equal(in_place, expected) and torch.equal(strided, expected)


@pytest.mark.parametrize("distance", [1, 64])
def test_out_may_overlap_the_input(distance: int) -> None:
    memory = torch.randn(4096 + distance, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    quantizer = Quantizer(formats.mxfp6_e3m2, backend="triton")
    expected = quantizer.quantize(memory[:4096].clone())
    quantizer.quantize(memory[:4096], out=memory[distance:])
    assert torch.equal(memory[distance:], expected)


def test_what_is_not_served_says_so() -> None:
    served = backend("triton").supports
    assert not served(Quantizer(formats.float8_e8m0fnu, overflow=Overflow.SPECIAL), DEVICE)
    assert not served(Quantizer(FixedFormat("q32", 32, 0)), DEVICE)
    assert not served(Quantizer(FloatFormat("e11m52", 11, 52)), DEVICE)
    assert not served(Quantizer(formats.mxfp4_e2m1), torch.device("meta"))
    with pytest.raises(ValueError, match="does not serve"):
        triton(torch.ones(1), FixedFormat("q32", 32, 0))


# ---------------------------------------------------------------------------------------------- golden vectors


def assert_golden(cases: list[dict]) -> None:
    arrays = np.load(FOLDER / "microxcaling.npz")
    for case in cases:
        fmt = BlockFormat("golden", ELEMENTS[case["element"]], formats.float8_e8m0fnu, block_size=case["block_size"])
        x = arrays[case["x"]]
        expected = expected_output(x, arrays[case["key"]], fmt.element.has_negative_zero)
        actual = triton(torch.from_numpy(x), fmt, case["axis"], ROUNDINGS[case["round"]])
        assert_same_bits(actual.numpy(), expected, str(case))


GOLDEN = json.loads((FOLDER / "microxcaling.json").read_text())


def test_golden_vectors() -> None:
    """A fifth of them: of every input, element, rounding and kind of block some."""
    some = GOLDEN[::5]
    for name in ("x", "element", "round", "axis", "block_size"):
        assert {case[name] for case in some} == {case[name] for case in GOLDEN}
    assert_golden(some)


@pytest.mark.full
def test_all_golden_vectors() -> None:
    assert len(GOLDEN) == 378
    assert_golden(GOLDEN)
