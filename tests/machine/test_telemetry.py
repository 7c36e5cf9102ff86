"""Telemetry: each number equals its definition, and observing changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.training.models.gpt2 import MICRO
from lpsim import Codebook, Gemm, Quantizer, Recipe, Rounding, formats, simulate
from lpsim.machine.arguments import lies_in
from lpsim.machine.recipes import BackwardOperands
from lpsim.machine.telemetry import NonFinite, Row, Telemetry

FP4 = Quantizer(formats.get("mxfp4_e2m1"))
FP8 = Quantizer(formats.get("float8_e4m3fn"))
STOCHASTIC = Quantizer(formats.get("mxfp4_e2m1"), rounding=Rounding.STOCHASTIC)
THREE = Recipe(Gemm(FP4, FP4), Gemm(STOCHASTIC, FP4), Gemm(FP4, STOCHASTIC), vector=Quantizer(formats.get("bfloat16")))
TOKENS = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(0))


def row_of(rows: list[Row], site: str, role: str) -> Row:
    (row,) = (r for r in rows if r.site == site and r.role == role)
    return row


def test_every_number_is_what_it_says() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(100, 7, bias=False)
    x = torch.randn(40, 100) * torch.logspace(-6, 3, 40)[:, None]
    x[:, 32:64] = 0
    with simulate(layer, Recipe(Gemm(FP4, FP8))) as sim:
        telemetry = Telemetry(sim, every=10)
        layer(x)
        layer(x)
    row = row_of(telemetry.rows(), "<model>/linear", "fprop.lhs")
    q, x64 = FP4.quantize(x).double(), x.double()
    assert (row.step, row.format, row.calls, row.elements) == (0, "mxfp4_e2m1", 2, 8000)
    assert row.sqnr_db == pytest.approx(10 * math.log10(x64.square().sum() / (q - x64).square().sum()), rel=1e-12)
    assert row.bias == pytest.approx(((q - x64).sum() / x64.abs().sum()).item(), rel=1e-9)
    blocks = F.pad(x, (0, 28)).view(40, 4, 32)
    amax = blocks.abs().amax(-1)
    exponent = torch.floor(torch.log2(amax.double())) - 2  # emax of E2M1 is 2
    clipped = (blocks.double().abs() > 6 * 2.0 ** exponent[..., None]).sum().item()
    assert clipped > 0 and row.clipped == clipped / 4000
    assert row.underflowed == ((q == 0) & (x != 0)).double().mean().item()
    assert (row.nan, row.inf, row.amax) == (0, 0, x.abs().max().item())
    exponents = exponent[amax > 0]
    assert (row.scale_log2_min, row.scale_log2_max) == (exponents.min().item(), exponents.max().item())
    assert row.scale_log2_mean == pytest.approx(exponents.mean().item())
    assert row.scale_log2_std == pytest.approx(exponents.std(correction=0).item())
    assert math.isnan(row.swallowed)

    weights = row_of(telemetry.rows(), "<model>/linear", "fprop.rhs")
    assert weights.format == "float8_e4m3fn" and math.isnan(weights.scale_log2_mean) and weights.clipped == 0
    result = row_of(telemetry.rows(), "<model>/linear", "fprop.out")
    assert result.format == "" and math.isnan(result.sqnr_db) and result.elements == 2 * 40 * 7


def test_zeros_that_a_format_without_zero_rounds_are_all_noise() -> None:
    """And those that stay zeros have none."""
    x = torch.zeros(1, 4)
    for values, sqnr in (((-1.0, 1.0), -math.inf), ((-1.0, 0.0, 1.0), math.inf)):
        q = Quantizer(Codebook("table", values))
        with simulate(nn.Linear(4, 4), Recipe(fprop=Gemm(q, None))) as sim:
            telemetry = Telemetry(sim, every=1)
            sim.model(x)

        (row,) = [row for row in telemetry.rows() if row.role == "fprop.lhs"]
        assert row.sqnr_db == sqnr


def test_a_view_of_a_parameter_is_the_parameter_and_an_equal_copy_is_not() -> None:
    p = nn.Parameter(torch.zeros(4, 4))
    assert all(lies_in(x, [torch.ones(4), p]) for x in (p, p.detach(), p.T, p[1:, 2], p.data.view(16)))
    assert not any(lies_in(x, [torch.ones(4), p]) for x in (p.clone(), p * 1, torch.zeros(4, 4)))
    place, p.data = p.detach(), torch.zeros(4, 4)  # as an optimizer does that samples weights
    assert lies_in(p.T, [p]) and not lies_in(place, [p])


def test_swallowed_updates() -> None:
    layer = nn.Linear(32, 2, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    with simulate(layer, Recipe(Gemm(rhs=FP8))) as sim:
        telemetry = Telemetry(sim, every=5)
        for step in range(7):
            sim.step = step
            layer(torch.ones(1, 32))
            with torch.no_grad():
                layer.weight[0, :8] += 0.5  # 8 change visibly
                layer.weight[0, 8:20] += 1e-3  # 12 do not, and 44 stay
    rows = [r for r in telemetry.rows() if r.role == "fprop.rhs"]
    assert [r.step for r in rows] == [0, 5]
    assert rows[0].swallowed == 12 / 20


def train(model: nn.Module, recipe: Recipe, steps: range, every: int = 2) -> tuple[Telemetry, list[Tensor]]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    with simulate(model, recipe, seed=3) as sim:
        telemetry = Telemetry(sim, every)
        for step in steps:
            sim.step = step
            optimizer.zero_grad()
            loss = F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return telemetry, losses


def micro() -> nn.Module:
    torch.manual_seed(0)
    return MICRO.build()


def test_observing_changes_nothing_and_repeats_itself(tmp_path: Path) -> None:
    """The same numbers at one and two threads, and from a run resumed at step 2."""
    first, losses = train(micro(), THREE, range(4))
    quiet, plain = train(micro(), THREE, range(4), every=1000)
    assert all(map(torch.equal, losses, plain))
    assert {r.step for r in first.rows()} == {0, 2} and {r.step for r in quiet.rows()} == {0}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        second, _ = train(micro(), THREE, range(4))
    finally:
        torch.set_num_threads(threads)
    pd.testing.assert_frame_equal(first.table(), second.table(), check_exact=True)

    model = micro()
    train(model, THREE, range(2))
    resumed, _ = train(model, THREE, range(2, 4))
    late = first.table().query("step == 2").reset_index(drop=True)
    pd.testing.assert_frame_equal(resumed.table(), late, check_exact=True)

    resumed.write(tmp_path / "telemetry.parquet")
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "telemetry.parquet"), late, check_exact=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "telemetry.parquet"]
    roles = set(late["role"])
    assert roles >= {
        "fprop.lhs",
        "fprop.rhs",
        "fprop.out",
        "dgrad.lhs",
        "dgrad.out",
        "wgrad.rhs",
        "wgrad.out",
        "vector",
    }


def test_between_samples_nothing_is_observed() -> None:
    model = micro()
    with simulate(model, THREE, audit=False) as sim:
        telemetry = Telemetry(sim, every=10)
        assert sim.observer is not None
        sim.step = 2
        assert sim.observer is None
        model(TOKENS[:, :-1])
        model.eval()
        sim.step = 10
        model(TOKENS[:, :-1])  # an evaluation in a sampled step
    assert telemetry.rows() == []


@pytest.mark.parametrize("vector", [None, Quantizer(formats.get("bfloat16"))])
def test_the_first_infinity_is_found_where_it_arises(vector: Quantizer | None) -> None:
    class Grows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.zeros(8).masked_fill(torch.arange(8) > 5, -math.inf)
            return self.second(torch.exp(torch.softmax(self.first(x) + mask, -1) * 1e3 * self.growth))

        growth = 0.0

    torch.manual_seed(0)
    model = Grows()
    with simulate(model, Recipe(Gemm(FP4, FP4), vector=vector)) as sim:
        telemetry = Telemetry(sim, every=1)
        for step in range(4):
            sim.step = step
            model.growth = 1.0 if step == 2 else 0.0
            model(torch.randn(4, 8))
    assert telemetry.first_nonfinite == NonFinite(2, "<model>/exp", "vector", "inf")


def test_a_product_that_overflows_is_named() -> None:
    """Here in the backward pass: the gradient of the second layer's weight does not fit float32."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.ones(1, 4, requires_grad=True)
    with torch.no_grad():
        model[0].weight.fill_(3e20)
        model[1].weight.fill_(1e-9)
    with simulate(model, Recipe(wgrad=Gemm(FP4, FP4))) as sim:
        telemetry = Telemetry(sim, every=1)
        model(x).backward(torch.full((1, 4), 1e28))
    assert telemetry.first_nonfinite == NonFinite(0, "1/linear", "wgrad.out", "inf")


