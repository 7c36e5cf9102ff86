"""Recipes from the literature, each with its source and with the parts of it that are not simulated.

If a source quantizes only layers that have weights, its recipe does too: it rounds linear layers, addmm and
convolutions, and leaves the products of attention in the compute dtype. To leave out more sites, put them first in
`overrides`:

    recipe = named_recipes.get("nvfp4").recipe
    recipe = dataclasses.replace(recipe, overrides={"lm_head": Recipe(), **recipe.overrides})
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass

from lpsim import formats
from lpsim.formats import BlockFormat, Format
from lpsim.formats.named import nearest
from lpsim.formats.rounding import Rounding, ScaleRule
from lpsim.machine.recipes import BackwardOperands, Gemm, Recipe
from lpsim.quantization.quantizer import Quantizer, ScaleClipsWarning

__all__ = ["ALL_RECIPES", "NamedRecipe", "get"]


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe; source: where it was published; omits: the parts of the publication that it leaves out."""

    name: str
    recipe: Recipe
    source: str
    omits: str = ""


def get(name: str) -> NamedRecipe:
    """The recipe of that name. Raises ValueError, with close matches, for an unknown one."""
    if name not in ALL_RECIPES:
        close = nearest(name, ALL_RECIPES) or list(ALL_RECIPES)
        raise ValueError(f"unknown recipe {name!r}; did you mean {', '.join(close)}?")
    return ALL_RECIPES[name]


def _training(
    activations: Format, weights: Format, gradients: Format, gradient_rounding: Rounding = Rounding.TIES_TO_EVEN
) -> Recipe:
    """All three products quantized, each operand from its wide tensor."""
    a, w = Quantizer(activations), Quantizer(weights)
    with warnings.catch_warnings():  # the scales clip in the publication, too
        warnings.simplefilter("ignore", ScaleClipsWarning)
        g = Quantizer(gradients, rounding=gradient_rounding)
    return Recipe(Gemm(a, w), Gemm(g, w), Gemm(a, g), backward_operands=BackwardOperands.UNQUANTIZED)


def _weights_only(recipe: Recipe) -> Recipe:
    """`recipe` for the ops of layers with weights, nothing elsewhere."""
    return Recipe(overrides={"*/linear": recipe, "*/addmm": recipe, "*/conv*": recipe})


def _scaled_up(fmt: BlockFormat) -> BlockFormat:
    """The format with scales that never clip."""
    return dataclasses.replace(fmt, name=f"{fmt.name}_rceil", scale_rule=ScaleRule.RCEIL)


_nvfp4_tiles = dataclasses.replace(formats.nvfp4, name="nvfp4_16x16", block_size=(16, 16))
_fp8_tiles = BlockFormat("fp8_e4m3_1x128", formats.float8_e4m3fn, formats.float32, 128, ScaleRule.ROUND)
_fp8_blocks = dataclasses.replace(_fp8_tiles, name="fp8_e4m3_128x128", block_size=(128, 128))
_fp8_tensor_e4m3 = dataclasses.replace(_fp8_tiles, name="fp8_e4m3_tensor", block_size=None)
_fp8_tensor_e5m2 = dataclasses.replace(_fp8_tensor_e4m3, name="fp8_e5m2_tensor", element=formats.float8_e5m2)
_MXFP8_UP = _scaled_up(formats.mxfp8_e4m3)
_STOCHASTIC_FP4 = Quantizer(_scaled_up(formats.mxfp4_e2m1), rounding=Rounding.STOCHASTIC)
_ROUHANI = "Rouhani et al. 2023, Microscaling Data Formats for Deep Learning, arXiv:2310.10537"

ALL_RECIPES: dict[str, NamedRecipe] = {
    r.name: r
    for r in (
        *(
            NamedRecipe(
                f"{fmt.name}_forward", Recipe.forward(fmt, vector=formats.bfloat16), f"{_ROUHANI}: forward only"
            )
            for fmt in (formats.mxfp8_e4m3, formats.mxfp6_e3m2, formats.mxfp6_e2m3, formats.mxfp4_e2m1, formats.mxint8)
        ),
        NamedRecipe(
            "mxfp6_training",
            dataclasses.replace(
                _training(formats.mxfp6_e3m2, formats.mxfp6_e3m2, formats.mxfp6_e3m2),
                vector=Quantizer(formats.bfloat16),
            ),
            f"{_ROUHANI}: weights, activations and gradients in MXFP6",
        ),
        NamedRecipe(
            "mxfp4_weights_mxfp6_training",
            dataclasses.replace(
                _training(formats.mxfp6_e3m2, formats.mxfp4_e2m1, formats.mxfp6_e3m2),
                vector=Quantizer(formats.bfloat16),
            ),
            f"{_ROUHANI}: weights in MXFP4, activations and gradients in MXFP6",
        ),
        NamedRecipe(
            "mxfp8_e4m3",
            _weights_only(_training(_MXFP8_UP, _MXFP8_UP, _MXFP8_UP)),
            "Mishra et al. 2025, Recipes for Pre-training LLMs with MXFP8, arXiv:2506.08027: E4M3 everywhere, scales "
            "rounded up",
        ),
        NamedRecipe(
            "mxfp8_hybrid",
            _weights_only(_training(formats.mxfp8_e4m3, formats.mxfp8_e4m3, formats.mxfp8_e5m2)),
            "Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv:2209.05433 (E4M3 forward, E5M2 gradients), "
            "with the blocks of OCP MX v1.0",
        ),
        NamedRecipe(
            "fp8_tensor_hybrid",
            _weights_only(_training(_fp8_tensor_e4m3, _fp8_tensor_e4m3, _fp8_tensor_e5m2)),
            "Micikevicius et al. 2022, FP8 Formats for Deep Learning, arXiv:2209.05433: one scale a tensor",
            omits="delayed scaling: the scale is of the tensor itself, not of its history",
        ),
        NamedRecipe(
            "deepseek_v3",
            _weights_only(_training(_fp8_tiles, _fp8_blocks, _fp8_tiles)),
            "DeepSeek-AI 2024, DeepSeek-V3 Technical Report, arXiv:2412.19437, §3.3: E4M3 everywhere, activations and "
            "gradients in 1x128 tiles, weights in 128x128 blocks",
            omits="promotion of partial sums every 128 elements, and the exceptions for embedding, head and gating",
        ),
        NamedRecipe(
            "mxfp4_stochastic_gradients",
            _weights_only(
                Recipe(dgrad=Gemm(_STOCHASTIC_FP4, _STOCHASTIC_FP4), wgrad=Gemm(_STOCHASTIC_FP4, _STOCHASTIC_FP4))
            ),
            "Tseng et al. 2025, Training LLMs with MXFP4, arXiv:2502.20586: forward in the compute dtype, both "
            "operands of dgrad and wgrad rounded stochastically, without a bias from clipping",
            omits="the random Hadamard transform; clipping is avoided by larger scales, not by shrinking by 3/4",
        ),
        NamedRecipe(
            "nvfp4",
            _weights_only(_training(formats.nvfp4, _nvfp4_tiles, formats.nvfp4, Rounding.STOCHASTIC)),
            "NVIDIA 2025, Pretraining Large Language Models with NVFP4, arXiv:2509.25149: weights in 16x16 tiles, "
            "gradients rounded stochastically, with scales rounded to nearest, which clip",
            omits="the random Hadamard transform of wgrad's operands, and the few layers kept in bfloat16",
        ),
    )
}
