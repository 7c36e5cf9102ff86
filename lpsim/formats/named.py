"""Every named format as a constant, and the table in which a name is looked up.

Sources: OCP 8-bit Floating Point (OFP8) v1.0; OCP Microscaling Formats (MX) v1.0; IEEE 754-2019; names as in ml_dtypes.
Rouhani et al. 2020 (Microsoft Floating Point, NeurIPS) for MSFP; Rouhani et al. 2023 (arXiv:2302.08007) for MX9 to MX4.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from lpsim.formats.definitions import BlockFormat, FixedFormat, FloatFormat, Format, Specials, p3109
from lpsim.formats.rounding import ScaleRule

# OCP OFP8 v1.0 table 1; OCP MX v1.0 tables 3 to 5 and 7
float8_e4m3fn = FloatFormat("float8_e4m3fn", 4, 3, specials=Specials.FN)
float8_e5m2 = FloatFormat("float8_e5m2", 5, 2)
float6_e3m2fn = FloatFormat("float6_e3m2fn", 3, 2, specials=Specials.NONE)
float6_e2m3fn = FloatFormat("float6_e2m3fn", 2, 3, specials=Specials.NONE)
float4_e2m1fn = FloatFormat("float4_e2m1fn", 2, 1, specials=Specials.NONE)
float4_e3m0fn = FloatFormat("float4_e3m0fn", 3, 0, specials=Specials.NONE)  # powers of two and zero; not in OCP MX
float8_e8m0fnu = FloatFormat(
    "float8_e8m0fnu", 8, 0, bias=127, specials=Specials.FN, signed=False, subnormals=False, zero=False
)
int8_q6 = FixedFormat("int8_q6", bits=8, frac_bits=6, symmetric=True)  # the element of MXINT8, MX v1.0 §5.3.4
int4_q2 = FixedFormat("int4_q2", bits=4, frac_bits=2, symmetric=True)

# IEEE 754-2019 table 3.5 and the formats of accelerators
float16 = FloatFormat("float16", 5, 10)
bfloat16 = FloatFormat("bfloat16", 8, 7)
tensorfloat32 = FloatFormat("tensorfloat32", 8, 10)
float32 = FloatFormat("float32", 8, 23)

# further 8-bit types of ml_dtypes
float8_e4m3 = FloatFormat("float8_e4m3", 4, 3)
float8_e3m4 = FloatFormat("float8_e3m4", 3, 4)
float8_e4m3fnuz = FloatFormat("float8_e4m3fnuz", 4, 3, bias=8, specials=Specials.FNUZ)
float8_e5m2fnuz = FloatFormat("float8_e5m2fnuz", 5, 2, bias=16, specials=Specials.FNUZ)
float8_e4m3b11fnuz = FloatFormat("float8_e4m3b11fnuz", 4, 3, bias=11, specials=Specials.FNUZ)

# IEEE P3109: the formats of 8 bits whose range and precision are those of E4M3 and E5M2
binary8p3se = p3109(8, 3)
binary8p4se = p3109(8, 4)

# OCP MX v1.0 table 1
mxfp8_e4m3 = BlockFormat("mxfp8_e4m3", float8_e4m3fn, float8_e8m0fnu)
mxfp8_e5m2 = BlockFormat("mxfp8_e5m2", float8_e5m2, float8_e8m0fnu)
mxfp6_e3m2 = BlockFormat("mxfp6_e3m2", float6_e3m2fn, float8_e8m0fnu)
mxfp6_e2m3 = BlockFormat("mxfp6_e2m3", float6_e2m3fn, float8_e8m0fnu)
mxfp4_e2m1 = BlockFormat("mxfp4_e2m1", float4_e2m1fn, float8_e8m0fnu)
mxint8 = BlockFormat("mxint8", int8_q6, float8_e8m0fnu)
mxint4 = BlockFormat("mxint4", int4_q2, float8_e8m0fnu)

# NVIDIA: E2M1 elements, blocks of 16, E4M3 scales, one float32 scale a tensor
nvfp4 = BlockFormat(
    "nvfp4", float4_e2m1fn, float8_e4m3fn, block_size=16, scale_rule=ScaleRule.ROUND, tensor_scale=float32
)

# sign and magnitude: with one exponent bit, normal numbers and subnormals are the integers of 7, 4, 3 and 2 bits
float8_e1m6fn = FloatFormat("float8_e1m6fn", 1, 6, bias=1, specials=Specials.NONE)
float5_e1m3fn = FloatFormat("float5_e1m3fn", 1, 3, bias=1, specials=Specials.NONE)
float4_e1m2fn = FloatFormat("float4_e1m2fn", 1, 2, bias=1, specials=Specials.NONE)
float3_e1m1fn = FloatFormat("float3_e1m1fn", 1, 1, bias=1, specials=Specials.NONE)

# block floating point: MSFP shares an exponent among 16 (2020); MX9, MX6 and MX4 also a bit among 2 (2023, table II)
msfp16 = BlockFormat("msfp16", float8_e1m6fn, float8_e8m0fnu, block_size=16)
msfp12 = BlockFormat("msfp12", float4_e1m2fn, float8_e8m0fnu, block_size=16)
mx9 = BlockFormat("mx9", float8_e1m6fn, float8_e8m0fnu, block_size=16, sub_block_size=2, microexponent_bits=1)
mx6 = BlockFormat("mx6", float5_e1m3fn, float8_e8m0fnu, block_size=16, sub_block_size=2, microexponent_bits=1)
mx4 = BlockFormat("mx4", float3_e1m1fn, float8_e8m0fnu, block_size=16, sub_block_size=2, microexponent_bits=1)

ALL_FORMATS: dict[str, Format] = {f.name: f for f in list(globals().values()) if isinstance(f, Format)}


def register(fmt: Format) -> Format:
    """Make a format known by its name (in grids, on the command line) and return it.

    Registering an equal one again changes nothing. Raises ValueError when another format has the name, TypeError for
    something that is no format.
    """
    check_format("what is registered", fmt)
    if ALL_FORMATS.setdefault(fmt.name, fmt) != fmt:
        raise ValueError(f"a different format is already named {fmt.name!r}; choose another name")
    return fmt


def get(name: str) -> Format:
    """The format of that name. Raises ValueError naming the closest ones."""
    try:
        return ALL_FORMATS[name]
    except (KeyError, TypeError):
        close = nearest(name, ALL_FORMATS)
        hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(ALL_FORMATS)}"
        raise ValueError(f"unknown format {name!r}; {hint}") from None


def nearest(name: object, known: Iterable[str]) -> list[str]:
    """Up to three of the known names: those that begin with a name, then that hold it; or else that resemble it.

    Upper and lower case are the same.
    """
    lower, sought = {each.lower(): each for each in known}, str(name).lower()
    holding = [each for each in lower if sought in each] if len(sought) > 2 else []
    holding.sort(key=lambda each: not each.startswith(sought))
    return [lower[each] for each in holding[:3] or difflib.get_close_matches(sought, lower, n=3)]


def check_format(what: str, value: object, kinds: Any = Format) -> None:
    """Raises TypeError for a value that is not of these kinds of formats; for a string it says how to look it up."""
    if not isinstance(value, kinds):
        close = nearest(value, ALL_FORMATS) if isinstance(value, str) else []
        hint = f"; did you mean {' or '.join(f'lpsim.formats.get({name!r})' for name in close)}?" if close else ""
        kind = "a format" if kinds is Format else "a format without blocks"
        raise TypeError(f"{what} must be {kind}, got {type(value).__name__}{hint}")
