"""The matrix product of simulated accumulators over torch.matmul: milliseconds and ratios, at one thread and at two.

All arms are interleaved, call by call. At one thread the table gives medians of the process's CPU time; at two, which
any other process upsets, the shortest wall times. A processor whose torch.matmul is near its peak leaves less room than
one where it is not; the column of multiply-adds a nanosecond tells: AVX-512 does at most 32 a cycle.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import pandas as pd
import torch
from torch import Tensor

from experiments.bench.step import keep_memory
from lpsim import Accumulator, FloatFormat, Order, Quantizer, Rounding, accumulators, formats
from lpsim.accumulators import cpu as accumulator_cpu

SIZE = 512
E8M13 = FloatFormat("float22_e8m13", 8, 13)

Arm = Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=15, help="samples of each arm (default 15)")
    parser.add_argument("--size", type=int, default=SIZE, help=f"M, N and K of the product (default {SIZE})")
    parser.add_argument("--threads", type=int, choices=(1, 2), help="only so many threads")
    parser.add_argument(
        "--keep-memory", action="store_true", help="forbid glibc to return freed memory, for all arms (mallopt)"
    )


def run(options: argparse.Namespace) -> int:
    has = accumulator_cpu.vectors()
    kept = keep_memory() if options.keep_memory else False
    print(
        f"torch {torch.__version__}, AVX-512: {has.directed}, AVX-512 FP16: {has.half}, size {options.size}, "
        f"glibc {'keeps freed memory' if kept else 'as it is'}"
    )
    for threads in (1, 2) if options.threads is None else (options.threads,):
        torch.set_num_threads(threads)
        table = measure(arms(options.size), options.size**3, options.repeats, threads)
        print(f"\n{threads} thread{'s' * (threads > 1)}\n{table.to_string(index=False)}")
    return 0


def arms(size: int) -> dict[str, Arm]:
    """torch.matmul, and the units on normal numbers as they are, in MXFP6 and in E4M3."""
    generator = torch.Generator().manual_seed(0)
    lhs, rhs = torch.randn(size, size, generator=generator), torch.randn(size, size, generator=generator)
    mx, e4m3 = Quantizer(formats.mxfp6_e3m2).quantize, Quantizer(formats.float8_e4m3fn).quantize
    half = Quantizer(formats.float16).quantize
    narrow, eight = (mx(lhs), mx(rhs, 0)), (e4m3(lhs), e4m3(rhs))
    zero = Rounding.TOWARD_ZERO

    def arm(unit: Accumulator, operands: tuple[Tensor, Tensor]) -> Arm:
        return lambda: unit.matmul(*operands)

    return {
        "torch.matmul": lambda: lhs @ rhs,
        "every multiply-add, float32": arm(Accumulator(formats.float32), (lhs, rhs)),
        "every multiply-add, float16, MXFP6 operands": arm(Accumulator(formats.float16), narrow),
        "every multiply-add, bfloat16, MXFP6 operands": arm(Accumulator(formats.bfloat16), narrow),
        "every multiply-add, 14 bits": arm(Accumulator(E8M13), (lhs, rhs)),
        "every multiply-add, 14 bits, toward zero": arm(Accumulator(E8M13, rounding=zero), (lhs, rhs)),
        "chunks of 32, 14 bits": arm(Accumulator(E8M13, 32), (lhs, rhs)),
        "chunks of 128, 14 bits": arm(Accumulator(E8M13, 128), (lhs, rhs)),
        "chunks of 32, float16, MXFP6 operands": arm(Accumulator(formats.float16, 32), narrow),
        "chunks of 32, pairwise, 14 bits": arm(Accumulator(E8M13, 32, Order.PAIRWISE), (lhs, rhs)),
        "HOPPER_FP8": arm(accumulators.HOPPER_FP8, eight),
        "HOPPER_FP16": arm(accumulators.HOPPER_FP16, (half(lhs), half(rhs))),
        "AMPERE_FP16": arm(accumulators.AMPERE_FP16, (half(lhs), half(rhs))),
    }


def measure(table: dict[str, Arm], multiply_adds: int, repeats: int, threads: int) -> pd.DataFrame:
    """The time of each arm and its ratio to the first."""
    clock = time.process_time if threads == 1 else time.perf_counter
    typical: Callable[[list[float]], float] = statistics.median if threads == 1 else min
    times: dict[str, list[float]] = {name: [] for name in table}
    for arm in table.values():  # compile, and touch the memory
        arm()
    for _ in range(repeats):
        for name, arm in table.items():
            begun = clock()
            arm()
            times[name].append(clock() - begun)
    seconds = {name: typical(samples) for name, samples in times.items()}
    first = next(iter(seconds.values()))
    rows = [
        (name, round(1e3 * s, 2), round(s / first, 2), round(multiply_adds / s / 1e9, 1)) for name, s in seconds.items()
    ]
    return pd.DataFrame(rows, columns=["arm", "ms", "over torch.matmul", "multiply-adds a ns"])
