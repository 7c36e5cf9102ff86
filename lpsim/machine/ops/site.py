"""Sites: where an op runs, what the recipe says there, and how one call at a site rounds its tensors.

A site is named "module path/op", with "#k" if the op occurs again in the same call of the module. A site and a role
together name one tensor of one op; overrides, telemetry rows and random bits refer to these names.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from lpsim.formats.rounding import Key, Rounding
from lpsim.machine.ops import exact
from lpsim.machine.ops.product import Product, Role, StraightThrough
from lpsim.machine.recipes import BackwardOperands, Recipe
from lpsim.quantization.quantizer import Quantizer

_RESULTS = (Role.FPROP_OUT, Role.DGRAD_OUT, Role.WGRAD_OUT, Role.VECTOR)
ELEMENT_BITS, ROLE_BITS, OCCURRENCE_BITS = 38, 4, 20  # of Key.offset, which has 62


class Site:
    """One op at one place of the model, with the recipe that applies there.

    `stream` is the CRC-32 of the name: stable across runs, processes and recipes, so that two arms of an ablation
    with the same seed draw the same bits at the same site.
    """

    __slots__ = (
        "_count",
        "_evaluations",
        "_step",
        "dgrad_bits",
        "fprop_bits",
        "name",
        "op",
        "path",
        "recipe",
        "repetition",
        "stochastic",
        "stream",
        "wgrad_bits",
    )

    def __init__(self, path: str, op: str, repetition: int, recipe: Recipe) -> None:
        self.path = path
        self.op = op
        self.repetition = repetition
        self.name = site_name(path, op, repetition)
        self.recipe = recipe
        self.stream = zlib.crc32(self.name.encode())
        gemms = (recipe.fprop, recipe.dgrad, recipe.wgrad)
        quantizers = [recipe.vector, *(q for gemm in gemms for q in (gemm.lhs, gemm.rhs, gemm.out))]
        self.stochastic = any(q is not None and q.rounding is Rounding.STOCHASTIC for q in quantizers)
        quantized = recipe.backward_operands is BackwardOperands.QUANTIZED
        kept = (recipe.fprop.lhs, recipe.fprop.rhs) if quantized else (None, None)
        self.fprop_bits = _product_bits(recipe.fprop.lhs, recipe.fprop.rhs)
        self.dgrad_bits = _product_bits(recipe.dgrad.lhs, recipe.dgrad.rhs or kept[1])
        self.wgrad_bits = _product_bits(recipe.wgrad.lhs or kept[0], recipe.wgrad.rhs)
        self._step = -1
        self._count = 0
        self._evaluations = 0

    def reserve(self, step: int, calls: int = 1, evaluation: bool = False) -> int:
        """Take `calls` consecutive call numbers of this step and give the first; they begin at 0 in each step.

        evaluation: take them from 2^19 on instead, so that evaluations do not change the numbers of training.
        """
        if step != self._step:
            self._step, self._count, self._evaluations = step, 0, 0
        if evaluation:
            self._evaluations += calls
            first = (1 << OCCURRENCE_BITS - 1) + self._evaluations - calls
        else:
            self._count += calls
            first = self._count - calls
        if first + calls > 1 << OCCURRENCE_BITS:
            times = self._evaluations if evaluation else self._count
            raise ValueError(
                f"{self.name} ran {times} times in step {step}: set sim.step in the training loop, "
                "so that random bits are keyed by the step"
            )
        return first


def site_name(path: str, op: str, repetition: int) -> str:
    """PATH/OP, and from an op's second time in a call of the module on PATH/OP#1 and so forth."""
    return f"{path}/{op}#{repetition}" if repetition else f"{path}/{op}"


def _product_bits(lhs: Quantizer | None, rhs: Quantizer | None) -> int | None:
    """The `bits` of exact.matmul; None where an operand is not rounded to a format that fits bfloat16."""
    if lhs is None or rhs is None:
        return None
    return exact.bits_of_product(lhs.format, rhs.format)


class Observer(Protocol):
    """Called with every tensor that is rounded, and with each result that is not: then quantizer is None, result x."""

    def __call__(
        self, call: Call, role: Role, quantizer: Quantizer | None, axis: int, x: Tensor, result: Tensor
    ) -> None: ...


