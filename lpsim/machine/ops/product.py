"""The machine's autograd Functions: `Product`, a matrix product and its gradients, and `StraightThrough`, a rounding.

Every product of every op comes here. fprop (the forward product) and its gradients dgrad (for the left operand) and
wgrad (for the right) are three matrix products. Each quantizes its operands along the axis that it sums over.
"""

from __future__ import annotations

import enum
from typing import Any, Protocol

import torch
from torch import Tensor

from lpsim.machine import precision
from lpsim.machine.ops import exact
from lpsim.machine.recipes import BackwardOperands, Gemm, Recipe
from lpsim.quantization.quantizer import Quantizer


class Role(enum.IntEnum):
    """Which tensor of an op. The number is part of the random stream: never renumber."""

    FPROP_LHS = 0
    FPROP_RHS = 1
    FPROP_OUT = 2
    DGRAD_LHS = 3
    DGRAD_RHS = 4
    DGRAD_OUT = 5
    WGRAD_LHS = 6
    WGRAD_RHS = 7
    WGRAD_OUT = 8
    VECTOR = 9

    @property
    def label(self) -> str:
        """As shown to the user: fprop.lhs."""
        return self.name.lower().replace("_", ".")


class Bits(Protocol):
    """The bits (see exact.bits_of_product) of each product whose operands are exactly bfloat16, else None."""

    fprop_bits: int | None
    dgrad_bits: int | None
    wgrad_bits: int | None


