"""The conformance kit: it certifies what is right, and catches what is broken."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lpsim import (
    BlockFormat,
    FloatFormat,
    Key,
    Overflow,
    Quantizer,
    Rounding,
    ScaleRule,
    Specials,
    conformance,
    formats,
)
from lpsim.conformance import ConformanceError, laws, walk
from lpsim.conformance.inputs import ladder, scalar_inputs
from lpsim.formats import reference
from lpsim.formats.codebooks import logarithmic, nf4, posit
from lpsim.quantization import quantizer as quantizers
from tests.laws import ODD_ONES, SCALAR

E2M2 = FloatFormat("float5_e2m2fn", exponent_bits=2, mantissa_bits=2, bias=3, specials=Specials.NONE)
MXE2M2 = BlockFormat("mxfp5_e2m2", element=E2M2, scale=formats.float8_e8m0fnu, block_size=32)


# ---------------------------------------------------------------------------------------------- what is right


@pytest.mark.parametrize(
    "fmt",
    [
        E2M2,
        MXE2M2,
        posit(6, 1),
        logarithmic("log4", 4),
        formats.float8_e4m3fn,
        formats.float4_e3m0fn,
        formats.int4_q2,
        formats.p3109(6, 3),
        formats.p3109(4, 2, signed=False),
        nf4,
        FloatFormat("e3m2_flushed", 3, 2, subnormals=False),
        BlockFormat("tiles", E2M2, formats.float8_e8m0fnu, block_size=(2, 3), scale_rule=ScaleRule.RCEIL),
        BlockFormat("whole", formats.int4_q2, formats.float8_e8m0fnu, block_size=None, scale_rule=ScaleRule.CEIL),
        formats.nvfp4,
    ],
    ids=lambda fmt: fmt.name,
)
def test_these_conform(fmt: formats.Format) -> None:
    certificate = conformance.check(fmt)
    assert "numba" in certificate.compared
    assert all(certificate.cases.values())
    assert str(certificate).startswith(f"{fmt.name} conforms")


@pytest.mark.gpu
@pytest.mark.full
@pytest.mark.parametrize("fmt", [*formats.ALL_FORMATS.values(), *ODD_ONES], ids=lambda fmt: fmt.name)
def test_every_named_format_conforms(fmt: formats.Format) -> None:
    conformance.check(fmt)


def test_a_certificate_says_what_was_shown() -> None:
    lines = str(conformance.check(E2M2)).splitlines()
    laws_named = ["codes", "rounding", "monotone", "agreement", "stochastic", "storage"]
    assert [any(word in line for line in lines) for word in laws_named] == [True] * 6
    assert any(line.startswith("  equal to the oracle: numba") for line in lines)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="takes a format"):
        conformance.check("float8_e4m3fn")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"check\(float6_e3m2fn"):
        conformance.check(formats.mxfp6_e3m2, exhaustive=True)
    with pytest.raises(ValueError, match="up to 16 bits"):
        conformance.check(formats.tensorfloat32, exhaustive=True)


# ---------------------------------------------------------------------------------------------- broken backends

Change = Callable[[torch.Tensor, Quantizer, int, Key | None], torch.Tensor]


class Broken:
    """The Numba backend with a fault."""

    name = "broken"

    def __init__(self, change: Change) -> None:
        self.change = change

    def supports(self, quantizer: Quantizer, device: torch.device) -> bool:
        return quantizers.backend("numba").supports(quantizer, device)

    def quantize(
        self, x: torch.Tensor, quantizer: Quantizer, axis: int, key: Key | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        return self.change(x, dataclasses.replace(quantizer, backend="numba"), axis, key)


def ties_away(x: torch.Tensor, q: Quantizer, axis: int, key: Key | None) -> torch.Tensor:
    wrong = Rounding.TIES_TO_AWAY if q.rounding is Rounding.TIES_TO_EVEN else q.rounding
    return dataclasses.replace(q, rounding=wrong).quantize(x, axis, key)


def hides_nan(x: torch.Tensor, q: Quantizer, axis: int, key: Key | None) -> torch.Tensor:
    return torch.nan_to_num(q.quantize(x, axis, key), nan=1.0)


def drops_the_sign_of_zero(x: torch.Tensor, q: Quantizer, axis: int, key: Key | None) -> torch.Tensor:
    return q.quantize(x, axis, key) + 0.0


def rounds_twice(x: torch.Tensor, q: Quantizer, axis: int, key: Key | None) -> torch.Tensor:
    return q.quantize(x.bfloat16().to(x.dtype), axis, key)


def flushes_subnormals(x: torch.Tensor, q: Quantizer, axis: int, key: Key | None) -> torch.Tensor:
    y = q.quantize(x, axis, key)
    return torch.where(y.abs() < q.format.min_normal, 0.0 * y, y)  # type: ignore[union-attr]


def overflows_to_inf(x: torch.Tensor, q: Quantizer, axis: int, key: Key | None) -> torch.Tensor:
    y = q.quantize(x, axis, key)
    return torch.where(x.abs() > 2 * q.format.max, x * math.inf, y)


def wrong_scale_below_powers_of_two(x: torch.Tensor, q: Quantizer, axis: int, key: Key | None) -> torch.Tensor:
    if not isinstance(q.format, BlockFormat):
        return q.quantize(x, axis, key)
    significand = torch.frexp(x)[0].abs()
    return q.quantize(torch.where(significand > 1 - 2.0**-23, x * (1 + 2.0**-23), x), axis, key)


def forgets_the_axis(x: torch.Tensor, q: Quantizer, axis: int, key: Key | None) -> torch.Tensor:
    return q.quantize(x, -1, key)


def forgets_the_offset(x: torch.Tensor, q: Quantizer, axis: int, key: Key | None) -> torch.Tensor:
    return q.quantize(x, axis, key and dataclasses.replace(key, offset=0))


def wrong_in_float64(x: torch.Tensor, q: Quantizer, axis: int, key: Key | None) -> torch.Tensor:
    return q.quantize(x.float(), axis, key).to(x.dtype)


@pytest.mark.parametrize(
    ("fmt", "change", "message"),
    [
        (E2M2, ties_away, "TIES_TO_EVEN"),
        (E2M2, hides_nan, "must be nan"),
        (E2M2, drops_the_sign_of_zero, r"must be -0\.0"),
        (E2M2, rounds_twice, "agreement"),
        (formats.float8_e4m3fn, flushes_subnormals, r"becomes -?0\.0"),
        (formats.float8_e4m3fn, overflows_to_inf, "becomes inf"),
        (E2M2, forgets_the_offset, "STOCHASTIC"),
        (E2M2, wrong_in_float64, "float64"),
        (MXE2M2, wrong_scale_below_powers_of_two, "agreement on axis"),
        (MXE2M2, forgets_the_axis, "agreement on axis 0"),
    ],
    ids=lambda p: getattr(p, "__name__", None),
)
def test_a_broken_backend_is_caught(
    fmt: formats.Format, change: Change, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(quantizers.BACKENDS, "broken", "nowhere")
    monkeypatch.setitem(quantizers._instances, "broken", Broken(change))
    with pytest.raises(ConformanceError, match=message) as caught:
        conformance.check(fmt)
    assert "backend broken" in str(caught.value)


# ---------------------------------------------------------------------------------------------- broken laws


def serve(monkeypatch: pytest.MonkeyPatch, change: Change) -> None:
    """The fault in the backend that everything is computed with by default."""
    broken, honest = Broken(change), quantizers._serving
    monkeypatch.setattr(quantizers, "_serving", lambda q, device: honest(q, device) if q.backend else broken)


def one_noise_for_all_rows(x: torch.Tensor, q: Quantizer, axis: int, key: Key | None) -> torch.Tensor:
    return q.quantize(x[:1], axis, key).expand_as(x) if x.dim() == 2 else q.quantize(x, axis, key)


def one_noise_for_all_keys(x: torch.Tensor, q: Quantizer, axis: int, key: Key | None) -> torch.Tensor:
    return q.quantize(x, axis, key and Key(1))


def one_noise_along_a_row(x: torch.Tensor, q: Quantizer, axis: int, key: Key | None) -> torch.Tensor:
    """The same random word for all columns of a row: the frequencies are right, the draws are not independent."""
    if key is None or x.dim() != 2:
        return q.quantize(x, axis, key)
    return torch.cat([q.quantize(x[:, j : j + 1].contiguous(), axis, key) for j in range(x.shape[1])], 1)


def nearest_instead(x: torch.Tensor, q: Quantizer, axis: int, key: Key | None) -> torch.Tensor:
    nearest = Quantizer(q.format, Rounding.TIES_TO_EVEN, q.overflow)
    return nearest.quantize(x, axis) if q.rounding is Rounding.STOCHASTIC else q.quantize(x, axis, key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_noise_for_all_rows, "frequency"),
        (nearest_instead, "frequency"),
        (one_noise_for_all_keys, "two keys correlate"),
        (one_noise_along_a_row, "variance of independent"),
    ],
)
def test_broken_randomness_is_caught(change: Change, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    laws.stochastic(formats.float8_e5m2)
    serve(monkeypatch, change)
    with pytest.raises(ConformanceError, match=message):
        laws.stochastic(formats.float8_e5m2)


def shifts(x: torch.Tensor, q: Quantizer, axis: int, key: Key | None) -> torch.Tensor:
    return q.quantize(x + torch.where(x > 0, 1e-3, 0.0).to(x.dtype), axis, key)


def falls_at_one(x: torch.Tensor, q: Quantizer, axis: int, key: Key | None) -> torch.Tensor:
    y = q.quantize(x, axis, key)
    return torch.where((x > 1) & (x < 1.05), 0.5, y).to(x.dtype)


@pytest.mark.parametrize(
    ("change", "message"), [(hides_nan, "a NaN stays"), (shifts, "odd|values stay"), (falls_at_one, "monotone|odd")]
)
def test_broken_order_is_caught(change: Change, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, change)
    with pytest.raises(ConformanceError, match=message):
        laws.order(formats.float8_e5m2)


def test_nan_in_a_neighbour_block_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaks(x: torch.Tensor, q: Quantizer, axis: int, key: Key | None) -> torch.Tensor:
        y = q.quantize(x, axis, key)
        return torch.where(torch.isnan(y).any(-1, keepdim=True), math.nan, y)

    serve(monkeypatch, leaks)
    with pytest.raises(ConformanceError, match="NaN in exactly the blocks"):
        laws.blocks(MXE2M2)


def test_a_broken_oracle_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties to odd under the name of ties to even: no backend is asked."""
    honest = reference._away_from_zero

    def wrong(fraction, lower_is_even, *rest):  # type: ignore[no-untyped-def]
        return honest(fraction, lower_is_even != (fraction == 0.5), *rest)

    monkeypatch.setattr(reference, "_away_from_zero", wrong)
    with pytest.raises(ConformanceError, match="the rounding's definition, TIES_TO_EVEN"):
        laws.roundings(E2M2)