class Call:
    """One execution of an op at a site: quantizes its tensors by role, with this call's random bits."""

    __slots__ = ("observer", "occurrence", "part", "recipe", "seed", "site", "step", "whole")

    def __init__(
        self, site: Site, seed: int, step: int, occurrence: int, observer: Observer | None, part: int = 0
    ) -> None:
        self.site = site
        self.recipe = site.recipe
        self.seed = seed
        self.step = step
        self.occurrence = occurrence
        self.observer = observer
        self.part = part  # see Simulation.part
        self.whole: tuple[Role, ...] = ()  # whose tensors are parameters, which every part of the batch has whole

    def at(self, n: int) -> Call:
        """The n-th of the calls that were reserved together with this one."""
        return Call(self.site, self.seed, self.step, self.occurrence + n, self.observer, self.part)

    def key(self, role: Role, elements: int = 0) -> Key:
        """The key of one role's random bits. Its offset differs from that of every other role and call of the step.

        elements: of the tensor, where it may be one of several equal parts of the batch's.
        """
        offset = (self.occurrence << ROLE_BITS | role) << ELEMENT_BITS
        if self.part and role not in self.whole:
            offset += self.part * elements
        return Key(self.seed, self.site.stream, self.step, offset)

    def quantize(self, role: Role, quantizer: Quantizer | None, x: Tensor, axis: int = -1) -> Tensor:
        """x rounded by `quantizer`, with blocks along `axis`; x itself if that is None. Not differentiable."""
        if quantizer is None:
            if self.observer is not None and role in _RESULTS:
                self.observer(self, role, None, axis, x, x)
            return x
        key = self.key(role, x.numel()) if quantizer.rounding is Rounding.STOCHASTIC else None
        result = quantizer.quantize(x, axis, key)
        if self.observer is not None:
            self.observer(self, role, quantizer, axis, x, result)
        return result

    def product(
        self, lhs: Tensor, rhs: Tensor, bias: Tensor | None = None, *, lhs_axis: int = -1, rhs_axis: int = -2
    ) -> Tensor:
        """lhs · rhs + bias by the recipe's three products, before fprop.out rounds it; see Product for the shapes."""
        if self.part:
            self._see(lhs, rhs)
        return Product.apply(lhs, rhs, bias, self, lhs_axis, rhs_axis)

    def gemm(
        self, lhs: Tensor, rhs: Tensor, bias: Tensor | None = None, *, lhs_axis: int = -1, rhs_axis: int = -2
    ) -> Tensor:
        """`product`, rounded by fprop.out."""
        return self.out(self.product(lhs, rhs, bias, lhs_axis=lhs_axis, rhs_axis=rhs_axis))

    def _see(self, lhs: Tensor, rhs: Tensor) -> None:
        """Note which operands are parameters: they, and their gradients, are no part of the batch."""
        of_lhs = (Role.FPROP_LHS, Role.DGRAD_OUT, Role.WGRAD_LHS) if _is_parameter(lhs) else ()
        of_rhs = (Role.FPROP_RHS, Role.DGRAD_RHS, Role.WGRAD_OUT) if _is_parameter(rhs) else ()
        self.whole = (*of_lhs, *of_rhs)

    def out(self, x: Tensor) -> Tensor:
        """A product's result rounded by fprop.out; the gradient passes straight through."""
        return self._rounded(Role.FPROP_OUT, self.recipe.fprop.out, x)

    def vector(self, x: Tensor) -> Tensor:
        """A vector op's result rounded to the vector format, if floating-point; straight-through gradient."""
        return self._rounded(Role.VECTOR, self.recipe.vector, x)

    def _rounded(self, role: Role, quantizer: Quantizer | None, x: Tensor) -> Tensor:
        if not (x.is_floating_point() or x.is_complex()):
            return x
        if quantizer is None:
            return self.quantize(role, None, x)
        if x.is_complex():
            return torch.view_as_complex(self._rounded(role, quantizer, torch.view_as_real(x)))
        if x.requires_grad and torch.is_grad_enabled():
            return StraightThrough.apply(x, self, role, quantizer)
        return self.quantize(role, quantizer, x)


def _is_parameter(x: Tensor) -> bool:
    """Whether x is a parameter or a view of one."""
    return isinstance(x, Parameter) or (x._is_view() and isinstance(x._base, Parameter))


class Composite:
    """One execution of an op that hides products. Each of its parts is a site of its own; `part` gives their calls."""

    __slots__ = ("_part",)

    def __init__(self, part: Callable[[str, int], Call]) -> None:
        self._part = part

    def part(self, name: str, calls: int = 1) -> Call:
        """The call at the site "path/op.name"; with `calls` > 1 the first of that many, see Call.at."""
        return self._part(name, calls)
