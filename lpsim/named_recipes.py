"""The public name of `lpsim.machine.named_recipes`: recipes from the literature."""

from lpsim.machine.named_recipes import ALL_RECIPES, NamedRecipe, get

__all__ = ["ALL_RECIPES", "NamedRecipe", "get"]
