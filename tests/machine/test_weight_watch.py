"""What updates do to rounded weights, and attention's logits: hand-made cases with known numbers."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpsim import Gemm, Quantizer, Recipe, formats, simulate
from lpsim.formats import BlockFormat, Format, reference
from lpsim.machine.telemetry import Telemetry
from lpsim.machine.weight_watch import oscillated, swallowed

FP4 = formats.get("float4_e2m1fn")  # 0, 0.5, 1, 1.5, 2, 3, 4, 6


def after(values: list[list[float]], fmt: Format = FP4) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The weights (a row of `values` each) at three steps: the first, and what all three are rounded to."""
    steps = torch.tensor(values).T.contiguous()  # [3, weights]
    first, second, third = (Quantizer(fmt).quantize(x) for x in steps)
    return steps[0], (first, second, third)


@pytest.mark.parametrize(
    ("weight", "flips"),
    [
        ([1.0, 1.5, 1.0], True),  # to the next value and back
        ([1.2, 1.3, 1.2], True),  # the same, for a small change across the midpoint 1.25
        ([1.0, 1.5, 1.5], False),  # stays there
        ([1.0, 1.5, 0.5], False),  # comes back too far
        ([1.0, 2.0, 1.0], False),  # over 1.5, no neighbour
        ([1.0, 1.1, 1.0], False),  # the rounded value never moves
        ([4.0, 6.0, 4.0], True),  # a gap of 2 is a neighbour's there
        ([0.2, -0.3, 0.2], True),  # 0 and -0.5
        ([0.5, -0.5, 0.5], False),  # over 0
        ([6.0, 100.0, 6.0], False),  # both saturate to 6
        ([1.0, math.nan, 1.0], False),
    ],
)
def test_a_weight_oscillates_when_it_flips_to_a_neighbour_and_back(weight: list[float], flips: bool) -> None:
    still = [2.0, 2.0, 2.0]
    assert oscillated(*after([weight, still, still, still]), FP4, -1) == (0.25 if flips else 0.0)


