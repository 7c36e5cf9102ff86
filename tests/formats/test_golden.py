"""Every backend against the stored outputs of other implementations (tests/golden/README.md)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lpsim import Quantizer, Rounding, formats
from lpsim.formats import BlockFormat
from tests.laws import assert_same_bits

FOLDER = Path(__file__).parents[1] / "golden"
ELEMENTS = {
    "fp8_e4m3": formats.float8_e4m3fn,
    "fp8_e5m2": formats.float8_e5m2,
    "fp6_e3m2": formats.float6_e3m2fn,
    "fp6_e2m3": formats.float6_e2m3fn,
    "fp4_e2m1": formats.float4_e2m1fn,
    "int8": formats.int8_q6,
    "int4": formats.int4_q2,
}
ROUNDINGS = {"even": Rounding.TIES_TO_EVEN, "nearest": Rounding.TIES_TO_AWAY, "floor": Rounding.TOWARD_ZERO}


def expected_output(x: np.ndarray, stored: np.ndarray, negative_zero: bool) -> np.ndarray:
    """The stored output with the signs of zeros as our contract has them, after checking microxcaling's own rule."""
    zero = stored == 0
    np.testing.assert_array_equal(np.signbit(stored[zero]), (x < 0)[zero])
    return np.where(zero, np.copysign(np.float32(0), np.where(np.signbit(x) & negative_zero, -1, 1)), stored).astype(
        x.dtype
    )


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_microxcaling(backend: str, element: str) -> None:
    arrays = np.load(FOLDER / "microxcaling.npz")
    cases = [c for c in json.loads((FOLDER / "microxcaling.json").read_text()) if c["element"] == element]
    assert len(cases) == 54
    for case in cases:
        fmt = BlockFormat("golden", ELEMENTS[element], formats.float8_e8m0fnu, block_size=case["block_size"])
        quantizer = Quantizer(fmt, ROUNDINGS[case["round"]], backend=backend)
        x = arrays[case["x"]]
        expected = expected_output(x, arrays[case["key"]], fmt.element.has_negative_zero)
        assert_same_bits(quantizer(torch.from_numpy(x), axis=case["axis"]).numpy(), expected, str(case))