def test_a_broken_code_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = reference.encode
    monkeypatch.setattr(reference, "encode", lambda value, fmt: honest(abs(value), fmt))
    with pytest.raises(ConformanceError, match=r"code 0x10 decodes to -0\.0"):
        laws.codes(E2M2)


# ---------------------------------------------------------------------------------------------- inputs and the walk


@pytest.mark.parametrize("fmt", [f for f in [*SCALAR, *ODD_ONES] if f.bits <= 10], ids=lambda fmt: fmt.name)
def test_the_ladder_is_the_oracle_s_values(fmt: formats.Element) -> None:
    steps = ladder(fmt)
    assert steps.complete and steps.value.tolist() == reference.values(fmt)
    assert (np.diff(steps.place) == 1).all()


def test_the_critical_inputs_hold_every_value_midpoint_and_neighbour() -> None:
    x = set(scalar_inputs(formats.float8_e4m3fn).tolist())
    values = np.array(reference.values(formats.float8_e4m3fn), np.float32)
    middles = (values[1:] + values[:-1]) / 2
    for point in np.concatenate([values, middles]):
        assert {point, np.nextafter(point, np.float32(9e9)), np.nextafter(point, np.float32(-9e9))} <= x


@pytest.mark.parametrize("overflow", Overflow, ids=lambda o: o.name)
@pytest.mark.parametrize("rounding", laws.DETERMINISTIC, ids=lambda r: r.name)
def test_the_walk_s_steps_are_the_oracle_s(rounding: Rounding, overflow: Overflow) -> None:
    fmt = formats.float8_e5m2
    q = Quantizer(fmt, rounding, overflow)
    for sign in (0, walk.NEGATIVE):
        starts, results = walk.steps(q, sign)
        assert starts[0] == 0 and (np.diff(starts) > 0).all()
        patterns = np.random.default_rng(0).integers(0, walk.INFINITY + 1, 2000).astype(np.uint32)
        patterns = np.concatenate([patterns, starts, starts[1:] - 1, [walk.INFINITY]]).astype(np.uint32)
        x = (patterns | np.uint32(sign)).view(np.float32)
        expected = reference.quantize(x, fmt, 0, rounding, overflow)
        actual = results[np.searchsorted(starts, patterns, side="right") - 1]
        assert laws.same_bits(actual, expected).all()


