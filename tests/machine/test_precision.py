"""Settings that let torch multiply in a lower precision never reach a simulation, and are left as they were found."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lpsim import Gemm, Quantizer, Recipe, formats, simulate
from lpsim.machine import precision
from lpsim.machine.ops.product import Role
from lpsim.machine.precision import ChangedPrecisionError

RECIPE = Recipe.forward(formats.bfloat16)


def generic(value: str) -> Callable[[], None]:
    return lambda: setattr(torch.backends, "fp32_precision", value)


def of_matmul(name: str, value: object) -> Callable[[], None]:
    return lambda: setattr(torch.backends.cuda.matmul, name, value)


LOWERED: dict[str, Callable[[], None]] = {
    "as it is": lambda: None,
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "generic tf32": generic("tf32"),
    "generic bf16": generic("bf16"),
    "cuBLAS, old name": of_matmul("allow_tf32", True),
    "cuBLAS, new name": of_matmul("fp32_precision", "tf32"),
    "oneDNN": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),  # type: ignore[attr-defined]
    "cuDNN, old name": lambda: setattr(torch.backends.cudnn, "allow_tf32", True),
    "cuDNN, new name": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),  # type: ignore[attr-defined]
    "float16 sums": of_matmul("allow_fp16_accumulation", True),
    "no split K": of_matmul("allow_bf16_reduced_precision_reduction", (False, False)),
    "attention": lambda: torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True),
}


def settings() -> dict[str, object]:
    """By name, what each setting itself says, without those where old and new names contradict each other."""
    return {setting.name: value for setting, value in precision.values().items()}


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    before = precision.values()
    yield
    precision.put_back(before)
    assert precision.values() == before


def low(values: dict[str, object]) -> dict[str, object]:
    """Those that let a product lose precision."""
    return {
        name: value
        for name, value in values.items()
        if value is True or value in ("tf32", "bf16", "medium", "high") or (isinstance(value, tuple) and value[0])
    }


@pytest.mark.parametrize("name", LOWERED)
def test_inside_every_setting_is_at_full_precision_and_afterwards_as_it_was(name: str) -> None:
    LOWERED[name]()
    before = settings()
    with simulate(nn.Identity(), RECIPE) as sim:
        inside = settings()
        assert low(inside) == {}
    assert settings() == before
    assert {line.partition(":")[0] for line in sim.audit().pinned} == set(low(before)), "the audit states them"
    with pytest.raises(ZeroDivisionError), simulate(nn.Identity(), RECIPE):
        raise ZeroDivisionError
    assert settings() == before


@pytest.mark.parametrize("recipe", [Recipe(), Recipe.forward(formats.float32)], ids=["left", "computed"])
@pytest.mark.parametrize("setting", ["medium", "generic bf16", "oneDNN"])
def test_products_are_those_of_full_precision(setting: str, recipe: Recipe) -> None:
    """Forward, and backward inside the simulation and after it; float32 as operand format keeps 24 bits in play."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 128, generator=generator)
    layer = nn.Linear(128, 96, bias=False)

    def step(inside: bool) -> list[Tensor]:
        layer.weight.grad, own = None, x.clone().requires_grad_()
        with simulate(layer, recipe):
            out = layer(own)
            if inside:
                out.square().sum().backward()
        if not inside:
            out.backward(2 * out.detach())
        assert layer.weight.grad is not None and own.grad is not None
        return [out.detach(), layer.weight.grad.clone(), own.grad]

    expected = step(True)
    LOWERED[setting]()
    for inside in (True, False):
        assert all(map(torch.equal, step(inside), expected))


