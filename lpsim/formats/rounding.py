"""How a real number becomes a representable one: rounding, overflow, block scales, and the key of the random bits.

Every enumeration states the formula of each member, and the clause it comes from. Nothing is computed here: `reference`
defines the results in exact arithmetic, `cpu` and `gpu` reproduce them bit for bit.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Rounding(enum.Enum):
    """Which of the two representable neighbours lo <= x <= hi becomes the result. An exact x stays x.

    - TIES_TO_EVEN: the nearer one; at the midpoint the one with the even code (IEEE 754-2019 §4.3.1, roundTiesToEven).
    - TIES_TO_AWAY: the nearer one; at the midpoint the larger magnitude (IEEE 754-2019 §4.3.1, roundTiesToAway).
    - TOWARD_ZERO: the smaller magnitude (IEEE 754-2019 §4.3.2).
    - TOWARD_POSITIVE: hi (IEEE 754-2019 §4.3.2).
    - TOWARD_NEGATIVE: lo (IEEE 754-2019 §4.3.2).
    - TO_ODD: the one with the odd code (Boldo and Melquiond 2008: a later, narrower rounding is then still correct).
    - STOCHASTIC: the larger magnitude where ⌊r·2^k⌋ + R >= 2^k, else the smaller.

    "Even" and "odd" speak of the code: neighbouring values of a format have neighbouring codes, so one is even.

    In STOCHASTIC r = (|x| − |lo|)/(|hi| − |lo|) and R is a uniform k-bit integer, the top k bits of the element's
    random word. The probability of the larger magnitude is ⌊r·2^k⌋/2^k. k = None means 32 bits: as many as the
    remainder of any float32 has in the normal range of a format, so the result is unbiased there; far below the
    smallest subnormal the bias is less than 2^-32 of the spacing.
    """

    TIES_TO_EVEN = "ties_to_even"
    TIES_TO_AWAY = "ties_to_away"
    TOWARD_ZERO = "toward_zero"
    TOWARD_POSITIVE = "toward_positive"
    TOWARD_NEGATIVE = "toward_negative"
    TO_ODD = "to_odd"
    STOCHASTIC = "stochastic"


class Overflow(enum.Enum):
    """What becomes of a value beyond the largest magnitude, and of an infinity, in a format without blocks.

    - SATURATE: ±max, also for ±Inf (OCP OFP8 v1.0 §5.2, saturating mode).
    - SPECIAL: Inf where the format has one, else NaN (OCP OFP8 v1.0 §5.2, non-saturating mode).

    A finite value overflows when rounding with an unbounded exponent passes max; with SPECIAL, directed rounding toward
    zero stops at ±max (IEEE 754-2019 §7.4). A format with neither Inf nor NaN cannot use SPECIAL. The elements of a
    block always saturate.
    """

    SATURATE = "saturate"
    SPECIAL = "special"


class ScaleRule(enum.Enum):
    """The scale of a block from amax, its largest magnitude; emax and max are the element's.

    - FLOOR: 2^(⌊log2 amax⌋ − emax) (OCP MX v1.0 §6.3). The block maximum may lie above max·scale and is then clipped.
    - CEIL: 2^(⌈log2 amax⌉ − emax): never clips, since 2^emax is a value of the element.
    - RCEIL: 2^⌈log2(amax / max)⌉, with amax / max in exact arithmetic: never clips.
    - EVEN: FLOOR of amax rounded to the element's mantissa, ties away: clips where amax rounds to the top of its
      binade.
    - ROUND: amax / max rounded to nearest, ties to even, in the scale's format, which has a mantissa (NVFP4). Clips a
      little where it was rounded down.

    All but ROUND give powers of two, whatever mantissa the scale's format has. In a BlockFormat a function
    (amax, element) -> scale can take a rule's place; its result is rounded to the scale's format, as ROUND's.

    The result is clamped to the normal numbers of the scale's format, and what then lies above max·scale is clipped by
    any rule. Exponents are read from bits, never from a float log2.
    """

    FLOOR = "floor"
    CEIL = "ceil"
    RCEIL = "rceil"
    EVEN = "even"
    ROUND = "round"


@dataclass(frozen=True)
class Key:
    """What determines random bits. There is no hidden state: equal keys give equal bits on every backend and device.

    Element i (row-major) of a call draws the 32-bit word `reference.random_word(key, i)`.

    seed: 64 bits, one for each experiment. stream: 32 bits, one for each site. step: 32 bits, one for each training
    step. offset: 62 bits, the index of a tensor's first element, so that a part of a tensor draws what the whole would
    have drawn.

    Raises TypeError for something else than an int, ValueError for one out of range.
    """

    seed: int
    stream: int = 0
    step: int = 0
    offset: int = 0

    def __post_init__(self) -> None:
        for name, bits in (("seed", 64), ("stream", 32), ("step", 32), ("offset", 62)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Key.{name} must be an int, got {type(value).__name__}")
            if not 0 <= value < 2**bits:
                raise ValueError(f"Key.{name} must lie in [0, 2**{bits}), got {value}")
