"""Results of torchao and gfloat on fixed inputs: computed where the library is installed, else from tests/golden.

`python -m tests.peers` writes the golden files anew, torchao.npz and gfloat.npz.
"""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import torch

from lpsim import BlockFormat, FloatFormat, Key, Rounding, ScaleRule, formats
from lpsim.conformance.inputs import block_inputs, scalar_inputs
from lpsim.formats import p3109, reference

GOLDEN = Path(__file__).parent / "golden"
Vectors = dict[str, np.ndarray]

# ---------------------------------------------------------------------------------------------- torchao

MX = {
    f"{rule.name}/{element.name}": BlockFormat(
        f"{rule.name} {element.name}", element, formats.float8_e8m0fnu, scale_rule=rule
    )
    for rule in (ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.RCEIL, ScaleRule.EVEN)
    for element in (
        formats.float8_e4m3fn,
        formats.float8_e5m2,
        formats.float6_e3m2fn,
        formats.float6_e2m3fn,
        formats.float4_e2m1fn,
    )
}
ONE_LEVEL = BlockFormat("one_level", formats.float4_e2m1fn, formats.float8_e4m3fn, 16, ScaleRule.ROUND)


def torchao_inputs() -> Vectors:
    """Rows of 64: random, heavy-tailed, hostile blocks of every element; for NVFP4, whole tensors of several sizes."""
    random = np.random.default_rng(0)
    rows = [
        random.standard_normal((8, 64)),
        random.standard_cauchy((8, 64)),
        np.exp(4 * random.standard_normal((8, 64))) * random.choice([-1, 1], (8, 64)),
        np.ldexp(random.integers(-64, 64, (8, 64)) / 4, random.integers(-140, 120, (8, 1))),
        np.ldexp(random.standard_normal((4, 64)), random.integers(-149, -115, (4, 1))),
        np.ldexp(1.0, random.integers(-20, 20, (4, 64))),
    ]
    for fmt in MX.values():
        if fmt.scale_rule is ScaleRule.FLOOR:
            rows += [x[:6, :64] for x in list(block_inputs(fmt))[:12] if np.isfinite(x).all()]
    x = np.concatenate(rows).astype(np.float32)
    x[0, 3], x[1, 40], x[2, 5], x[3] = np.nan, np.inf, -np.inf, 0.0
    normal = random.standard_normal((16, 64)).astype(np.float32)
    heavy = random.standard_cauchy((16, 64)).astype(np.float32)
    wide = (normal * np.exp2(random.uniform(-12, 6, (16, 64)))).astype(np.float32)
    steps = (random.integers(-12, 13, (16, 64)) / 4).astype(np.float32)
    return {
        "mx": x,
        "nv/normal": normal,
        "nv/heavy": heavy,
        "nv/wide": wide,
        "nv/steps": steps,
        "nv/small": normal * 1e-30,
    }


