"""Which rounding costs what: a trained model with one of its roundings at a time, or with all but one.

    frame = attribute(model, batches, loss, Recipe.forward(formats.mxfp4_e2m1))
    print(interactions(frame))

Nothing is trained. What a rounding costs while a model is trained is another question, which needs runs: the grid
`attribution` asks it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lpsim.machine import measured
from lpsim.machine.measured import Loss
from lpsim.machine.pieces import Piece, at_sites, kept, present, survey
from lpsim.machine.recipes import Recipe, check_recipe

if TYPE_CHECKING:
    import pandas

__all__ = ["BY", "attribute", "interactions", "parts"]

BY = ("class", "role", "site", "site-role")
_NAMES: dict[str, Callable[[Piece], str]] = {
    "class": lambda piece: piece.op_class,
    "role": lambda piece: piece.role,
    "site": lambda piece: piece.site,
    "site-role": lambda piece: f"{piece.site} {piece.role}",
}


def parts(pieces: Iterable[Piece], by: str) -> dict[str, list[Piece]]:
    """The pieces in groups: by op class, role, site, or site and role. Raises ValueError for another word."""
    if by not in _NAMES:
        raise ValueError(f"parts are by {', '.join(BY)}; got {by!r}")
    groups: dict[str, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(_NAMES[by](piece), []).append(piece)
    return groups


def attribute(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    loss: Loss,
    recipe: Recipe,
    *,
    by: Sequence[str] = BY,
    but_one: bool = False,
    backward: bool = False,
    sites: Sequence[str] = (),
    seed: int = 0,
) -> pandas.DataFrame:
    """What each part of the machine's rounding does to a trained model, alone and, with `but_one`, by its absence.

    One row for the model as it is, one for the whole recipe, then one for each part: rounded is "nothing", "all",
    "only" (this part and nothing else) or "all but" (everything else). by and part: what it is a part of, and its name;
    site, role: of a part that has one, else "". roundings: how many pieces are rounded; a part of the model that the
    recipe leaves has 0. loss: the mean over all targets. change: what the rounding of this part adds to the loss; for
    "all" and "only" the loss less that of "nothing", for "all but" the loss of "all" less this one. logits_sqnr_db:
    10·log10(Σy² / Σ(y' − y)²), y the logits of "nothing"; infinite where nothing changed. With `backward` also
    gradient_sqnr_db and gradient_cosine: the same, and the cosine, of the gradients of all parameters. Rounding in
    dgrad and wgrad changes these alone.

    The parts add up exactly where the loss is linear in what is rounded, and what is rounded does not depend on other
    roundings: for loss = Σ ± w·x over products of inputs and weights, by site up to the rounding of the summation, and
    by role up to Σ|δw·δx|, which is at most u² Σ|w|·|x| for relative errors of at most u. Elsewhere they do not, and
    `interactions` says by how much.

    model(inputs) gives logits; batches: pairs of inputs and targets, gone through once a row; loss(logits, targets): a
    mean over the targets. by: of BY. sites: patterns as in Recipe.overrides; then the recipe holds at these sites alone
    ("all" too). seed: of stochastic rounding; a site draws the same bits in every row. The model is in evaluation mode
    meanwhile.

    Raises ValueError for a pattern of `sites` or of the recipe that matches no site, and without a batch.
    """
    import pandas

    check_recipe(recipe)
    batches = list(batches)
    if not batches:
        raise ValueError("there is no batch to run the model on")
    for kind in by:
        parts((), kind)  # refuses a wrong word before anything is run
    every = survey(model, batches, loss, recipe, backward)
    if sites:
        every = at_sites(every, sites)
        recipe = kept(recipe, every)
    groups = [(kind, name, pieces) for kind in by for name, pieces in parts(every, kind).items()]
    rounded = frozenset(present(every, recipe))
    table = _Table((model, batches, loss), recipe, every, backward, seed)
    rows = [table.row(frozenset(), rounded="nothing"), table.row(rounded, rounded="all")]
    without, whole = (row["loss"] for row in rows)
    rows[0]["change"], rows[1]["change"] = 0.0, whole - without
    for kind, name, pieces in groups:
        mine = frozenset(present(pieces, recipe))
        labels = {"by": kind, "part": name}
        labels |= {"site": pieces[0].site} if kind in ("site", "site-role") else {}
        labels |= {"role": pieces[0].role} if kind in ("role", "site-role") else {}
        rows.append(table.row(mine, rounded="only", **labels))
        rows[-1]["change"] = rows[-1]["loss"] - without
        if but_one:
            rows.append(table.row(rounded - mine, rounded="all but", **labels))
            rows[-1]["change"] = whole - rows[-1]["loss"]
    return pandas.DataFrame(rows)


Chosen = frozenset[Piece]


class _Table:
    """Measures the recipe with some of its pieces, each choice once, against the model as it is."""

    def __init__(
        self,
        of: tuple[nn.Module, measured.Batches, Loss],
        recipe: Recipe,
        every: Sequence[Piece],
        backward: bool,
        seed: int,
    ) -> None:
        self._of, self._recipe, self._every, self._backward, self._seed = of, recipe, every, backward, seed
        self._all = frozenset(present(every, recipe))
        self._plain: tuple[list[Tensor], list[Tensor]] | None = None  # logits and gradients
        self._forward: dict[Chosen, tuple[float, float]] = {}
        self._gradients: dict[Chosen, tuple[float, float]] = {}

    def row(self, chosen: Chosen, **labels: str) -> dict[str, Any]:
        """The loss, and what became of logits and gradients, where these pieces are rounded."""
        row: dict[str, Any] = {"by": "-", "part": "-", "site": "", "role": ""} | labels
        row |= {"roundings": len(chosen), "loss": math.nan, "change": math.nan}
        if self._plain is None:
            outcome = measured.run(*self._of, Recipe(), seed=self._seed)
            self._plain = outcome.logits, self._gradients_of(Recipe()) if self._backward else []
            self._forward[frozenset()] = outcome.loss, math.inf
            self._gradients[frozenset()] = math.inf, 1.0
        forward = frozenset(piece for piece in chosen if piece.forward)
        if forward not in self._forward:  # what only the backward pass rounds does not change the logits
            outcome = measured.run(*self._of, self._with(forward), seed=self._seed)
            self._forward[forward] = outcome.loss, measured.sqnr_db(self._plain[0], outcome.logits)
        row["loss"], row["logits_sqnr_db"] = self._forward[forward]
        if self._backward:
            if chosen not in self._gradients:
                both = self._plain[1], self._gradients_of(self._with(chosen))
                self._gradients[chosen] = measured.sqnr_db(*both), measured.agreement(*both)
            row["gradient_sqnr_db"], row["gradient_cosine"] = self._gradients[chosen]
        return row

    def _with(self, chosen: Chosen) -> Recipe:
        whole = chosen == self._all
        return self._recipe if whole else kept(self._recipe, [piece for piece in self._every if piece in chosen])

    def _gradients_of(self, recipe: Recipe) -> list[Tensor]:
        return measured.gradients(*self._of, recipe, seed=self._seed)


def interactions(frame: pandas.DataFrame) -> pandas.DataFrame:
    """How far the parts are from adding up: one row for each kind of part, alone and by absence.

    sum: of the changes of the parts; all: the change of everything together; gap = all − sum, and its share of all (NaN
    where all is 0). A positive gap of "only" parts says that roundings make each other worse. summed_logits_sqnr_db:
    the SQNR that the logits would have if the powers of the errors of "only" parts added up, as those of independent
    errors do; logits_sqnr_db: the one they have. Where there is a backward pass, the same of the gradients.

    frame: what `attribute` returned.
    """
    import pandas

    whole = frame[frame["rounded"] == "all"].iloc[0]
    rows = []
    for (by, rounded), group in frame[frame["by"] != "-"].groupby(["by", "rounded"], sort=False):
        total, change = float(group["change"].sum()), float(whole["change"])
        row = {"by": by, "rounded": rounded, "parts": len(group), "sum": total, "all": change, "gap": change - total}
        row["share"] = row["gap"] / change if change else math.nan
        for what in ("logits", "gradient"):
            name = f"{what}_sqnr_db"
            if name in frame:
                noise = float((10 ** (-group[name] / 10)).sum())
                row[f"summed_{name}"] = measured.decibel(1.0, noise) if rounded == "only" else math.nan
                row[name] = whole[name]
        rows.append(row)
    return pandas.DataFrame(rows)
