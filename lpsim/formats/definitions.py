"""What a number format is: floats, fixed point, tables of values, and blocks that share a scale, as frozen data.

A format is hashable (it keys kernel caches) and turns into JSON and back (it is part of a run's config).
"""

from __future__ import annotations

import enum
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from lpsim.formats.rounding import ScaleRule


class Specials(enum.Enum):
    """Which codes of a float format are not finite numbers.

    - IEEE: the largest exponent code holds ±Inf (mantissa 0) and NaNs (IEEE 754-2019 §3.4).
    - FN: no Inf; NaN only where exponent and mantissa are all ones (OFP8 E4M3).
    - FNUZ: no Inf, no negative zero: the code of -0 is the only NaN (AMD/Graphcore FNUZ types).
    - NONE: every code is a finite number (MX FP6 and FP4).
    - EXTENDED: ±Inf at the outermost code of each sign, no negative zero: the code of -0 is the only NaN. An unsigned
      format has NaN at the outermost code and Inf below it (IEEE P3109, extended domain).
    """

    IEEE = "ieee"
    FN = "fn"
    FNUZ = "fnuz"
    NONE = "none"
    EXTENDED = "extended"


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"a format's name must be a non-empty string, got {name!r}")


def _check_int(owner: str, field: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {field} must be an int, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{owner}: {field} must lie in [{low}, {high}], got {value}")


def _check_flag(owner: str, field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {field} must be True or False, got {value!r}")


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format: sign, `exponent_bits`, `mantissa_bits` (stored ones), in this order from the top.

    A code with exponent field E > 0 and mantissa field M is ±(1 + M/2^m)·2^(E − bias). E = 0 holds zero and the
    subnormals ±(M/2^m)·2^(1 − bias); without subnormals it holds zero only. With `zero=False` (E8M0) E = 0 is a binade
    like the others and there is no zero.

    Raises ValueError where the fields contradict each other or leave no positive normal number.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int | None = None  # None: 2^(exponent_bits − 1) − 1, resolved on construction
    specials: Specials = Specials.IEEE
    signed: bool = True
    subnormals: bool = True
    zero: bool = True

    kind: ClassVar[str] = "float"

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_int(self.name, "exponent_bits", self.exponent_bits, 1, 11)
        _check_int(self.name, "mantissa_bits", self.mantissa_bits, 0, 52)
        if self.bias is None:
            object.__setattr__(self, "bias", 2 ** (self.exponent_bits - 1) - 1)
        _check_int(self.name, "bias", self.bias, -1200, 1200)
        if not isinstance(self.specials, Specials):
            raise TypeError(f"{self.name}: specials must be one of {[str(s) for s in Specials]}, got {self.specials!r}")
        for flag in ("signed", "subnormals", "zero"):
            _check_flag(self.name, flag, getattr(self, flag))
        if self.specials is Specials.FNUZ and not self.signed:
            raise ValueError(f"{self.name}: FNUZ has NaN at the code of -0; unsigned formats have none. Use FN or NONE")
        if self.specials in (Specials.FNUZ, Specials.EXTENDED) and not self.zero:
            raise ValueError(f"{self.name}: {self.specials.name} needs a zero")
        if not self.zero and self.signed:
            raise ValueError(f"{self.name}: a signed format has a zero; set signed=False or zero=True")
        if not self.zero and self.subnormals:
            raise ValueError(f"{self.name}: without a zero there are no subnormals; set subnormals=False")
        if self._max_code() < self._min_normal_code():
            raise ValueError(
                f"{self.name}: {self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits with specials "
                f"{self.specials.name} leave no normal number; add exponent bits or use Specials.NONE"
            )
        if self.emax > 1023 or self.emin - self.mantissa_bits < -1074:
            raise ValueError(f"{self.name}: 2^{self.emin} to 2^{self.emax} do not fit float64; change the bias")

    def _max_code(self) -> int:
        """The magnitude code of the largest finite number."""
        top = (1 << (self.exponent_bits + self.mantissa_bits)) - 1
        if self.specials is Specials.IEEE:
            return (((1 << self.exponent_bits) - 1) << self.mantissa_bits) - 1
        if self.specials is Specials.EXTENDED:
            return top - (1 if self.signed else 2)
        return top - 1 if self.specials is Specials.FN else top

    def _min_normal_code(self) -> int:
        return 1 << self.mantissa_bits if self.zero else 0

    def _magnitude(self, code: int) -> float:
        """The value of a finite magnitude code."""
        exponent, mantissa = code >> self.mantissa_bits, code & ((1 << self.mantissa_bits) - 1)
        if exponent == 0 and self.zero:
            return math.ldexp(mantissa, self.emin - self.mantissa_bits) if self.subnormals else 0.0
        return math.ldexp((1 << self.mantissa_bits) + mantissa, exponent - self._bias - self.mantissa_bits)

    @property
    def _bias(self) -> int:
        assert self.bias is not None
        return self.bias

    @property
    def bits(self) -> int:
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @cached_property
    def max(self) -> float:
        return self._magnitude(self._max_code())

    @property
    def min(self) -> float:
        """The most negative finite value; for an unsigned format the smallest one."""
        if self.signed:
            return -self.max
        return 0.0 if self.zero else self.min_normal

    @cached_property
    def emax(self) -> int:
        """⌊log2 max⌋."""
        return (self._max_code() >> self.mantissa_bits) - self._bias

    @property
    def emin(self) -> int:
        """log2 of the smallest normal number."""
        return (1 if self.zero else 0) - self._bias

    @property
    def min_normal(self) -> float:
        return math.ldexp(1.0, self.emin)

    @property
    def min_subnormal(self) -> float:
        """The smallest positive number (min_normal in a format without subnormals)."""
        return math.ldexp(1.0, self.emin - self.mantissa_bits) if self.subnormals else self.min_normal

    @property
    def eps(self) -> float:
        """The spacing of the numbers in [1, 2)."""
        return math.ldexp(1.0, -self.mantissa_bits)

    @property
    def has_inf(self) -> bool:
        return self.specials in (Specials.IEEE, Specials.EXTENDED)

    @property
    def has_nan(self) -> bool:
        """IEEE formats without mantissa bits have only Inf at the top exponent."""
        return self.specials is not Specials.NONE and (self.specials is not Specials.IEEE or self.mantissa_bits > 0)

    @property
    def has_negative_zero(self) -> bool:
        return self.signed and self.zero and self.specials not in (Specials.FNUZ, Specials.EXTENDED)


@dataclass(frozen=True)
class FixedFormat:
    """A two's complement fixed-point format: an integer of `bits` bits times 2^-frac_bits. No specials, one zero.

    symmetric: the most negative code is not used, as OCP MX v1.0 §5.3.4 allows for MXINT8.
    """

    name: str
    bits: int
    frac_bits: int
    symmetric: bool = False

    kind: ClassVar[str] = "fixed"
    signed: ClassVar[bool] = True
    has_inf: ClassVar[bool] = False
    has_nan: ClassVar[bool] = False
    has_negative_zero: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_int(self.name, "bits", self.bits, 2, 32)
        _check_int(self.name, "frac_bits", self.frac_bits, -100, 100)
        _check_flag(self.name, "symmetric", self.symmetric)

    @property
    def max(self) -> float:
        return math.ldexp((1 << (self.bits - 1)) - 1, -self.frac_bits)

    @property
    def min(self) -> float:
        return -self.max if self.symmetric else -math.ldexp(1 << (self.bits - 1), -self.frac_bits)

    @property
    def eps(self) -> float:
        """The spacing, everywhere."""
        return math.ldexp(1.0, -self.frac_bits)

    @property
    def min_normal(self) -> float:
        return self.eps

    @property
    def min_subnormal(self) -> float:
        return self.eps

    @property
    def mantissa_bits(self) -> int:
        """Bits below the leading one of max, for the EVEN scale rule."""
        return self.bits - 2

    @property
    def emax(self) -> int:
        """⌊log2 max⌋: 0 for MXINT8, whose largest value is 1 + 63/64."""
        return self.bits - 2 - self.frac_bits


@dataclass(frozen=True)
class Codebook:
    """A format given by its table: the code of `values[i]` is i. At most 2^16 distinct finite numbers, in any order.

    Each must be exact in float32, the type that holds simulated values; np.float32(v) makes it so. There is one zero,
    without sign, and no Inf or NaN. The even neighbour of a tie is the one an even number of places away, in order of
    size, from the value nearest zero: so a table that is symmetric about zero rounds symmetrically.
    """

    name: str
    values: tuple[float, ...]

    kind: ClassVar[str] = "codebook"
    has_inf: ClassVar[bool] = False
    has_nan: ClassVar[bool] = False
    has_negative_zero: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_name(self.name)
        try:
            values = tuple(float(v + 0) + 0.0 for v in self.values)  # no string + 0; + 0.0 turns -0.0 into 0.0
        except TypeError:
            raise TypeError(f"{self.name}: values must be a tuple of numbers, got {self.values!r:.80}") from None
        object.__setattr__(self, "values", values)
        if not 2 <= len(values) <= 2**16:
            raise ValueError(f"{self.name}: a codebook holds 2 to 65536 values, got {len(values)}")
        if not all(math.isfinite(v) for v in values):
            raise ValueError(f"{self.name}: a codebook holds finite numbers; NaN passes through quantization anyway")
        if len(set(values)) != len(values):
            repeated = sorted({v for v in values if values.count(v) > 1} if len(values) < 4096 else ())
            raise ValueError(f"{self.name}: a codebook holds each value once (0 and -0 are one): {repeated[:5]}")
        inexact = [v for v in values if not _is_float32(v)]
        if inexact:
            raise ValueError(f"{self.name}: {inexact[0]!r} is not exact in float32; round the table with numpy.float32")

    @cached_property
    def sorted_values(self) -> tuple[float, ...]:
        return tuple(sorted(self.values))

    @cached_property
    def origin(self) -> int:
        """The place of the value nearest zero in `sorted_values` (of two equally near, the negative one)."""
        ordered = self.sorted_values
        return min(range(len(ordered)), key=lambda i: (abs(ordered[i]), i))

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()

    @property
    def signed(self) -> bool:
        return self.sorted_values[0] < 0

    @property
    def max(self) -> float:
        """The largest magnitude."""
        return max(abs(self.sorted_values[0]), abs(self.sorted_values[-1]))

    @property
    def min(self) -> float:
        return self.sorted_values[0]

    @property
    def min_subnormal(self) -> float:
        """The smallest non-zero magnitude."""
        return min(abs(v) for v in self.values if v != 0)

    @property
    def min_normal(self) -> float:
        return self.min_subnormal

    @property
    def eps(self) -> float:
        """The widest gap between neighbours, relative to the largest magnitude."""
        ordered = self.sorted_values
        return max(b - a for a, b in itertools.pairwise(ordered)) / self.max

    @property
    def emax(self) -> int:
        """⌊log2 max⌋."""
        return math.frexp(self.max)[1] - 1

    @property
    def mantissa_bits(self) -> int:
        """Of the largest magnitude's significand, for the EVEN scale rule: bits needed after the leading one."""
        numerator = math.ldexp(self.max, 24 - math.frexp(self.max)[1])
        trailing = (int(numerator) & -int(numerator)).bit_length() - 1
        return 23 - trailing


def _is_float32(value: float) -> bool:
    mantissa, exponent = math.frexp(value)
    quantum = max(exponent - 24, -149)
    return value == 0 or (exponent <= 128 and math.ldexp(mantissa, exponent - quantum).is_integer())


def p3109(
    bits: int, precision: int, signed: bool = True, extended: bool = True, name: str | None = None
) -> FloatFormat:
    """The format binary{bits}p{precision}{s|u}{e|f} of IEEE P3109: one zero, one NaN, ±Inf if `extended`.

    precision counts the leading one. The bias is 2^(bits − precision − 1), of unsigned formats 2^(bits − precision).
    Signed finite formats of this family are FNUZ, unsigned finite ones FN.

    Raises ValueError where the family has no such format. Source: IEEE SA P3109 Working Group, Interim Report on
    Binary Floating-point Formats for Machine Learning, and its value tables.
    """
    name = name or f"binary{bits}p{precision}{'s' if signed else 'u'}{'e' if extended else 'f'}"
    _check_flag(name, "signed", signed)
    _check_flag(name, "extended", extended)
    _check_int(name, "bits", bits, 2, 16)
    _check_int(name, "precision", precision, 1, bits - signed)
    exponent_bits = bits - precision + (0 if signed else 1)
    finite = Specials.FNUZ if signed else Specials.FN
    specials = Specials.EXTENDED if extended else finite
    return FloatFormat(name, exponent_bits, precision - 1, 2 ** (exponent_bits - 1), specials, signed)


Element = FloatFormat | FixedFormat | Codebook
CustomScaleRule = Callable[[float, Element], float]


@dataclass(frozen=True)
class BlockFormat:
    """Blocks of elements that share a scale: value = element · scale (· tensor_scale).

    element: the format of one entry. scale: the format of a block's scale; E8M0 or any float format.
    block_size: entries a block along the axis given in the call; (rows, columns) for tiles of the last two axes;
    0 for the whole axis; None for the whole tensor. scale_rule: a ScaleRule, or a function (amax, element) -> scale
    whose result, finite and at least 0, is rounded to the scale's format. tensor_scale: format of a second scale for
    the whole tensor, which then is amax / (element.max · scale.max) in that format (NVFP4).

    sub_block_size: entries that share a microexponent of `microexponent_bits` bits, an exponent below the block's
    (MX9): their scale is the block's over 2^τ, with τ = min(E − e, 2^microexponent_bits − 1), where the rule gives the
    exponents E for the block and e for these entries alone. So a 1-bit microexponent is 1 where all entries have
    exponents below the block's. No scale is below the smallest number of `scale`. Source: Rouhani et al. 2023,
    arXiv:2302.08007, with a power of two for the second scale, too.

    Raises ValueError where the scale cannot hold what the rule produces.
    """

    name: str
    element: Element
    scale: FloatFormat
    block_size: int | tuple[int, int] | None = 32
    scale_rule: ScaleRule | CustomScaleRule = ScaleRule.FLOOR
    tensor_scale: FloatFormat | None = None
    sub_block_size: int = 0
    microexponent_bits: int = 0

    kind: ClassVar[str] = "block"

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not isinstance(self.element, FloatFormat | FixedFormat | Codebook):
            raise TypeError(f"{self.name}: element must be a Float- or FixedFormat or a Codebook, got {self.element!r}")
        if not isinstance(self.scale, FloatFormat):
            raise TypeError(f"{self.name}: scale must be a FloatFormat, got {self.scale!r}")
        if isinstance(self.block_size, list):  # as JSON gives it
            object.__setattr__(self, "block_size", tuple(self.block_size))
        if isinstance(self.block_size, tuple):
            if len(self.block_size) != 2:
                raise ValueError(f"{self.name}: a tile is (rows, columns), got {self.block_size}")
            for side in self.block_size:
                _check_int(self.name, "block_size", side, 1, 2**31 - 1)
        elif self.block_size is not None:
            _check_int(self.name, "block_size", self.block_size, 0, 2**31 - 1)
        if not (isinstance(self.scale_rule, ScaleRule) or callable(self.scale_rule)):
            raise TypeError(f"{self.name}: scale_rule must be a ScaleRule or a function, got {self.scale_rule!r}")
        powers_of_two = self.scale_rule in (ScaleRule.FLOOR, ScaleRule.CEIL, ScaleRule.RCEIL, ScaleRule.EVEN)
        if self.scale_rule is ScaleRule.ROUND and self.scale.mantissa_bits == 0:
            raise ValueError(
                f"{self.name}: ScaleRule.ROUND needs a scale with a mantissa; {self.scale.name} has none. "
                "Use FLOOR, CEIL, RCEIL or EVEN"
            )
        if powers_of_two and self.tensor_scale is not None:
            raise ValueError(f"{self.name}: a tensor scale goes with ScaleRule.ROUND or a rule of your own")
        if powers_of_two and (self.scale.emin > 0 or self.scale.emax < 0):
            raise ValueError(f"{self.name}: the scale format {self.scale.name} cannot hold 2^0; take one that can")
        if self.scale.emin < -149:
            raise ValueError(
                f"{self.name}: the scale format {self.scale.name} goes down to 2^{self.scale.emin}, "
                "which is 0 in float32; "
                "take one whose smallest normal number is at least 2^-149 (a smaller bias, or fewer exponent bits)"
            )
        if self.scale.emax > 127 or (self.tensor_scale is not None and self.tensor_scale.emax > 127):
            raise ValueError(f"{self.name}: scales beyond float32 cannot be simulated")
        if self.tensor_scale is not None and not isinstance(self.tensor_scale, FloatFormat):
            raise TypeError(f"{self.name}: tensor_scale must be a FloatFormat, got {self.tensor_scale!r}")
        self._check_sub_blocks(powers_of_two)

    def _check_sub_blocks(self, powers_of_two: bool) -> None:
        size = self.sub_block_size
        _check_int(self.name, "sub_block_size", size, 0, 2**31 - 1)
        _check_int(self.name, "microexponent_bits", self.microexponent_bits, 0, 4)
        if (size == 0) != (self.microexponent_bits == 0):
            raise ValueError(f"{self.name}: sub_block_size and microexponent_bits go together: set both, or neither")
        if size and not powers_of_two:
            raise ValueError(f"{self.name}: microexponents go with the scale rules FLOOR, CEIL, RCEIL and EVEN")
        blocks = self.block_size
        whole = isinstance(blocks, int) and size < blocks and blocks % max(size, 1) == 0
        if size and not (whole and size <= 128 and size & (size - 1) == 0):
            raise ValueError(
                f"{self.name}: sub_block_size must be a power of two up to 128 that divides block_size, and less than "
                f"it, got {size} and {blocks}"
            )

    def scale_by_rule(self, amax: float) -> float:
        """What a scale rule that is a function gives for a block whose largest magnitude is `amax`.

        Raises ValueError for what is no finite number of at least 0; 0 becomes the smallest scale.
        """
        rule = self.scale_rule
        assert not isinstance(rule, ScaleRule)
        value = rule(amax, self.element)
        try:
            usable = 0 <= value < math.inf
        except (TypeError, ValueError):
            usable = False
        if not usable:
            raise ValueError(
                f"{self.name}: the scale rule {getattr(rule, '__qualname__', rule)} must give a finite number of at "
                f"least 0, and gave {value!r} for the largest magnitude {amax!r}"
            )
        return value

    @property
    def most_lowered(self) -> int:
        """The largest microexponent; 0 without sub-blocks."""
        return 2**self.microexponent_bits - 1

    @property
    def bits(self) -> float:
        """Bits an element, its share of what its block shares included (whole blocks; without the tensor scale)."""
        size = math.prod(self.block_size) if isinstance(self.block_size, tuple) else self.block_size
        shared = self.scale.bits / size if size else 0
        return self.element.bits + shared + (self.microexponent_bits / (self.sub_block_size or 1))

    @property
    def max(self) -> float:
        return self.element.max * self.scale.max * (self.tensor_scale.max if self.tensor_scale else 1.0)

    @property
    def min_subnormal(self) -> float:
        smallest = self.tensor_scale.min_subnormal if self.tensor_scale else 1.0
        return self.element.min_subnormal * self.scale.min_subnormal * smallest


Format = FloatFormat | FixedFormat | Codebook | BlockFormat