class Products(nn.Module):
    """Products with a bias, without, of a convolution, in place, of attention, and under autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.convolution = nn.Conv1d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.convolution(self.linear(x)) @ x.mT  # [2, 3, 3]
        x = x.clone().baddbmm_(x, x)
        x = nn.functional.scaled_dot_product_attention(x, x, x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x @ x


@pytest.mark.parametrize("setting", ["medium", "generic bf16"])
def test_products_that_the_recipe_leaves_are_pinned_in_a_later_backward_pass(setting: str) -> None:
    """Looks at the settings in each node that the products added to the graph, and before and after the pass."""
    LOWERED[setting]()
    before, model, x = settings(), Products(), torch.randn(2, 3, 8, requires_grad=True)
    with simulate(model, Recipe()):
        out = model(x)
    seen: dict[str, dict[str, object]] = {}
    todo: list[Any] = [out.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and not hasattr(node, "variable"):
            name = node.name()
            node.register_prehook(lambda grads, name=name: seen.update({name: low(settings())}))
            todo.extend(earlier for earlier, _ in node.next_functions)
    out.sum().backward()
    products = {name for name in seen if re.search(r"mm|Conv|Attention", name, re.IGNORECASE)}
    assert len(products) >= 4 and all(seen[name] == {} for name in products), seen
    assert settings() == before


def test_products_that_the_machine_computes_are_pinned_in_a_later_backward_pass() -> None:
    """An observer stands in the backward pass and looks at the settings."""
    LOWERED["medium"]()
    before, model, x = settings(), Products(), torch.randn(2, 3, 8, requires_grad=True)
    seen: dict[str, dict[str, object]] = {}
    q = Quantizer(formats.bfloat16)
    with simulate(model, Recipe(Gemm(q, q), Gemm(q, q), Gemm(q, q))) as sim:
        sim.observer = lambda call, role, *_: seen.update({role.label: low(settings())})
        out = model(x)
    seen.clear()
    out.sum().backward()
    assert {"dgrad.lhs", "dgrad.rhs", "wgrad.lhs", "wgrad.rhs"} <= set(seen)
    assert set(map(len, seen.values())) == {0}
    assert settings() == before


def test_a_backward_pass_stays_pinned_when_another_simulation_ends_meanwhile() -> None:
    """As when another thread leaves its simulation."""
    LOWERED["medium"]()
    before, layer = settings(), nn.Linear(4, 4)
    other, seen = precision.pinned(), []
    q = Quantizer(formats.bfloat16)

    def observer(call: object, role: Role, *_: object) -> None:
        if role == Role.DGRAD_LHS:  # the first of the backward pass
            other.__exit__(None, None, None)
            seen.append(low(settings()))

    with simulate(layer, Recipe(dgrad=Gemm(q, q), wgrad=Gemm(q, q))) as sim:
        sim.observer = observer
        out = layer(torch.randn(2, 4, requires_grad=True))
    other.__enter__()
    out.sum().backward()
    assert seen == [{}]
    assert settings() == before


def test_an_error_in_a_left_products_backward_pass_is_made_good_by_the_next_pass() -> None:
    LOWERED["medium"]()
    before, layer = settings(), nn.Linear(4, 4)

    def fail(grads: object) -> None:
        raise ZeroDivisionError

    for attempt in range(2):
        with simulate(layer, Recipe()):
            out = layer(torch.randn(2, 4))
        if attempt == 0:
            out.grad_fn.register_prehook(fail)
            with pytest.raises(ZeroDivisionError):
                out.sum().backward()
            assert low(settings()) == {}
        else:
            out.sum().backward()
    assert settings() == before


def test_a_setting_that_is_lowered_inside_is_an_error() -> None:
    layer = nn.Linear(4, 4)
    before = settings()
    with (
        pytest.raises(
            ChangedPrecisionError, match=r"fp32_precision was set to tf32 inside a simulation.*Set it outside"
        ),
        simulate(layer, RECIPE),
    ):
        torch.backends.cuda.matmul.allow_tf32 = True
    with (
        pytest.raises(ChangedPrecisionError, match=r"matmul.fp32_precision was set to (tf32|bf16)"),
        simulate(layer, RECIPE) as sim,
    ):
        torch.set_float32_matmul_precision("medium")
        sim.advance()
        raise AssertionError("the next step is refused")
    assert settings() == before


def test_simulations_in_one_another_and_backward_passes_share_the_pins() -> None:
    LOWERED["medium"]()
    before = settings()
    with precision.pinned():
        with simulate(nn.Identity(), RECIPE):
            assert low(settings()) == {}
        assert low(settings()) == {}
    assert settings() == before
