"""Does LMD keep its place when the backward pass rounds too?

gpt2-micro with AdamW and `lmd.for_model`, in float32, and with all three products in MXFP8 E4M3 and in MXFP6 E3M2,
where the gradient operands of dgrad and wgrad are rounded stochastically with scales that never clip. 2400 steps, 4
seeds that nothing was tuned on: 24 runs, 15 minutes on two cores. Settings are those that `lmd_claims_gpt2_tuning`
chose for the same format in the forward pass; MXFP8, which it has not, takes those of float32.
"""

from collections.abc import Iterator
from dataclasses import replace

from experiments.grids.claims import Claim, Contrast
from experiments.grids.lmd_claims_arms import ADAMW, FOR_MODEL, GPT2, STEPS, arm, config
from experiments.grids.tuning import tuned
from experiments.training.config import Config, GivenRecipe, RecipeConfig, forward
from lpsim import BackwardOperands, Gemm, Quantizer, Recipe, Rounding, ScaleRule, formats
from lpsim.formats import BlockFormat

SEEDS = range(6000, 6004)


def all_products(format: BlockFormat) -> GivenRecipe:
    """Every operand of fprop, dgrad and wgrad in the format, made from its wide tensor; gradients stochastically."""
    nearest = Quantizer(format)
    unclipped = replace(format, name=f"{format.name}_rceil", scale_rule=ScaleRule.RCEIL)
    gradient = Quantizer(unclipped, rounding=Rounding.STOCHASTIC)
    return GivenRecipe(
        f"{format.name}, all products",
        Recipe(
            Gemm(nearest, nearest),
            Gemm(gradient, nearest),
            Gemm(nearest, gradient),
            backward_operands=BackwardOperands.UNQUANTIZED,
        ),
    )


RECIPES: dict[str, tuple[RecipeConfig | GivenRecipe, str]] = {  # and the format whose tuned values it takes
    "float32": (forward("float32"), "float32"),
    "MXFP8": (all_products(formats.mxfp8_e4m3), "float32"),
    "MXFP6": (all_products(formats.mxfp6_e3m2), "mxfp6_e3m2"),
}


def runs(seed: int) -> dict[tuple[str, str], Config]:
    chosen, found = tuned("lmd_claims_gpt2_tuning"), {}
    _, steps = STEPS[GPT2[0].name]
    for optimizer in (ADAMW, FOR_MODEL):
        for name, (recipe, where) in RECIPES.items():
            run = config(GPT2, optimizer, where, seed=seed, steps=steps, validate_every=300, checkpoint_every=1200)
            found[optimizer, name] = replace(chosen.config(run, arm(GPT2[0], optimizer, where)), recipe=recipe)
    return found


def grid() -> Iterator[Config]:
    for seed in SEEDS:
        yield from runs(seed).values()


def claims() -> Iterator[Claim]:
    of = runs(SEEDS[0])
    for name in RECIPES:
        lmd, adamw = of[FOR_MODEL, name], of[ADAMW, name]
        yield Claim(
            f"ahead, {name}",
            "LMD by for_model ends below AdamW.",
            [Contrast(f"for_model − AdamW, {name}", [lmd], [adamw])],
            [lmd],
        )
