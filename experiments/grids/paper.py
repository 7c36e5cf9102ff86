"""The arms of `paper_gpt2` and `paper_vit`: the shape of the experiment of arXiv:2506.17768.

Three optimizers in three forward formats, gradients in the compute dtype; then what the paper takes LMD's steadiness
to come from: its noise, its prior, and stochastic rounding in place of noise. Rounding is compared in formats whose
scales never clip, where stochastic rounding is unbiased. What the paper's abstract does not say (steps, batches, rates)
is what the grids' own docstrings say.
"""

from collections.abc import Iterator
from dataclasses import replace

from experiments.training.config import Config, RecipeConfig, forward
from experiments.training.optimizers import AdamW, LMDForModel, Madam, OptimizerSettings
from lpsim import Rounding, ScaleRule, formats

FORMATS = ("float32", "mxfp6_e3m2", "mxfp4_e2m1")
UNCLIPPED = tuple(
    replace(format, name=f"{format.name}_unclipped", scale_rule=ScaleRule.CEIL)
    for format in (formats.mxfp6_e3m2, formats.mxfp4_e2m1)
)
SEEDS = (0, 1, 2)


def twin(base: Config) -> Config:
    """The run of a small model, data set and batch, at a length that CPUs finish."""
    return replace(base, steps=800, warmup_steps=80, log_every=1, checkpoint_every=200, device="cpu")


def runs(base: Config, adamw: AdamW, madam: Madam, lmd: LMDForModel) -> Iterator[Config]:
    """26 arms of every seed, a seed after the other; the first of each seed is what tables compare with."""
    for seed in SEEDS:
        for optimizer, recipe in arms(adamw, madam, lmd):
            yield replace(base, optimizer=optimizer, recipe=recipe, seed=seed)


def arms(adamw: AdamW, madam: Madam, lmd: LMDForModel) -> Iterator[tuple[OptimizerSettings, RecipeConfig]]:
    noiseless = replace(lmd, noise_scale=0.0)
    louder = replace(lmd, noise_scale=2 * lmd.noise_scale)
    no_prior = replace(lmd, weight_decay=0.0)
    for format in FORMATS:
        for optimizer in (adamw, madam, lmd, noiseless, louder, no_prior):
            yield optimizer, forward(format)
    for unclipped in UNCLIPPED:
        for optimizer in (adamw, noiseless):
            for rounding in (Rounding.TIES_TO_EVEN, Rounding.STOCHASTIC):
                yield optimizer, forward(unclipped, rounding=rounding)
