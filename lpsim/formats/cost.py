"""What a format costs in hardware: area and energy of a multiply-accumulate, and bytes moved in a training step.

These are models, not measurements: they order formats, and leave out wires, memories and control.
docs/howto/compare_formats.md states the formulas.

Energy: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, at 45 nm; between its
figures and below them a power law goes through the two. Area: counted in one-bit cells, in the manner of Rouhani et
al., "With Shared Microexponents, A Little Shifting Goes a Long Way", arXiv:2302.08007: multipliers, aligners, adder
tree, scales. The counts are this module's own, not that paper's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lpsim.formats.definitions import BlockFormat, Codebook, Element, FixedFormat, FloatFormat, Format
from lpsim.formats.named import check_format, float32

# pJ an operation, Horowitz 2014: {bits of the significand, the leading one counted: energy}
INT_ADD_PJ = {8: 0.03, 32: 0.1}
INT_MULTIPLY_PJ = {8: 0.2, 32: 3.1}
FLOAT_ADD_PJ = {11: 0.4, 24: 0.9}
FLOAT_MULTIPLY_PJ = {11: 1.1, 24: 3.7}

DOT_LENGTH = 64  # products that one adder tree sums


def precision(element: Element) -> int:
    """Bits of the widest significand, the leading one counted; all bits of a fixed-point format.

    Of a codebook: of the value that needs most, since its unit multiplies the decoded values.
    """
    check_format("an accumulator or element", element, Element)
    if isinstance(element, FixedFormat):
        return element.bits
    if isinstance(element, FloatFormat):
        return element.mantissa_bits + 1  # of sign and magnitude, all bits of the magnitude
    return max(_significand_bits(value) for value in element.values)


def mac_energy_pj(lhs: Format, rhs: Format | None = None, accumulator: Element = float32) -> float:
    """pJ of one multiplication, one addition to the accumulator, and the share of the block scales.

    Fixed-point operands take the energies of integers; of other pairs, those of floats. Two powers of two as scales
    take one integer addition a block, other scales one float multiplication; microexponents one integer addition a
    sub-block. rhs: None for lhs's format.
    """
    rhs = lhs if rhs is None else rhs
    left, right = _element(lhs), _element(rhs)
    integers = not (_exponent_bits(left) or _exponent_bits(right))
    width = math.sqrt(precision(left) * precision(right))
    multiply = _power_law(INT_MULTIPLY_PJ if integers else FLOAT_MULTIPLY_PJ, width)
    add = _power_law(INT_ADD_PJ if isinstance(accumulator, FixedFormat) else FLOAT_ADD_PJ, precision(accumulator))
    scales = 0.0
    for fmt in (lhs, rhs):
        if isinstance(fmt, BlockFormat):
            power_of_two = fmt.scale.mantissa_bits == 0
            table, bits = (
                (INT_ADD_PJ, fmt.scale.bits) if power_of_two else (FLOAT_MULTIPLY_PJ, fmt.scale.mantissa_bits + 1)
            )
            scales += _power_law(table, bits) / _along(fmt)
            if fmt.sub_block_size:
                scales += _power_law(INT_ADD_PJ, fmt.microexponent_bits) / fmt.sub_block_size
    return multiply + add + scales


def mac_energy(lhs: Format, rhs: Format | None = None, accumulator: Element = float32) -> float:
    """`mac_energy_pj` over that of float32 operands in a float32 accumulator (4.6 pJ)."""
    return mac_energy_pj(lhs, rhs, accumulator) / mac_energy_pj(float32)


def mac_cells(lhs: Format, rhs: Format | None = None, accumulator: Element = float32) -> float:
    """One-bit cells of a dot product of 64, for each product.

    p is the precision, e the exponent bits of an operand, P the accumulator's precision. A product has p·p' cells of a
    multiplier; e + e' of exponent adders; an aligner to w bits, w·⌈log2 w⌉, where an operand has exponents; and
    w + 6 of the adder tree, 6 = log2 64. w = p + p' without exponents, else min(P, p + p' + (2^e − 1) + (2^e' − 1)).
    Each dot product has P·⌈log2 P⌉ + P cells for the accumulator (P if it is fixed-point). Each block has a scale unit
    as wide as its scale for a power of two, else the scale's significand times w. Microexponents of d bits make w wider
    by the largest of each operand, 2^d − 1, and each sub-block has a shifter of d·w cells and an adder of d. rhs: None
    for lhs's format.
    """
    rhs = lhs if rhs is None else rhs
    left, right = precision(_element(lhs)), precision(_element(rhs))
    exponents = [_exponent_bits(_element(fmt)) for fmt in (lhs, rhs)]
    total = precision(accumulator)
    width = left + right
    cells: float = left * right + sum(exponents)
    if any(exponents):
        width = min(total, width + sum(2**e - 1 for e in exponents))
        cells += width * _log2_up(width)
    width += sum(fmt.most_lowered for fmt in (lhs, rhs) if isinstance(fmt, BlockFormat))
    cells += width + _log2_up(DOT_LENGTH)
    aligned = 0 if isinstance(accumulator, FixedFormat) else total * _log2_up(total)
    cells += (aligned + total) / DOT_LENGTH
    for fmt in (lhs, rhs):
        if isinstance(fmt, BlockFormat):
            m = fmt.scale.mantissa_bits
            cells += (fmt.scale.bits if m == 0 else (m + 1) * width) / _along(fmt)
            cells += fmt.microexponent_bits * (width + 1) / (fmt.sub_block_size or 1)
    return cells


def mac_area(lhs: Format, rhs: Format | None = None, accumulator: Element = float32) -> float:
    """`mac_cells` over that of float32 operands in a float32 accumulator."""
    return mac_cells(lhs, rhs, accumulator) / mac_cells(float32)


@dataclass(frozen=True)
class StepBytes:
    """Bytes between memory and the arithmetic in one training step, caches left out."""

    weights: float
    activations: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.activations + self.gradients + self.optimizer


def step_bytes(
    weights: int,
    activations: int,
    weight: Format,
    activation: Format | None = None,
    gradient: Format | None = None,
    *,
    state: Format = float32,
    states: int = 2,
) -> StepBytes:
    """The bytes moved in one step of a model whose products hold so many weights and input activations.

    Weights are read by fprop and dgrad and written once, rounded: 3. Activations are written by the layer before, read
    by fprop and by wgrad: 3. Gradients of activations are written, read by dgrad and by wgrad: 3; those of weights, in
    `state`'s format, written and read: 2. The optimizer reads and writes master weights and `states` numbers a weight
    (AdamW 2, LMD 1), in `state`'s format: 2·(1 + states). Bits are true ones, block scales included.

    weights, activations: counts, of the whole batch. weight, activation, gradient: their formats; None for the format
    of weights and for float32.

    Raises ValueError for a negative count.
    """
    if weights < 0 or activations < 0 or states < 0:
        raise ValueError(f"counts must not be negative, got {weights}, {activations}, {states}")
    activation = weight if activation is None else activation
    gradient = float32 if gradient is None else gradient
    for name, fmt in {"weight": weight, "activation": activation, "gradient": gradient, "state": state}.items():
        check_format(name, fmt)
    return StepBytes(
        weights=3 * weights * weight.bits / 8,
        activations=3 * activations * activation.bits / 8,
        gradients=(3 * activations * gradient.bits + 2 * weights * state.bits) / 8,
        optimizer=2 * (1 + states) * weights * state.bits / 8,
    )


def _element(fmt: Format) -> Element:
    check_format("what is multiplied", fmt)
    return fmt.element if isinstance(fmt, BlockFormat) else fmt


def _exponent_bits(element: Element) -> int:
    """0 without exponents; of a codebook, what counts the octaves of its values, which are decoded to floats.

    A float format whose values lie in one binade and its subnormals is a sign and an integer: it has none.
    """
    if isinstance(element, FixedFormat) or (isinstance(element, FloatFormat) and element.emin == element.emax):
        return 0
    if isinstance(element, Codebook):
        octaves = math.frexp(element.max)[1] - math.frexp(element.min_subnormal)[1]
        return octaves.bit_length()
    return element.exponent_bits


def _along(fmt: BlockFormat) -> int:
    """Elements of a dot product that share a scale; at most DOT_LENGTH, which whole rows and tensors count as."""
    size = fmt.block_size[-1] if isinstance(fmt.block_size, tuple) else fmt.block_size
    return min(size or DOT_LENGTH, DOT_LENGTH)


def _significand_bits(value: float) -> int:
    numerator = int(abs(math.frexp(value)[0]) * 2**53)
    return (numerator // (numerator & -numerator)).bit_length() if numerator else 1


def _log2_up(n: int) -> int:
    return (n - 1).bit_length()


def _power_law(points: dict[int, float], width: float) -> float:
    """The curve c·width^a through two points."""
    (w0, e0), (w1, e1) = points.items()
    return e0 * (width / w0) ** (math.log(e1 / e0) / math.log(w1 / w0))
