"""What the tests of ops share: formats, recipes, and how to run a function on a machine, with its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lpsim import Gemm, Quantizer, Recipe, formats, simulate

FP4 = Quantizer(formats.get("mxfp4_e2m1"))
FP6 = Quantizer(formats.get("mxfp6_e3m2"))
FP8 = Quantizer(formats.get("mxfp8_e5m2"))
BF16 = Quantizer(formats.get("bfloat16"))
THREE = Recipe(Gemm(FP4, FP6), Gemm(FP8, FP4), Gemm(FP6, FP8))


class Wide:
    """An accumulator that does what torch does: operands go through the decomposition, but nothing is rounded."""

    def matmul(self, lhs: Tensor, rhs: Tensor) -> Tensor:
        return torch.matmul(lhs, rhs)


UNROUNDED = Recipe(Gemm(accumulate=Wide()), Gemm(accumulate=Wide()), Gemm(accumulate=Wide()))


def run(recipe: Recipe, function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The function's result under the recipe, and the gradients of a fixed weighted sum of it."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with simulate(nn.Identity(), recipe) as sim:
        out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, weighting(out), materialize_grads=True)
    assert not sim.audit().escaped
    return out.detach(), list(grads)


def weighting(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(out.shape, generator=generator, dtype=out.dtype)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def assert_equal(got: tuple[Tensor, list[Tensor]], out: Tensor, *grads: Tensor) -> None:
    assert torch.equal(got[0], out)
    for ours, explicit in zip(got[1], grads, strict=True):
        assert torch.equal(ours, explicit)


class Runs(nn.Module):
    """A model whose forward is a function."""

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)
