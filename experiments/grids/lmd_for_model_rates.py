"""Which rate should AdamW's part of `lmd.for_model` have by default?

Three rates, all else at the defaults; a Llama and a ViT of transformers, gpt2-micro and vit-micro on glyphs, in float32
and MXFP4. 1200 steps, 2 seeds that no comparison uses: 48 runs, 20 minutes on two cores.

The rule, fixed before the runs: of the rates at which no run diverges, the one whose final validation loss lies least
above the best of the three, on the mean over models, formats and seeds; of two that differ by less than 0.01 nats, the
lower.
"""

from collections.abc import Iterator
from dataclasses import replace

from experiments.grids.lmd_claims_arms import GPT2, VIT
from experiments.grids.lmd_outsiders import TASKS, at_defaults
from experiments.training.config import Config
from experiments.training.optimizers import LMDForModel

RATES = (0.003, 0.006, 0.012)


def grid() -> Iterator[Config]:
    for seed in (100, 101):
        for config in at_defaults((*TASKS, GPT2, VIT), seed):
            for rate in RATES:
                yield replace(config, optimizer=LMDForModel(others_lr=rate, others_weight_decay=0.0))
