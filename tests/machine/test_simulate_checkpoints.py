"""Recomputed regions (torch.utils.checkpoint) run again with the random bits, and at the sites, of their first pass."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lpsim import Gemm, Quantizer, Recipe, Rounding, formats, simulate
from lpsim.machine.simulate import Simulation
from lpsim.machine.telemetry import Telemetry
from tests.machine.test_simulate import BF16, FP4, FP6, STOCHASTIC, gpt, gradients, same

STOCHASTIC_VECTORS = Quantizer(formats.get("bfloat16"), rounding=Rounding.STOCHASTIC)
THREE = Recipe(*[Gemm(STOCHASTIC, STOCHASTIC)] * 3, vector=STOCHASTIC_VECTORS)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_module_recomputes_with_the_same_bits(reentrant: bool) -> None:
    model, x, y = gpt()
    recipe = Recipe.forward(FP4.format, rounding=Rounding.STOCHASTIC)

    def losses(checkpointed: bool) -> Tensor:
        h = model.tokens(x)
        for block in model.h:
            h = checkpoint(block, h, use_reentrant=reentrant) if checkpointed else block(h)
        return F.cross_entropy(model.lm_head(h).flatten(0, 1), y.flatten())

    def accumulated(checkpointed: bool) -> list[Tensor]:
        with simulate(model, recipe) as sim:
            sim.step = 3
            model.zero_grad()
            losses(checkpointed).backward()
            losses(checkpointed).backward()
            if not reentrant:  # reentrant backward passes add gradients in another order
                (losses(checkpointed) + losses(checkpointed)).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    assert same(accumulated(False), accumulated(True))


def test_a_checkpointed_function_recomputes_at_its_own_site() -> None:
    class Checkpointed(nn.Module):
        def __init__(self, active: bool) -> None:
            super().__init__()
            self.weight, self.active = nn.Parameter(torch.randn(8, 8)), active

        def forward(self, x: Tensor) -> Tensor:
            def inner(x: Tensor) -> Tensor:
                return torch.tanh(x @ self.weight) @ self.weight

            x = x @ self.weight
            return checkpoint(inner, x, use_reentrant=False) if self.active else inner(x)

    def run(active: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(Checkpointed(active), Checkpointed(active))
        overrides = {"1": Recipe.forward(FP6.format, vector=BF16.format)}
        recipe = Recipe(Gemm(STOCHASTIC, STOCHASTIC), vector=BF16, overrides=overrides)
        with simulate(model, recipe):
            return gradients(model, model(torch.randn(3, 8)).square().sum())

    assert same(run(False), run(True))


Checkpoint = Callable[..., Any]


def plain(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


def reentrant(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=True)


def replayed(function: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


class Shared(nn.Module):
    """One layer at three paths, all in one checkpointed region."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(32, 32)
        self.b, self.c = nn.Sequential(self.a), nn.Sequential(self.a)

    def forward(self, x: Tensor, run: Checkpoint) -> Tensor:
        return run(lambda y: self.c(self.b(self.a(y))), x)


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh())


# name -> a model, and what it computes, with its regions run by the second argument
REGIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any, Tensor, Checkpoint], Tensor]]] = {
    "a module twice": (layers, lambda m, x, run: run(lambda y: m(m(y)), x)),
    "two regions": (layers, lambda m, x, run: run(m, run(m, x))),
    "nested": (layers, lambda m, x, run: run(lambda y: run(lambda z: m(m[0](z)), m(y)), x)),
    "nested at once": (layers, lambda m, x, run: run(lambda y: run(m, run(m, y)), x)),
    "shared": (Shared, lambda m, x, run: m(x, run)),
    "functions": (layers, lambda m, x, run: run(lambda y: F.linear(F.linear(y, m[0].weight), m[0].weight).tanh(), x)),
}


def trained(name: str, run: Checkpoint, accumulated: int) -> list[Tensor]:
    """Losses and gradients of some forward passes, the last one's backward pass in the step after."""
    torch.manual_seed(0)
    build, function = REGIONS[name]
    model, x = build(), torch.randn(4, 32, requires_grad=True)
    with simulate(model, THREE, seed=1) as sim:
        losses = [function(model, x * (i + 1), run).square().sum() for i in range(accumulated)]
        for i, loss in enumerate(losses):
            if i == accumulated - 1:
                sim.advance()
            loss.backward()
    assert x.grad is not None
    return [*losses, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # a nested region, first time
@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("name", REGIONS)
def test_a_region_is_recomputed_with_its_own_bits(name: str, accumulated: int) -> None:
    expected = trained(name, plain, accumulated)
    assert same(expected, trained(name, replayed, accumulated))
    if name == "functions":
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            trained(name, reentrant, accumulated)
    else:  # reentrant passes add a layer's gradients in another order, so the last bit of a sum may differ
        for got, ours in zip(trained(name, reentrant, accumulated), expected, strict=True):
            torch.testing.assert_close(got, ours, rtol=0, atol=1e-6 * ours.abs().max().item())


def test_products_of_a_backward_function_draw_different_bits() -> None:
    """They are no recomputation, though they run in a backward pass."""
    drawn: list[Tensor] = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            drawn.extend(torch.mm(grad, torch.eye(32)) for _ in range(3))
            return grad

    x = torch.rand(32, 32, requires_grad=True)
    with simulate(nn.Identity(), Recipe(overrides={"<backward>": Recipe(Gemm(lhs=STOCHASTIC))})):
        Twice.apply(x).backward(torch.rand(32, 32))
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def backward_as_on_a_gpu(sim: Simulation, loss: Tensor) -> None:
    """In a thread of its own, with its own numbers of autograd nodes and the modes of the thread that called it."""

    def run() -> None:
        with ExitStack() as stack:
            if sim._counting is not None:
                stack.enter_context(sim._counting)
            stack.enter_context(sim._mode)
            loss.backward()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(run).result()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", [Recipe(), THREE])
def test_a_backward_pass_in_another_thread_is_the_same(recipe: Recipe, reentrant: bool) -> None:
    """As that of a GPU: gradients, audit and telemetry."""
    model, x, _ = gpt()

    def run(backward: Callable[[Simulation, Tensor], None]) -> tuple[list[Tensor], Any, list[Any]]:
        model.zero_grad()
        with simulate(model, recipe, on_escape="raise") as sim:
            telemetry = Telemetry(sim, every=1)
            h = model.tokens(x)
            for block in model.h:
                h = checkpoint(block, h, use_reentrant=reentrant)
            backward(sim, model.lm_head(h).square().mean())
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        return found, sim.audit().products, [repr(row) for row in telemetry.rows()]

    for _ in range(20):
        model(x)  # so that the numbers of this thread's nodes are ahead
    here, there = run(lambda _, loss: loss.backward()), run(backward_as_on_a_gpu)
    assert same(here[0], there[0]) and here[1:] == there[1:]
