"""Attribution finds the site that is rounded; on a linear model the parts add up; rows equal runs made by hand."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lpsim import BackwardOperands, Gemm, Quantizer, Recipe, Rounding, formats
from lpsim.attribution import attribute, interactions
from lpsim.machine import measured
from lpsim.machine.pieces import kept, survey

MXFP4, E4M3 = formats.mxfp4_e2m1, formats.float8_e4m3fn
ATTENTION = ("scaled_dot_product_attention.qk", "scaled_dot_product_attention.pv")
SITES = ["embed/linear", *(f"<model>/{part}" for part in ATTENTION), "mlp.0/linear", "mlp.2/linear", "<model>/matmul"]


class Model(nn.Module):
    """One attention, two linear layers, and a product with a parameter: [B, T, 32] to [B, T, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(32, 96)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Parameter(torch.randn(32, 8) / 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.embed(x).chunk(3, -1)
        return torch.matmul(self.mlp(F.scaled_dot_product_attention(q, k, v)), self.head)


def subject() -> tuple[nn.Module, list[tuple[Tensor, Tensor]], Any]:
    torch.manual_seed(0)
    model = Model()
    batches = [(torch.randn(2, 32, 32), torch.randint(8, (2, 32))) for _ in range(2)]
    return model, batches, lambda logits, targets: F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def test_the_one_site_that_is_rounded_is_found_and_all_others_change_nothing() -> None:
    model, batches, loss = subject()
    for site in SITES:
        recipe = Recipe(overrides={site: Recipe.forward(MXFP4)})
        frame = attribute(model, batches, loss, recipe, by=["site"], but_one=True).set_index(["part", "rounded"])
        alone, absent = (frame.xs(which, level="rounded") for which in ("only", "all but"))
        assert list(alone.index) == list(absent.index) == SITES
        whole = frame.loc[("-", "all")]
        assert whole["change"] != 0 and math.isfinite(whole["logits_sqnr_db"])
        others = [name for name in SITES if name != site]
        assert (alone.loc[others, ["change", "roundings"]] == 0).all(axis=None)
        assert (alone.loc[others, "logits_sqnr_db"] == math.inf).all()
        assert (absent.loc[others, "change"] == 0).all()
        assert alone.loc[site, "change"] == absent.loc[site, "change"] == whole["change"]
        assert alone.loc[site, "logits_sqnr_db"] == whole["logits_sqnr_db"]


class Parallel(nn.Module):
    """A sum of linear layers of the same input: linear in every weight and in the input."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x) for layer in self.layers]).sum(0)


def test_on_a_linear_model_the_parts_add_up() -> None:
    """By site the gap is the rounding of sums; by role it is the mean of δw·δx, at most u² times that of |w|·|x|."""
    layers, width, examples = 3, 32, 16
    generator = torch.Generator().manual_seed(0)

    def normal_numbers(*shape: int) -> Tensor:  # of float8_e4m3fn, so that relative errors are at most u
        sign = torch.randint(2, shape, generator=generator) * 2 - 1
        return (0.5 + torch.rand(shape, generator=generator, dtype=torch.float64)) * sign

    model = Parallel(layers, width).double()
    for parameter in model.parameters():
        parameter.data = normal_numbers(width, width)
    x = normal_numbers(examples, width)
    frame = attribute(model, [(x, x)], lambda logits, _: logits.mean(), Recipe.forward(E4M3))
    table = interactions(frame).set_index("by")

    unit = 2.0**-4
    q = Quantizer(E4M3)
    weights = [p.detach() for p in model.parameters()]
    size = sum((x.abs() @ w.abs().T).mean().item() for w in weights) * (1 + unit) ** 2
    cross = sum(((q(x) - x) @ (q(w) - w).T).mean().item() for w in weights)
    terms = width + layers + examples * width  # additions on the way to a loss
    summation = (layers * 2 + 2) * terms * 2.0**-53 * size
    assert abs(table.loc["site", "gap"]) <= summation
    for by in ("role", "site-role"):
        assert abs(table.loc[by, "gap"] - cross) <= summation
    assert abs(cross) <= unit**2 * size
    assert table.loc["role", "all"] == frame["loss"].iloc[1] - frame["loss"].iloc[0]
    assert (table["parts"] == [1, 2, layers, 2 * layers]).all()


def test_all_pieces_together_are_the_recipe_bit_for_bit() -> None:
    """Stochastic rounding, results, the vector unit and an override included, forward and backward."""
    model, batches, loss = subject()
    q = Quantizer(E4M3, rounding=Rounding.STOCHASTIC)
    whole = Recipe(Gemm(q, q, out=q), Gemm(q, q), Gemm(q, q), Quantizer(formats.bfloat16))
    whole = Recipe(whole.fprop, whole.dgrad, whole.wgrad, whole.vector, {"mlp.2": Recipe(fprop=Gemm(rhs=q))})
    again = kept(whole, survey(model, batches, loss, whole))
    outcomes = [measured.run(model, batches, loss, recipe, seed=3) for recipe in (whole, again)]
    assert outcomes[0].loss == outcomes[1].loss
    assert all(torch.equal(a, b) for a, b in zip(*(o.logits for o in outcomes), strict=True))
    again = kept(whole, survey(model, batches, loss, whole, backward=True))
    both = [measured.gradients(model, batches, loss, recipe, seed=3) for recipe in (whole, again)]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))
    assert not any(isinstance(p.grad, Tensor) for p in model.parameters()) and model.training
    frame = attribute(model, batches, loss, whole, by=["class"], backward=True, seed=3)
    assert frame["loss"].iloc[1] == outcomes[0].loss
    assert list(frame["part"][2:]) == ["linear", "attention", "vector", "reduction"]  # the loss is a reduction


def test_roles_classes_and_gradients_are_those_of_recipes_written_by_hand() -> None:
    model, batches, loss = subject()
    q = Quantizer(MXFP4)
    operands = Gemm(q, q)
    wide = {"backward_operands": BackwardOperands.UNQUANTIZED}
    recipe = Recipe(operands, operands, operands, **wide)  # type: ignore[arg-type]
    frame = attribute(model, batches, loss, recipe, by=["role", "class"], backward=True).set_index("part")
    assert set(frame.index[2:]) == {
        *("fprop.activation", "fprop.weight", "dgrad.gradient", "dgrad.weight", "dgrad.activation"),
        *("wgrad.activation", "wgrad.gradient", "linear", "attention"),
    }
    plain = measured.run(model, batches, loss, Recipe())
    gradients = measured.gradients(model, batches, loss, Recipe())
    weights = Recipe(fprop=Gemm(rhs=q), **wide)  # type: ignore[arg-type]
    by_hand = {
        "fprop.weight": Recipe(overrides={"*/linear": weights, "*/matmul": weights}),
        "wgrad.gradient": Recipe(wgrad=Gemm(rhs=q)),
        "attention": Recipe(overrides={"*/scaled_dot_product_attention.*": recipe}),
    }
    for part, mine in by_hand.items():
        outcome = measured.run(model, batches, loss, mine)
        row = frame.loc[part]
        assert row["gradient_sqnr_db"] == measured.sqnr_db(gradients, measured.gradients(model, batches, loss, mine))
        if part != "wgrad.gradient":  # which leaves the logits alone, but not torch's fused attention
            assert row["loss"] == outcome.loss
            assert row["logits_sqnr_db"] == measured.sqnr_db(plain.logits, outcome.logits)
    only_backward = frame.loc[["dgrad.gradient", "dgrad.weight", "wgrad.activation", "wgrad.gradient"]]
    assert (only_backward["change"] == 0).all() and (only_backward["logits_sqnr_db"] == math.inf).all()
    assert frame["gradient_cosine"].between(0.5, 1 + 1e-9).all() and frame["gradient_cosine"].iloc[0] == pytest.approx(
        1
    )


def test_each_module_keeps_its_own_mode() -> None:
    """Such as a frozen layer in evaluation mode inside a model that trains."""
    model, batches, loss = subject()
    model.get_submodule("mlp").eval()
    before = [module.training for module in model.modules()]
    measured.run(model, batches, loss, Recipe())
    assert [module.training for module in model.modules()] == before and len(set(before)) == 2


def test_chosen_sites_are_a_machine_of_their_own() -> None:
    model, batches, loss = subject()
    frame = attribute(model, batches, loss, Recipe.forward(MXFP4), by=["site"], sites=["mlp.*", "*/*.qk"])
    assert list(frame["site"][2:]) == [SITES[1], "mlp.0/linear", "mlp.2/linear"]
    those = {name: Recipe.forward(MXFP4) for name in frame["site"][2:]}
    assert frame["loss"].iloc[1] == measured.run(model, batches, loss, Recipe(overrides=those)).loss


def test_interactions_are_sums_and_differences() -> None:
    rows = [
        {"by": "-", "rounded": "nothing", "change": 0.0, "logits_sqnr_db": math.inf},
        {"by": "-", "rounded": "all", "change": 0.5, "logits_sqnr_db": 10.0},
        {"by": "role", "rounded": "only", "change": 0.125, "logits_sqnr_db": 20.0},
        {"by": "role", "rounded": "only", "change": 0.25, "logits_sqnr_db": 20.0},
    ]
    (line,) = interactions(pd.DataFrame(rows)).to_dict("records")
    assert (line["parts"], line["sum"], line["all"], line["gap"], line["share"]) == (2, 0.375, 0.5, 0.125, 0.25)
    assert line["summed_logits_sqnr_db"] == pytest.approx(20 - 10 * math.log10(2)) and line["logits_sqnr_db"] == 10


def test_mistakes_are_told() -> None:
    model, batches, loss = subject()
    with pytest.raises(ValueError, match=r"site pattern 'mlp\.7' matches no site .*mlp\.0/linear"):
        attribute(model, batches, loss, Recipe.forward(MXFP4), sites=["mlp.7"])
    with pytest.raises(ValueError, match=r"override 'mlp\.0/conv2d' matches no site"):
        attribute(model, batches, loss, Recipe(overrides={"mlp.0/conv2d": Recipe()}))
    with pytest.raises(ValueError, match="parts are by class, role, site, site-role; got 'layer'"):
        attribute(model, batches, loss, Recipe(), by=["layer"])
    with pytest.raises(TypeError, match=r'named_recipes\.get\("nvfp4"\)\.recipe'):
        attribute(model, batches, loss, "nvfp4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no batch"):
        attribute(model, [], loss, Recipe())
    with pytest.raises(ValueError, match="requires a gradient"):
        attribute(nn.Identity(), batches, loss, Recipe(), backward=True)
