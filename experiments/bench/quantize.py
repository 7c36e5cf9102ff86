"""Quantizing a tensor, over copying it: nanoseconds an element and the ratio to a copy of the same tensor.

All arms are interleaved, call by call, on one thread; the table gives medians. Two sizes: one that stays in the cache
(256 x 1024) and one that does not (4096 x 4096). Peers are measured where they are installed; their results, like the
arm "new output", are new tensors, whose pages glibc asks of the kernel anew for blocks above 32 MiB. So these arms are
measured again, with the copy, after glibc has been told to keep freed memory. The memory that a call adds at its
peak is given in sizes of the tensor; where it is not output, it is work space.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pandas as pd
import torch

from experiments.bench.step import keep_memory
from lpsim import Key, Quantizer, Rounding, available_backends, formats
from lpsim.formats import BlockFormat
from lpsim.quantization.quantizer import ScaleClipsWarning

SIZES = {"256x1024": (256, 1024, 20), "4096x4096": (4096, 4096, 1)}  # rows, columns, calls a sample
FORMATS = (
    *("mxfp8_e4m3", "mxfp6_e3m2", "mxfp4_e2m1", "mxint8", "mx9", "mx6", "nvfp4", "nf4_block64"),
    *("float8_e4m3fn", "bfloat16"),
)

NEW = ", new output"  # at the end of the name of an arm that allocates its result

Arm = Callable[[], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=15, help="samples of each arm (default 15)")
    parser.add_argument("--size", choices=[*SIZES], help="only this size")


def run(options: argparse.Namespace) -> int:
    warnings.simplefilter("ignore", ScaleClipsWarning)  # the time is measured, not the bias
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, 1 thread")
    chosen = [(size, *rest) for size, rest in SIZES.items() if options.size in (None, size)]
    tensors = {
        size: torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        for size, rows, columns, _ in chosen
    }
    for size, _, _, calls in chosen:
        x = tensors[size]
        table = measure(dict(arms(x)), x.numel(), options.repeats, calls)
        print(f"\n{size}\n{table.to_string(index=False)}")
    for size, rows, columns, _ in chosen:
        if 4 * rows * columns > 1 << 25:  # smaller blocks are served from memory that is there already
            table = {name: arm for name, arm in arms(tensors[size]) if name.endswith(NEW)}
            added = pd.DataFrame(peaks(table, 4 * rows * columns), columns=["arm", "memory added, tensors"])
            print(f"\n{size}: memory\n{added.to_string(index=False)}")
    if keep_memory():
        for size, _, _, calls in chosen:
            x = tensors[size]
            table = {name: arm for name, arm in arms(x) if name == "copy" or name.endswith(NEW)}
            kept = measure(table, x.numel(), options.repeats, calls)
            print(f"\n{size}, glibc keeps freed memory\n{kept.to_string(index=False)}")
    small = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    quantizer = Quantizer(formats.mxfp6_e3m2)
    calls_ns = measure({"call": lambda: quantizer.quantize(small)}, 1, options.repeats, 500)["ns an element"]
    print(f"\n32x32 mxfp6_e3m2: {calls_ns[0] / 1000:.1f} microseconds a call")
    return 0


def peaks(table: dict[str, Arm], size: int) -> Iterator[tuple[str, float]]:
    """By how much a call raises the most memory that the process had, over `size` bytes; needs Linux."""

    def resident(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024

    for name, arm in table.items():
        Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now
        before = resident("VmRSS")
        result = arm()
        yield name, round((resident("VmHWM") - before) / size, 2)
        del result


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
    yield f"mxfp6_e3m2 last axis{NEW}", lambda: even.quantize(x)
    for rounding in (Rounding.TIES_TO_AWAY, Rounding.TOWARD_ZERO, Rounding.TO_ODD):
        quantizer = Quantizer(formats.mxfp6_e3m2, rounding)
        yield f"mxfp6_e3m2 last axis {rounding.value}", partial(quantizer.quantize, x, out=out)
    yield from peers(x)


def peers(x: torch.Tensor) -> Iterator[tuple[str, Arm]]:
    """Other libraries on the same tensor: fake quantization where they have it, else a cast there and back."""
    backends = available_backends()
    if "microxcaling" in backends:
        theirs = Quantizer(formats.mxfp6_e3m2, backend="microxcaling")
        yield f"peer: microxcaling mxfp6_e3m2{NEW}", lambda: theirs.quantize(x)
    if "qtorch" in backends:
        from qtorch.quant import float_quantize

        yield f"peer: qtorch e3m2 nearest{NEW}", lambda: float_quantize(x, exp=3, man=2, rounding="nearest")
        yield f"peer: qtorch e3m2 stochastic{NEW}", lambda: float_quantize(x, exp=3, man=2, rounding="stochastic")
    array = x.numpy()
    yield f"peer: ml_dtypes float6_e3m2fn{NEW}", lambda: array.astype(ml_dtypes.float6_e3m2fn).astype(np.float32)
    try:
        from torchao.prototype.mx_formats.mx_tensor import to_mx
    except ImportError:
        return
    yield f"peer: torchao mxfp8_e4m3, to_mx only{NEW}", lambda: to_mx(x, torch.float8_e4m3fn, 32)


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
