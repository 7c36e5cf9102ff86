"""Tensors of more than 2^31 elements: the kernels' places in them, in the interpreter without the memory they take."""

from __future__ import annotations

import math
import mmap

import numpy as np
import pytest
import torch

from lpsim import Key, Quantizer, Rounding, accumulators, formats

pytest.importorskip("triton")

import triton
import triton.language as tl

from lpsim.accumulators import gpu as accumulator_gpu
from lpsim.quantization import gpu
from lpsim.quantization.gpu_kernels import cells

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HUGE = 2**31
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux; Python knows the name since 3.13


@triton.jit
def write_cells(pid, where, indices, there, tiles, T: tl.constexpr, R: tl.constexpr, K: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of the block of program `pid`: the indices, whether they are inside, and its tiles."""
    _, at, mask, tile, _ = cells(pid, where, T, R, K, C)
    place = tl.reshape(tl.arange(0, T * R * K * C), (T, R, K, C))
    tl.store(indices + place, at)
    tl.store(there + place, mask.to(tl.int8))
    tl.store(tiles + tl.reshape(tl.arange(0, T * K), (T, K)), tile)


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((1, 1, HUGE + 4096 + 32), (1, 32)),  # blocks along the last axis
        ((1, HUGE + 96, 2), (32, 1)),  # along the first
        ((HUGE // 64 + 5, 96, 40), (32, 1)),
        ((1, HUGE + 77, 2), (HUGE + 77, 1)),  # a scale a column
        ((1, 1, HUGE + 4099), (1, HUGE + 4099)),  # no blocks
        ((HUGE // 128 + 1, 20, 33), (3, 5)),
    ],
)
def test_the_last_programs_lie_where_they_should(shape: tuple[int, int, int], tile: tuple[int, int]) -> None:
    """Against numpy's int64: no index wraps, and the last element is reached."""
    cut = gpu._cut(shape, tile, True)
    t, r, k, c = cut.block
    reached = -1
    for pid in range(cut.programs - 1, max(cut.programs - 5, 0), -1):
        indices = torch.empty(math.prod(cut.block), dtype=torch.int64, device=DEVICE)
        there = torch.empty(math.prod(cut.block), dtype=torch.int8, device=DEVICE)
        tiles = torch.empty(t * k, dtype=torch.int64, device=DEVICE)
        write_cells[(1,)](pid, cut.where, indices, there, tiles, T=t, R=r, K=k, C=c)
        expected, inside, tile_numbers = places(pid, cut)
        assert np.array_equal(there.cpu().numpy() != 0, inside.reshape(-1))
        assert np.array_equal(indices.cpu().numpy()[inside.reshape(-1)], expected[inside])
        assert np.array_equal(tiles.cpu().numpy(), tile_numbers.reshape(-1))
        reached = max(reached, int(expected[inside].max(initial=-1)))
    assert reached == math.prod(shape) - 1 >= HUGE


def places(pid: int, cut: gpu._Cut) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The indices [T, R, K, C], whether they are inside, and the tiles [T, K] of a program, written out."""
    strips, rows, columns, tile_rows, tile_columns, down, across, parts_down, parts_across = cut.where
    t, r, k, c = np.ix_(*(np.arange(n, dtype=np.int64) for n in cut.block))
    groups = -(-across // cut.block[2]) * parts_across
    unit, strip = pid % groups, pid // groups
    tile_row = strip // parts_down * cut.block[0] + t
    tile_column = unit // parts_across * cut.block[2] + k
    in_row = strip % parts_down * cut.block[1] + r
    in_column = unit % parts_across * cut.block[3] + c
    row, column = tile_row % down * tile_rows + in_row, tile_column * tile_columns + in_column
    inside = (tile_row < strips) & (in_row < tile_rows) & (row < rows) & (in_column < tile_columns) & (column < columns)
    return (tile_row // down * rows + row) * columns + column, inside, (tile_row * across + tile_column)[:, 0, :, 0]


def test_an_accumulator_reads_rows_that_lie_far_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows 2^31 + 5 elements apart, in memory of which only the pages that are touched exist."""
    if DEVICE.type == "cuda":
        if torch.cuda.mem_get_info()[0] < 20 << 30:
            pytest.skip("needs 20 GiB")
        memory = torch.empty(HUGE + 64, device=DEVICE)
    else:
        from triton.runtime import interpreter

        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)  # it would copy the memory
        pages = mmap.mmap(-1, 4 * (HUGE + 64), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        memory = torch.from_numpy(np.frombuffer(pages, np.float32))
    unit = accumulators.HOPPER_BF16
    lhs, rhs = torch.arange(6.0).view(2, 3) + 1, torch.arange(12.0).view(3, 4)
    far = memory.as_strided((1, 2, 3), (0, HUGE + 5, 1))
    far.copy_(lhs)
    out = torch.empty(1, 2, 4, device=DEVICE)
    accumulator_gpu.matmul(far, rhs[None].to(DEVICE), unit.unit, out)
    assert torch.equal(out[0].cpu(), lhs @ rhs)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_a_gpu_rounds_the_end_of_a_huge_tensor_as_the_end_alone() -> None:
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB")
    x = torch.zeros(HUGE + 4096, dtype=torch.bfloat16, device=DEVICE)
    end = torch.randn(4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[-4096:] = end.to(DEVICE)
    for fmt in (formats.mxfp6_e3m2, formats.float8_e4m3fn):
        quantizer = Quantizer(fmt, Rounding.STOCHASTIC)
        whole = quantizer.quantize(x, key=Key(1))[-4096:].cpu()
        assert torch.equal(whole, quantizer.quantize(end, key=Key(1, offset=HUGE)))