def test_gradients_are_compared_with_full_precision() -> None:
    model = micro()

    def loss() -> Tensor:
        return F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten())

    full = torch.autograd.grad(loss(), list(model.parameters()))
    with simulate(model, THREE) as sim:
        telemetry = Telemetry(sim)
        loss().backward()
        rows = len(telemetry.rows())
        telemetry.compare_gradients(loss)
    assert len(telemetry.rows()) == rows  # the comparison itself is not observed
    cosines = telemetry.cosines()
    for (name, p), g in zip(model.named_parameters(), full, strict=True):
        assert p.grad is not None
        cosine = F.cosine_similarity(p.grad.double().flatten(), g.double().flatten(), 0).item()
        assert cosines.set_index("parameter").loc[name, "cosine"] == pytest.approx(cosine, abs=1e-12)
    assert 0.5 < cosines["cosine"].median() < 1
    with simulate(model, Recipe(backward_operands=BackwardOperands.UNQUANTIZED)) as sim:
        telemetry = Telemetry(sim)
        model.zero_grad()
        loss().backward()
        telemetry.compare_gradients(loss)
    assert telemetry.cosines()["norm_ratio"].eq(1).all()


def test_sparse_gradients_are_compared_as_the_dense_ones_they_stand_for() -> None:
    def cosines(sparse: bool) -> pd.DataFrame:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(9, 32, sparse=sparse), nn.Linear(32, 1))
        with simulate(model, THREE) as sim:
            telemetry = Telemetry(sim)
            model(torch.tensor([3, 1, 3])).sum().backward()
            telemetry.compare_gradients(lambda: model(torch.tensor([3, 1, 3])).sum())
        assert model[0].weight.grad is not None and model[0].weight.grad.is_sparse is sparse
        return telemetry.cosines()

    pd.testing.assert_frame_equal(cosines(True), cosines(False))


