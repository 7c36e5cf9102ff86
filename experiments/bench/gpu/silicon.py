"""Do the accumulator presets equal the tensor cores of this machine, bit by bit; and if not, where?

Products of float16, bfloat16 and float8 by torch.mm, torch._scaled_mm and by Triton's tl.dot, against what each preset
of these operands gives. torch's library may divide K among several sums; tl.dot as it is called here does not. With 64
rows a program uses a warp group's instruction where the machine has one (wgmma), with 16 rows the older mma. Float8 is
also compared with the preset whose sums are moved to float32 registers every 128 products, as libraries do.

A row is one comparison of [M, K] · [K, N]: how many results differ, how far at most, and the first of them. Operands
that the device does not multiply have one row, which says why they were not asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from experiments.bench.gpu import operands
from experiments.bench.gpu.machine import Machine, Record, Row
from experiments.bench.gpu.parts import attempt
from lpsim import Accumulator, accumulators
from lpsim.machine import precision
from lpsim.quantization.gpu_kernels import tl, triton

SIZE, DEPTHS = 128, (32, 64, 256, 1024)
SHOWN = 3  # of the results that differ
PROMOTED_EVERY = 128

Product = Callable[[Tensor, Tensor], Tensor]  # [M, K] · [K, N], K side by side in memory in both

PRESETS: dict[tuple[torch.dtype, torch.dtype], dict[str, Accumulator]] = {
    (torch.float16, torch.float16): {
        "AMPERE_FP16": accumulators.AMPERE_FP16,
        "HOPPER_FP16": accumulators.HOPPER_FP16,
    },
    (torch.bfloat16, torch.bfloat16): {
        "AMPERE_BF16": accumulators.AMPERE_BF16,
        "HOPPER_BF16": accumulators.HOPPER_BF16,
    },
    (torch.float8_e4m3fn, torch.float8_e4m3fn): {"HOPPER_FP8": accumulators.HOPPER_FP8},
    (torch.float8_e4m3fn, torch.float8_e5m2): {"HOPPER_FP8_E4M3_E5M2": accumulators.HOPPER_FP8_E4M3_E5M2},
    (torch.float8_e5m2, torch.float8_e4m3fn): {"HOPPER_FP8_E5M2_E4M3": accumulators.HOPPER_FP8_E5M2_E4M3},
    (torch.float8_e5m2, torch.float8_e5m2): {"HOPPER_FP8_E5M2": accumulators.HOPPER_FP8_E5M2},
}


def run(machine: Machine, record: Record) -> None:
    with precision.pinned():  # no sums in float16
        _run(machine, record)


def _run(machine: Machine, record: Record) -> None:
    size, depths = (16, DEPTHS[:1]) if machine.small else (SIZE, DEPTHS)
    chosen = list(PRESETS.items())[::2] if machine.small else PRESETS.items()
    device = Silicon.found(machine)
    for types, presets in chosen:
        if (why := device.lacks(types)) is not None:
            record({"operands": _names(types), "not_asked": why})
            continue
        left = ways(types)
        for depth in depths:
            for kind, lhs, rhs in operands.cases(types, size, depth, few=machine.small):
                a, b = lhs.to(machine.device), rhs.T.contiguous().to(machine.device).T
                expected = simulated(presets, a, b)
                for by, product in list(left.items()):
                    what = {"operands": _names(types), "by": by, "K": depth, "inputs": kind}
                    row = attempt(what, partial(_compare, product, expected, a, b))
                    if "error" in row:
                        record(row)
                        del left[by]  # it would say the same of all others
                    for name, found in row.pop("presets", {}).items():
                        record(row | {"preset": name} | found)


def _names(types: tuple[torch.dtype, torch.dtype]) -> str:
    return " · ".join(str(dtype).removeprefix("torch.") for dtype in types)


# ---------------------------------------------------------------------------------------------- what multiplies


@dataclass(frozen=True)
class Silicon:
    """maker: "nvidia" or "amd"; None for the twin, whose interpreter multiplies everything. capability: NVIDIA's."""

    maker: str | None
    capability: tuple[int, int]

    @staticmethod
    def found(machine: Machine) -> Silicon:
        if not machine.cuda:
            return Silicon(None, (0, 0))
        return Silicon("nvidia" if torch.version.hip is None else "amd", torch.cuda.get_device_capability())

    def lacks(self, types: tuple[torch.dtype, torch.dtype]) -> str | None:
        """Why the device has no products of these operands; None where it has."""
        if types[0].itemsize == 2 or self.maker is None:
            return None
        if self.maker == "amd":
            return "AMD's float8 types are others on some of its devices"
        major, minor = self.capability
        return None if self.capability >= (8, 9) else f"capability {major}.{minor} has no float8; 8.9 and later have"


