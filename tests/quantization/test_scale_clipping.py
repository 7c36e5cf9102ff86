"""Stochastic rounding is biased where a block's scale clips: the bound that decides, the warning, and the bias."""

from __future__ import annotations

import copy
import dataclasses
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from lpsim import BlockFormat, Codebook, FixedFormat, FloatFormat, Key, Quantizer, Rounding, ScaleRule, formats
from lpsim.formats import Element, Specials
from lpsim.formats import reference as oracle
from lpsim.quantization.quantizer import ScaleClipsWarning, clipping_ratio

ELEMENTS: list[Element] = [
    formats.float8_e4m3fn,
    formats.float8_e5m2,
    formats.float6_e3m2fn,
    formats.float6_e2m3fn,
    formats.float4_e2m1fn,
    formats.get("mxint8").element,
    FloatFormat("one_code_missing", 4, 1, specials=Specials.FN),
    FloatFormat("no_mantissa", 4, 0, specials=Specials.NONE),
    FixedFormat("symmetric", 4, 2, symmetric=True),
    Codebook("top_is_a_power", (-1.0, -0.5, 0.0, 0.5, 1.0)),
    Codebook("top_is_odd", (-1.375, 0.0, 0.25, 1.375)),
]
SCALES = {ScaleRule.ROUND: (formats.float8_e4m3fn, formats.float16, formats.float32)}


def blocks(element: Element) -> list[BlockFormat]:
    return [
        BlockFormat("blocks", element, scale, 32, rule)
        for rule in ScaleRule
        for scale in SCALES.get(rule, (formats.float8_e8m0fnu,))
    ]


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_the_bound_is_the_least_one(element: Element) -> None:
    """No amax passes it, and the worst one of its rule comes within a float32 step of it."""
    rng = np.random.default_rng(0)
    for fmt in blocks(element):
        bound = clipping_ratio(fmt)
        edges = [2.0, element.max, (2 - 2.0 ** -(element.mantissa_bits + 1)) * 2.0**element.emax]
        halves = (1 + (np.arange(2**10) + 0.5) * 2.0 ** -min(fmt.scale.mantissa_bits, 10)) * element.max
        values = np.concatenate([rng.uniform(0.25, 16, 2000), edges, halves]).astype(np.float32)
        values = np.concatenate([values, np.nextafter(values, np.float32(0))])
        ratios = [float(v) / (oracle.block_scale(float(v), fmt) * element.max) for v in values]
        slack = 1 + 2.0**-22
        if bound == 1:
            assert max(ratios) <= slack, fmt
        else:
            assert bound / slack <= max(ratios) <= bound * slack, fmt


def test_which_rules_clip() -> None:
    for element in ELEMENTS:
        clips = {(f.scale_rule, f.scale.name): clipping_ratio(f) > 1 for f in blocks(element)}
        assert not clips[ScaleRule.CEIL, "float8_e8m0fnu"] and not clips[ScaleRule.RCEIL, "float8_e8m0fnu"]
        assert clips[ScaleRule.FLOOR, "float8_e8m0fnu"] and clips[ScaleRule.ROUND, "float8_e4m3fn"]
        assert not clips[ScaleRule.ROUND, "float32"]  # beyond what the division itself rounds
    assert clipping_ratio(formats.mxfp4_e2m1) == 8 / 6
    wide = BlockFormat("wide", FloatFormat("single", 8, 23, specials=Specials.NONE, bias=128), formats.float8_e8m0fnu)
    assert clipping_ratio(wide) == 1  # the element holds every float32 below the next power of two


def rounded_up(amax: float, element: Element) -> float:
    return 2.0 ** math.ceil(math.log2(amax / element.max))


def halved(amax: float, element: Element) -> float:
    return amax / element.max / 2


def test_rules_of_the_user() -> None:
    fmt = formats.mxfp4_e2m1
    assert clipping_ratio(dataclasses.replace(fmt, name="up", scale_rule=rounded_up)) == 1
    clipping = dataclasses.replace(fmt, name="down", scale=formats.float16, scale_rule=halved)
    assert clipping_ratio(clipping) == pytest.approx(2, rel=1e-3)
    with pytest.warns(ScaleClipsWarning, match="halved"):
        Quantizer(clipping, Rounding.STOCHASTIC)


def test_the_warning_names_the_rules_that_do_not_clip() -> None:
    fmt = formats.mxfp4_e2m1
    with pytest.warns(
        ScaleClipsWarning, match=r"mxfp4_e2m1: .* FLOOR .* 1\.333 times .*\.CEIL and ScaleRule\.RCEIL"
    ) as w:
        q = Quantizer(fmt, Rounding.STOCHASTIC)
    assert len(w) == 1 and w[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(q)
        Quantizer(fmt), Quantizer(formats.bfloat16, Rounding.STOCHASTIC)
        for rule in (ScaleRule.CEIL, ScaleRule.RCEIL):
            Quantizer(dataclasses.replace(fmt, name="up", scale_rule=rule), Rounding.STOCHASTIC)


def test_what_the_package_ships_does_not_warn() -> None:
    """Its recipes clip where their source does, and say so there, also as data; nor does the conformance kit."""
    code = (
        "from lpsim import conformance, formats, named_recipes; from lpsim.machine import recipe_data; "
        "[recipe_data.from_dict(recipe_data.to_dict(r.recipe)) for r in named_recipes.ALL_RECIPES.values()]; "
        "conformance.check(formats.mxfp4_e2m1)"
    )
    arguments = [sys.executable, "-W", "error::UserWarning", "-c", code]
    subprocess.run(arguments, check=True, capture_output=True, timeout=300)


@pytest.mark.parametrize("rule", [ScaleRule.FLOOR, ScaleRule.RCEIL, ScaleRule.CEIL, ScaleRule.EVEN])
def test_the_mean_is_biased_exactly_where_it_clips(rule: ScaleRule) -> None:
    """Blocks whose maximum is 7.9 of E2M1's 6: the mean of many draws is x, or what is left of it when clipped."""
    fmt = dataclasses.replace(formats.mxfp4_e2m1, name="rule", scale_rule=rule)
    amax = 7.9 if rule is not ScaleRule.EVEN else 6.9  # EVEN takes 7.9 for 8
    x = torch.full((4096, 32), amax)
    mean = Quantizer(fmt, Rounding.STOCHASTIC).quantize(x, key=Key(seed=3)).double().mean().item()
    step = 4.0  # the widest gap in these blocks: a draw deviates by less, and its mean by less than 6 sigma
    band = 6 * step / 2 / math.sqrt(x.numel())
    if rule in (ScaleRule.CEIL, ScaleRule.RCEIL):
        assert abs(mean - amax) < band
    else:
        assert mean == 6.0
