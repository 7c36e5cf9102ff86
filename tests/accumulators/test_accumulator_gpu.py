"""The GPU's accumulator: equal to the CPU's, and compiled to IEEE arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lpsim import Accumulator, Alignment, accumulators, formats
from lpsim.accumulators import cpu as accumulator_cpu
from tests.accumulators.units import E8M13, NARROW_FNUZ, hostile_pairs, tensors, units
from tests.laws import assert_same_bits


@pytest.mark.gpu
def test_triton_equals_numba() -> None:
    """Every kind of unit and every kind of number, in turn."""
    gpu = pytest.importorskip("lpsim.accumulators.gpu", exc_type=ImportError)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the interpreter's
    pairs = itertools.cycle(hostile_pairs().items())
    for unit in itertools.chain(units(E8M13), units(NARROW_FNUZ)):
        for name, (a, b) in itertools.islice(pairs, 2 if unit.chunk == 1 else 1):
            lhs, rhs = torch.from_numpy(a)[None], torch.from_numpy(b)[None]
            out, expected = torch.empty(1, 5, 6, device=device), torch.empty(1, 5, 6)
            gpu.matmul(lhs.to(device), rhs.to(device), unit.unit, out)
            accumulator_cpu.any_unit(lhs, rhs, unit.unit, expected)
            assert_same_bits(out.cpu().numpy(), expected.numpy(), f"{name} {unit}")


@pytest.mark.gpu
def test_triton_on_batches_blocks_and_layouts() -> None:
    gpu = pytest.importorskip("lpsim.accumulators.gpu", exc_type=ImportError)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lhs, rhs = tensors((2, 6, 35), (2, 45, 6))
    for unit in (Accumulator(formats.float16), dataclasses.replace(accumulators.HOPPER_FP8, alignment=Alignment(13))):
        out, expected = torch.empty(2, 45, 35, device=device).mT, torch.empty(2, 35, 45)
        gpu.matmul(lhs.mT.to(device), rhs.mT.to(device), unit.unit, out)
        accumulator_cpu.matmul(lhs.mT, rhs.mT, unit.unit, expected)
        assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(target, marks=pytest.mark.full) for target in ("sm_80", "sm_100"))]
)
def test_the_triton_kernel_compiles_to_ieee_arithmetic(target: str, tmp_path: Path) -> None:
    """No contracted products, no flushed subnormals, no approximations."""
    pytest.importorskip("lpsim.accumulators.gpu", exc_type=ImportError)
    from tests.quantization.compile_kernels import no_assembler

    if missing := no_assembler(target):
        pytest.skip(missing)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.accumulators.compile_accumulators", target],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) == 4
    for kernel in kernels:
        inexact = re.search(r"\bfma\.|\bmad\.(rn\.)?f|\.ftz|\.approx|div\.full", kernel["assembly"])
        assert inexact is None, f"{kernel['case']}: {inexact}"