def torchao_vectors(inputs: Vectors) -> Vectors:
    """Block scales and element codes, as unpacked bytes, for every element and scale mode; for NVFP4 on both levels."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
        from torchao.prototype.mx_formats.mx_tensor import to_mx
        from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale
    types = {
        "float8_e4m3fn": torch.float8_e4m3fn,
        "float8_e5m2": torch.float8_e5m2,
        "float6_e3m2fn": DTYPE_FP6_E3M2,
        "float6_e2m3fn": DTYPE_FP6_E2M3,
        "float4_e2m1fn": torch.float4_e2m1fn_x2,
    }

    def unpacked(codes: torch.Tensor) -> np.ndarray:
        halves = codes.view(torch.uint8).numpy()
        return np.stack([halves & 15, halves >> 4], -1).reshape(len(halves), -1)

    results: Vectors = {}
    for name in MX:
        rule, element = name.split("/")
        scale, codes = to_mx(torch.from_numpy(inputs["mx"]), types[element], 32, ScaleCalculationMode[rule])
        results[f"{name}/scale"] = scale.view(torch.uint8).numpy()
        results[f"{name}/codes"] = unpacked(codes) if "float4" in element else codes.view(torch.uint8).numpy()
    for name, array in inputs.items():
        if name.startswith("nv/"):
            x = torch.from_numpy(array)
            outer = per_tensor_amax_to_scale(x.abs().max())
            for levels, second in (("two", outer), ("one", None)):
                scale, codes = nvfp4_quantize(x, 16, second)
                results[f"{name}/{levels}/scale"] = scale.view(torch.uint8).numpy()
                results[f"{name}/{levels}/codes"] = unpacked(codes)
            results[f"{name}/outer"] = outer.numpy()
    return results


# ---------------------------------------------------------------------------------------------- gfloat

SCALAR: dict[str, FloatFormat] = {
    "ocp_e4m3": formats.float8_e4m3fn,
    "ocp_e5m2": formats.float8_e5m2,
    "ocp_e3m2": formats.float6_e3m2fn,
    "ocp_e2m3": formats.float6_e2m3fn,
    "ocp_e2m1": formats.float4_e2m1fn,
    "binary16": formats.float16,
    "bfloat16": formats.bfloat16,
    "p3109_k8p3se": p3109(8, 3),
    "p3109_k8p4sf": p3109(8, 4, extended=False),
    "p3109_k6p3se": p3109(6, 3),
    "p3109_k5p1se": p3109(5, 1),
    "p3109_k6p2ue": p3109(6, 2, signed=False),
}
MODES = {
    Rounding.TIES_TO_EVEN: "TiesToEven",
    Rounding.TIES_TO_AWAY: "TiesToAway",
    Rounding.TOWARD_ZERO: "TowardZero",
    Rounding.TOWARD_POSITIVE: "TowardPositive",
    Rounding.TOWARD_NEGATIVE: "TowardNegative",
    Rounding.STOCHASTIC: "StochasticFastest",
}
RANDOM_BITS = 5
KEY = Key(seed=11)


def gfloat_inputs() -> Vectors:
    """About a thousand of the inputs that quantizers get wrong, the specials at their end included."""
    random, inputs = np.random.default_rng(0), {}
    for name, fmt in SCALAR.items():
        x = scalar_inputs(fmt, np.float64, count=48)
        inputs[name] = np.concatenate([random.choice(x[:-12], 1000, replace=False), x[-12:]])
    return inputs


def random_words(count: int) -> np.ndarray:
    return np.array([reference.random_word(KEY, i) >> (32 - RANDOM_BITS) for i in range(count)], np.int64)


def gfloat_vectors(inputs: Vectors) -> Vectors:
    """Rounded values for every format, rounding, and with and without saturation where the format allows both."""
    from gfloat import RoundMode, round_ndarray
    from gfloat import formats as theirs
    from gfloat.types import Domain, Signedness

    results: Vectors = {}
    for name, fmt in SCALAR.items():
        if name.startswith("p3109"):
            sign = Signedness.Signed if name[-2] == "s" else Signedness.Unsigned
            domain = Domain.Extended if name[-1] == "e" else Domain.Finite
            info = theirs.format_info_p3109(fmt.bits, fmt.mantissa_bits + 1, sign, domain)
        else:
            info = getattr(theirs, f"format_info_{name}")
        x = inputs[name]
        for mode in MODES.values():
            for saturate in (True, False) if fmt.has_nan else (True,):
                words = random_words(len(x)) if mode.startswith("Stochastic") else None
                with np.errstate(all="ignore"):
                    y = round_ndarray(
                        info, x, RoundMode[mode], saturate, words, RANDOM_BITS if words is not None else 0
                    )
                    results[f"{name}/{mode}/{'saturate' if saturate else 'special'}"] = y.astype(np.float32)
    return results


# ---------------------------------------------------------------------------------------------- golden

SOURCES = {"torchao": (torchao_inputs, torchao_vectors), "gfloat": (gfloat_inputs, gfloat_vectors)}


def installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None


def golden(library: str) -> tuple[Vectors, Vectors]:
    """(inputs, results) of the golden file."""
    with np.load(GOLDEN / f"{library}.npz") as stored:
        parts = {name: stored[name] for name in stored.files}
    return tuple({n[len(p) :]: a for n, a in parts.items() if n.startswith(p)} for p in ("x:", "y:"))  # type: ignore[return-value]


def live(library: str) -> tuple[Vectors, Vectors]:
    """(inputs, results) of the installed library."""
    make_inputs, make_results = SOURCES[library]
    inputs = make_inputs()
    return inputs, make_results(inputs)


if __name__ == "__main__":
    for library in SOURCES:
        inputs, results = live(library)
        arrays = {f"x:{n}": a for n, a in inputs.items()} | {f"y:{n}": a for n, a in results.items()}
        np.savez_compressed(GOLDEN / f"{library}.npz", **arrays)  # type: ignore[arg-type]
