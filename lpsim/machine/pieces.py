"""The single roundings of a machine, `Piece`s: found by running a model, and put together again to a recipe.

A piece is one quantizer or accumulator of one product at one site. `survey` finds all that a model has, `kept` makes
the recipe that rounds at some of them and nowhere else.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from lpsim.formats import float32
from lpsim.machine.arguments import lies_in
from lpsim.machine.frames import OUTSIDE
from lpsim.machine.measured import Batches, Loss, gradients, run
from lpsim.machine.ops import WRAPPED, Call, Kind, Role, site_name
from lpsim.machine.places import nearest_first
from lpsim.machine.recipes import Gemm, Recipe, matches
from lpsim.quantization.quantizer import Quantizer

__all__ = ["Piece", "at_sites", "kept", "present", "survey"]

_WITH_WEIGHT = ("linear", "addmm", "addmv", "conv1d", "conv2d", "conv3d")  # whose second operand is a weight
_RECURRENT = ("lstm", "gru", "rnn")
_ROUND = Quantizer(float32)


@dataclass(frozen=True)
class Piece:
    """One thing that a recipe may round at one site.

    site: its name. product: fprop, dgrad, wgrad, or vector. slot: lhs, rhs, accumulate or out; "" for vector. role:
    what that is to a user, such as fprop.weight. op_class: linear, convolution, attention, recurrent, matmul (another
    product), vector or reduction.
    """

    path: str
    op: str
    repetition: int
    product: str
    slot: str
    role: str
    op_class: str

    @property
    def site(self) -> str:
        return site_name(self.path, self.op, self.repetition)

    @property
    def forward(self) -> bool:
        """Whether it runs without gradients, unlike dgrad, wgrad and vector ops outside the model, such as the loss."""
        return self.product == "fprop" or (self.product == "vector" and self.path != OUTSIDE)


def survey(model: nn.Module, batches: Batches, loss: Loss, recipe: Recipe, backward: bool = False) -> list[Piece]:
    """Every operand of every product that the model runs, whether `recipe` rounds it or not; and the accumulators,
    products' results and vector ops that it rounds. In the order in which they run; with `backward`, of the backward
    pass too.

    An operand is a weight where it lies in a parameter's memory, or is the second one of an op such as linear.

    Raises ValueError for a pattern of the recipe's overrides that matches no site; those that begin with */ may.
    """
    parameters = list(model.parameters())
    seen: dict[tuple[str, str, int], dict[Role, bool]] = {}  # by site; whether it was a weight

    def observe(call: Call, role: Role, quantizer: Quantizer | None, axis: int, x: Tensor, result: Tensor) -> None:
        site = call.site
        second_of_linear = role is Role.FPROP_RHS and site.op.partition(".")[0] in _WITH_WEIGHT
        weight = second_of_linear or lies_in(x, parameters)
        roles = seen.setdefault((site.path, site.op, site.repetition), {})
        roles[role] = roles.get(role, False) or weight

    everything = Gemm(_ROUND, _ROUND)
    run(model, batches, loss, Recipe(everything, vector=_ROUND), observe)
    if backward:
        gradients(model, batches, loss, Recipe(everything, everything, everything, _ROUND), observe)
    sites = [f"{path}/{op}" for path, op, _ in seen]
    for pattern in recipe.overrides:
        if not pattern.startswith("*/") and not any(matches(pattern, *site) for site in seen):
            raise ValueError(_unknown("the override", pattern, sites))
    return [piece for site, roles in seen.items() for piece in _at(*site, roles, recipe)]


def _at(path: str, op: str, repetition: int, roles: dict[Role, bool], recipe: Recipe) -> Iterator[Piece]:
    here = _resolved(recipe, path, op, repetition)
    lhs, rhs = ("weight" if roles.get(role) else "activation" for role in (Role.FPROP_LHS, Role.FPROP_RHS))
    operands = {
        "fprop": (Role.FPROP_LHS, lhs, Role.FPROP_RHS, rhs),
        "dgrad": (Role.DGRAD_LHS, "gradient", Role.DGRAD_RHS, rhs),
        "wgrad": (Role.WGRAD_LHS, lhs, Role.WGRAD_RHS, "gradient"),
    }
    op_class = _class(op, "weight" in (lhs, rhs))
    for product, (left, left_is, right, right_is) in operands.items():
        ran = left in roles or right in roles
        gemm: Gemm = getattr(here, product)
        found = [("lhs", left_is)] * (left in roles) + [("rhs", right_is)] * (right in roles)
        found += [("accumulate", "accumulator")] * (ran and gemm.accumulate is not None)
        found += [("out", "result")] * (ran and gemm.out is not None)
        for slot, what in found:
            yield Piece(path, op, repetition, product, slot, f"{product}.{what}", op_class)
    if Role.VECTOR in roles and here.vector is not None:
        yield Piece(path, op, repetition, "vector", "", "vector.result", op_class)


def _class(op: str, weighted: bool) -> str:
    name = op.partition(".")[0]
    kind = WRAPPED[name].kind if name in WRAPPED else Kind.PRODUCT
    if kind in (Kind.VECTOR, Kind.REDUCTION):
        return kind.value
    if name.startswith("conv"):
        return "convolution"
    if name.startswith(_RECURRENT):
        return "recurrent"
    if name == "scaled_dot_product_attention":
        return "attention"
    return "linear" if weighted else "matmul"


def present(pieces: Iterable[Piece], recipe: Recipe) -> list[Piece]:
    """Those of the pieces that the recipe really rounds."""
    return [piece for piece in pieces if _chosen(recipe, piece) is not None]


def _chosen(recipe: Recipe, piece: Piece) -> object:
    here = _resolved(recipe, piece.path, piece.op, piece.repetition)
    return here.vector if piece.product == "vector" else getattr(getattr(here, piece.product), piece.slot)


def at_sites(pieces: Sequence[Piece], patterns: Sequence[str]) -> list[Piece]:
    """The pieces at sites that one of the patterns matches (as in Recipe.overrides). Raises ValueError for a pattern
    that matches none.
    """
    for pattern in patterns:
        if not any(matches(pattern, p.path, p.op, p.repetition) for p in pieces):
            raise ValueError(_unknown("the site pattern", pattern, [p.site for p in pieces]))
    return [p for p in pieces if any(matches(pattern, p.path, p.op, p.repetition) for pattern in patterns)]


def _unknown(what: str, pattern: str, sites: Sequence[str]) -> str:
    return (
        f"{what} {pattern!r} matches no site of the model; there are: {nearest_first(pattern, sites)}. "
        "A pattern without / is matched against the module's path"
    )


def kept(recipe: Recipe, pieces: Iterable[Piece]) -> Recipe:
    """The recipe that rounds these pieces as `recipe` does, and nothing else: one override for each of their sites."""
    sites: dict[tuple[str, str, int], list[Piece]] = {}
    for piece in present(pieces, recipe):
        sites.setdefault((piece.path, piece.op, piece.repetition), []).append(piece)
    return Recipe(overrides={_exactly(*site): _only(_resolved(recipe, *site), some) for site, some in sites.items()})


def _exactly(path: str, op: str, repetition: int) -> str:
    return f"{glob.escape(f'{path}/{op}')}#{repetition}"


def _only(recipe: Recipe, pieces: Sequence[Piece]) -> Recipe:
    def gemm(product: str) -> Gemm:
        whole = getattr(recipe, product)
        return Gemm(**{piece.slot: getattr(whole, piece.slot) for piece in pieces if piece.product == product})

    vector = recipe.vector if any(piece.product == "vector" for piece in pieces) else None
    return Recipe(gemm("fprop"), gemm("dgrad"), gemm("wgrad"), vector, backward_operands=recipe.backward_operands)


def _resolved(recipe: Recipe, path: str, op: str, repetition: int) -> Recipe:
    """What holds at a site, without overrides."""
    pattern = recipe.pattern_at(path, op, repetition)
    return replace(recipe, overrides={}) if pattern is None else recipe.overrides[pattern]
