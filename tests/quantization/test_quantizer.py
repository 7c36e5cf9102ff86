"""Quantizer on the CPU: equality with the oracle, layouts, dtypes, random bits, gradients, bad input."""

import itertools
import multiprocessing
import warnings

import numpy as np
import pytest
import torch

from lpsim import Key, Overflow, Quantizer, Rounding, ScaleRule, available_backends, encode, formats
from lpsim.formats import BlockFormat, Codebook, FixedFormat, FloatFormat, Specials, reference
from lpsim.quantization import cpu, plan
from tests.laws import ODD_ONES, SCALAR, assert_same_bits, critical_inputs, hostile_tensors, pairs

KEY = Key(seed=5, stream=7, step=9, offset=300)
ELEMENTS = [f for f in SCALAR if f.bits <= 19] + ODD_ONES
FEW = [
    formats.float6_e3m2fn,
    formats.float4_e2m1fn,
    formats.int8_q6,
    formats.bfloat16,
    *(f for f in ODD_ONES if f.name in ("e4m3_flushed", "e3m0", "q4_3", "log_sqrt2", "no_zero")),
]


def amax_over_three(amax: float, element: object) -> float:
    """A user's own scale rule."""
    return amax / 3


SCALES = [
    *((formats.float8_e8m0fnu, rule, None) for rule in ScaleRule if rule is not ScaleRule.ROUND),
    (formats.float8_e4m3fn, ScaleRule.ROUND, formats.float32),
    (formats.float8_e4m3fn, ScaleRule.FLOOR, None),
    (formats.float8_e4m3fn, ScaleRule.ROUND, formats.bfloat16),
    (formats.float32, ScaleRule.ROUND, None),
    (formats.float8_e4m3fn, amax_over_three, formats.float32),
]


@pytest.mark.parametrize("fmt", ELEMENTS, ids=lambda f: f.name)
def test_scalar_formats_equal_the_oracle(fmt) -> None:
    """All roundings and overflow policies on every value, midpoint and neighbour, in float32 and float64."""
    for dtype in (np.float32, np.float64):
        x = critical_inputs(fmt, dtype) if fmt.bits <= 8 else np.concatenate(hostile_tensors((200,), dtype))
        for rounding, overflow in pairs(Rounding, Overflow):
            if overflow is Overflow.SPECIAL and not (fmt.has_inf or fmt.has_nan):
                continue
            quantizer = Quantizer(fmt, rounding, overflow, random_bits=None)
            expected = reference.quantize(x, fmt, 0, rounding, overflow, None, KEY)
            assert_same_bits(
                quantizer(torch.from_numpy(x), key=KEY).numpy(), expected, f"{rounding} {overflow} {dtype}"
            )


@pytest.mark.parametrize("element", FEW, ids=lambda f: f.name)
@pytest.mark.parametrize(
    "scale", SCALES, ids=lambda s: "-".join(getattr(part, "name", type(part).__name__) for part in s)
)
def test_block_formats_equal_the_oracle(element, scale) -> None:
    """All kinds of blocks on hostile tensors; axis, rounding and dtype take turns."""
    turn = 0
    for block_size in (8, 16, 0, None, (3, 5)):
        fmt = BlockFormat("b", element, scale[0], block_size, scale[1], scale[2])
        for x in hostile_tensors((3, 5, 20)):
            rounding = list(Rounding)[turn % 7]
            axis = turn % 3
            x = x.astype(np.float64) if turn % 11 == 0 else x
            expected = reference.quantize(x, fmt, axis, rounding, key=KEY)
            actual = Quantizer(fmt, rounding)(torch.from_numpy(x), axis=axis, key=KEY).numpy()
            assert_same_bits(actual, expected, f"block {block_size}, axis {axis}, {rounding}")
            turn += 1


@pytest.mark.parametrize("random_bits", [1, 2, 4, 8, 16, 17, 31, None])
@pytest.mark.parametrize("name", ["mxfp4_e2m1", "float8_e4m3fn", "nvfp4"])
def test_stochastic_bits_are_the_same_from_oracle_halves_and_threads(name: str, random_bits: int | None) -> None:
    quantizer = Quantizer(formats.get(name), Rounding.STOCHASTIC, random_bits=random_bits)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((16, 96)).astype(np.float32))
    whole = quantizer(x, key=KEY)
    expected = reference.quantize(x.numpy(), quantizer.format, 1, Rounding.STOCHASTIC, random_bits=random_bits, key=KEY)
    assert_same_bits(whole.numpy(), expected)
    if quantizer.format is not formats.nvfp4:  # its tensor scale depends on the whole
        first, second = quantizer(x[:9], key=KEY), quantizer(x[9:], key=Key(5, 7, 9, offset=300 + 9 * 96))
        assert torch.equal(torch.cat([first, second]), whole)


