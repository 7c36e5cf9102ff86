"""Products in the backward pass of a user's autograd.Function: which of the three they are, nobody can tell."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from lpsim import EscapedProductError, EscapedProductWarning, Gemm, Quantizer, Recipe, formats, simulate

Q = Quantizer(formats.mxfp4_e2m1)
ROUNDED = Gemm(Q, Q)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def, override]
        x, w = ctx.saved_tensors
        return g @ w.T, x.T @ g


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 48))

    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.w)  # type: ignore[no-any-return, no-untyped-call]


@pytest.fixture
def case() -> tuple[Own, Tensor, Tensor]:
    torch.manual_seed(0)
    return Own(), torch.randn(8, 32, requires_grad=True), torch.randn(8, 48)


def test_a_forward_recipe_leaves_them_in_full_precision(case: tuple[Own, Tensor, Tensor]) -> None:
    model, x, g = case
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with simulate(model, Recipe.forward(formats.mxfp4_e2m1)) as sim:
            y = model(x)
            y.backward(g)
    assert torch.equal(y, Q(x) @ Q(model.w, axis=0)) and torch.equal(x.grad, g @ model.w.T)
    assert sim.audit().products["aten.mm", "backward", "left by the recipe"] == 2


@pytest.mark.parametrize("recipe", [Recipe(dgrad=ROUNDED), Recipe(overrides={"*": Recipe(wgrad=ROUNDED)})])
def test_a_recipe_that_rounds_gradients_is_told_of_them_once(case: tuple[Own, Tensor, Tensor], recipe: Recipe) -> None:
    model, x, g = case
    sim = simulate(model, recipe)
    with pytest.warns(EscapedProductWarning, match=r"of your own \(matmul\)"), sim:
        model(x).backward(g)
    assert torch.equal(x.grad, g @ model.w.T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sim:
            model(x).backward(g)
    with pytest.raises(EscapedProductError, match="overrides="), simulate(model, recipe, on_escape="raise"):
        model(x).backward(g)


@pytest.mark.parametrize("pattern", ["<backward>", "<backward>/matmul"])
def test_an_override_rounds_their_operands(case: tuple[Own, Tensor, Tensor], pattern: str) -> None:
    model, x, g = case
    recipe = Recipe(ROUNDED, ROUNDED, ROUNDED, overrides={pattern: Recipe(fprop=ROUNDED)})
    with simulate(model, recipe, on_escape="raise"):
        model(x).backward(g)
    assert torch.equal(x.grad, Q(g) @ Q(model.w.T, axis=0))
