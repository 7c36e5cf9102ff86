"""Quantizing a tensor, over copying it: nanoseconds an element and the ratio to a copy of the same tensor.

All arms are interleaved, call by call, on one thread; the table gives medians. Two sizes: one that stays in the cache
(256 x 1024) and one that does not (4096 x 4096). Peers are measured where they are installed; their results, like the
arm "new output", are new tensors, whose pages glibc asks of the kernel anew for blocks above 32 MiB unless
--keep-memory forbids it.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import ml_dtypes
import numpy as np
import pandas as pd
import torch

from experiments.bench.step import keep_memory
from lpsim import Key, Quantizer, Rounding, available_backends, formats
from lpsim.formats import BlockFormat
from lpsim.quantizer import ScaleClipsWarning

SIZES = {"256x1024": (256, 1024, 20), "4096x4096": (4096, 4096, 1)}  # rows, columns, calls a sample
FORMATS = ("mxfp8_e4m3", "mxfp6_e3m2", "mxfp4_e2m1", "mxint8", "nvfp4", "nf4_block64", "float8_e4m3fn", "bfloat16")

Arm = Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=15, help="samples of each arm (default 15)")
    parser.add_argument("--size", choices=[*SIZES], help="only this size")
    parser.add_argument(
        "--keep-memory", action="store_true", help="forbid glibc to return freed memory, for all arms (mallopt)"
    )


def run(options: argparse.Namespace) -> int:
    warnings.simplefilter("ignore", ScaleClipsWarning)  # the time is measured, not the bias
    torch.set_num_threads(1)
    kept = keep_memory() if options.keep_memory else False
    print(f"torch {torch.__version__}, 1 thread, glibc {'keeps freed memory' if kept else 'as it is'}")
    for size, (rows, columns, calls) in SIZES.items():
        if options.size in (None, size):
            x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
            print(f"\n{size}\n{measure(dict(arms(x)), x.numel(), options.repeats, calls).to_string(index=False)}")
    small = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    quantizer = Quantizer(formats.mxfp6_e3m2)
    calls_ns = measure({"call": lambda: quantizer.quantize(small)}, 1, options.repeats, 500)["ns an element"]
    print(f"\n32x32 mxfp6_e3m2: {calls_ns[0] / 1000:.1f} microseconds a call")
    return 0


def arms(x: torch.Tensor) -> Iterator[tuple[str, Arm]]:
    """The copy, our formats into a given output, and what is installed of the peers."""
    out, key = torch.empty_like(x), Key(seed=0)
    yield "copy", lambda: out.copy_(x)
    for name in FORMATS:
        fmt = formats.get(name)
        even, stochastic = Quantizer(fmt), Quantizer(fmt, Rounding.STOCHASTIC)
        for axis, place in ((-1, " last axis"), (0, " first axis")) if isinstance(fmt, BlockFormat) else ((-1, ""),):
            yield f"{name}{place}", partial(even.quantize, x, axis, out=out)
            yield f"{name}{place} stochastic", partial(stochastic.quantize, x, axis, key, out=out)
    even = Quantizer(formats.mxfp6_e3m2)
    yield "mxfp6_e3m2 last axis, new output", lambda: even.quantize(x)
    for rounding in (Rounding.TIES_TO_AWAY, Rounding.TOWARD_ZERO, Rounding.TO_ODD):
        quantizer = Quantizer(formats.mxfp6_e3m2, rounding)
        yield f"mxfp6_e3m2 last axis {rounding.value}", partial(quantizer.quantize, x, out=out)
    yield from peers(x)


def peers(x: torch.Tensor) -> Iterator[tuple[str, Arm]]:
    """Other libraries on the same tensor: fake quantization where they have it, else a cast there and back."""
    backends = available_backends()
    if "microxcaling" in backends:
        theirs = Quantizer(formats.mxfp6_e3m2, backend="microxcaling")
        yield "peer: microxcaling mxfp6_e3m2", lambda: theirs.quantize(x)
    if "qtorch" in backends:
        nearest = Quantizer(formats.float6_e3m2fn, backend="qtorch")
        if nearest_serves(nearest, x):
            yield "peer: qtorch float6 nearest", lambda: nearest.quantize(x)
    array = x.numpy()
    yield "peer: ml_dtypes float6_e3m2fn", lambda: array.astype(ml_dtypes.float6_e3m2fn).astype(np.float32)
    try:
        from torchao.prototype.mx_formats.mx_tensor import to_mx
    except ImportError:
        return
    yield "peer: torchao mxfp8_e4m3, to_mx only", lambda: to_mx(x, torch.float8_e4m3fn, 32)


def nearest_serves(quantizer: Quantizer, x: torch.Tensor) -> bool:
    """Whether the backend of a quantizer takes it."""
    try:
        quantizer.quantize(x[:1, :32])
    except ValueError:
        return False
    return True


def measure(table: dict[str, Arm], elements: int, repeats: int, calls: int) -> pd.DataFrame:
    """The median time of each arm and its ratio to the first."""
    times: dict[str, list[float]] = {name: [] for name in table}
    for arm in table.values():  # compile, and touch the memory
        arm()
    for _ in range(repeats):
        for name, arm in table.items():
            begun = time.perf_counter()
            for _ in range(calls):
                arm()
            times[name].append((time.perf_counter() - begun) / calls / elements * 1e9)
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    first = next(iter(medians.values()))
    rows = [(name, round(ns, 3), round(ns / first, 2)) for name, ns in medians.items()]
    return pd.DataFrame(rows, columns=["arm", "ns an element", "over copy"])
