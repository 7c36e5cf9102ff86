"""Accumulator: the dot-product unit of a simulated machine, as part of a Gemm.

Three machines, of which `reference.dot` is the exact definition; the products come in ascending order of k,
so a result depends on neither threads nor tiles. Kernels: `cpu` (Numba), `gpu` (Triton).
"""

from __future__ import annotations

import enum
import importlib
import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lpsim.formats import FloatFormat
from lpsim.formats.rounding import Overflow, Rounding
from lpsim.quantization.quantizer import Quantizer

FLOATING = (torch.float32, torch.bfloat16, torch.float16)
MAX_ALIGNED_BITS = 40  # of fractions: then sums of 64 aligned terms are exact in float64
MAX_ALIGNED_PRODUCTS = 64


class Order(enum.Enum):
    """In which order the products of a chunk are added."""

    SEQUENTIAL = "sequential"
    """One after another, by fused multiply-adds into a float32 register that starts at zero."""
    PAIRWISE = "pairwise"
    """An adder tree: products rounded to float32, then neighbours added in float32, level by level. Missing ones of a
    ragged chunk are +0."""


@dataclass(frozen=True)
class Alignment:
    """How a tensor core adds the accumulator and one chunk of products in a single step.

    Each term, its significand in [1, 2) or, for a product, the product of two such, is shifted to the largest exponent
    of the step, the accumulator's included, and cut to `fraction_bits` bits after the binary point; the sum of what is
    left is exact, and is rounded to the accumulator's format. A product's exponent is the sum of its operands'; zero
    has the exponent -126.

    rounding: of the aligned terms; TOWARD_ZERO (NVIDIA), TOWARD_NEGATIVE (shifted two's complement) or TIES_TO_EVEN.
    operands: the formats of lhs and rhs, whose subnormal numbers have the exponent of the smallest normal one, as in
    the codes that the unit reads. Tensors with other values are refused then. None: float32's.
    """

    fraction_bits: int
    rounding: Rounding = Rounding.TOWARD_ZERO
    operands: tuple[FloatFormat, FloatFormat] | None = None

    def __post_init__(self) -> None:
        _check_int("Alignment.fraction_bits", self.fraction_bits, 1, MAX_ALIGNED_BITS)
        if self.rounding not in (Rounding.TOWARD_ZERO, Rounding.TOWARD_NEGATIVE, Rounding.TIES_TO_EVEN):
            raise ValueError(
                f"Alignment.rounding must be TOWARD_ZERO, TOWARD_NEGATIVE or TIES_TO_EVEN, got {self.rounding!r}"
            )
        if self.operands is not None:
            if len(self.operands) != 2 or not all(isinstance(f, FloatFormat) for f in self.operands):
                raise TypeError(f"Alignment.operands must be the FloatFormats of lhs and rhs, got {self.operands!r}")
            for fmt in self.operands:
                if fmt.emin < -126 or fmt.emax > 127 or fmt.mantissa_bits > 23:
                    raise ValueError(f"Alignment.operands: {fmt.name} does not fit float32, which holds the operands")

    @property
    def emin(self) -> tuple[int, int]:
        """The smallest exponents of lhs and of rhs."""
        return (-126, -126) if self.operands is None else (self.operands[0].emin, self.operands[1].emin)


