"""The Triton kernels as they are compiled for GPUs that are not there; and what is said where Triton cannot serve."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.quantization.compile_kernels import no_assembler

UNINTERPRETED = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
INEXACT = re.compile(r"\bfma\.|\bmad\.(rn\.)?f|\.ftz|\.approx|div\.full")  # in PTX


def compiled(target: str, extent: str, cache: Path) -> list[dict[str, str]]:
    """What tests.quantization.compile_kernels prints."""
    command = [sys.executable, "-m", "tests.quantization.compile_kernels", target, extent]
    where = {"cwd": Path(__file__).parents[2], "env": UNINTERPRETED | {"TRITON_CACHE_DIR": str(cache)}}
    done = subprocess.run(command, capture_output=True, text=True, **where)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_ieee_arithmetic(kernels: list[dict[str, str]]) -> None:
    """No contracted products, no flushed subnormals, no approximate divisions."""
    assert {kernel["kernel"] for kernel in kernels} == {"quantize_tiles", "tile_maxima", "tensor_scale"}
    for kernel in kernels:
        found = [line.strip() for line in kernel["assembly"].splitlines() if INEXACT.search(line)]
        assert not found, f"{kernel['kernel']} for {kernel['case']}: {found[:3]}"


def test_kernels_compile_for_nvidia_to_ieee_arithmetic(tmp_path: Path) -> None:
    assert_ieee_arithmetic(compiled("sm_90", "few", tmp_path))


@pytest.mark.full
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_all_kernels_compile_for_nvidia_to_ieee_arithmetic(target: str, tmp_path: Path) -> None:
    if missing := no_assembler(target):
        pytest.skip(missing)
    assert_ieee_arithmetic(compiled(target, "many", tmp_path))


@pytest.mark.full
def test_all_kernels_compile_for_amd(tmp_path: Path) -> None:
    """That the arithmetic is exact there is not shown: its divisions and conversions are made of fused operations."""
    assert len(compiled("gfx942", "many", tmp_path)) > 100


def said(statement: str) -> str:
    """The last line that a failing statement writes in a fresh interpreter without TRITON_INTERPRET."""
    done = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, env=UNINTERPRETED)
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


def test_an_absent_triton_says_how_to_install_it() -> None:
    error = said(
        "import sys; sys.modules['triton'] = None; from lpsim.quantization.quantizer import backend; backend('triton')"
    )
    assert error.startswith("ImportError") and "pip install triton" in error


def test_a_triton_that_flushes_subnormals_in_divisions_is_refused() -> None:
    error = said(
        "import triton; triton.__version__ = '3.5.1'; from lpsim.quantization.quantizer import backend; "
        "backend('triton')"
    )
    assert error.startswith("ImportError") and "3.6" in error and "pip install" in error


def test_cpu_tensors_need_the_interpreter() -> None:
    call = "Quantizer(formats.float16, backend='triton')(torch.ones(1))"
    error = said(f"import torch; from lpsim import Quantizer, formats; {call}")
    assert error.startswith("ValueError: the backend triton does not serve")
