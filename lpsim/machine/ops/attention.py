"""Attention without its fused kernel: two matrix products and the vector ops between them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lpsim.machine.ops.product import Role, only_first
from lpsim.machine.ops.site import Call, Composite


def scaled_dot_product_attention(
    composite: Composite,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale · query·keyᵀ + mask) · value, [..., H, L, V].

    query [..., H, L, E], key [..., H or Hkv, S, E], value [..., H or Hkv, S, V]; mask broadcasts to [..., H, L, S].
    Parts: the products qk and pv, and the vector ops scores (scaled and masked) and softmax (with dropout). A row in
    which all positions are masked gives zeros, as in torch. With enable_gqa, query heads that share a key head are
    multiplied in one product.
    """
    length, positions = query.shape[-2], key.shape[-2]
    bias = _bias(query, key, attn_mask, is_causal)
    grouped = enable_gqa and query.shape[-3] != key.shape[-3]
    lead = query.shape[:-2] if grouped else torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
    if grouped:
        if query.shape[-3] % key.shape[-3]:
            raise ValueError(f"{query.shape[-3]} query heads do not divide into {key.shape[-3]} key heads")
        query = query.unflatten(-3, (key.shape[-3], -1)).flatten(-3, -2)  # [..., Hkv, H / Hkv * L, E]
    flat = query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and query.dim() > 3
    if flat:
        query, key, value = (t.flatten(0, -3) for t in (query, key, value))  # contiguous, once for all products
    scores = composite.part("qk").gemm(query, key, rhs_axis=-1)
    factor = _factor(query, scale)
    shape = (*lead, length, positions)
    weights = _Softmax.apply(scores, bias, factor, shape, attn_mask is not None, composite.part("scores"))
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    weights = composite.part("softmax").vector(weights)
    out = composite.part("pv").gemm(weights, value)
    return out.view(*lead, length, out.shape[-1]) if flat or grouped else out


def logits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """scale · query·keyᵀ + mask [..., H, L, S], what the softmax takes: for telemetry, of calls that torch runs whole.

    −Inf where a position is left out. Arguments as those of scaled_dot_product_attention.
    """
    bias = _bias(query, key, attn_mask, is_causal)
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = torch.matmul(query, key.mT) * _factor(query, scale)
    return scores if bias is None else scores + bias


def _factor(query: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(query.shape[-1]) if scale is None else scale


def _bias(query: Tensor, key: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """What is added to the scaled scores; None for nothing. Raises ValueError where there are two masks."""
    if is_causal:
        if attn_mask is not None:
            raise ValueError("attention takes either attn_mask or is_causal")
        left_out = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).triu(1)
        return _as_bias(left_out, query)
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        return _as_bias(attn_mask.logical_not(), query)
    return attn_mask


def _as_bias(left_out: Tensor, like: Tensor) -> Tensor:
    """-Inf where a position is left out, else 0."""
    return torch.zeros(left_out.shape, dtype=like.dtype, device=like.device).masked_fill_(left_out, -math.inf)


class _Softmax(torch.autograd.Function):
    """softmax(round(factor · scores + bias)), written over scores.

    scores: the result of the product qk, in its own shape. shape: [..., H, L, S], which the bias broadcasts to.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        bias: Tensor | None,
        factor: float,
        shape: tuple[int, ...],
        rows_may_be_masked: bool,
        call: Call,
    ) -> Tensor:
        x = scores.view(shape)
        if bias is None:
            x.mul_(factor)
        else:
            torch.add(bias, x, alpha=factor, out=x)
        rounded = call.quantize(Role.VECTOR, call.recipe.vector, x)  # x itself without a vector format
        if rounded is not x:
            x.copy_(rounded)
        torch.softmax(x, -1, out=x)
        if rows_may_be_masked and bias is not None:
            empty = bias.isneginf().all(-1, keepdim=True)
            if empty.any():
                x.masked_fill_(empty, 0)
        ctx.mark_dirty(scores)
        ctx.save_for_backward(scores)
        ctx.site = call.site.name
        ctx.factor, ctx.shape, ctx.bias_shape = factor, shape, None if bias is None else bias.shape
        return scores

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weights,) = ctx.saved_tensors
        with torch._C.DisableTorchFunction():
            if torch.is_grad_enabled():  # create_graph=True
                with torch.no_grad():
                    gradients = _softmax_backward(ctx, weights, grad)
                return only_first(ctx.site, gradients, (weights, grad))
            return _softmax_backward(ctx, weights, grad)


def _softmax_backward(ctx: Any, weights: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad = torch._softmax_backward_data(grad, weights, -1, weights.dtype)
    grad_bias = grad.view(ctx.shape).sum_to_size(ctx.bias_shape) if ctx.needs_input_grad[1] else None
    return grad.mul_(ctx.factor), grad_bias, None, None, None, None
