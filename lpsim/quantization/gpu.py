"""The GPU backend: cuts a tensor into what the Triton kernels (`gpu_kernels`) handle, and brings them their arguments.

Its results equal `reference` bit for bit. `cpu` is its sibling.

Under TRITON_INTERPRET=1, set before Triton is imported, the kernels run in Triton's interpreter, on CPU tensors too.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from lpsim.formats import BlockFormat, FloatFormat, Format, reference
from lpsim.formats.rounding import Key, Overflow, Rounding, ScaleRule
from lpsim.quantization import gpu_kernels as kernels
from lpsim.quantization.gpu_bits import triton
from lpsim.quantization.gpu_kernels import quantize_tiles, tensor_scale, tile_maxima
from lpsim.quantization.plan import Plan, exact, geometry, memory_order, plan, sub_tile

if TYPE_CHECKING:
    from lpsim.quantization.quantizer import Quantizer

INTERPRETED = not isinstance(quantize_tiles, triton.JITFunction)
# as numbers, since a launch takes longer with Triton's constexpr
_RULES = (kernels.NO_SCALE, kernels.POWER_OF_TWO, kernels.QUOTIENT, kernels.OWN_RULE)
NO_SCALE, POWER_OF_TWO, QUOTIENT, OWN_RULE = (rule.value for rule in _RULES)
STOCHASTIC = kernels.STOCHASTIC.value


# ---------------------------------------------------------------------------------------------- cutting a tensor

_BLOCK = 4096  # elements a program handles where the tiles allow it
_LARGEST = 16384  # elements of a tile, padded to powers of two, that a program can hold
_SEGMENT = 32  # columns side by side that make a full memory transaction


class _Cut(NamedTuple):
    """A tensor cut into blocks of cells.

    where: the number of rows of tiles, the rows and columns of a matrix and of a tile, the tiles down and across a
    matrix, and the cells down and across a tile.
    """

    where: tuple[int, int, int, int, int, int, int, int, int]
    block: tuple[int, int, int, int]  # T, R, K, C
    programs: int
    tiles: int
    aligned: bool  # every row of a block is consecutive and starts at a multiple of 128 in the tensor

    @property
    def whole(self) -> bool:
        """Each cell is a tile."""
        return self.where[-2:] == (1, 1)


@functools.lru_cache(maxsize=4096)
def _cut(shape: tuple[int, int, int], tile: tuple[int, int], scaled: bool) -> _Cut:
    """How programs share a tensor (outer, rows, columns) in tiles; `scaled`: a tile fits a program where it can."""
    outer, rows, columns = shape
    tile_rows, tile_columns = min(tile[0], rows), min(tile[1], columns)
    if tile_rows == 1 and columns % tile_columns == 0:  # tiles one after another
        outer, rows, columns = 1, 1, outer * rows * columns
    r, c = triton.next_power_of_2(tile_rows), triton.next_power_of_2(tile_columns)
    down, across = triton.cdiv(rows, tile_rows), triton.cdiv(columns, tile_columns)
    strips, neighbours = outer * down, triton.next_power_of_2(across)
    t, k = 1, min(max(_SEGMENT // c, 1), neighbours)
    if r * k * c > (_LARGEST if scaled else _BLOCK):
        c = min(c, _BLOCK)
        r = min(r, max(_BLOCK // (k * c), 1))
    else:
        k = min(max(_BLOCK // (r * c), k), neighbours)
        t = min(max(_BLOCK // (r * k * c), 1), triton.next_power_of_2(strips))
    parts_down, parts_across = triton.cdiv(tile_rows, r), triton.cdiv(tile_columns, c)
    consecutive = k == 1 or c == tile_columns
    if parts_across > 1:
        starts = c % 128 == 0 and (across == 1 or tile_columns % 128 == 0)
    else:
        starts = across <= k or k * tile_columns % 128 == 0
    return _Cut(
        where=(strips, rows, columns, tile_rows, tile_columns, down, across, parts_down, parts_across),
        block=(t, r, k, c),
        programs=triton.cdiv(strips, t) * parts_down * triton.cdiv(across, k) * parts_across,
        tiles=strips * across,
        aligned=consecutive and starts and k * c % 128 == 0 and (outer * rows == 1 or columns % 128 == 0),
    )


# ---------------------------------------------------------------------------------------------- tensors


class _Numbers(NamedTuple):
    """A plan's arrays on a device, and what is compiled in."""

    f: torch.Tensor
    i: torch.Tensor
    thresholds: torch.Tensor | None
    values: torch.Tensor | None
    rule: torch.Tensor | None
    size: int
    compiled: dict[str, Any]


