"""What a simulated machine computes in: the quantizers of the three matrix products, and of the vector unit.

A recipe is data: `ops` says how each op is simulated, and `simulate` applies it to a model's calls.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Protocol

from torch import Tensor

from lpsim.formats import BlockFormat, Format
from lpsim.formats.rounding import Rounding
from lpsim.quantization.quantizer import Quantizer


class Accumulation(Protocol):
    """How the sum of a dot product is formed, such as an Accumulator. None in a Gemm: as torch.matmul forms it."""

    def matmul(self, lhs: Tensor, rhs: Tensor) -> Tensor:
        """lhs [..., M, K] times rhs [..., K, N], batch dimensions broadcast: [..., M, N] in their dtype."""
        ...


class BackwardOperands(enum.Enum):
    """Which copy of an fprop operand the backward products start from, before dgrad's and wgrad's own quantizers."""

    QUANTIZED = "quantized"
    """The rounded tensor that fprop multiplied: gradients are those of the product that was really computed."""
    UNQUANTIZED = "unquantized"
    """The tensor before fprop's quantizer, as on hardware that rounds a wide tensor twice, once along each axis."""


def _check_quantizer(name: str, value: object) -> None:
    if value is not None and not isinstance(value, Quantizer):
        raise TypeError(f"{name} must be a Quantizer or None, got {value!r}; wrap a format as Quantizer(format)")


@dataclass(frozen=True)
class Gemm:
    """One matrix product lhs · rhs -> out: each operand's quantizer, the accumulator, and the result's quantizer.

    None leaves the operand, the accumulation or the result in the compute dtype. The blocks of an operand lie along the
    axis that this product sums over. A bias is added to the accumulated sum, before `out` rounds it.

    What lhs and rhs are: in fprop, activations · weights; in dgrad, which gives the gradient of the activations, the
    output's gradient · weights; in wgrad, which gives the gradient of the weights, activations · the output's gradient.
    """

    lhs: Quantizer | None = None
    rhs: Quantizer | None = None
    accumulate: Accumulation | None = None
    out: Quantizer | None = None

    def __post_init__(self) -> None:
        for name in ("lhs", "rhs", "out"):
            _check_quantizer(f"Gemm.{name}", getattr(self, name))
        if self.accumulate is not None and not callable(getattr(self.accumulate, "matmul", None)):
            raise TypeError(f"Gemm.accumulate must have a method matmul(lhs, rhs), got {self.accumulate!r}")

    @property
    def plain(self) -> bool:
        """Whether this product is left as torch computes it."""
        return self == Gemm()


def check_recipe(recipe: object) -> None:
    """Raises TypeError for what is no Recipe, and says how to make one of it."""
    if isinstance(recipe, Recipe):
        return
    kind, hint = type(recipe).__name__, "for a format, use Recipe.forward(format)"
    if isinstance(recipe, str):
        hint = f'use named_recipes.get("{recipe}").recipe; for a format, Recipe.forward(format)'
    elif isinstance(getattr(recipe, "recipe", None), Recipe):
        hint = f"pass the recipe within this {kind}, its attribute .recipe"
    raise TypeError(f"recipe must be a Recipe, got {kind}; {hint}")


def matches(pattern: str, path: str, op: str, repetition: int) -> bool:
    """Whether a site pattern, as Recipe.overrides has them, means the site of the op's k-th repetition at a path."""
    names = (f"{path}/{op}", f"{path}/{op}#{repetition}") if "/" in pattern else (path,)
    return any(fnmatchcase(name, pattern) for name in names)


