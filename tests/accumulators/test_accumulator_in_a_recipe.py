"""Accumulators in a recipe: every product of every op sums in the unit of its Gemm."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpsim import Gemm, Quantizer, Recipe, accumulators, formats, simulate
from tests.accumulators.units import UNITS, Q, tensors

RECIPE = Recipe(*(Gemm(Q, Q, accumulate=unit) for unit in UNITS))


def run(function: Callable[..., Tensor], *operands: Tensor, recipe: Recipe = RECIPE) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in operands]
    with simulate(nn.Identity(), recipe) as sim:
        out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, gradient(out))
    assert not sim.audit().escaped
    return out.detach(), *grads


def gradient(out: Tensor) -> Tensor:
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(6))


def explicit(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [.., M, K] · w [.., K, N] and its gradients."""
    fprop, dgrad, wgrad = (unit.matmul for unit in UNITS)
    x_q, w_q = Q.quantize(x, -1), Q.quantize(w, -2)
    out = fprop(x_q, w_q)
    g = gradient(out)
    dx = dgrad(Q.quantize(g, -1), Q.quantize(w_q, -1).mT)
    dw = wgrad(Q.quantize(x_q, -2).mT, Q.quantize(g, -2))
    return out, dx, dw


def test_matmul_and_its_gradients() -> None:
    x, w = tensors((2, 9, 40), (2, 40, 33))
    for got, expected in zip(run(torch.matmul, x, w), explicit(x, w), strict=True):
        assert torch.equal(got, expected)


def test_linear_and_its_gradients() -> None:
    x, w = tensors((9, 40), (33, 40))
    out, dx, dw = explicit(x, w.T)
    for got, expected in zip(run(F.linear, x, w), (out, dx, dw.T), strict=True):
        assert torch.equal(got, expected)


def test_convolution_and_its_gradients() -> None:
    x, w = tensors((2, 3, 8, 8), (5, 3, 3, 3))
    out, dx, dw = run(F.conv2d, x, w)
    rows = F.unfold(x, 3).mT.reshape(-1, 27)  # [B * L, C * 9]
    fprop, dgrad, wgrad = (unit.matmul for unit in UNITS)
    rows_q, w_q = Q.quantize(rows, -1), Q.quantize(w.view(5, 27), -1)
    assert torch.equal(out, fprop(rows_q, w_q.T).view(2, 36, 5).mT.reshape(2, 5, 6, 6))
    g = gradient(out).view(2, 5, 36).mT.reshape(-1, 5)
    d_rows = dgrad(Q.quantize(g, -1), Q.quantize(w_q, 0))
    assert torch.equal(dx, F.fold(d_rows.view(2, 36, 27).mT, (8, 8), 3))
    assert torch.equal(dw, wgrad(Q.quantize(rows_q, 0).T, Q.quantize(g, 0)).T.reshape(5, 3, 3, 3))


def test_einsum_and_attention_use_the_unit() -> None:
    unit = UNITS[0]
    recipe = Recipe(Gemm(accumulate=unit), Gemm(accumulate=unit), Gemm(accumulate=unit))
    q, k, v = tensors((2, 5, 8), (2, 7, 8), (2, 7, 8))
    assert torch.equal(
        run(lambda a, b: torch.einsum("bqd,bkd->bqk", a, b), q, k, recipe=recipe)[0], unit.matmul(q, k.mT)
    )
    out, _, _, dv = run(F.scaled_dot_product_attention, q, k, v, recipe=recipe)
    weights = torch.softmax(unit.matmul(q, k.mT) * (1 / math.sqrt(8)), -1)
    assert torch.equal(out, unit.matmul(weights, v))
    assert torch.equal(dv, unit.matmul(weights.mT, gradient(out)))


def test_an_accumulator_gets_its_operands_in_the_order_of_the_gemm() -> None:
    """The formats of a tensor core's operands hold for gradients of transposed weights too."""
    e4m3, e5m2 = Quantizer(formats.float8_e4m3fn), Quantizer(formats.float8_e5m2)
    recipe = Recipe(
        Gemm(e4m3, e4m3, accumulators.HOPPER_FP8),
        Gemm(e5m2, e4m3, accumulators.HOPPER_FP8_E5M2_E4M3),
        Gemm(e4m3, e5m2, accumulators.HOPPER_FP8_E4M3_E5M2),
    )
    x, w = tensors((9, 40), (33, 40))
    x, w = x / 8, w / 32  # with subnormal numbers
    out, dx, dw = run(F.linear, x, w, recipe=recipe)
    g = e5m2.quantize(gradient(out))
    x_q, w_q = e4m3.quantize(x), e4m3.quantize(w)
    assert torch.equal(out, accumulators.HOPPER_FP8.matmul(x_q, w_q.T))
    assert torch.equal(dx, accumulators.HOPPER_FP8_E5M2_E4M3.matmul(g, w_q))
    assert torch.equal(dw, accumulators.HOPPER_FP8_E4M3_E5M2.matmul(x_q.T, g).T)
    with pytest.raises(ValueError, match="lhs has values that are not in float8_e4m3fn"):
        run(F.linear, x, w, recipe=Recipe(Gemm(None, e4m3, accumulators.HOPPER_FP8)))
