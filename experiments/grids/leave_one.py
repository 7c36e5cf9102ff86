"""`leave_one`: the configs of a grid that asks which rounding costs what while a model is trained."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from experiments.training.config import Config, GivenRecipe, RecipeConfig, forward
from experiments.training.train import build, cross_entropy
from lpsim.attribution import parts
from lpsim.machine.pieces import Piece, kept, present, survey

ONLY, ALL_BUT = "{}, only {}", "{}, all but {}"  # the names by which analysis.statistics.attribution knows the parts


def leave_one(
    base: Config, seeds: Iterable[int], by: Sequence[str] = ("class", "role"), only: bool = True, all_but: bool = True
) -> Iterator[Config]:
    """For each seed: `base` in float32, `base` itself, then for each part of what its recipe rounds the run that rounds
    `only` this, and the one that rounds `all_but` this.

    All else is as in `base`, the learning rate too, so that arms differ by rounding alone and are paired by seed. Parts
    are by op class, role, site or site and role (lpsim.attribution); a part that is all there is makes no run. The
    sites are found by running the model on one example.

    Raises ValueError where the recipe of `base` rounds nothing, and as `survey` does.
    """
    recipe = base.recipe.build()
    pieces = _pieces(base)
    if not pieces:
        raise ValueError(f"{base.recipe.name} rounds nothing in {base.model.name}: there is no part to leave out")
    recipes: list[RecipeConfig | GivenRecipe] = [forward("float32"), base.recipe]
    for name, part in ((name, part) for kind in by for name, part in parts(pieces, kind).items()):
        rest = [piece for piece in pieces if piece not in part]
        if rest and only:
            recipes.append(GivenRecipe(ONLY.format(base.recipe.name, name), kept(recipe, part)))
        if rest and all_but:
            recipes.append(GivenRecipe(ALL_BUT.format(base.recipe.name, name), kept(recipe, rest)))
    for seed in seeds:
        for chosen in recipes:
            yield replace(base, seed=seed, recipe=chosen)


def _pieces(base: Config) -> list[Piece]:
    """What the recipe rounds, in the order in which it runs."""
    model, _ = build(base)
    batch = base.data.load(base.model).train_batch(base.seed, 0, 1)
    inputs, targets = (tensor.to(base.device) for tensor in batch)
    recipe = base.recipe.build()
    return present(survey(model, [(inputs, targets)], cross_entropy, recipe, backward=True), recipe)
