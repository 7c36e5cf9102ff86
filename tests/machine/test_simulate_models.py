"""Whole models, unmodified: nothing escapes, a recipe of Nones is plain torch, and they train."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from experiments.command import cli
from experiments.training.models.zoo import CASES, Case
from lmd import LMD
from lpsim import Gemm, Quantizer, Recipe, Rounding, formats, simulate
from lpsim.machine.recipes import BackwardOperands

FP4 = Quantizer(formats.get("mxfp4_e2m1"))
STOCHASTIC = Quantizer(formats.get("mxfp4_e2m1"), rounding=Rounding.STOCHASTIC)
THREE = Recipe(
    Gemm(FP4, FP4),
    Gemm(STOCHASTIC, FP4),
    Gemm(FP4, STOCHASTIC),
    vector=Quantizer(formats.get("bfloat16")),
    backward_operands=BackwardOperands.UNQUANTIZED,
)


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(0)
    try:
        return request.param()
    except ImportError as error:
        pytest.skip(str(error))


def gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    model.zero_grad()
    value = loss(model)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_a_recipe_of_nones_is_plain_torch(case: Case) -> None:
    model, loss = case
    plain = gradients(model, loss)
    assert all(map(torch.equal, plain, gradients(model, loss)))  # else the comparison would mean nothing
    with simulate(model, Recipe()) as sim:
        simulated = gradients(model, loss)
    assert len(plain) == len(simulated) and all(map(torch.equal, plain, simulated))
    assert sim.audit().escaped == ()


@pytest.mark.parametrize("recipe", [Recipe.forward(FP4.format), THREE], ids=["forward", "three"])
def test_it_trains_and_nothing_escapes(case: Case, recipe: Recipe) -> None:
    model, loss = case
    optimizers = [
        LMD(model.parameters(), lr=0.01, noise_scale=0.05, seed=0),
        torch.optim.AdamW(model.parameters(), 1e-3),
    ]
    with simulate(model, recipe) as sim:
        for optimizer in optimizers:
            before = [p.detach().clone() for p in model.parameters()]
            optimizer.zero_grad()
            value = loss(model)
            value.backward()
            optimizer.step()
            assert torch.isfinite(value)
            assert not all(map(torch.equal, before, model.parameters()))
    audit = sim.audit()
    assert audit.escaped == ()
    owners = {owner for _, _, owner in audit.products}
    assert owners == {"the recipe"}


def test_the_table_of_models(capsys: pytest.CaptureFixture[str]) -> None:
    """`lpsim bench audit`: one row a model, and every op of it with --ops."""
    assert cli.main(["bench", "audit", "U-Net", "nn.LSTM", "--ops"]) == 0
    out = capsys.readouterr().out
    head, _, unet, lstm, *ops = out.splitlines()
    assert head.split(" | ")[1:3] == ["products", "vector"]
    assert unet.startswith("| U-Net | 4 | 5 | ") and unet.endswith("| 11 | none | yes |")
    assert lstm.startswith("| nn.LSTM | ") and lstm.endswith(" | none | yes |")
    assert any(line.startswith("conv_transpose2d") and "dgrad mxfp4_e2m1_rceil · mxfp4_e2m1" in line for line in ops)
    with pytest.raises(SystemExit, match="no model resnet; there are: gpt2-micro, "):
        cli.main(["bench", "audit", "resnet"])