@dataclass(frozen=True)
class Recipe:
    """The three products of every linear op, the vector unit, and the exceptions by site.

    fprop, dgrad, wgrad: see Gemm. backward_operands: what dgrad and wgrad start from.
    vector: rounds the result of every vector and reduction op, with a straight-through gradient; None leaves them.
    overrides: {site pattern: Recipe}; the first pattern that matches a site replaces this whole recipe there. A pattern
    without "/" is matched against the module's path (`lm_head`, `h.*.attn`); one with "/" is matched against `path/op`,
    or `path/op#k` for the k-th repetition of an op in one call of its module (`h.*/scaled_dot_product_attention.*`,
    `*/conv2d`). Wildcards are the shell's (fnmatch); `*` also matches dots. Ops outside every module have the path
    `<outside>`, those in the model's own forward `<model>`. A pattern that matches no site gives a warning, unless it
    begins with `*/`.
    """

    fprop: Gemm = Gemm()
    dgrad: Gemm = Gemm()
    wgrad: Gemm = Gemm()
    vector: Quantizer | None = None
    overrides: Mapping[str, Recipe] = field(default_factory=dict, hash=False)
    backward_operands: BackwardOperands = BackwardOperands.QUANTIZED

    def __post_init__(self) -> None:
        for name in ("fprop", "dgrad", "wgrad"):
            if not isinstance(getattr(self, name), Gemm):
                raise TypeError(f"Recipe.{name} must be a Gemm, got {getattr(self, name)!r}")
        _check_quantizer("Recipe.vector", self.vector)
        if self.vector is not None and isinstance(self.vector.format, BlockFormat):
            raise ValueError(
                f"Recipe.vector rounds every element by itself, so it cannot be the block format "
                f"{self.vector.format.name}; use an elementwise format such as bfloat16"
            )
        if not isinstance(self.backward_operands, BackwardOperands):
            raise TypeError(f"Recipe.backward_operands must be a BackwardOperands, got {self.backward_operands!r}")
        if not isinstance(self.overrides, Mapping):
            raise TypeError(
                f"Recipe.overrides must be a dict of site patterns to recipes, got {type(self.overrides).__name__}"
            )
        for pattern, recipe in self.overrides.items():
            if not isinstance(pattern, str) or not isinstance(recipe, Recipe):
                raise TypeError(f"Recipe.overrides maps site patterns to recipes, got {pattern!r}: {recipe!r}")
            if recipe.overrides:
                raise ValueError(f"the recipe for {pattern!r} has overrides of its own; list them in the outer recipe")

    def __eq__(self, other: object) -> bool:
        """Equal in everything, the order of the overrides included: the first match wins."""
        if not isinstance(other, Recipe):
            return NotImplemented
        return all(
            list(mine.items()) == list(theirs.items()) if field.name == "overrides" else mine == theirs
            for field in dataclasses.fields(self)
            for mine, theirs in [(getattr(self, field.name), getattr(other, field.name))]
        )

    @classmethod
    def forward(
        cls, format: Format, vector: Format | None = None, rounding: Rounding = Rounding.TIES_TO_EVEN
    ) -> Recipe:
        """Both operands of every forward product in `format`; the backward pass in the compute dtype.

        Gradients are those of the products computed: dgrad and wgrad use the quantized operands. With `vector`, the
        results of vector and reduction ops, and of the products, are rounded to it, ties to even.
        """
        operand = Quantizer(format, rounding=rounding)
        unit = None if vector is None else Quantizer(vector)
        return cls(fprop=Gemm(lhs=operand, rhs=operand, out=unit), vector=unit)

    def pattern_at(self, path: str, op: str, repetition: int) -> str | None:
        """The override that holds at a site: the first that matches; None where this recipe itself holds."""
        return next((pattern for pattern in self.overrides if matches(pattern, path, op, repetition)), None)

    @property
    def products_plain(self) -> bool:
        """Whether all three products are left as the compute dtype does them."""
        return self.fprop.plain and self.dgrad.plain and self.wgrad.plain

    @property
    def plain(self) -> bool:
        """Whether nothing is rounded anywhere, by an override neither: the machine is the compute dtype's."""
        return all(each.products_plain and each.vector is None for each in (self, *self.overrides.values()))