@pytest.mark.parametrize("name", ["mxfp4_e2m1", "mxint8", "nvfp4", "nf4_block64"])
def test_neighbours_are_those_of_the_blocks_scale(name: str) -> None:
    """Eight weights go to the next value of their block's grid and back, seven to the one after that and back."""
    fmt = formats.get(name)
    assert isinstance(fmt, BlockFormat) and isinstance(fmt.block_size, int)
    size = fmt.block_size
    for scale in (1.0, 2.0**-20, 2.0**10):
        grid = torch.tensor(reference.values(fmt.element)).unique() * scale
        first = grid[torch.arange(size) % 5 + len(grid) // 2].unsqueeze(0)  # [1, block]
        first[0, -1] = grid[-1]  # holds the block's scale
        steps = [first, first.clone(), first]
        for weight in range(15):
            steps[1][0, weight] = grid[weight % 5 + len(grid) // 2 + (1 if weight < 8 else 2)]
        one, two, three = (Quantizer(fmt).quantize(x) for x in steps)
        assert int((one != two).sum()) == 15
        assert oscillated(first, (one, two, three), fmt, -1) == 8 / size


@pytest.mark.parametrize(("step", "flips"), [(1, True), (2, False)])
def test_neighbours_are_those_of_the_sub_block_s_scale(step: int, flips: bool) -> None:
    """Beside a 1.5 MX9's values are multiples of 2^-6, in a pair whose weights are below 1 of 2^-7."""
    fmt = formats.mx9
    x = torch.full((1, 16), 0.5)
    x[0, 0] = 1.5
    moved = x.clone()
    moved[0, 2] += step * 2.0**-7
    one, two = (Quantizer(fmt).quantize(each) for each in (x, moved))
    assert torch.equal(one, x) and torch.equal(two, moved)
    assert oscillated(x, (one, two, one), fmt, -1) == (1 / 16 if flips else 0.0)


def test_a_scale_that_changes_and_comes_back_makes_weights_flip() -> None:
    """1.5 lies on the grid of a block whose largest weight is 6, and not of one with 12: there it becomes 2."""
    fmt = formats.get("mxfp4_e2m1")
    x = torch.tensor([[6.0, 1.5, 3.0] + [0.0] * 29])
    doubled = torch.tensor([[12.0, 1.5, 3.0] + [0.0] * 29])
    one, two = (Quantizer(fmt).quantize(each) for each in (x, doubled))
    assert two[0, :3].tolist() == [12.0, 2.0, 3.0]
    assert oscillated(x, (one, two, one), fmt, -1) == 2 / 32  # the 12 is the next beyond the grid of 6


def test_the_share_of_updates_that_rounding_swallows() -> None:
    x = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    later = torch.tensor([1.1, 1.2, 1.4, 1.0, 1.0])
    q, q_later = (Quantizer(FP4).quantize(each) for each in (x, later))
    assert swallowed(x, q, later, q_later) == 2 / 3
    assert math.isnan(swallowed(x, q, x, q))


@pytest.mark.parametrize("every", [1, 3, 5])
def test_telemetry_tells_how_many_weights_flip_and_back(every: int) -> None:
    """Every second step 8 of 64 weights are at the next value; in steps in between they are back."""
    layer = nn.Linear(32, 2, bias=False)
    quantizer = Quantizer(FP4)

    def train(steps: range, telemetry_state: dict[str, Any] | None = None) -> Telemetry:
        with simulate(layer, Recipe(Gemm(rhs=quantizer))) as sim:
            sim.step = steps[0]
            telemetry = Telemetry(sim, every=every)
            if telemetry_state is not None:
                telemetry.load_state_dict(telemetry_state)
            for step in steps:
                sim.step = step
                with torch.no_grad():
                    layer.weight.fill_(1.0)
                    layer.weight[0, :8] += 0.5 * (step % 2)
                    layer.weight[1] += step * 1e-3
                layer(torch.ones(1, 32))
        return telemetry

    whole = train(range(11))
    rows = [row for row in whole.rows() if row.role == "fprop.rhs"]
    assert [row.step for row in rows] == list(range(0, 11, every))
    for row in rows:
        assert row.oscillated == 8 / 64 if row.step <= 8 else math.isnan(row.oscillated)
        assert row.swallowed == 32 / 40 if row.step <= 9 else math.isnan(row.swallowed)
    for stop in range(1, 8):
        parts = train(range(stop, 11), train(range(stop)).state_dict())
        pd.testing.assert_frame_equal(parts.table(), whole.table(), check_exact=True)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("mask", ["none", "causal", "given"])
def test_telemetry_sees_the_largest_attention_logit(quantized: bool, mask: str) -> None:
    """Of the scaled and masked logits; the same where torch computes the attention whole, and then its bits stay."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8) for _ in range(3))
    given = torch.rand(6, 6) > 0.5
    given.fill_diagonal_(True)
    ways: dict[str, dict[str, Any]] = {"none": {}, "causal": {"is_causal": True}, "given": {"attn_mask": given}}
    how = ways[mask]

    class Attends(nn.Module):
        def forward(self) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, **how)

    expected = q.double() @ k.double().mT / math.sqrt(8)
    kept = {"none": torch.ones(6, 6).bool(), "causal": torch.ones(6, 6).tril().bool(), "given": given}[mask]
    recipe = Recipe(Gemm(Quantizer(formats.get("bfloat16")), Quantizer(formats.get("bfloat16"))))
    with simulate(Attends(), recipe if quantized else Recipe()) as sim:
        telemetry = Telemetry(sim, every=1)
        out = sim.model()
    (row,) = [row for row in telemetry.rows() if row.site.endswith(".scores")]
    assert (row.role, row.format, row.elements, row.origin) == ("vector", "", expected.numel(), "")
    assert row.amax == pytest.approx(expected[..., kept].abs().max().item(), rel=2e-2 if quantized else 1e-6)
    if not quantized:
        assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, **how))
        assert not sim.audit().escaped


def test_the_largest_logit_of_grouped_heads() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)

    class Attends(nn.Module):
        def forward(self) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.5)

    with simulate(Attends(), Recipe()) as sim:
        telemetry = Telemetry(sim, every=1)
        sim.model()
    (row,) = [row for row in telemetry.rows() if row.site.endswith(".scores")]
    largest = 0.5 * (q @ k.repeat_interleave(2, -3).mT).abs().max()
    assert row.amax == pytest.approx(largest.item(), rel=1e-6)