def test_threads_do_not_change_a_bit() -> None:
    x = torch.from_numpy(np.random.default_rng(1).standard_normal((1024, 1024)).astype(np.float32))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            for largest in (0, -1):  # the scale of an nvfp4 tensor is that of its largest element, in whichever share
                y = x.clone()
                y.view(-1)[largest] = 1000.0
                results.append(Quantizer(formats.nvfp4)(y))
            for fmt, axis in (
                (formats.mxfp6_e3m2, 1),
                (formats.mxfp6_e3m2, 0),
                (formats.bfloat16, 1),
                (formats.nvfp4, 1),
            ):
                results.append(Quantizer(fmt, Rounding.STOCHASTIC)(x, axis=axis, key=KEY))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(results[: len(results) // 2], results[len(results) // 2 :], strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("rounding", Rounding)
@pytest.mark.parametrize(
    "fmt",
    [
        formats.mxfp6_e3m2,
        formats.mxint8,
        BlockFormat("large_integers", FixedFormat("q8_-30", 8, -30), formats.float8_e8m0fnu),
        BlockFormat("large_floats", FloatFormat("e3m2_large", 3, 2, -40), formats.float8_e8m0fnu),
        BlockFormat("small_floats", FloatFormat("e3m2_small", 3, 2, 50), formats.float8_e8m0fnu),
    ],
    ids=lambda f: f.name,
)
def test_blocks_of_every_magnitude_equal_the_oracle(fmt: BlockFormat, rounding: Rounding) -> None:
    """One block a power of two that float32 has: where scales are divided out, where not, and both in one row."""
    block = np.random.default_rng(0).uniform(-1.5, 1.5, 32).astype(np.float32)
    x = np.ldexp(block, np.arange(-149, 128)[:, None]).astype(np.float32)
    quantizer = Quantizer(fmt, rounding)
    expected = reference.quantize(x, fmt, 1, rounding, key=KEY)
    assert_same_bits(quantizer(torch.from_numpy(x), key=KEY).numpy(), expected, "last axis")
    columns = np.ascontiguousarray(x.T)
    expected = reference.quantize(columns, fmt, 0, rounding, key=KEY)
    assert_same_bits(quantizer(torch.from_numpy(columns), axis=0, key=KEY).numpy(), expected, "first axis")


@pytest.mark.parametrize(("dtype", "least", "most"), [(np.float32, -149, 128), (np.float64, -1074, 1024)])
def test_tensors_of_every_magnitude_equal_the_oracle_where_they_have_a_scale(
    dtype: type, least: int, most: int
) -> None:
    """One tensor every few powers of two, and some that hold what is no number; along the last axis and the first."""
    block = np.random.default_rng(0).uniform(-1.5, 1.5, (16, 32)).astype(dtype)
    tensors = [np.ldexp(block, power).astype(dtype) for power in range(least, most, 7)]
    for special in (np.nan, np.inf):
        tensors.append(block.copy())
        tensors[-1][3, 5] = special
    for axis, x in itertools.product((1, 0), tensors):
        expected = reference.quantize(x, formats.nvfp4, axis)
        assert_same_bits(Quantizer(formats.nvfp4)(torch.from_numpy(x), axis=axis).numpy(), expected, f"axis {axis}")


@pytest.mark.parametrize("block_size", [16, 64, (2, 1)])
def test_a_block_of_zeros_has_the_smallest_scale(block_size: int | tuple[int, int]) -> None:
    """It shows where the element has no zero, and is so small that the scales of subnormal blocks are larger."""
    element = Codebook("tiny", (1.5 * 2.0**-30, 1.75 * 2.0**-30))
    fmt = BlockFormat("b", element, formats.float8_e8m0fnu, block_size)
    x = np.zeros((4, 64), np.float32)
    expected = reference.quantize(x, fmt)
    assert_same_bits(Quantizer(fmt)(torch.from_numpy(x)).numpy(), expected)


@pytest.mark.parametrize(
    "element",
    [
        FloatFormat("e8m1_wide", 8, 1, bias=1),
        FloatFormat("e2m24", 2, 24, bias=0, specials=Specials.EXTENDED, signed=False),
    ],
    ids=lambda f: f.name,
)
def test_elements_beyond_float32_are_rounded_to_it_before_they_are_scaled(element: FloatFormat) -> None:
    for scale, rule in ((formats.float8_e8m0fnu, ScaleRule.FLOOR), (formats.float32, ScaleRule.ROUND)):
        fmt = BlockFormat("b", element, scale, 4, rule)
        x = (np.random.default_rng(0).standard_normal((16, 32)) * 2.0**100).astype(np.float32)
        expected = reference.quantize(x, fmt)
        assert_same_bits(Quantizer(fmt)(torch.from_numpy(x)).numpy(), expected)


@pytest.mark.parametrize("rounding", [Rounding.TIES_TO_EVEN, Rounding.STOCHASTIC])
@pytest.mark.parametrize("name", ["mxfp6_e3m2", "mxint8", "nvfp4", "float8_e4m3fn"])
def test_large_tensors_give_the_same_bits(name: str, rounding: Rounding, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large results are written past the cache; also where they end within a vector or start beside a cache line."""
    shapes = [((64, 96), 0), ((64, 96), 1), ((7, 100), 0), ((7, 100), 1), ((5000,), 0)]
    results = []
    for limit in (cpu._LARGE, 0):
        monkeypatch.setattr(cpu, "_LARGE", limit)
        plan.plan.cache_clear()  # prepared calls are kept with plans
        quantizer = Quantizer(formats.get(name), rounding)
        for shape, axis in shapes:
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            beside = torch.empty(x.numel() + 1)[1:].view(shape)
            results += [quantizer.quantize(x, axis, KEY), quantizer.quantize(x, axis, KEY, out=beside)]
    plan.plan.cache_clear()
    for one, other in zip(results[: len(results) // 2], results[len(results) // 2 :], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("random_bits", [1, 2, 4, 8, None])
def test_stochastic_mean_and_variance(random_bits: int | None) -> None:
    """In n draws at x = lo + r·q the share that goes up is p = ⌊r 2^k⌋/2^k within 5 standard deviations.

    A false alarm has probability below 1e-6 per case; the seed is fixed.
    """
    n = 1 << 16
    k = 32 if random_bits is None else random_bits
    for r in (0.0, 0.1, 0.3, 0.5, 0.77):
        x = torch.full((n,), 1 + r * 0.25)  # between 1.0 and 1.25 of E3M2
        y = Quantizer(formats.float6_e3m2fn, Rounding.STOCHASTIC, random_bits=random_bits)(x, key=Key(3))
        share = ((y - 1) / 0.25).double().mean().item()
        p = np.floor((float(x[0]) - 1) / 0.25 * 2**k) / 2**k
        assert abs(share - p) <= 5 * np.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize("backend", ["numba", "triton"])
@pytest.mark.parametrize("random_bits", [1, 8, 16, None])
def test_a_tables_remainder_is_cut_in_float64(backend: str, random_bits: int | None) -> None:
    """r = 1/2 - 6e-9 is 1/2 in float32; with one bit it must never go up, as ⌊2r⌋ = 0."""
    if backend not in available_backends():
        pytest.skip(f"{backend} is not installed")
    table = Codebook("wide", (-1.0, 1.5))
    x = torch.full((128,), np.nextafter(np.float32(0.25), np.float32(0)).item())
    quantizer = Quantizer(table, Rounding.STOCHASTIC, random_bits=random_bits, backend=backend)
    expected = reference.quantize(x.numpy(), table, 0, Rounding.STOCHASTIC, random_bits=random_bits, key=KEY)
    assert_same_bits(quantizer(x, key=KEY).numpy(), expected)
    assert random_bits != 1 or (expected == -1).all()


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "transposed": x.mT,
        "strided": x.repeat_interleave(2, dim=1)[:, ::2],
        "flipped": x.flip(0),
        "expanded": x[:, :1].expand(-1, 40),
        "permuted": x.reshape(4, 6, -1).permute(2, 0, 1),
        "empty": x[:0],
        "0-d": x[0, 0],
        "1-d": x[0],
        "gradient": x.clone().requires_grad_(),
    }


@pytest.mark.parametrize("layout", layouts(torch.zeros(24, 40)))
@pytest.mark.parametrize("fmt", [formats.mxfp4_e2m1, formats.bfloat16, formats.nvfp4], ids=lambda f: f.name)
def test_every_layout_equals_the_oracle(layout: str, fmt) -> None:
    base = torch.from_numpy(np.random.default_rng(2).standard_normal((24, 40)).astype(np.float32))
    x = layouts(base)[layout]
    for axis in range(-max(x.dim(), 1), max(x.dim(), 1)):
        for rounding in (Rounding.TIES_TO_EVEN, Rounding.STOCHASTIC):
            expected = reference.quantize(np.ascontiguousarray(x.detach().numpy()), fmt, axis, rounding, key=KEY)
            actual = Quantizer(fmt, rounding)(x, axis=axis, key=KEY)
            assert_same_bits(actual.detach().numpy(), expected.reshape(tuple(x.shape)), f"axis {axis}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_tensors_are_rounded_once(dtype: torch.dtype) -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    for fmt in (formats.mxfp6_e2m3, formats.float8_e5m2):
        for rounding in (Rounding.TIES_TO_EVEN, Rounding.TOWARD_POSITIVE):
            actual = Quantizer(fmt, rounding)(x)
            assert actual.dtype is dtype
            expected = torch.from_numpy(reference.quantize(x.float().numpy(), fmt, rounding=rounding)).to(dtype)
            assert_same_bits(actual.float().numpy(), expected.float().numpy())


def test_out_and_in_place() -> None:
    x = torch.from_numpy(np.random.default_rng(3).standard_normal((32, 64)).astype(np.float32))
    for rounding in Rounding:
        for fmt in (formats.mxfp6_e3m2, formats.float8_e4m3fn):
            quantizer = Quantizer(fmt, rounding)
            expected = quantizer.quantize(x, key=KEY)
            strided = torch.empty(32, 128)[:, ::2]
            for out in (torch.empty_like(x), x.clone(), strided):
                source = out if out is not strided and torch.equal(out, x) else x
                assert quantizer.quantize(source, key=KEY, out=out) is out
                assert torch.equal(out, expected)


def test_overflow_of_formats_beyond_float32() -> None:
    """2^128 is a number of the format, and Inf in a float32 tensor; NaN comes later."""
    fmt = FloatFormat("e8m2_fn", 8, 2, specials=Specials.FN)
    x = np.array([np.finfo(np.float32).max, -np.finfo(np.float32).max, np.inf, np.nan, 1.0], np.float32)
    expected = reference.quantize(x, fmt, overflow=Overflow.SPECIAL)
    assert_same_bits(Quantizer(fmt, overflow=Overflow.SPECIAL)(torch.from_numpy(x)).numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distance", [1, 64])
def test_out_may_overlap_the_input(distance: int, dtype: torch.dtype) -> None:
    for fmt in (formats.mxfp6_e3m2, formats.bfloat16):
        quantizer = Quantizer(fmt)
        memory = torch.randn(4096 + distance, generator=torch.Generator().manual_seed(0), dtype=dtype)
        expected = quantizer.quantize(memory[:4096].clone())
        quantizer.quantize(memory[:4096], out=memory[distance:])
        assert torch.equal(memory[distance:], expected)


def test_views_that_stand_for_the_negative_of_their_memory() -> None:
    x = torch.randn(4, 32)
    quantizer = Quantizer(formats.mxfp4_e2m1)
    assert torch.equal(quantizer(torch._neg_view(x)), quantizer(-x))
    out = torch.empty_like(x)
    quantizer.quantize(x, out=torch._neg_view(out))
    assert torch.equal(-out, quantizer(x))


def test_a_tensor_without_memory_is_refused() -> None:
    with pytest.raises(TypeError, match="no memory"):
        Quantizer(formats.mxfp4_e2m1)(torch._efficientzerotensor(4, 32))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
def test_a_forked_process_has_threads_of_its_own() -> None:
    x = torch.randn(1024, 512)
    out = torch.zeros_like(x).share_memory_()
    quantizer = Quantizer(formats.mxfp6_e3m2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = quantizer(x)
        child = multiprocessing.get_context("fork").Process(target=quantizer.quantize, args=(x, -1, None, out))
        child.start()
        child.join(60)
        child.kill()
    finally:
        torch.set_num_threads(threads)
    assert child.exitcode == 0
    assert torch.equal(out, expected)


def test_the_gradient_passes_straight_through() -> None:
    x = torch.randn(8, 32, requires_grad=True)
    weight = torch.randn(8, 32)
    (Quantizer(formats.mxfp4_e2m1)(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    with torch.no_grad():
        assert not Quantizer(formats.mxfp4_e2m1)(x).requires_grad


def nested(x: torch.Tensor, layout: torch.layout) -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):  # that the interface may change
        return torch.nested.nested_tensor([x, x], layout=layout)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q, x: q(x.int()), TypeError, "float32"),
        (lambda q, x: q(x.to(torch.complex64)), TypeError, "float32"),
        (lambda q, x: q([1.0]), TypeError, "tensor"),
        (lambda q, x: q(x, axis=2), ValueError, "axis"),
        (lambda q, x: q(x, axis=-3), ValueError, "axis"),
        *(
            (lambda q, x, axis=axis: q(x, axis), TypeError, "axis must be an int")
            for axis in ("0", None, (0, 1), 1.0, True)
        ),
        (lambda q, x: q(x, key=3), TypeError, r"Key\(seed=3\)"),
        (lambda q, x: q(x, key=torch.Generator()), TypeError, r"Key\(seed=3\)"),
        (lambda q, x: q(x.to_sparse()), TypeError, "dense tensors with values .*, got a torch.sparse_coo tensor"),
        (lambda q, x: q(x.to("meta")), TypeError, "dense tensors with values .*, got a meta tensor"),
        (lambda q, x: q(nested(x, torch.strided)), TypeError, "dense tensors with values .*, got a nested tensor"),
        (lambda q, x: q(nested(x, torch.jagged)), TypeError, "dense tensors with values .*, got a nested tensor"),
        (lambda q, x: Quantizer(q.format, Rounding.STOCHASTIC)(x), ValueError, "key=Key"),
        (lambda q, x: q.quantize(x, out=torch.empty(3)), ValueError, "out must be"),
        (lambda q, x: Quantizer("mxfp4_e2m1"), TypeError, r"formats.get\('mxfp4_e2m1'\)\?$"),
        (lambda q, x: Quantizer("mxfp4"), TypeError, r"formats.get\('mxfp4_e2m1'\)\?$"),
        (lambda q, x: Quantizer(q.format, "even"), TypeError, "TIES_TO_EVEN"),
        (lambda q, x: Quantizer(q.format, random_bits=4), ValueError, "STOCHASTIC"),
        (lambda q, x: Quantizer(q.format, Rounding.STOCHASTIC, random_bits=33), ValueError, "32"),
        (lambda q, x: Quantizer(q.format, overflow=Overflow.SPECIAL), ValueError, "saturate"),
        (lambda q, x: Quantizer(formats.float4_e2m1fn, overflow=Overflow.SPECIAL), ValueError, "neither"),
        (lambda q, x: Quantizer(q.format, backend="cuda"), ValueError, "known"),
        (lambda q, x: Key(-1), ValueError, "seed"),
        (lambda q, x: Key(0, stream=2**32), ValueError, "stream"),
        (lambda q, x: Key(0.5), TypeError, "seed"),
    ],
)
def test_bad_input_is_refused_with_what_would_be_right(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call(Quantizer(formats.mxfp4_e2m1), torch.randn(4, 32))


def test_an_axis_may_be_an_int_of_another_type() -> None:
    x, quantizer = torch.randn(4, 32), Quantizer(formats.mxfp4_e2m1)
    assert torch.equal(quantizer(x, axis=np.int64(0)), quantizer(x, axis=0))


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1", None])
def test_a_scale_rule_must_give_a_finite_number_of_at_least_0(backend: str, value: object) -> None:
    def faulty(amax: float, element: object) -> float:
        return value  # type: ignore[return-value]

    fmt = BlockFormat("own", formats.float4_e2m1fn, formats.float8_e4m3fn, scale_rule=faulty)
    for call in (Quantizer(fmt, backend=backend), lambda x: encode(x, fmt)):
        with pytest.raises(ValueError, match=r"own: the scale rule .*faulty must give a finite number of at least 0"):
            call(torch.ones(4, 32))


def test_backends_in_this_environment() -> None:
    assert {"reference", "numba"} <= set(available_backends())
