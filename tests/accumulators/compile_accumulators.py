"""Compile the Triton kernel of Accumulator for GPUs that are not there, as `tests.quantization.compile_kernels` does.

Run as `python -m tests.accumulators.compile_accumulators TARGET` without TRITON_INTERPRET.
Prints one JSON object a kernel.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.runtime import driver

from lpsim import Accumulator, Order, Rounding, accumulators, formats
from lpsim.accumulators import gpu as accumulator_gpu
from tests.quantization.compile_kernels import TARGETS, Nowhere

UNITS = (
    Accumulator(formats.float16),
    Accumulator(formats.bfloat16, 32, rounding=Rounding.TOWARD_ZERO),
    Accumulator(formats.bfloat16, 16, Order.PAIRWISE),
    accumulators.HOPPER_FP8,
)


def main(target: str) -> None:
    driver.set_active(Nowhere(TARGETS[target]))
    launch = triton.JITFunction.run

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled = launch(kernel, *arguments, grid=grid, warmup=True, **options)
        assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
        print(json.dumps({"kernel": kernel.__name__, "case": f"{options['CHUNK']}", "assembly": assembly}))

    triton.JITFunction.run = compile_only
    for unit, depth in zip(UNITS, (1, 40, 40, 40), strict=True):
        lhs, rhs = torch.zeros(2, 5, depth), torch.zeros(2, 7, depth).mT
        accumulator_gpu.matmul(lhs, rhs, unit.unit, torch.empty(2, 5, 7))


if __name__ == "__main__":
    main(*sys.argv[1:])
