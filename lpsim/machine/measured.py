"""What a machine makes of a model: its loss, logits and gradients over some batches, and how far they are from others.

In: a module that maps inputs to logits, pairs of inputs and targets, a loss that is a mean over the targets, a recipe.
The model is in evaluation mode meanwhile, and left as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lpsim.machine.ops import Observer
from lpsim.machine.recipes import Recipe
from lpsim.machine.simulate import simulate

__all__ = ["Batches", "Loss", "Outcome", "agreement", "decibel", "gradients", "run", "sqnr_db"]

Batches = Sequence[tuple[Tensor, Tensor]]  # inputs and targets
Loss = Callable[[Tensor, Tensor], Tensor]  # of logits and targets, a mean over the targets


@dataclass(frozen=True)
class Outcome:
    """The mean loss over all targets, and the logits of every batch."""

    loss: float
    logits: list[Tensor]


@torch.no_grad()
def run(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Loss,
    recipe: Recipe,
    observer: Observer | None = None,
    seed: int = 0,
) -> Outcome:
    """The mean loss and the logits of all batches, from forward passes on the machine that `recipe` describes.

    observer: called with every tensor that is rounded. seed: of stochastic rounding.
    """
    total, count, all_logits = 0.0, 0, []
    with _evaluating(model), simulate(model, recipe, seed) as simulation:
        simulation.observer = observer
        for inputs, targets in batches:
            logits = model(inputs)
            total += loss(logits, targets).item() * targets.numel()
            count += targets.numel()
            all_logits.append(logits)
    return Outcome(total / count, all_logits)


def gradients(
    model: nn.Module, batches: Batches, loss: Loss, recipe: Recipe, observer: Observer | None = None, seed: int = 0
) -> list[Tensor]:
    """The gradients of the mean loss, one for each parameter that takes part in it. `.grad` is not touched.

    Raises ValueError for a model without a parameter that requires a gradient.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("no parameter of the model requires a gradient, so there is no backward pass to look at")
    count = sum(targets.numel() for _, targets in batches)
    sums: list[Tensor | None] = [None] * len(parameters)
    with _evaluating(model), torch.enable_grad(), simulate(model, recipe, seed) as simulation:
        simulation.observer = observer
        for inputs, targets in batches:
            mean = loss(model(inputs), targets)
            share = torch.full_like(mean, targets.numel() / count)
            found = torch.autograd.grad(mean, parameters, share, allow_unused=True)
            sums = [s if g is None else g if s is None else s + g for s, g in zip(sums, found, strict=True)]
    return [g for g in sums if g is not None]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def sqnr_db(plain: Sequence[Tensor], rounded: Sequence[Tensor]) -> float:
    """10·log10(Σy² / Σ(y' − y)²) over all elements of all tensors, y the plain ones.

    Infinite without a difference, NaN where an element is not finite.
    """
    signal = sum(y.double().square().sum().item() for y in plain)
    noise = sum((q.double() - y.double()).square().sum().item() for y, q in zip(plain, rounded, strict=True))
    return decibel(signal, noise)


def agreement(plain: Sequence[Tensor], rounded: Sequence[Tensor]) -> float:
    """The cosine of the angle between all elements of the one and of the other; NaN where either is zero."""
    pairs = [(y.double(), q.double()) for y, q in zip(plain, rounded, strict=True)]
    norms = (sum(t[i].square().sum().item() for t in pairs) for i in (0, 1))
    length = math.sqrt(math.prod(norms))
    return sum((y * q).sum().item() for y, q in pairs) / length if length else math.nan


def decibel(signal: float, noise: float) -> float:
    """10·log10(signal / noise), of sums of squares: every SQNR and QSNR is computed here.

    Infinite without noise, minus infinity with noise and no signal, NaN where either is not finite.
    """
    if not math.isfinite(signal + noise):
        return math.nan
    return 10 * math.log10(signal / noise) if signal and noise else math.inf if not noise else -math.inf