@dataclass(frozen=True)
class Accumulator:
    """How the sum of a dot product is formed: in `format`, from +0 on, k ascending.

    chunk = 1: after every multiply-add, c <- round(c + a·b), in one rounding of the exact value (a fused multiply-add
    of the format; never by way of float32).
    chunk > 1: products are added up in float32, `chunk` at a time (see Order), and each such sum s goes into the
    accumulator by c <- round(c + s), again one rounding. The last chunk may be short.
    alignment: chunk + 1 terms are added at once by tensor-core arithmetic, see Alignment; `order` means nothing then.

    rounding: TIES_TO_EVEN or TOWARD_ZERO. overflow, as in Quantizer: SPECIAL is Inf, or NaN in a format without; finite
    sums that are rounded TOWARD_ZERO stop at max, but with `alignment` are Inf (as on hardware). SATURATE is ±max, also
    for infinite products. NaN stays NaN. Zero: IEEE's sign (+0 unless the format underflows a negative sum);
    with `alignment` always +0.

    format: a signed FloatFormat with subnormal numbers, 1 to 23 mantissa bits and exponents within float32's.

    Raises TypeError or ValueError for a combination that has no meaning.
    """

    format: FloatFormat
    chunk: int = 1
    order: Order = Order.SEQUENTIAL
    alignment: Alignment | None = None
    rounding: Rounding = Rounding.TIES_TO_EVEN
    overflow: Overflow = Overflow.SPECIAL

    def __post_init__(self) -> None:
        fmt = self.format
        if not isinstance(fmt, FloatFormat):
            hint = f"; did you mean lpsim.formats.get({fmt!r})?" if isinstance(fmt, str) else ""
            raise TypeError(f"Accumulator.format must be a FloatFormat, got {type(fmt).__name__}{hint}")
        if not (fmt.signed and fmt.zero and fmt.subnormals):
            raise ValueError(f"{fmt.name}: an accumulator needs a format with a sign, a zero and subnormal numbers")
        if not 1 <= fmt.mantissa_bits <= 23 or fmt.emin < -126 or fmt.emax > 127:
            raise ValueError(f"{fmt.name}: an accumulator has 1 to 23 mantissa bits and exponents from -126 to 127")
        _check_int("Accumulator.chunk", self.chunk, 1, 2**31 - 1)
        if not isinstance(self.order, Order):
            raise TypeError(f"Accumulator.order must be an Order, got {self.order!r}")
        if self.alignment is not None and not isinstance(self.alignment, Alignment):
            raise TypeError(f"Accumulator.alignment must be an Alignment or None, got {self.alignment!r}")
        if self.alignment is not None and self.chunk > MAX_ALIGNED_PRODUCTS:
            raise ValueError(f"at most {MAX_ALIGNED_PRODUCTS} products are aligned in a step, got chunk={self.chunk}")
        if self.order is Order.PAIRWISE and (self.alignment is not None or not 2 <= self.chunk <= 1024):
            raise ValueError("Order.PAIRWISE adds up chunks of 2 to 1024 products, without alignment")
        if self.rounding not in (Rounding.TIES_TO_EVEN, Rounding.TOWARD_ZERO):
            raise ValueError(f"Accumulator.rounding must be TIES_TO_EVEN or TOWARD_ZERO, got {self.rounding!r}")
        if not isinstance(self.overflow, Overflow):
            raise TypeError(
                f"Accumulator.overflow must be Overflow.SATURATE or Overflow.SPECIAL, got {self.overflow!r}"
            )
        if self.overflow is Overflow.SPECIAL and not (fmt.has_inf or fmt.has_nan):
            raise ValueError(f"{fmt.name} has neither Inf nor NaN; use Overflow.SATURATE")

    @property
    def infinite(self) -> float:
        """What an infinite sum becomes, before its sign."""
        if self.overflow is Overflow.SATURATE:
            return self.format.max
        return float("inf") if self.format.has_inf else float("nan")

    @property
    def beyond(self) -> float:
        """What a finite sum becomes if it is rounded past max, before its sign."""
        stops = self.rounding is Rounding.TOWARD_ZERO and self.alignment is None
        return self.format.max if stops else self.infinite

    def matmul(self, lhs: Tensor, rhs: Tensor) -> Tensor:
        """lhs [..., M, K] times rhs [..., K, N], batch dimensions broadcast: [..., M, N], detached.

        Results are values of `format`, then rounded to nearest even where the tensors' dtype is narrower than it.

        lhs, rhs: float32, bfloat16 or float16, both alike, on one device, in any layout.

        Raises TypeError for other dtypes, ValueError for shapes that do not fit and for values that are none of
        `alignment.operands`.
        """
        if lhs.dtype != rhs.dtype or lhs.dtype not in FLOATING:
            raise TypeError(f"an Accumulator multiplies float32, bfloat16 or float16, got {lhs.dtype} and {rhs.dtype}")
        if lhs.dim() < 2 or rhs.dim() < 2 or lhs.shape[-1] != rhs.shape[-2] or lhs.device != rhs.device:
            raise ValueError(
                "an Accumulator multiplies [..., M, K] and [..., K, N] on one device, "
                f"got {tuple(lhs.shape)} on {lhs.device} and {tuple(rhs.shape)} on {rhs.device}"
            )
        batch = torch.broadcast_shapes(lhs.shape[:-2], rhs.shape[:-2])
        lhs, rhs = lhs.detach(), rhs.detach()
        dtype = lhs.dtype
        lhs, rhs = lhs.float(), rhs.float()
        out = lhs.new_empty(*batch, lhs.shape[-2], rhs.shape[-1])
        backend = importlib.import_module(self._backend(out.device))
        seen = self._check_values(lhs, rhs, backend)
        if out.numel() > 0:
            pair = (lhs.expand(*batch, *lhs.shape[-2:]), rhs.expand(*batch, *rhs.shape[-2:]))
            three = [x.reshape(math.prod(batch), *x.shape[-2:]) for x in (*pair, out)]  # [B, ., .]
            backend.matmul(three[0], three[1], self.unit, three[2], **seen)
        return out.to(dtype)

    def _backend(self, device: torch.device) -> str:
        """The module that serves a device."""
        backends = {"cpu": "lpsim.accumulators.cpu", "cuda": "lpsim.accumulators.gpu"}
        if device.type not in backends:
            raise ValueError(f"an Accumulator multiplies on a CPU or a GPU, not on {device}")
        return backends[device.type]

    def _check_values(self, lhs: Tensor, rhs: Tensor, backend: Any) -> dict[str, Any]:
        """What the backend found out about the operands, as arguments of its matmul."""
        if self.alignment is None or self.alignment.operands is None or lhs.numel() == 0 or rhs.numel() == 0:
            return {}
        if not hasattr(backend, "examine"):
            for side, x in enumerate((lhs, rhs)):
                self._check_side(side, x)
            return {}
        seen = backend.examine(lhs), backend.examine(rhs)
        for side, x in enumerate((lhs, rhs)):
            if not seen[side].fit(self.alignment.operands[side]):
                self._check_side(side, x)
        return {"seen": seen}

    def _check_side(self, side: int, x: Tensor) -> None:
        quantizer = self._operands[side]
        rounded = quantizer.quantize(x)
        if not torch.equal(rounded, x) and not bool(((rounded == x) | ~x.isfinite()).all()):
            raise ValueError(
                f"{('lhs', 'rhs')[side]} has values that are not in {quantizer.format.name}, which this tensor core "
                "reads: quantize it first, or give the right formats in Alignment.operands"
            )

    @cached_property
    def _operands(self) -> tuple[Quantizer, Quantizer]:
        assert self.alignment is not None and self.alignment.operands is not None
        lhs, rhs = self.alignment.operands
        return Quantizer(lhs), Quantizer(rhs)

    @cached_property
    def unit(self) -> Unit:
        """The numbers that kernels take."""
        fmt, aligned = self.format, self.alignment
        return Unit(
            mantissa_bits=fmt.mantissa_bits,
            emin=fmt.emin,
            emax=fmt.emax,
            max=fmt.max,
            beyond=self.beyond,
            infinite=self.infinite,
            negative_zero=fmt.has_negative_zero,
            toward_zero=self.rounding is Rounding.TOWARD_ZERO,
            chunk=self.chunk,
            pairwise=self.order is Order.PAIRWISE,
            fraction_bits=aligned.fraction_bits if aligned is not None else 0,
            aligned_rounding=_ALIGNED_ROUNDINGS.index(aligned.rounding) if aligned is not None else 0,
            operand_emin=aligned.emin if aligned is not None else (-126, -126),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


_ALIGNED_ROUNDINGS = (Rounding.TOWARD_ZERO, Rounding.TOWARD_NEGATIVE, Rounding.TIES_TO_EVEN)


class Unit(NamedTuple):
    """An Accumulator as numbers: beyond and infinite see there; fraction_bits = 0 where nothing is aligned.

    aligned_rounding: 0 toward zero, 1 toward negative, 2 to nearest even.
    """

    mantissa_bits: int
    emin: int
    emax: int
    max: float
    beyond: float
    infinite: float
    negative_zero: bool
    toward_zero: bool
    chunk: int
    pairwise: bool
    fraction_bits: int
    aligned_rounding: int
    operand_emin: tuple[int, int]


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")
