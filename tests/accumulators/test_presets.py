"""The presets of tensor cores: equal to what is computed by hand, and to MMA-Sim."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lpsim.accumulators import reference as oracle
from tests.accumulators.units import PRESETS, multiplied
from tests.laws import assert_same_bits


def row(*terms: tuple[float, float], products: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """One dot product from its pairs of operands, filled up with zeros."""
    filled = [*terms, *[(0.0, 0.0)] * (products - len(terms))]
    return np.float32([[a for a, _ in filled]]), np.float32([[b] for _, b in filled])


HAND_COMPUTED: list[tuple[str, list[tuple[float, float]], float]] = [
    # FP8: the quantum beside 1 is 2^-13, so 31 products of 2^-14 vanish, and 31 of 2^-13 stay
    ("HOPPER_FP8", [(1, 1)] + [(2.0**-7, 2.0**-7)] * 31, 1),
    ("HOPPER_FP8", [(1, 1)] + [(2.0**-6, 2.0**-7)] * 31, 1 + 31 * 2.0**-13),
    # the sum of a step is truncated to 13 bits too: 2 + 2^-13
    ("HOPPER_FP8", [(1, 1), (1, 1), (2.0**-6, 2.0**-7)], 2),
    ("HOPPER_FP8", [(-1, 1), (1, -1), (2.0**-6, -(2.0**-7))], -2),
    # 1.5 · 1.5 counts with exponent 0, though it is 2.25: 2^-13 is kept, and then cut from 2.25 + 2^-13
    ("HOPPER_FP8", [(1.5, 1.5), (2.0**-6, 2.0**-7)], 2.25),
    # 32 products a step: the 33rd meets a sum of 2 + 2^-12
    ("HOPPER_FP8", [(1, 1), (1, 1), (2.0**-6, 2.0**-6)] + [(0, 0)] * 29 + [(2.0**-6, 2.0**-6)], 2 + 2.0**-11),
    # a subnormal operand counts with the exponent of its field, -14: 2^-28 falls below 2^-14-13
    ("HOPPER_FP8_E5M2", [(2.0**-16, 1), (2.0**-16, 2.0**-12)], 2.0**-16),
    ("HOPPER_FP8_E5M2", [(2.0**-16, 1), (2.0**-15, 2.0**-12)], 2.0**-16 + 2.0**-27),
    ("HOPPER_FP8_E5M2", [(57344, 57344), (math.inf, 1)], math.inf),
    ("HOPPER_FP8_E5M2_E4M3", [(2.0**-16, 2.0**-9)], 2.0**-25),
    ("HOPPER_FP8_E4M3_E5M2", [(2.0**-9, 2.0**-16)], 2.0**-25),
    # FP16 on Hopper: quantum 2^-25, 16 products a step, the sum truncated to 23 bits
    ("HOPPER_FP16", [(1, 1)] + [(2.0**-12, 2.0**-13)] * 15, 1 + 3 * 2.0**-23),
    ("HOPPER_FP16", [(1, 1)] + [(2.0**-13, 2.0**-13)] * 15, 1),
    ("HOPPER_FP16", [(1, 1), (2.0**-12, -(2.0**-13))], 1 - 2.0**-24),
    ("HOPPER_FP16", [(1024, 1024), (-1024, 1024), (1, 1)], 1),
    ("HOPPER_FP16", [(32768, 16384), (-32768, 16384), (1, 1)], 0),
    # on Ampere: quantum 2^-24, 8 products a step
    ("AMPERE_FP16", [(1, 1)] + [(2.0**-12, 2.0**-13)] * 15, 1),
    ("AMPERE_FP16", [(1, 1)] + [(2.0**-12, 2.0**-12)] * 7, 1 + 3 * 2.0**-23),
    ("AMPERE_FP16", [(1, 1), (2.0**-12, -(2.0**-13))], 1),
    ("AMPERE_FP16", [(1, 1), *[(0, 0)] * 7, *[(2.0**-12, 2.0**-12)] * 8], 1 + 4 * 2.0**-23),
    # BF16: the same, with float32's exponents
    ("HOPPER_BF16", [(2.0**60, 2.0**60)] + [(2.0**48, 2.0**47)] * 15, 2.0**120 * (1 + 3 * 2.0**-23)),
    ("HOPPER_BF16", [(2.0**64, 2.0**64)], math.inf),
    ("HOPPER_BF16", [(2.0**64, 2.0**64), (-(2.0**64), 2.0**63)], 2.0**127),
    ("HOPPER_BF16", [(math.inf, 1), (-math.inf, 1)], math.nan),
    ("AMPERE_BF16", [(2.0**60, 2.0**60)] + [(2.0**48, 2.0**47)] * 7, 2.0**120),
    ("AMPERE_BF16", [(2.0**-100, 2.0**-49)], 2.0**-149),
    ("AMPERE_BF16", [(2.0**-100, -(2.0**-50))], 0),
]


@pytest.mark.parametrize(("name", "terms", "expected"), HAND_COMPUTED)
def test_presets_give_what_is_computed_by_hand(name: str, terms: list[tuple[float, float]], expected: float) -> None:
    a, b = row(*terms)
    assert_same_bits(multiplied(PRESETS[name], a, b), np.float32([[expected]]))


def test_every_preset_is_computed_by_hand_and_golden() -> None:
    assert {name for name, _, _ in HAND_COMPUTED} == set(PRESETS)
    assert {key.split(".")[0] for key in np.load(GOLDEN)} == set(PRESETS)


GOLDEN = Path(__file__).parents[1] / "golden" / "mma_sim.npz"
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


def golden_operands(name: str, arrays: dict[str, np.ndarray]) -> tuple[Tensor, Tensor]:
    alignment = PRESETS[name].alignment
    assert alignment is not None and alignment.operands is not None
    codes = (torch.from_numpy(arrays[f"{name}.{side}"]) for side in ("lhs", "rhs"))
    a, b = (x.view(DTYPES[fmt.name]).float() for x, fmt in zip(codes, alignment.operands, strict=True))
    return a[:, None, :], b[:, :, None]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_mma_sim(name: str) -> None:
    """48 dot products over three steps: normal, every code, subnormal, cancelling, with NaN and Inf."""
    arrays = np.load(GOLDEN)
    a, b = golden_operands(name, arrays)
    assert_same_bits(PRESETS[name].matmul(a, b).reshape(-1).numpy(), arrays[f"{name}.out"])
    for i in range(0, 48, 5):
        dot = oracle.dot(a[i].reshape(-1).tolist(), b[i].reshape(-1).tolist(), PRESETS[name])
        assert_same_bits(np.float32([dot]), arrays[f"{name}.out"][i : i + 1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", PRESETS)
def test_presets_equal_mma_sim_on_a_gpu(name: str) -> None:
    arrays = np.load(GOLDEN)
    a, b = golden_operands(name, arrays)
    assert_same_bits(PRESETS[name].matmul(a.cuda(), b.cuda()).cpu().reshape(-1).numpy(), arrays[f"{name}.out"])
