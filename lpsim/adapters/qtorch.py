"""QPyTorch (qtorch 0.3) as a backend: its nearest rounding of floats, fixed point and block floating point.

Its stochastic rounding is left out: no key determines its bits, and on CPU not even torch.manual_seed. Importing
qtorch compiles its extension, so that is left to the first call. What differs from our definition is listed by
`departures`; everything else is equal bit for bit in tests/adapters/test_adapters.py.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import torch

from lpsim import formats
from lpsim.formats import BlockFormat, FixedFormat, FloatFormat, Specials
from lpsim.formats.rounding import Key, Overflow, Rounding, ScaleRule
from lpsim.quantization.quantizer import Quantizer


class Settings(NamedTuple):
    """A function of qtorch.quant and its arguments besides the tensor (and, of block_quantize, its dim)."""

    function: str
    arguments: dict[str, Any]


def settings(quantizer: Quantizer) -> Settings | None:
    """qtorch's call for a Quantizer; None where it has no such format, rounding or overflow policy.

    float_quantize: all codes are numbers, the bias is 2^(e − 1) − 1, e <= 7, ties away from zero. fixed_point_quantize:
    ties to even. block_quantize: one power of two for a whole axis or tensor, symmetric integers, ties away.
    """
    fmt, rounding = quantizer.format, quantizer.rounding
    if quantizer.overflow is not Overflow.SATURATE:
        return None
    if isinstance(fmt, FloatFormat) and rounding is Rounding.TIES_TO_AWAY:
        like = FloatFormat(fmt.name, fmt.exponent_bits, fmt.mantissa_bits, specials=Specials.NONE)
        if fmt == like and 2 <= fmt.exponent_bits <= 7 and 1 <= fmt.mantissa_bits <= 22:
            return Settings(
                "float_quantize", {"exp": fmt.exponent_bits, "man": fmt.mantissa_bits, "rounding": "nearest"}
            )
    if isinstance(fmt, FixedFormat) and rounding is Rounding.TIES_TO_EVEN and fmt.bits <= 24:
        arguments = {"wl": fmt.bits, "fl": fmt.frac_bits, "clamp": True, "symmetric": fmt.symmetric}
        return Settings("fixed_point_quantize", {**arguments, "rounding": "nearest"})
    if isinstance(fmt, BlockFormat) and rounding is Rounding.TIES_TO_AWAY:
        scaled = fmt.scale == formats.float8_e8m0fnu and fmt.scale_rule is ScaleRule.FLOOR
        bits = fmt.element.bits
        integer = FixedFormat(fmt.element.name, bits, bits - 2, symmetric=True)
        if scaled and fmt.block_size in (0, None) and fmt.element == integer and bits <= 20:
            return Settings("block_quantize", {"wl": bits, "rounding": "nearest"})
    return None


class QtorchBackend:
    """qtorch.quant's float_quantize, fixed_point_quantize and block_quantize."""

    name = "qtorch"

    def __init__(self) -> None:
        if importlib.util.find_spec("qtorch") is None:
            raise ImportError(
                "the backend qtorch needs QPyTorch, which is not installed: pip install qtorch ninja "
                "(and a C++ compiler, as it compiles itself when first used)"
            )

    def supports(self, quantizer: Quantizer, device: torch.device) -> bool:
        return settings(quantizer) is not None

    def departures(self, quantizer: Quantizer) -> tuple[str, ...]:
        """Where its result is not ours."""
        call = settings(quantizer)
        function = call.function if call else None
        if function == "float_quantize":
            return (
                "NaN becomes ±max",
                "-0.0 and negative numbers that round to zero become +0.0",
                "subnormals are rounded twice (x plus the smallest normal number, in float32)",
            )
        if function == "fixed_point_quantize":
            return (
                "numbers that round to zero from below become -0.0, which the format has not",
                "x is rounded twice (half a step is added in float32): just above half a step becomes 0",
            )
        return (
            "ties go toward positive, not away from zero",
            "x is rounded twice (six times the largest power of two is added in float32)",
            "blocks with a maximum below 2^-126 come out wrong (the exponent field is 0)",
            "blocks with a maximum of 2^125 and more become -max throughout (six times it overflows)",
        )

    def quantize(
        self, x: torch.Tensor, quantizer: Quantizer, axis: int, key: Key | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Computed in float32, the only type that qtorch knows."""
        from qtorch import quant

        call = settings(quantizer)
        assert call is not None
        wide = x.float().contiguous()
        function = getattr(quant, call.function)
        if x.numel() == 0:
            result = wide
        elif isinstance(quantizer.format, BlockFormat):
            whole = quantizer.format.block_size is None or x.dim() < 2
            lines = wide.reshape(-1) if whole else wide.movedim(axis, -1).contiguous()
            result = function(lines.reshape(-1, lines.shape[-1]), dim=-1 if whole else 0, **call.arguments)
            result = result.reshape(lines.shape)
            result = result.reshape(x.shape) if whole else result.movedim(-1, axis)
        else:
            result = function(wide, **call.arguments)
        return result.to(x.dtype) if out is None else out.copy_(result)