class Quantizing(Protocol):
    """What a product needs of the call it belongs to (`site.Call`): the recipe, the bits, and rounding by role."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def site(self) -> Bits: ...

    def quantize(self, role: Role, quantizer: Quantizer | None, x: Tensor, axis: int = -1) -> Tensor: ...


def _matmul(gemm: Gemm, exact_bits: int | None, lhs: Tensor, rhs: Tensor, transposed: bool = False) -> Tensor:
    """lhs [..., M, K] · rhs [..., K, N], or its transpose, with the product's accumulator.

    exact_bits: see exact.bits_of_product. An accumulator gets lhs and rhs untransposed, as the Gemm names them.
    """
    if gemm.accumulate is not None:
        out = gemm.accumulate.matmul(lhs, rhs)
        return out.mT if transposed else out
    if transposed:
        lhs, rhs = rhs.mT, lhs.mT
    return torch.matmul(lhs, rhs) if exact_bits is None else exact.matmul(lhs, rhs, exact_bits)


class Product(torch.autograd.Function):
    """out = lhs · rhs (+ bias), and its gradients dgrad and wgrad; each of the three has its own Gemm in the recipe.

    lhs: [..., M, K] with lhs_axis = -1, or [..., K, M] with -2. rhs: [..., K, N] with rhs_axis = -2, or [..., N, K]
    with -1. Operands are passed as they are stored, so that each stored element has its own random bits. bias: [N].
    out: [..., M, N]. Batch dimensions broadcast; a broadcast operand's gradient is summed in the compute dtype.

    Not differentiable twice: there is no convention for the second derivative of a rounded function.
    """

    @staticmethod
    def forward(
        ctx: Any, lhs: Tensor, rhs: Tensor, bias: Tensor | None, call: Quantizing, lhs_axis: int, rhs_axis: int
    ) -> Tensor:
        fprop = call.recipe.fprop
        lhs_q = call.quantize(Role.FPROP_LHS, fprop.lhs, lhs, lhs_axis)
        rhs_q = call.quantize(Role.FPROP_RHS, fprop.rhs, rhs, rhs_axis)
        out = _matmul(
            fprop, call.site.fprop_bits, lhs_q if lhs_axis == -1 else lhs_q.mT, rhs_q if rhs_axis == -2 else rhs_q.mT
        )
        if bias is not None:
            out += bias
        if call.recipe.backward_operands is BackwardOperands.QUANTIZED:
            lhs, rhs = lhs_q, rhs_q
        needs_lhs_grad, needs_rhs_grad = ctx.needs_input_grad[:2]
        ctx.save_for_backward(lhs if needs_rhs_grad else None, rhs if needs_lhs_grad else None)
        ctx.call, ctx.lhs_axis, ctx.rhs_axis = call, lhs_axis, rhs_axis
        ctx.lhs_shape, ctx.rhs_shape = lhs.shape, rhs.shape
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lhs, rhs = ctx.saved_tensors  # may recompute a checkpointed forward pass, which the mode must see
        # what follows are the machine's ops, not the model's
        with torch._C.DisableTorchFunction(), precision.pinned():
            if torch.is_grad_enabled():  # create_graph=True
                with torch.no_grad():
                    gradients = _backward(ctx, lhs, rhs, grad)
                return only_first(ctx.call.site.name, gradients, (lhs, rhs, grad))
            if torch.is_autocast_enabled(grad.device.type):
                with torch.autocast(grad.device.type, enabled=False):
                    return _backward(ctx, lhs, rhs, grad)
            return _backward(ctx, lhs, rhs, grad)


def _backward(ctx: Any, lhs: Tensor, rhs: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    call, lhs_axis, rhs_axis = ctx.call, ctx.lhs_axis, ctx.rhs_axis
    dgrad, wgrad = call.recipe.dgrad, call.recipe.wgrad
    needs_lhs, needs_rhs, needs_bias = ctx.needs_input_grad[:3]
    grad_lhs = grad_rhs = grad_bias = None
    if needs_lhs:  # [M, N] · [N, K]: sums over N
        grad_q = call.quantize(Role.DGRAD_LHS, dgrad.lhs, grad, -1)
        rhs_q = call.quantize(Role.DGRAD_RHS, dgrad.rhs, rhs, -3 - rhs_axis)
        rhs_q = rhs_q if rhs_axis == -1 else rhs_q.mT  # [N, K]
        grad_lhs = _matmul(dgrad, call.site.dgrad_bits, grad_q, rhs_q, transposed=lhs_axis != -1)
        grad_lhs = _summed_to(ctx.lhs_shape, grad_lhs)
        grad_lhs = call.quantize(Role.DGRAD_OUT, dgrad.out, grad_lhs)
    if needs_rhs:  # [K, M] · [M, N]: sums over M
        lhs_q = call.quantize(Role.WGRAD_LHS, wgrad.lhs, lhs, -3 - lhs_axis)
        grad_q = call.quantize(Role.WGRAD_RHS, wgrad.rhs, grad, -2)
        lhs_q = lhs_q if lhs_axis == -1 else lhs_q.mT  # [M, K]
        grad_rhs = _matmul(wgrad, call.site.wgrad_bits, lhs_q.mT, grad_q, transposed=rhs_axis != -2)
        grad_rhs = _summed_to(ctx.rhs_shape, grad_rhs)
        grad_rhs = call.quantize(Role.WGRAD_OUT, wgrad.out, grad_rhs)
    if needs_bias:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_lhs, grad_rhs, grad_bias, None, None, None


def only_first(
    site: str, gradients: tuple[Tensor | None, ...], of: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients at a site, computed from the tensors `of`: to differentiate them is an error that says why."""
    if not any(x is not None and x.requires_grad for x in of):
        return gradients
    leaves = [None if x is None else x.detach().requires_grad_() for x in gradients]
    return _FirstDerivative.apply(site, *leaves)


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, site: str, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.site = site
        return tuple(None if x is None else x.view_as(x) for x in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"{ctx.site}: a second derivative is not simulated, since a rounded function has none; compute what is "
            "differentiated twice inside `simulation.suspended()`, or leave this site by an override with Recipe()"
        )


def _summed_to(shape: torch.Size, grad: Tensor) -> Tensor:
    """The gradient of an operand whose batch dimensions were broadcast."""
    return grad if grad.shape == shape else grad.sum_to_size(shape)


class StraightThrough(torch.autograd.Function):
    """A result rounded by the recipe. The gradient passes unchanged, even where the rounding saturates."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Quantizing, role: Role, quantizer: Quantizer) -> Tensor:
        result = call.quantize(role, quantizer, x)
        if result._is_view():  # torch lets a Function's result be changed in place only if it is no view
            result = result.new_empty(0).set_(result)  # type: ignore[call-overload]
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None, None
