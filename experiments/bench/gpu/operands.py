"""Operands on which a tensor core shows how it adds: random ones, and ones made to be cut, to cancel or to overflow."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Types = tuple[torch.dtype, torch.dtype]
_EMIN = {torch.float16: -14, torch.bfloat16: -126, torch.float8_e4m3fn: -6, torch.float8_e5m2: -14}


def cases(types: Types, size: int, depth: int, few: bool = False) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, lhs [size, depth], rhs [depth, size]), always the same ones. few: the first."""
    generator = torch.Generator().manual_seed(depth)
    shapes = (size, depth), (depth, size)

    def normal() -> tuple[Tensor, Tensor]:
        a, b = (torch.randn(shape, generator=generator) for shape in shapes)
        return a, b

    def given(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return narrowed(a, types[0]), narrowed(b, types[1])

    ladder = one_and_small(types, size, depth)
    yield "one and small", *given(*ladder)
    if few:
        return
    yield "normal", *given(*normal())
    yield "one and small, mixed signs", *given(ladder[0] * _signs(shapes[0], generator), ladder[1])
    yield "minus one and small", *given(-ladder[0], ladder[1])
    a, b = normal()
    spread = 3 if types[0].itemsize == 1 else 6
    yield (
        "spread",
        *given(
            a * torch.exp2(torch.randint(-spread, spread + 1, shapes[0], generator=generator)),
            b * torch.exp2(torch.randint(-spread, spread + 1, shapes[1], generator=generator)),
        ),
    )
    yield "any code", any_code(types[0], shapes[0], generator), any_code(types[1], shapes[1], generator)
    a, b = normal()
    a[:, 1::2], b[1::2] = -a[:, ::2], b[::2]
    a[:, -1] *= 1 + 2.0**-2
    yield "cancelling", *given(a, b)
    a, b = normal()
    yield "subnormal", narrowed(a * 2.0 ** (_EMIN[types[0]] - 1), types[0]), narrowed(b, types[1])
    yield "large", *given(*(_signs(s, generator) * torch.finfo(t).max for s, t in zip(shapes, types, strict=True)))
    a, b = given(*normal())
    yield "with Inf and NaN", _broken(a, generator), b


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to nearest into the dtype; what is too large becomes its largest number."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)


def one_and_small(types: Types, size: int, depth: int) -> tuple[Tensor, Tensor]:
    """1 · 1 first, then equal products 2^-(i + j) at [i, j], down to where no unit sees them beside 1."""
    a, b = torch.ones(size, depth), torch.ones(depth, size)
    low = [min(-_EMIN[dtype], 16) + 1 for dtype in types]
    a[:, 1:] = torch.exp2(-(torch.arange(size) % low[0]).float())[:, None]
    b[1:] = torch.exp2(-(torch.arange(size) % low[1]).float())
    return a, b


def any_code(dtype: torch.dtype, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Every bit pattern alike, zeros in place of Inf and NaN."""
    bits = 8 * dtype.itemsize
    codes = torch.randint(0, 1 << bits, shape, generator=generator)
    x = codes.to(torch.uint8).view(dtype) if bits == 8 else codes.sub(1 << 15).to(torch.int16).view(dtype)
    return x.float().nan_to_num(0.0, 0.0, 0.0).to(dtype)


def _signs(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator).float() * 2 - 1


def _broken(x: Tensor, generator: torch.Generator) -> Tensor:
    """x with a NaN or an infinity, where the dtype has one, in some rows."""
    wide = x.float()
    where = torch.rand(x.shape, generator=generator) < 2.0 / x.numel() * x.shape[0]
    wide[where] = torch.nan if x.dtype is torch.float8_e4m3fn else torch.inf
    wide[0, 0] = torch.nan
    return wide.to(x.dtype)
