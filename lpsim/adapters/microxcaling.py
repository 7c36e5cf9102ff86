"""microxcaling (Microsoft's emulator of the MX formats, commit 7bc4195) as a backend, on CPU through its PyTorch path.

`settings` gives all 30 of its string keys, so that its own layers can be run with our format too: its defaults leave
some roundings at "nearest" where only "round" is set. What differs from our definition is listed by `departures`;
everything else is equal bit for bit, on the golden vectors and in tests/adapters/test_adapters.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from lpsim import formats
from lpsim.formats import BlockFormat, FixedFormat, FloatFormat, Specials
from lpsim.formats.rounding import Key, Overflow, Rounding, ScaleRule
from lpsim.quantization.quantizer import Quantizer

ELEMENTS: dict[formats.Element, str] = {
    formats.float8_e4m3fn: "fp8_e4m3",
    formats.float8_e5m2: "fp8_e5m2",
    formats.float6_e3m2fn: "fp6_e3m2",
    formats.float6_e2m3fn: "fp6_e2m3",
    formats.float4_e2m1fn: "fp4_e2m1",
    formats.int8_q6: "int8",
    formats.int4_q2: "int4",
}
ROUNDINGS = {
    Rounding.TIES_TO_EVEN: "even",
    Rounding.TIES_TO_AWAY: "nearest",
    Rounding.TOWARD_ZERO: "floor",
}
ROUNDING_KEYS = (
    "round",
    "round_m",
    "round_weight",
    "round_output",
    "round_grad_weight",
    "round_grad_input",
    "round_mx_output",
    "round_mx_input_grad_input",
    "round_mx_weight_grad_input",
    "round_mx_grad_output_grad_input",
    "round_mx_input_grad_weight",
    "round_mx_grad_output_grad_weight",
)
ELEMENT_KEYS = (
    "w_elem_format",
    "a_elem_format",
    "w_elem_format_bp",
    "a_elem_format_bp",
    "a_elem_format_bp_ex",
    "a_elem_format_bp_os",
)


def settings(quantizer: Quantizer) -> dict[str, Any] | None:
    """All of microxcaling's keys for a Quantizer; None where it has no such format, rounding or overflow policy.

    Blocks: the seven elements of `ELEMENTS` with E8M0 scales, FLOOR, along one axis. Scalars: bfloat16-like formats (8
    exponent bits, "bfloat") and float16-like ones (5, "fp") that overflow to Inf. Its random rounding ("dither") draws
    from torch's global state, which no key determines, and is left out.
    """
    fmt, rounding = quantizer.format, ROUNDINGS.get(quantizer.rounding)
    element, block_size, bfloat, fp = None, 0, 0, 0
    if isinstance(fmt, BlockFormat):
        if not isinstance(fmt.block_size, int) or fmt.sub_block_size:
            return None
        if fmt.scale == formats.float8_e8m0fnu and fmt.scale_rule is ScaleRule.FLOOR:
            element, block_size = ELEMENTS.get(fmt.element), fmt.block_size
    elif isinstance(fmt, FloatFormat) and quantizer.overflow is Overflow.SPECIAL:
        like = FloatFormat(fmt.name, fmt.exponent_bits, fmt.mantissa_bits, specials=Specials.IEEE)
        if fmt == like and fmt.mantissa_bits >= 1:
            bfloat = fmt.bits if fmt.exponent_bits == 8 else 0
            fp = fmt.bits if fmt.exponent_bits == 5 else 0
    if rounding is None or not (element or bfloat or fp):
        return None
    return {
        "scale_bits": 8,
        **dict.fromkeys(ELEMENT_KEYS, element),
        "mx_flush_fp32_subnorms": False,
        "shared_exp_method": "max",
        "block_size": block_size,
        "bfloat": bfloat,
        "fp": fp,
        "bfloat_subnorms": True,
        "quantize_backprop": True,
        **dict.fromkeys(ROUNDING_KEYS, rounding),
        "softmax_exp2": False,
        "vec_use_exp2": False,
        "vec_use_recip": False,
        "custom_cuda": False,
    }


class MicroxcalingBackend:
    """microxcaling's quantize_mx_op and quantize_elemwise_op."""

    name = "microxcaling"

    def __init__(self) -> None:
        found = importlib.util.find_spec("mx")  # there are other things called mx
        folders = (found.submodule_search_locations or ()) if found else ()
        if not any(Path(folder, "mx_ops.py").exists() for folder in folders):
            raise ImportError(
                "the backend microxcaling needs the package mx of github.com/microsoft/microxcaling, which is not "
                "installed: clone that repository and put its folder on PYTHONPATH"
            )

    def supports(self, quantizer: Quantizer, device: torch.device) -> bool:
        return settings(quantizer) is not None

    def departures(self, quantizer: Quantizer) -> tuple[str, ...]:
        """Where its result is not ours."""
        element, blocks = _element(quantizer), isinstance(quantizer.format, BlockFormat)
        to_zero = quantizer.rounding is Rounding.TOWARD_ZERO
        reasons = []
        if isinstance(element, FixedFormat):
            reasons.append("a negative number that rounds to zero becomes -0.0, which the format has not")
        else:
            reasons.append("-0.0 becomes +0.0, as does what underflows over its scale (it multiplies by the sign, 0)")
            if to_zero:
                reasons.append("a number within 2^-18 below a power of two is cut at twice its spacing (float32 log2)")
            else:
                reasons.append("a number just below half the smallest one is rounded up (0.5 is added in float32)")
        if blocks:
            reasons.append(
                "a block maximum within 2^-18 below a power of two gets a scale one binade too large (float32 log2), "
                "just below 2^128 Inf or NaN"
            )
        else:
            reasons.append("the largest numbers of float32 become NaN (float32 log2 gives 128)")
            if to_zero:
                reasons.append("finite numbers beyond max become Inf, not max")
        return tuple(reasons)

    def quantize(
        self, x: torch.Tensor, quantizer: Quantizer, axis: int, key: Key | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Computed in float32, as microxcaling's accuracy is that of log2 in the tensor's type."""
        from mx.elemwise_ops import quantize_elemwise_op
        from mx.mx_ops import quantize_mx_op

        keys = settings(quantizer)
        assert keys is not None
        wide = x.to(torch.float64 if x.dtype is torch.float64 else torch.float32).contiguous()
        if x.numel() == 0:
            result = wide
        elif isinstance(quantizer.format, BlockFormat):
            lines = wide.reshape(tuple(x.shape) or (1,))
            result = quantize_mx_op(lines, keys, keys["w_elem_format"], axes=[axis], round=keys["round"]).reshape(
                x.shape
            )
        else:
            result = quantize_elemwise_op(wide, keys, keys["round"])
        return result.to(x.dtype) if out is None else out.copy_(result)


def _element(quantizer: Quantizer) -> formats.Element:
    fmt = quantizer.format
    return fmt.element if isinstance(fmt, BlockFormat) else fmt