def test_bad_arguments() -> None:
    sim = simulate(nn.Linear(2, 2), Recipe())
    with sim, pytest.raises(RuntimeError, match="no parameter has a gradient to compare: call backward"):
        Telemetry(sim).compare_gradients(lambda: torch.zeros(()))
    for every in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="every must be a number of steps"):
            Telemetry(sim, every=every)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"takes the Simulation that .* gives, got Linear"):
        Telemetry(sim.model)  # type: ignore[arg-type]


def test_a_simulation_has_one_telemetry_at_a_time() -> None:
    layer = nn.Linear(2, 2)
    with simulate(layer, Recipe.forward(formats.mxfp4_e2m1)) as sim:
        first = Telemetry(sim)
        with pytest.raises(ValueError, match=r"already has a Telemetry .* simulation\.sampler = None"):
            Telemetry(sim)
        layer(torch.ones(1, 2))
        sim.sampler = None
        second = Telemetry(sim)
        layer(torch.ones(1, 2))
    assert [row.calls for row in first.rows()] == [row.calls for row in second.rows()] == [1, 1, 1]


def test_large_tensors_give_the_same_sums_at_one_and_two_threads() -> None:
    """65536 scales a tensor, enough for torch to divide its own sums among threads."""
    layer = nn.Linear(512, 8)
    x = torch.randn(4096, 512, generator=torch.Generator().manual_seed(0))
    tables, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            with simulate(layer, Recipe(Gemm(Quantizer(formats.get("nvfp4")), FP4))) as sim:
                telemetry = Telemetry(sim)
                layer(x)
            tables.append(telemetry.table().query("role != 'fprop.out'"))  # the product itself is torch's
    finally:
        torch.set_num_threads(threads)
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_a_state_continues_the_tables_and_remembers_the_first() -> None:
    layer = nn.Linear(32, 2, bias=False)

    def observe(steps: range, state: dict[str, Any] | None = None) -> Telemetry:
        with simulate(layer, Recipe(Gemm(FP4, FP4))) as sim:
            sim.step = steps[0]
            telemetry = Telemetry(sim, every=2)
            if state is not None:
                telemetry.load_state_dict(state)
            for step in steps:
                sim.step = step
                with torch.no_grad():
                    layer.weight.fill_(1.5**step)
                layer(torch.full((1, 32), math.nan if step else math.inf))
        return telemetry

    whole = observe(range(4))
    for stop in (1, 2, 3):  # after a sampled step, before one, after the second
        resumed = observe(range(stop, 4), observe(range(stop)).state_dict())
        pd.testing.assert_frame_equal(resumed.table(), whole.table(), check_exact=True)
        assert resumed.first_nonfinite == NonFinite(0, "<model>/linear", "fprop.lhs", "inf")
    assert whole.table()["origin"].tolist() == ["inf", "", "", "", "", ""]
