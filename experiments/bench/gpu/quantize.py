"""Quantizing a tensor over copying it: the formats of README's table.

device_us: of calls launched as one CUDA graph; over_copy: the ratio of these to a copy's. called_us: of calls as a
program makes them, where what the host needs for a call counts if it is longer. Arms are interleaved; medians.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from experiments.bench.gpu.machine import Machine, Record, Row
from experiments.bench.gpu.parts import attempt, warm_up
from lpsim import Key, Quantizer, Rounding, formats
from lpsim.formats import BlockFormat
from lpsim.quantization.quantizer import ScaleClipsWarning

FORMATS = ("mxfp6_e3m2", "mxfp8_e4m3", "mxfp4_e2m1", "mxint8", "nvfp4", "nf4_block64", "float8_e4m3fn", "bfloat16")
Case = tuple[int, int, torch.dtype, tuple[str, ...]]
CASES: tuple[Case, ...] = (  # rows, columns, dtype, formats; 4096 x 4096 in float32 takes 64 MiB
    (4096, 4096, torch.float32, FORMATS),
    (256, 1024, torch.float32, FORMATS),
    (4096, 4096, torch.bfloat16, ("mxfp6_e3m2", "mxfp4_e2m1", "nvfp4")),
)
SMALL: tuple[Case, ...] = ((4, 32, torch.float32, ("mxfp6_e3m2",)),)
CALLS, REPEATS = 20, 7


def run(machine: Machine, record: Record) -> None:
    warnings.simplefilter("ignore", ScaleClipsWarning)  # the time is measured, not the bias
    cases = SMALL if machine.small else CASES
    if machine.cuda:
        work = [
            partial(_compile, rows, columns, dtype, name) for rows, columns, dtype, names in cases for name in names
        ]
        warm_up(work, machine.processes)
    for rows, columns, dtype, names in cases:
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(machine.device, dtype)
        out = torch.empty_like(x)
        calls = 1 if machine.small else CALLS
        copy = machine.on_device(partial(out.copy_, x), calls)
        common = {"size": f"{rows} x {columns}", "dtype": str(dtype).removeprefix("torch.")}
        for name in names:
            for axis, rounding in _arms(name):
                what = common | {"format": name, "axis": axis, "rounding": rounding.value}
                record(attempt(what, partial(_measure, machine, copy, calls, _call(x, out, name, axis, rounding))))


def _arms(name: str) -> list[tuple[int, Rounding]]:
    axes = (-1, 0) if isinstance(formats.get(name), BlockFormat) else (-1,)
    return [(axis, rounding) for axis in axes for rounding in (Rounding.TIES_TO_EVEN, Rounding.STOCHASTIC)]


def _call(x: Tensor, out: Tensor, name: str, axis: int, rounding: Rounding) -> Callable[[], object]:
    quantizer = Quantizer(formats.get(name), rounding, backend="triton")
    return partial(quantizer.quantize, x, axis, Key(seed=0), out=out)


def _compile(rows: int, columns: int, dtype: torch.dtype, name: str) -> None:
    x = torch.ones(rows, columns, dtype=dtype, device="cuda")
    for axis, rounding in _arms(name):
        _call(x, torch.empty_like(x), name, axis, rounding)()


def _measure(machine: Machine, copies: Callable[[], object], calls: int, call: Callable[[], object]) -> Row:
    """copies: makes `calls` copies."""
    repeats = 1 if machine.small else REPEATS
    graphs = copies, machine.on_device(call, calls)
    times = [[machine.time_ms(graph) / calls for graph in graphs] for _ in range(repeats)]
    copied, quantized = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    called = 1e3 * statistics.median(machine.time_ms(call, calls) for _ in range(repeats))
    return {
        "device_us": round(quantized, 2),
        "copy_us": round(copied, 2),
        "over_copy": round(quantized / copied, 3),
        "called_us": round(called, 2),
    }
