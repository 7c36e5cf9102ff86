"""Accumulator.matmul on GPUs: the sibling of `cpu`."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from lpsim.accumulators.gpu_kernels import dot_products
from lpsim.accumulators.unit import Unit
from lpsim.quantization.gpu_bits import triton


@functools.lru_cache(maxsize=256)
def _numbers(unit: Unit, device: torch.device) -> Tensor:
    zero = -0.0 if unit.negative_zero else 0.0
    return torch.tensor([unit.max, unit.beyond, unit.infinite, zero], dtype=torch.float64, device=device)


def matmul(lhs: Tensor, rhs: Tensor, unit: Unit, out: Tensor) -> None:
    """lhs [B, M, K] · rhs [B, K, N] into out [B, M, N], float32 in any layout; none of B, M, N is 0."""
    batch, rows, depth = lhs.shape
    columns = rhs.shape[2]
    levels = (unit.chunk - 1).bit_length() if unit.pairwise else 0
    block = (16, 32) if levels == 0 else (4, 4)  # a tree holds all products of a chunk at once
    tiles = triton.cdiv(rows, block[0]) * triton.cdiv(columns, block[1])
    with torch.cuda.device_of(lhs), np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns
        dot_products[(batch * tiles,)](
            lhs,
            rhs,
            out,
            _numbers(unit, lhs.device),
            rows,
            columns,
            depth,
            lhs.stride(),
            rhs.stride(),
            out.stride(),
            unit.emin,
            *unit.operand_emin,
            MANTISSA=unit.mantissa_bits,
            TOWARD_ZERO=unit.toward_zero,
            CHUNK=unit.chunk,
            LEVELS=levels,
            BITS=unit.fraction_bits,
            CUT=unit.aligned_rounding,
            BM=block[0],
            BN=block[1],
            num_warps=4,
            enable_fp_fusion=False,
        )