class Bar:
    def update(self, count: int) -> None: ...


def test_the_walk_catches_a_broken_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, flushes_subnormals)
    with pytest.raises(ConformanceError, match="all inputs, TIES_TO_EVEN"):
        walk._walk_steps(Quantizer(FloatFormat("e8m1", 8, 1)), Bar())


def test_peers_of_the_walk() -> None:
    assert walk.peer_dtype(formats.float16) == np.dtype(np.float16)
    assert walk.peer_dtype(formats.float8_e8m0fnu) is None  # ml_dtypes rounds its ties up
    assert walk.peer_dtype(dataclasses.replace(formats.float8_e4m3, name="float8_e4m3fn")) is None


WALKED = ["float8_e4m3fn", "float8_e5m2", "float6_e3m2fn", "float6_e2m3fn", "float4_e2m1fn", "bfloat16"]


@pytest.mark.full
@pytest.mark.parametrize("name", WALKED)
def test_all_float32_inputs(name: str) -> None:
    """Issue 3, show 3: no mismatch with ml_dtypes, nor with the oracle in any deterministic rounding."""
    pytest.importorskip("ml_dtypes")
    cases = conformance.check(formats.get(name), exhaustive=True, progress=True).cases
    assert cases["2^32 inputs, cast of ml_dtypes"] == 1 << 32
