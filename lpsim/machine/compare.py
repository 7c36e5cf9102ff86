"""Formats compared on tensors before anything is trained: what rounding does to each, and what the hardware costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lpsim.formats import BlockFormat, Element, Format, cost, float32
from lpsim.formats.rounding import Rounding
from lpsim.machine import measured
from lpsim.machine.arguments import lies_in
from lpsim.machine.ops import Role
from lpsim.machine.recipes import Recipe
from lpsim.machine.simulate import simulate
from lpsim.machine.telemetry import clipping, rounding_sums
from lpsim.quantization import storage
from lpsim.quantization.quantizer import Quantizer

if TYPE_CHECKING:
    import pandas

__all__ = ["compare", "pareto_front", "product_counts"]


def compare(
    formats: Sequence[Format], tensors: Mapping[str, Tensor], axis: int = -1, accumulator: Element = float32
) -> pandas.DataFrame:
    """One row for every format on every tensor, rounded to nearest, ties to even.

    qsnr_db: 10·log10(Σx² / Σ(q − x)²); infinite where nothing changed, NaN for a tensor of zeros.
    largest_relative_error: of |q − x| / |x| over x ≠ 0; at least 1 where an element underflowed. clipped: the share of
    elements above the largest magnitude that their block or format holds. underflowed: the share of elements whose
    rounded value is 0 and which are not. bits: an element's, all scales of this tensor included. area, energy: of a
    multiply-accumulate in `accumulator`, relative to float32 (lpsim.formats.cost). flag: why the row is not to be
    compared with others, or "".

    tensors: float tensors by name, any shape. axis: the axis blocks lie along.
    Raises ValueError for a tensor with NaN or Inf, or without elements, naming it.
    """
    import pandas

    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors must be a dict of names to tensors, got {type(tensors).__name__}")
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: a floating-point tensor is needed, got {type(x).__name__}")
        if not x.is_floating_point():
            raise ValueError(f"{name}: a floating-point tensor is needed, got {x.dtype}")
        if not x.numel():
            raise ValueError(f"{name} has no elements")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name} holds NaN or Inf, of which no error can be told; leave it out or mend it")
    return pandas.DataFrame([_row(fmt, name, x, axis, accumulator) for name, x in tensors.items() for fmt in formats])


def _row(fmt: Format, name: str, x: Tensor, axis: int, accumulator: Element) -> dict[str, str | float]:
    x = x.detach() if x.dtype is torch.float64 else x.detach().float()
    q = Quantizer(fmt, Rounding.TIES_TO_EVEN).quantize(x, axis)
    signal, noise, _, _, underflowed = rounding_sums(x, q)
    clipped = clipping(x, fmt, axis)[0] / x.numel()
    there = x != 0
    relative = ((q.double() - x.double()).abs() / x.double().abs())[there]
    row: dict[str, str | float] = {
        "format": fmt.name,
        "tensor": name,
        "qsnr_db": measured.decibel(signal, noise) if signal else math.nan,
        "largest_relative_error": float(relative.max()) if len(relative) else 0.0,
        "clipped": clipped,
        "underflowed": underflowed / x.numel(),
        "bits": _true_bits(fmt, x, axis),
        "area": cost.mac_area(fmt, accumulator=accumulator),
        "energy": cost.mac_energy(fmt, accumulator=accumulator),
    }
    return row | {"flag": _flag(row, bool(torch.isfinite(q).all()))}


def _flag(row: dict[str, str | float], finite: bool) -> str:
    if not finite:
        return "rounds to NaN or Inf"
    if math.isnan(float(row["qsnr_db"])):
        return "all zero"
    if float(row["clipped"]) >= 0.5:
        return "clips half: scale the data"
    return "underflows half: scale the data" if float(row["underflowed"]) >= 0.5 else ""


def _true_bits(fmt: Format, x: Tensor, axis: int) -> float:
    """Bits an element in this tensor: short blocks and the tensor's scale count."""
    if not isinstance(fmt, BlockFormat):
        return float(fmt.bits)
    axis = axis % max(x.dim(), 1)
    scale = storage.block_scales(x, fmt, axis)[0]
    shared = scale.numel() * fmt.scale.bits + (0 if fmt.tensor_scale is None else fmt.tensor_scale.bits)
    if fmt.sub_block_size:
        shared += storage.blocks_of_parts(scale, tuple(x.shape), fmt, axis).numel() * fmt.microexponent_bits
    return fmt.element.bits + shared / x.numel()


def pareto_front(frame: pandas.DataFrame, price: str, gain: str = "qsnr_db") -> pandas.DataFrame:
    """The rows that no other row beats: none has at most their price and more gain, or a lower price and as much gain.

    Sorted by price. Flagged rows and rows without a number are left out. Raises ValueError for a column that the frame
    does not have.
    """
    for name in (price, gain, "flag"):
        if name not in frame:
            raise ValueError(f"the frame has no column {name!r}; it has {', '.join(map(str, frame))}")
    rows = frame[(frame["flag"] == "") & frame[[price, gain]].notna().all(axis=1)]
    rows = rows.sort_values([price, gain], ascending=[True, False], kind="stable")
    best = rows[gain].cummax().shift(fill_value=-math.inf)
    return rows[rows[gain] > best]


@torch.no_grad()
def product_counts(model: nn.Module, *inputs: Any) -> tuple[int, int]:
    """(weights, activations) that the products of `model(*inputs)` take as operands: the counts of cost.step_bytes.

    A weight that two products use, such as a tied embedding's head, counts in each; a product of two activations, as in
    attention, counts both.
    """
    parameters = list(model.parameters())
    counts = [0, 0]

    def observe(call: Any, role: Role, quantizer: Any, axis: int, x: Tensor, result: Tensor) -> None:
        if role in (Role.FPROP_LHS, Role.FPROP_RHS):
            counts[not lies_in(x, parameters)] += x.numel()

    with simulate(model, Recipe.forward(float32), audit=False) as simulation:
        simulation.observer = observe
        model(*inputs)
        simulation.observer = None
    return counts[0], counts[1]
