"""Which rate should AdamW's part of `lmd.for_model` have by default? A screening: one seed, so a direction, no result.

The Llama and the ViT of `lmd_outsiders` in float32, 1200 steps; LMD at two rates, its other settings at their defaults,
AdamW's part at three. 12 runs, 5 minutes on two cores.
"""

from collections.abc import Iterator
from dataclasses import replace

from experiments.grids.lmd_outsiders import outsiders
from experiments.training.config import Config
from experiments.training.optimizers import LMDForModel


def grid() -> Iterator[Config]:
    for config in outsiders(seed=100):
        if config.recipe.name == "float32":
            for lr in (0.01, 0.018):
                for others_lr in (0.003, 0.006, 0.012):
                    yield replace(config, optimizer=LMDForModel(lr=lr, others_lr=others_lr))
