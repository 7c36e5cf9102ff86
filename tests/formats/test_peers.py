"""torchao's and gfloat's results are ours, bit for bit, but for the departures that are stated here exactly.

Live where the library is installed, and in any case on golden vectors (tests/golden/README.md).
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from lpsim import BlockFormat, Overflow, Quantizer, Rounding, ScaleRule, encode, formats
from lpsim.quantization.storage import unpack
from tests import peers
from tests.laws import assert_same_bits


@functools.cache
def source(library: str, kind: str) -> tuple[peers.Vectors, peers.Vectors]:
    return peers.live(library) if kind == "live" else peers.golden(library)


def sources(library: str) -> list[object]:
    absent = pytest.mark.skipif(not peers.installed(library), reason=f"{library} is not installed")
    return [pytest.param("live", marks=absent), "golden"]


def codes_of(x: np.ndarray, fmt: object) -> np.ndarray:
    element = fmt.element if isinstance(fmt, BlockFormat) else fmt
    return unpack(encode(torch.from_numpy(x), fmt).codes, element.bits, x.size).numpy().reshape(x.shape)


# ---------------------------------------------------------------------------------------------- torchao


@pytest.mark.parametrize("kind", sources("torchao"))
@pytest.mark.parametrize("name", peers.MX)
def test_torchao_scale_modes(name: str, kind: str) -> None:
    """Equal scales and codes, but where torchao 0.18 departs from OCP MX and from its own words:

    - a block with Inf gets a finite scale (ours: NaN, as MX v1.0 §6.3 leaves open);
    - a block with the smallest scale, 2^-127 (code 0), is divided by 2^-126, in mode RCEIL by 1;
    - RCEIL takes float32's log2 of float32's quotient, and so the next smaller scale where amax / max lies within 2^-18
      above a power of two.
    """
    inputs, results = source("torchao", kind)
    x, fmt = inputs["mx"], peers.MX[name]
    scale, codes = results[f"{name}/scale"], results[f"{name}/codes"]
    largest = np.abs(x).reshape(len(x), -1, 32).max(-1)
    ours = encode(torch.from_numpy(x), fmt).scales.numpy().reshape(scale.shape)

    finite = np.isfinite(largest)
    assert (ours[~finite] == 255).all()
    assert (scale[np.isnan(largest)] == 255).all()
    infinite = 254 if fmt.scale_rule is ScaleRule.RCEIL else 128 - fmt.element.emax + 127
    assert (scale[np.isinf(largest)] == infinite).all()

    with np.errstate(divide="ignore", invalid="ignore"):
        significand = np.frexp(largest.astype(np.float64) / fmt.element.max)[0]
    just_above = finite & (significand > 0.5) & (significand <= 0.5 * (1 + 2.0**-18)) & (largest > 0)
    just_above &= fmt.scale_rule is ScaleRule.RCEIL
    assert (scale == ours)[finite & ~just_above].all()
    if fmt.scale_rule is ScaleRule.RCEIL:
        assert (
            set((ours[just_above].astype(int) - scale[just_above]).tolist()) <= {0, 1}
            and (ours != scale)[just_above].any()
        )

    same = np.repeat(finite & (scale == ours) & (scale > 0), 32, -1)
    assert (codes_of(x, fmt) == codes)[same].all()
    smallest = np.repeat(finite & (scale == 0), 32, -1)
    divisor = np.float32(1.0 if fmt.scale_rule is ScaleRule.RCEIL else 2.0**-126)
    assert smallest.any() and (codes_of(np.where(smallest, x, 0) / divisor, fmt.element) == codes)[smallest].all()


@pytest.mark.parametrize("kind", sources("torchao"))
@pytest.mark.parametrize("name", ["normal", "heavy", "wide", "steps", "small"])
def test_torchao_nvfp4(name: str, kind: str) -> None:
    """Both levels and one level: equal tensor scales, block scales and codes."""
    inputs, results = source("torchao", kind)
    x = inputs[f"nv/{name}"]
    for levels, fmt in (("two", formats.nvfp4), ("one", peers.ONE_LEVEL)):
        encoded = encode(torch.from_numpy(x), fmt)
        scale, codes = results[f"nv/{name}/{levels}/scale"], results[f"nv/{name}/{levels}/codes"]
        np.testing.assert_array_equal(encoded.scales.numpy().reshape(scale.shape), scale)
        np.testing.assert_array_equal(codes_of(x, fmt), codes)
    outer = encode(torch.from_numpy(x), formats.nvfp4).tensor_scale.view(torch.float32).item()
    assert outer == results[f"nv/{name}/outer"]


@pytest.mark.skipif(not peers.installed("torchao"), reason="torchao is not installed")
def test_torchao_nvfp4_of_zeros() -> None:
    """Its scale of an all-zero tensor is 0 and the block scales are NaN; ours stay positive and all codes are 0."""
    zeros = {"mx": np.zeros((1, 32), np.float32), "nv/zeros": np.zeros((1, 16), np.float32)}
    theirs = peers.torchao_vectors(zeros)
    assert theirs["nv/zeros/outer"] == 0 and (theirs["nv/zeros/two/scale"] & 0x7F).tolist() == [[0x7F]]
    ours = encode(torch.zeros(1, 16), formats.nvfp4)
    assert ours.scales.tolist() == [0x08] and ours.codes.tolist() == [0] * 8
    assert ours.tensor_scale.view(torch.float32).item() == 2.0**-120


# ---------------------------------------------------------------------------------------------- gfloat


@pytest.mark.parametrize("kind", sources("gfloat"))
@pytest.mark.parametrize("rounding", peers.MODES, ids=lambda r: r.name)
@pytest.mark.parametrize("name", peers.SCALAR)
def test_gfloat_rounding_modes(name: str, rounding: Rounding, kind: str) -> None:
    """Equal values, signs of zero, Inf and NaN; its StochasticFastest is our STOCHASTIC with the same random bits.

    Left out: negative numbers in unsigned formats, which it keeps; under StochasticFastest inputs of more than 24 bits,
    as it adds the random bits to the remainder in float64 and rounds the sum, up to 1 from just below.
    """
    inputs, results = source("gfloat", kind)
    x, fmt, mode = inputs[name], peers.SCALAR[name], peers.MODES[rounding]
    bits = peers.RANDOM_BITS if rounding is Rounding.STOCHASTIC else None
    kept = np.isnan(x) | (fmt.signed | ~np.signbit(x))
    if rounding is Rounding.STOCHASTIC:
        with np.errstate(over="ignore", under="ignore"):
            kept &= np.isnan(x) | (x.astype(np.float32) == x)
    for policy in (Overflow.SATURATE, Overflow.SPECIAL) if fmt.has_nan else (Overflow.SATURATE,):
        theirs = results[f"{name}/{mode}/{policy.value}"]
        ours = Quantizer(fmt, rounding, policy, bits).quantize(torch.from_numpy(x), key=peers.KEY).numpy()
        assert_same_bits(ours[kept], theirs[kept].astype(np.float64), f"{name} {rounding.name} {policy.name}")


def test_golden_vectors_cover_what_they_should() -> None:
    assert len(peers.MX) == 20 and len(peers.SCALAR) * len(peers.MODES) == 72
    inputs, _ = peers.golden("torchao")
    assert len(inputs) == 6 and not math.isnan(inputs["nv/heavy"].sum())