def ways(types: tuple[torch.dtype, torch.dtype]) -> dict[str, Product]:
    """By name, the products of operands of these types that a program can ask for."""
    wide: dict[str, Product] = {"tl.dot, 64 rows": partial(by_triton, rows=64)}
    if types[0].itemsize == 2:
        return {
            "torch.mm, float32 out": _mm_wide,
            "torch.mm": torch.mm,
            **wide,
            "tl.dot, 16 rows": partial(by_triton, rows=16),  # of float8 it would be the float16 unit's
        }
    if types == (torch.float8_e5m2, torch.float8_e5m2):  # which torch refuses, since its library has none
        return wide
    return {
        "torch._scaled_mm, fast": partial(_scaled_mm, fast=True),
        "torch._scaled_mm": partial(_scaled_mm, fast=False),
        **wide,
    }


def _mm_wide(a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=torch.float32)


def _scaled_mm(a: Tensor, b: Tensor, fast: bool) -> Tensor:
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a, b, one, one, out_dtype=torch.float32, use_fast_accum=fast)


@triton.jit
def _dot_kernel(a, b, out, depth, columns, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out [M, N] = a [M, K] · b [K, N], with b stored by columns; M, N and K are multiples of the block."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for begin in range(0, depth, BK):
        k = begin + tl.arange(0, BK)
        lhs = tl.load(a + i[:, None] * depth + k[None, :])
        rhs = tl.load(b + j[None, :] * depth + k[:, None])
        total = tl.dot(lhs, rhs, total)
    tl.store(out + i[:, None] * columns + j[None, :], total)


def by_triton(a: Tensor, b: Tensor, rows: int) -> Tensor:
    """a · b by tl.dot, `rows` rows a program, all of K in one sum."""
    height, depth = a.shape
    columns = b.shape[1]
    rows, across = min(rows, height), min(64, columns)
    out = torch.empty(height, columns, device=a.device)
    grid = height // rows, columns // across
    _dot_kernel[grid](a, b, out, depth, columns, BM=rows, BN=across, BK=min(64, depth), num_warps=4)
    return out


# ---------------------------------------------------------------------------------------------- comparing


def _compare(product: Product, expected: dict[str, Tensor], a: Tensor, b: Tensor) -> Row:
    result = product(a, b)
    return {"presets": {name: difference(x.to(result.dtype), result) for name, x in expected.items()}}


def simulated(presets: dict[str, Accumulator], a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """What the presets give, in float32; float8 also with sums moved to float32 registers."""
    found = {name: matmul(unit, a.float(), b.float()) for name, unit in presets.items()}
    if a.dtype.itemsize == 1 and a.shape[1] > PROMOTED_EVERY:
        for name, unit in presets.items():
            parts = [
                matmul(unit, x.float(), y.float())
                for x, y in zip(a.split(PROMOTED_EVERY, 1), b.split(PROMOTED_EVERY, 0), strict=True)
            ]
            total = torch.zeros_like(parts[0])
            for part in parts:
                total += part
            found[f"{name}, moved every {PROMOTED_EVERY}"] = total
    return found


def matmul(unit: Accumulator, a: Tensor, b: Tensor) -> Tensor:
    """Accumulator.matmul by the GPU's kernel, which tests marked gpu show to equal the oracle."""
    from lpsim.accumulators import gpu

    out = torch.empty(1, a.shape[0], b.shape[1], device=a.device)
    gpu.matmul(a[None], b[None], unit.unit, out)
    return out[0]


def difference(expected: Tensor, result: Tensor) -> Row:
    """Where two tensors of one dtype differ in a bit, NaNs being alike; in steps of the dtype between the two."""
    integers = torch.int16 if result.dtype.itemsize == 2 else torch.int32
    x, y = (t.contiguous().view(integers).long() for t in (expected, result))
    differ = (x != y) & ~(expected.isnan() & result.isnan())
    places = [tuple(place) for place in differ.nonzero()[:SHOWN].tolist()]
    steps = (_ordered(x, integers) - _ordered(y, integers)).abs()
    finite = differ & expected.isfinite() & result.isfinite()
    return {
        "result": str(result.dtype).removeprefix("torch."),
        "of": result.numel(),
        "differ": int(differ.sum()),
        "only_in_sign_of_zero": int((differ & (expected == result)).sum()),
        "largest_steps": int(steps[finite].max()) if bool(finite.any()) else 0,
        "first": [
            {"at": list(at), "preset": float(expected[at]).hex(), "silicon": float(result[at]).hex()} for at in places
        ],
    }


def _ordered(bits: Tensor, integers: torch.dtype) -> Tensor:
    """Bit patterns of floats, as integers in the order of the numbers; both zeros are 0."""
    return torch.where(bits < 0, torch.iinfo(integers).min - bits, bits)
