"""Compile the Triton kernels for GPUs that are not there, through the same host code as a launch; print the assembly.

Run as `python -m tests.quantization.compile_kernels TARGET few|many` without TRITON_INTERPRET.
TARGET: sm_80, sm_90, sm_100, gfx942.
Prints one JSON object a kernel: {"kernel": name, "case": text, "assembly": PTX or GCN}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lpsim import Key, Overflow, Quantizer, Rounding, ScaleRule, formats
from lpsim.formats import BlockFormat
from lpsim.quantization import gpu
from lpsim.quantization.plan import plan
from tests.laws import ODD_ONES

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def no_assembler(target: str) -> str:
    """Why this Triton cannot assemble for the target; empty where it can."""
    if target == "sm_100":  # from Blackwell on, it calls another ptxas
        try:
            _ = knobs.nvidia.ptxas_blackwell
        except (AttributeError, RuntimeError) as error:
            return f"Triton {triton.__version__} cannot assemble for {target}: {error}"
    return ""


class Nowhere:
    """A driver for a GPU that is not there: enough to compile."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


def a_third(amax: float, element: object) -> float:
    return amax / 3


def cases(many: bool):  # type: ignore[no-untyped-def]
    """(tensor, quantizer, axis, key offset)."""
    x = torch.randn(64, 256)
    own = BlockFormat("own", formats.int8_q6, formats.float8_e4m3fn, 16, a_third, formats.float32)
    stochastic = Rounding.STOCHASTIC
    yield x, Quantizer(formats.mxfp6_e3m2), 1, 0
    yield x, Quantizer(formats.nvfp4, stochastic), 1, 0
    yield x, Quantizer(formats.mx9), 1, 0
    yield x.bfloat16(), Quantizer(formats.bfloat16, Rounding.TO_ODD), 0, 0
    if not many:
        return
    log_sqrt2 = ODD_ONES[-1]
    yield x, Quantizer(formats.mxfp6_e3m2, stochastic), 0, 5
    yield torch.randn(20000, 3), Quantizer(BlockFormat("axis", formats.float8_e5m2, formats.float8_e8m0fnu, 0)), 0, 0
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        yield x.to(dtype), Quantizer(own), 1, 0
        yield x.to(dtype), Quantizer(BlockFormat("t", log_sqrt2, formats.float32, (3, 5), ScaleRule.ROUND)), 1, 0
        for rounding in Rounding:
            yield x.to(dtype), Quantizer(formats.float8_e5m2, rounding, Overflow.SPECIAL), 0, 0
            for fmt in (f for f in ODD_ONES if f.name in ("e3m0", "e4m3_flushed", "log_sqrt2")):
                yield x.to(dtype), Quantizer(fmt, rounding), 0, 0


def main(target: str, extent: str) -> None:
    driver.set_active(Nowhere(TARGETS[target]))
    launch = triton.JITFunction.run
    compiled: list[tuple[str, Any]] = []

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append((kernel.__name__, launch(kernel, *arguments, grid=grid, warmup=True, **options)))

    triton.JITFunction.run = compile_only
    for x, q, axis, offset in cases(extent == "many"):
        compiled.clear()
        p = plan(q.format, q.rounding, q.overflow, q.random_bits, x.dtype is torch.float64)
        gpu.quantize(x, q.format, axis, p, Key(1, offset=offset), torch.empty_like(x))
        for name, kernel in compiled:
            assembly = kernel.asm.get("ptx") or kernel.asm["amdgcn"]
            case = f"{q.format.name} {q.rounding.name} {tuple(x.shape)} {x.dtype}"
            print(json.dumps({"kernel": name, "case": case, "assembly": assembly}))


if __name__ == "__main__":
    main(*sys.argv[1:])