_on_device: dict[tuple[int, torch.device], tuple[Plan, _Numbers]] = {}  # by identity, for which the plan is kept


def _numbers(p: Plan, device: torch.device) -> _Numbers:
    known = _on_device.get((id(p), device))
    if known is not None:
        return known[1]
    stochastic = p.variant.mode == STOCHASTIC
    size = len(p.values if stochastic else p.thresholds)
    overflows = np.array(p.overflow[:2] if p.overflow is not None else (), p.floats.dtype)

    def there(array: np.ndarray) -> torch.Tensor | None:
        return torch.from_numpy(array).to(device) if len(array) > 0 else None

    numbers = _Numbers(
        f=torch.from_numpy(np.append(p.floats, overflows)).to(device),
        i=torch.from_numpy(p.integers).to(device),
        thresholds=there(p.thresholds),
        values=there(p.values),
        rule=there(p.rule),
        size=size,
        compiled={
            "MODE": p.variant.mode,
            "STEPS": size.bit_length() if p.variant.table else 0,
            "GAP": p.variant.gap,
            "BARE": p.variant.bare,
            "SPECIAL": p.overflow is not None,
            "BITS": p.bits if stochastic else 0,
        },
    )
    _on_device[id(p), device] = p, numbers
    return numbers


def _scale_numbers(scale: FloatFormat, x: torch.Tensor) -> _Numbers:
    """For rounding scales of x's width to nearest even."""
    double = x.dtype is torch.float64
    return _numbers(plan(scale, Rounding.TIES_TO_EVEN, Overflow.SATURATE, None, double), x.device)


