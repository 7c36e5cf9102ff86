"""Attention without its fused kernel: two matrix products and the vector ops between them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lpsim.ops.site import Composite


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
    Parts: qk and pv are products, scores (scaled and masked) and softmax (with dropout) are vector ops. A row with
    every position masked gives zeros, as in torch. With enable_gqa the query heads of one key head form one product.
    """
    heads, length = query.shape[-3:-1] if query.dim() > 2 else (1, query.shape[-2])
    grouped = enable_gqa and heads != key.shape[-3]
    if grouped:
        if heads % key.shape[-3]:
            raise ValueError(f"{heads} query heads do not divide into {key.shape[-3]} key heads")
        query = query.unflatten(-3, (key.shape[-3], -1)).flatten(-3, -2)  # [..., Hkv, G * L, E]
    scores = composite.part("qk").gemm(query, key, rhs_axis=-1)
    scores = scores * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if grouped:
        scores = scores.unflatten(-2, (-1, length)).flatten(-4, -3)  # [..., H, L, S]
    if is_causal:
        if attn_mask is not None:
            raise ValueError("attention takes either attn_mask or is_causal")
        attn_mask = torch.ones(length, key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            scores = scores.masked_fill(attn_mask.logical_not(), -math.inf)
        else:
            scores = scores + attn_mask
    scores = composite.part("scores").vector(scores)
    weights = torch.softmax(scores, -1) if attn_mask is None else torch._safe_softmax(scores, -1)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    weights = composite.part("softmax").vector(weights)
    if grouped:
        weights = weights.unflatten(-3, (key.shape[-3], -1)).flatten(-3, -2)
    out = composite.part("pv").gemm(weights, value)
    return out.unflatten(-2, (-1, length)).flatten(-4, -3) if grouped else out
