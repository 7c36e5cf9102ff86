"""The public name of `experiments.training.config`: what a grid file needs to say what a run is."""

from experiments.training.config import (
    Config,
    GivenRecipe,
    RecipeConfig,
    all_products,
    forward,
    model,
    named_recipe,
)

__all__ = ["Config", "GivenRecipe", "RecipeConfig", "all_products", "forward", "model", "named_recipe"]
