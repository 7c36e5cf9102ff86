"""Other forms of an op (in place, out=, complex, integer), and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpsim import Recipe, simulate
from tests.machine.rounded import BF16, FP4, Runs, run, tensors, weighting


def test_in_place_and_out_forms_of_products() -> None:
    a, b, c = tensors((33, 40), (40, 37), (33, 37))
    expected = FP4.quantize(a, -1) @ FP4.quantize(b, 0)
    with simulate(nn.Identity(), Recipe.forward(FP4.format)):
        out = torch.empty(0)
        assert torch.mm(a, b, out=out) is out and torch.equal(out, expected)
        target = c.clone()
        assert target.addmm_(a, b, beta=0) is target and torch.equal(target, expected)
        leaf = a.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="do not support automatic differentiation"):
            torch.mm(leaf, b, out=out)


def test_in_place_and_out_forms_of_vector_ops() -> None:
    x, y = tensors((3, 4), (3, 4))
    r = BF16.quantize

    def forms() -> None:
        out = torch.empty(3, 4)
        assert torch.add(x, y, out=out) is out and torch.equal(out, r(plain))
        target = x.clone()
        target += y
        assert torch.equal(target, r(plain))
        target = x.clone()
        assert F.dropout(target, 0.0, True, True) is target and torch.equal(target, r(x))
        variance, mean = torch.var_mean(x, 0)
        assert torch.equal(variance, r(moments[0])) and torch.equal(mean, r(moments[1]))
        counter = torch.zeros(3, dtype=torch.long)
        counter += 1
        assert counter.tolist() == [1, 1, 1]

    plain, moments, model = x + y, torch.var_mean(x, 0), Runs()
    with simulate(model, Recipe(vector=BF16)):
        model(forms)


def test_rounding_in_place_keeps_what_the_gradient_needs() -> None:
    """relu_ saves its result and mul_ its operand: rounding in place must not disturb either."""
    x, w = tensors((3, 4), (3, 4))

    def function(x: Tensor, w: Tensor) -> Tensor:
        return (x * 1).mul_(w).relu_().exp_()

    out, (dx, dw) = run(Recipe(vector=BF16), function, x, w)
    r = BF16.quantize
    product = r(r(x) * w)
    assert torch.equal(out, r(product.relu().exp()))
    slope = weighting(out) * product.relu().exp() * (product > 0)
    assert torch.equal(dx, slope * w) and torch.equal(dw, slope * r(x))


def test_complex_results_are_rounded_by_parts() -> None:
    x = torch.view_as_complex(tensors((5, 2))[0])
    model = Runs()
    with simulate(model, Recipe(vector=BF16)):
        y = model(torch.mul, x, x)
    assert torch.equal(torch.view_as_real(y), BF16.quantize(torch.view_as_real(x * x)))


def test_integer_products_are_no_arithmetic_of_the_machine() -> None:
    x = torch.arange(4).reshape(2, 2)
    with simulate(nn.Identity(), Recipe.forward(FP4.format)):
        assert torch.equal(x @ x, torch.tensor([[2, 3], [6, 11]]))


def test_wrong_ranks_are_refused() -> None:
    a = torch.ones(2, 3, 4)
    with (
        simulate(nn.Identity(), Recipe.forward(FP4.format)),
        pytest.raises(ValueError, match="mm multiplies a 2-D by a 2"),
    ):
        torch.mm(a, a)


def test_second_derivatives_are_refused() -> None:
    x, w = tensors((4, 4), (4, 4))
    x.requires_grad_()
    with simulate(nn.Identity(), Recipe.forward(FP4.format)):
        out = F.linear(x, w).square().sum()
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        assert torch.equal(grad, torch.autograd.grad(F.linear(x, w).square().sum(), x)[0])
        with pytest.raises(RuntimeError, match=r"<outside>/linear: a second derivative is not simulated"):
            grad.sum().backward()
        attention = F.scaled_dot_product_attention(x[None], x[None], x[None]).sum()
        (grad,) = torch.autograd.grad(attention, x, create_graph=True)
        with pytest.raises(
            RuntimeError, match=r"<outside>/scaled_dot_product_attention\.\w+: a second derivative is not simulated"
        ):
            grad.sum().backward()
