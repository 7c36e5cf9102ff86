"""Convolutions of all dimensions, and their transposes, against products of patches gathered index by index.

All numbers are small multiples of 1/4, whose products and sums are exact in float32: so the three products must come
out bit for bit whatever the order in which overlapping patches are added.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpsim import Gemm, Quantizer, Recipe, formats, simulate

FP4 = Quantizer(formats.get("mxfp4_e2m1"))
FP6 = Quantizer(formats.get("mxfp6_e3m2"))
FP8 = Quantizer(formats.get("mxfp8_e5m2"))
THREE = Recipe(Gemm(FP4, FP6), Gemm(FP8, FP4), Gemm(FP6, FP8))
BATCH, CHANNELS, OUTPUTS = 2, 6, 4
SIZES = {1: (19,), 2: (9, 8), 3: (6, 5, 7)}
KERNELS = {1: (4,), 2: (3, 2), 3: (2, 3, 2)}

OPTIONS: list[dict[str, int]] = [
    {},
    {"stride": 2, "padding": 1},
    {"dilation": 2, "padding": 2},
    {"groups": 2},
    {"stride": 2, "padding": 1, "dilation": 2, "groups": 2},
]


TRANSPOSED = [*OPTIONS, *({**options, "output_padding": 1} for options in OPTIONS if "padding" in options)]


def quarters(shape: Sequence[int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, tuple(shape), generator=generator) / 4


def patch_indices(
    channels: int, size: Sequence[int], kernel: Sequence[int], stride: int, dilation: int
) -> tuple[Tensor, list[int]]:
    """[positions, channels * kernel]: where each entry of each patch stands in an image [channels, *size]; the grid."""
    grid = [(n - dilation * (k - 1) - 1) // stride + 1 for n, k in zip(size, kernel, strict=True)]
    places = torch.arange(channels * math.prod(size)).view(channels, *size)
    rows = []
    for position in itertools.product(*map(range, grid)):
        taps = itertools.product(range(channels), *map(range, kernel))
        rows.append(
            [
                int(places[(c, *(p * stride + t * dilation for p, t in zip(position, tap, strict=True)))])
                for c, *tap in taps
            ]
        )
    return torch.tensor(rows), grid


def padded(x: Tensor, padding: int) -> Tensor:
    return F.pad(x, (padding, padding) * (x.dim() - 2))


def cropped(x: Tensor, padding: int) -> Tensor:
    for axis in range(2, x.dim()):
        x = x.narrow(axis, padding, x.shape[axis] - 2 * padding)
    return x


def scattered(rows: Tensor, indices: Tensor, shape: Sequence[int]) -> Tensor:
    """The images [B, C, *size] that patches [B * L, C * kernel] add up to."""
    image = torch.zeros(shape).flatten(1)
    return image.index_add_(1, indices.flatten(), rows.view(len(image), -1)).view(*shape)


def columns_of(x: Tensor) -> Tensor:
    """[B, C, *size] as [B * L, C]."""
    return x.flatten(2).transpose(1, 2).reshape(-1, x.shape[1])


def image_of(rows: Tensor, grid: Sequence[int]) -> Tensor:
    return rows.view(BATCH, -1, rows.shape[1]).transpose(1, 2).reshape(BATCH, -1, *grid)


def simulated(name: str, x: Tensor, w: Tensor, b: Tensor, options: dict[str, int]) -> tuple[Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    with simulate(nn.Identity(), THREE) as sim:
        out = getattr(F, name)(*leaves, **options)
        grads = torch.autograd.grad(out, leaves, quarters(out.shape, 3))
    assert not sim.audit().escaped
    return out.detach(), *grads


q4, q6, q8 = FP4.quantize, FP6.quantize, FP8.quantize


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions(dims: int, options: dict[str, int]) -> None:
    groups, padding = options.get("groups", 1), options.get("padding", 0)
    inner, outer = CHANNELS // groups, OUTPUTS // groups
    x, b = quarters((BATCH, CHANNELS, *SIZES[dims]), 0), quarters((OUTPUTS,), 2)
    w = quarters((OUTPUTS, inner, *KERNELS[dims]), 1)
    got = simulated(f"conv{dims}d", x, w, b, options)
    size = [n + 2 * padding for n in SIZES[dims]]
    indices, grid = patch_indices(inner, size, KERNELS[dims], options.get("stride", 1), options.get("dilation", 1))
    parts: list[tuple[Tensor, ...]] = []
    for n in range(groups):
        mine, theirs = slice(n * inner, (n + 1) * inner), slice(n * outer, (n + 1) * outer)
        rows = q4(padded(x[:, mine], padding).flatten(1)[:, indices].flatten(0, 1), -1)  # [B * L, C * kernel]
        kernels = q6(w[theirs].flatten(1), -1)
        out = rows @ kernels.T + b[theirs]
        g = columns_of(quarters(got[0].shape, 3)[:, theirs])
        drows = q8(g, -1) @ q4(kernels, 0)  # sums over the outputs
        dw = q8(g, 0).T @ q6(rows, 0)  # sums over the batch and the positions
        dx = cropped(scattered(drows, indices, (BATCH, inner, *size)), padding)
        parts.append((image_of(out, grid), dx, dw.view_as(w[theirs]), g.sum(0)))
    out, dx, dw, db = zip(*parts, strict=True)
    expected = torch.cat(out, 1), torch.cat(dx, 1), torch.cat(dw), torch.cat(db)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("options", TRANSPOSED, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolutions(dims: int, options: dict[str, int]) -> None:
    stride, dilation = options.get("stride", 1), options.get("dilation", 1)
    output_padding = options.get("output_padding", 0)
    groups, padding = options.get("groups", 1), options.get("padding", 0)
    inner, outer = CHANNELS // groups, OUTPUTS // groups
    x, b = quarters((BATCH, CHANNELS, *SIZES[dims]), 0), quarters((OUTPUTS,), 2)
    w = quarters((CHANNELS, outer, *KERNELS[dims]), 1)
    got = simulated(f"conv_transpose{dims}d", x, w, b, options)
    size = [
        (n - 1) * stride + dilation * (k - 1) + 1 + output_padding
        for n, k in zip(SIZES[dims], KERNELS[dims], strict=True)
    ]
    filled = [n - output_padding for n in size]
    indices, grid = patch_indices(outer, filled, KERNELS[dims], stride, dilation)
    assert tuple(grid) == SIZES[dims]
    parts: list[tuple[Tensor, ...]] = []
    for n in range(groups):
        mine, theirs = slice(n * inner, (n + 1) * inner), slice(n * outer, (n + 1) * outer)
        rows = q4(columns_of(x[:, mine]), -1)  # [B * L, C]
        kernels = q6(w[mine].flatten(1), 0)  # [C, O * kernel], summed over C
        image = scattered(rows @ kernels, indices, (BATCH, outer, *filled))
        image = cropped(F.pad(image, (0, output_padding) * dims), padding)
        g = quarters(got[0].shape, 3)[:, theirs]
        wide = padded(g, padding)
        for axis in range(2, wide.dim()):
            wide = wide.narrow(axis, 0, filled[axis - 2])
        patches = wide.flatten(1)[:, indices].flatten(0, 1)  # [B * L, O * kernel]
        dx = q8(patches, -1) @ q4(kernels, 1).T  # sums over the outputs and the kernel
        dw = q6(rows, 0).T @ q8(patches, 0)  # sums over the batch and the positions
        bias = b[theirs].view(-1, *[1] * dims)
        parts.append((image + bias, image_of(dx, SIZES[dims]), dw.view_as(w[mine]), columns_of(g).sum(0)))
    out, dx, dw, db = zip(*parts, strict=True)
    expected = torch.cat(out, 1), torch.cat(dx, 1), torch.cat(dw), torch.cat(db)
    assert all(map(torch.equal, got, expected))
