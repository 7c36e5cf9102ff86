"""Recipes: what is valid, and the named ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.training.models.gpt2 import MICRO
from lpsim import Accumulator, Gemm, Quantizer, Recipe, Rounding, formats, simulate
from lpsim.machine import named_recipes
from lpsim.machine.named_recipes import ALL_RECIPES, NamedRecipe
from lpsim.machine.recipes import BackwardOperands

FP4, BF16 = Quantizer(formats.get("mxfp4_e2m1")), Quantizer(formats.get("bfloat16"))


def test_forward_is_the_forward_products_and_nothing_else() -> None:
    recipe = Recipe.forward(FP4.format)
    assert recipe == Recipe(fprop=Gemm(lhs=FP4, rhs=FP4)) and hash(recipe) == hash(Recipe(fprop=Gemm(FP4, FP4)))
    assert recipe.backward_operands is BackwardOperands.QUANTIZED
    rounded = Recipe.forward(FP4.format, vector=BF16.format, rounding=Rounding.STOCHASTIC)
    operand = Quantizer(FP4.format, rounding=Rounding.STOCHASTIC)
    assert rounded == Recipe(fprop=Gemm(operand, operand, out=BF16), vector=BF16)
    assert Recipe(vector=BF16).products_plain and not recipe.products_plain


def test_bad_recipes() -> None:
    with pytest.raises(TypeError, match=r"Recipe\.fprop must be a Gemm"):
        Recipe(fprop=FP4)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Recipe\.vector must be a Quantizer or None"):
        Recipe(vector=formats.get("bfloat16"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="BackwardOperands"):
        Recipe(backward_operands="quantized")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="maps site patterns to recipes"):
        Recipe(overrides={"lm_head": None})  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"Recipe\.overrides must be a dict .*, got list"):
        Recipe(overrides=[("lm_head", Recipe())])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'a' has overrides of its own"):
        Recipe(overrides={"a": Recipe(overrides={"b": Recipe()})})
    with pytest.raises(TypeError, match="matmul"):
        Gemm(accumulate=FP4)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown recipe 'nvfp5'; did you mean nvfp4"):
        named_recipes.get("nvfp5")
    with pytest.raises(ValueError, match="unknown recipe 'NVFP4'; did you mean nvfp4"):
        named_recipes.get("NVFP4")


@pytest.mark.parametrize("named", ALL_RECIPES.values(), ids=ALL_RECIPES)
def test_named_recipes_train(named: NamedRecipe) -> None:
    """Every one differs from plain torch where its source says so, and nothing escapes."""
    torch.manual_seed(0)
    model = MICRO.build()
    tokens = torch.randint(0, 256, (2, 33))

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    plain = step()
    with simulate(model, named.recipe) as sim:
        simulated = step()
    assert all(torch.isfinite(t).all() for t in simulated)
    assert torch.equal(plain[0], simulated[0]) == (named.name == "mxfp4_stochastic_gradients")
    assert not any(map(torch.equal, plain[2:], simulated[2:]) if "forward" not in named.name else ())
    assert sim.audit().escaped == () and "arXiv" in named.source


def test_nvfp4_uses_one_copy_of_the_weights() -> None:
    """Tiles are the same along both axes, so dgrad multiplies the weights that fprop multiplied."""
    torch.manual_seed(0)
    layer, x = nn.Linear(48, 64, bias=False), torch.randn(32, 48, requires_grad=True)
    recipe = named_recipes.get("nvfp4").recipe
    products = recipe.overrides["*/linear"]
    assert products.fprop.rhs is not None and products.dgrad.rhs == products.fprop.rhs
    wide_gradient = dataclasses.replace(products, dgrad=Gemm(rhs=products.dgrad.rhs))
    with simulate(layer, wide_gradient):
        out = layer(x)
        out.sum().backward()
    weight = products.fprop.rhs.quantize(layer.weight)
    assert x.grad is not None and torch.equal(x.grad, torch.ones(32, 64) @ weight)


def test_the_order_of_overrides_counts() -> None:
    """The first match wins, so another order is another recipe."""
    one, two = Recipe(), Recipe.forward(formats.mxfp6_e3m2)
    forth = Recipe(overrides={"head": one, "h*": two})
    back = Recipe(overrides={"h*": two, "head": one})
    assert forth != back
    again = Recipe(overrides=dict(forth.overrides))
    assert forth == again and hash(forth) == hash(again)


def test_the_audit_names_what_sums() -> None:
    unit = Accumulator(formats.float16, chunk=32)
    recipe = Recipe(
        fprop=Gemm(FP4, FP4, accumulate=unit, out=BF16), dgrad=Gemm(accumulate=Accumulator(formats.bfloat16))
    )
    with simulate(nn.Linear(32, 32), recipe) as sim:
        sim.model(torch.randn(2, 32)).sum().backward()
    (row,) = (row for row in sim.audit().rows if row.op == "linear")
    assert row.formats == (
        "fprop mxfp4_e2m1 · mxfp4_e2m1, summed in float16 by 32 -> bfloat16, dgrad - · -, summed in bfloat16"
    )
