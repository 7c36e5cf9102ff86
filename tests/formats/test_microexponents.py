"""Blocks with shared microexponents (MX9, MX6, MX4): the paper's words in NumPy, its theorem, and every backend."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from lpsim import BlockFormat, Key, Quantizer, Rounding, ScaleRule, formats
from lpsim.formats import reference
from tests.laws import ODD_ONES, assert_same_bits, hostile_tensors

MX = {9: formats.mx9, 6: formats.mx6, 4: formats.mx4}


def mx(m: int, k1: int = 16, k2: int = 2, d2: int = 1) -> BlockFormat:
    """A sign and m bits of magnitude, k1 elements with an exponent of 8 bits, k2 with a microexponent of d2."""
    element = formats.FloatFormat(f"sign_magnitude{m}", 1, m - 1, bias=1, specials=formats.Specials.NONE)
    return BlockFormat("mx", element, formats.float8_e8m0fnu, k1, sub_block_size=k2, microexponent_bits=d2)


def by_the_paper(x: np.ndarray, m: int, k1: int, k2: int, d2: int) -> np.ndarray:
    """arXiv:2302.08007, figure 4 and table II, in float64: E of the block, τ of the sub-block, integers of m bits."""
    exponent = np.frexp(np.abs(x.reshape(-1, k1 // k2, k2)).max(2))[1] - 1
    shared = exponent.max(1, keepdims=True)
    tau = np.minimum(shared - exponent, 2**d2 - 1)
    step = np.repeat(2.0 ** (shared - tau - (m - 1)), k2, axis=1).reshape(x.shape)
    return np.clip(np.rint(x / step), 1 - 2**m, 2**m - 1) * step


@pytest.mark.parametrize(
    ("m", "k1", "k2", "d2"), [(7, 16, 2, 1), (4, 16, 2, 1), (2, 16, 2, 1), (5, 64, 8, 2), (3, 8, 1, 3)]
)
def test_the_oracle_is_what_the_paper_describes(m: int, k1: int, k2: int, d2: int) -> None:
    x = np.random.default_rng(0).standard_normal((4, 128)) * 2.0 ** np.random.default_rng(1).integers(-4, 4, (4, 128))
    np.testing.assert_array_equal(reference.quantize(x, mx(m, k1, k2, d2)), by_the_paper(x, m, k1, k2, d2))


def test_named_formats_are_those_of_table_ii() -> None:
    for m, fmt in ((7, formats.mx9), (4, formats.mx6), (2, formats.mx4)):
        named = dataclasses.replace(fmt.element, name=f"sign_magnitude{m}")
        assert dataclasses.replace(fmt, name="mx", element=named) == mx(m)


@pytest.mark.parametrize(("m", "k1", "k2", "d2"), [(7, 16, 2, 1), (2, 16, 2, 1), (3, 16, 4, 2), (4, 32, 1, 1)])
def test_no_block_is_worse_than_the_theorem_says(m: int, k1: int, k2: int, d2: int) -> None:
    """Theorem 1: QSNR >= 6.02 m + 10 log10(2^2β / (k1 + (2^2β − 1) k2)), β = 2^d2 − 1, for data of any kind."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4096, k1))
    x[1024:2048] *= 2.0 ** rng.integers(-8, 8, (1024, k1))
    x[2048:] = rng.uniform(0.95, 1, (2048, k1)) * 2.0 ** -(m + 2**d2 - 1)  # the worst: just below half a step
    x[2048:, :k2] *= 2.0 ** (2**d2 - 1)
    x[2048:, 0] = 1
    y = Quantizer(mx(m, k1, k2, d2))(torch.from_numpy(x)).numpy()
    noise = ((y - x) ** 2).sum(1)
    beta = 2**d2 - 1
    bound = 20 * m * math.log10(2) + 10 * math.log10(4**beta / (k1 + (4**beta - 1) * k2))
    qsnr = 10 * np.log10((x**2).sum(1) / np.where(noise > 0, noise, 1e-300))
    assert qsnr.min() >= bound
    assert qsnr.min() < bound + 3  # and the bound is near


CASES = [
    formats.mx9,
    BlockFormat("fixed", formats.int8_q6, formats.float8_e8m0fnu, 12, ScaleRule.CEIL, None, 4, 3),
    BlockFormat("table", ODD_ONES[-1], formats.float8_e8m0fnu, 9, ScaleRule.RCEIL, None, 1, 2),
    BlockFormat("narrow", formats.float6_e3m2fn, formats.float8_e5m2, 64, ScaleRule.EVEN, None, 16, 1),
]


@pytest.mark.parametrize("fmt", CASES, ids=lambda f: f.name)
def test_kernels_equal_the_oracle(fmt: BlockFormat) -> None:
    """In rows that end within a sub-block, along both axes, with NaN, Inf and subnormals."""
    for turn, x in enumerate([*hostile_tensors((3, 75)), *hostile_tensors((3, 5), np.float64)]):
        for axis in (0, 1):
            rounding = Rounding.STOCHASTIC if turn == 1 else Rounding.TIES_TO_EVEN
            key = Key(5) if rounding is Rounding.STOCHASTIC else None
            quantizer = Quantizer(fmt, rounding, backend="numba")
            actual = quantizer(torch.from_numpy(x), axis, key).numpy()
            assert_same_bits(actual, reference.quantize(x, fmt, axis, rounding, key=key), f"{turn} {axis}")


def test_run_folders_of_one_level_formats_keep_their_names() -> None:
    assert "sub_block_size" not in formats.to_dict(formats.mxfp4_e2m1)
    assert formats.to_dict(formats.mx9)["microexponent_bits"] == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sub_block_size": 2}, "go together"),
        ({"microexponent_bits": 1}, "go together"),
        ({"sub_block_size": 3, "microexponent_bits": 1, "block_size": 6}, "power of two"),
        ({"sub_block_size": 16, "microexponent_bits": 1}, "less than it, got 16 and 16"),
        ({"sub_block_size": 2, "microexponent_bits": 1, "block_size": 15}, "divides block_size"),
        ({"sub_block_size": 2, "microexponent_bits": 1, "block_size": None}, "got 2 and None"),
        ({"sub_block_size": 2, "microexponent_bits": 5}, "must lie in"),
        ({"sub_block_size": 2, "microexponent_bits": 1, "scale_rule": lambda amax, element: amax}, "FLOOR, CEIL"),
    ],
)
def test_what_has_no_meaning_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(formats.msfp16, **fields)