@functools.lru_cache(maxsize=1024)
def _limits(divisor: float, least: float, most: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor([divisor, least, most], dtype=dtype, device=device)


def _integers(x: torch.Tensor) -> torch.Tensor:
    """bfloat16 as int16; any other tensor as it is."""
    return x.view(torch.int16) if x.dtype is torch.bfloat16 else x


@functools.lru_cache(maxsize=4096)
def _options(block: tuple[int, int, int, int], stochastic: bool) -> dict[str, Any]:
    """The shape of a program's block and how it is compiled."""
    threads = math.prod(block) // (8 if stochastic else 16)  # as many elements each as the registers hold
    warps = min(max(threads // 32, 1), 16)
    return {**dict(zip("TRKC", block, strict=True)), "num_warps": warps, "enable_fp_fusion": False}


def _launch(kernel: Any, cut: _Cut, *arguments: Any, stochastic: bool = False, **compiled: Any) -> None:
    with np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns of NaN, Inf and overflow
        kernel[(cut.programs,)](*arguments, **_options(cut.block, stochastic), **compiled)


def _maxima(x: torch.Tensor, cut: _Cut) -> torch.Tensor:
    """The largest magnitude of every tile, as bit patterns of float64 for float64 tensors, else of float32."""
    patterns = torch.int64 if x.dtype is torch.float64 else torch.int32
    result = torch.zeros(cut.tiles, dtype=patterns, device=x.device)
    _launch(tile_maxima, cut, _integers(x), result, cut.where, BFLOAT16=x.dtype is torch.bfloat16)
    return result


def _own_scales(maxima: torch.Tensor, fmt: BlockFormat, dtype: torch.dtype) -> torch.Tensor:
    """The user's rule for every tile, computed once for each distinct finite maximum, on the host."""
    amax = maxima.view(dtype)
    distinct, where = torch.unique(torch.where(amax.isfinite(), amax, 0), return_inverse=True)
    scales = [fmt.scale_by_rule(a) for a in distinct.tolist()]
    return torch.tensor(scales, dtype=dtype, device=maxima.device)[where]


def _scale_of_tensor(x: torch.Tensor, fmt: BlockFormat, dtype: torch.dtype) -> torch.Tensor | None:
    """reference.tensor_scale, a tensor of one element on x's device; None where the format has none."""
    second = fmt.tensor_scale
    if second is None:
        return None
    all_of_it = _cut((1, 1, x.numel()), (1, x.numel()), False)
    numbers = _scale_numbers(second, x)
    limits = _limits(fmt.element.max * fmt.scale.max, reference.least_tensor_scale(fmt), second.max, dtype, x.device)
    result = torch.empty(1, dtype=dtype, device=x.device)
    gap, bare = numbers.compiled["GAP"], numbers.compiled["BARE"]
    with np.errstate(all="ignore"):
        tensor_scale[(1,)](
            _maxima(x, all_of_it), result, numbers.f, numbers.i, limits, gap, bare, num_warps=1, enable_fp_fusion=False
        )
    return result


def overlaps_in_part(x: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether two contiguous tensors share some memory but not all: programs would overwrite what others read."""
    return 0 < abs(out.data_ptr() - x.data_ptr()) < x.numel() * x.element_size()


def quantize(x: torch.Tensor, fmt: Format, axis: int, p: Plan, key: Key | None, out: torch.Tensor) -> None:
    """reference.quantize of a contiguous float tensor x, into the contiguous `out` of its dtype (x itself is allowed).

    axis: the axis that blocks lie along, from the front. p: the plan of the format and rounding for x's width. key: of
    the random bits; None where none are drawn.
    """
    if x.numel() == 0:
        return
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    numbers = _numbers(p, x.device)
    if isinstance(fmt, BlockFormat):
        shape, tile = geometry(x.shape, fmt, axis)
    else:
        shape, tile = (1, 1, x.numel()), (1, x.numel())
    cut = _cut(shape, tile, isinstance(fmt, BlockFormat))
    key = key or Key(0)
    rule, scale_gap, scale_bare, divided, part = NO_SCALE, False, False, False, (1, 1)
    maxima = wanted = outer = scale_f = scale_i = limits = None
    if isinstance(fmt, BlockFormat):
        rule, divided = POWER_OF_TWO, fmt.sub_block_size > 0
        part = sub_tile(tile, fmt) if divided else part
        if numbers.rule is None:
            rule = QUOTIENT if fmt.scale_rule is ScaleRule.ROUND else OWN_RULE
            scale = _scale_numbers(fmt.scale, x)
            scale_f, scale_i = scale.f, scale.i
            scale_gap, scale_bare = scale.compiled["GAP"], scale.compiled["BARE"]
            limits = _limits(fmt.element.max, fmt.scale.min_normal, fmt.scale.max, dtype, x.device)
            outer = _scale_of_tensor(x, fmt, dtype)
        if not cut.whole or rule == OWN_RULE:
            maxima = _maxima(x, cut)
        if rule == OWN_RULE and maxima is not None:
            wanted = _own_scales(maxima, fmt, dtype)
    _launch(
        quantize_tiles,
        cut,
        _integers(x),
        _integers(out),
        numbers.f,
        numbers.i,
        numbers.thresholds,
        numbers.values,
        numbers.size,
        numbers.rule,
        maxima,
        wanted,
        outer,
        scale_f,
        scale_i,
        limits,
        cut.where,
        key.seed & 0xFFFFFFFF,
        key.seed >> 32,
        key.stream,
        key.step,
        key.offset,
        RULE=rule,
        DIVIDED=divided,
        DOWN=1 << (part[0] - 1).bit_length(),  # a tile that is smaller is filled up to a power of two
        ACROSS=1 << (part[1] - 1).bit_length(),
        SCALE_GAP=scale_gap,
        SCALE_BARE=scale_bare,
        ALIGNED=cut.aligned and key.offset % 128 == 0,
        BFLOAT16=x.dtype is torch.bfloat16,
        stochastic=numbers.compiled["BITS"] > 0,
        **numbers.compiled,
    )


class TritonBackend:
    """Triton kernels for CUDA and ROCm tensors; for CPU tensors too where Triton's interpreter runs."""

    name = "triton"

    def supports(self, quantizer: Quantizer, device: torch.device) -> bool:
        served = device.type == "cuda" or (INTERPRETED and device.type == "cpu")
        return served and exact(quantizer.format, quantizer.overflow)

    def quantize(
        self, x: torch.Tensor, quantizer: Quantizer, axis: int, key: Key | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        q = quantizer
        order = None if x.is_contiguous() else memory_order(x, q.format, q.rounding)
        source = x.contiguous() if order is None else x.permute(order)
        in_place = out is not None and order is None and out.is_contiguous() and not overlaps_in_part(source, out)
        target = out if in_place and out is not None else torch.empty_like(source)
        double = x.dtype is torch.float64
        if double not in q.plans:
            q.plans[double] = plan(q.format, q.rounding, q.overflow, q.random_bits, double)
        with torch.cuda.device_of(x):
            quantize(source, q.format, axis if order is None else order.index(axis), q.plans[double], key, target)
        if order is not None:
            target = target.permute([order.index(d) for d in range(len(order))])
        if out is not None:
            return out if in_place else out.copy_(target)
        return target
