"""Which of weight growth, tails, block maxima and noise explains what LMD loses to MXFP4?

The arms of `lmd_claims` on gpt2-micro that its claims compare, at the same settings, with telemetry: AdamW,
`for_model`, the same without noise and without prior, LMD on everything; float32 and MXFP4, 3 seeds that nothing was
tuned on. Every run records the norm, kurtosis and crest of its weights; telemetry has the SQNR of every operand and the
updates that rounding swallows. 30 runs, 17 minutes on two cores.
"""

from collections.abc import Iterator
from dataclasses import replace

from experiments.grids.lmd_claims import FLOAT32, MXFP4, NO_PRIOR, arms
from experiments.grids.lmd_claims_arms import ADAMW, EVERYTHING, FOR_MODEL, GPT2, NOISELESS
from experiments.training.config import Config

SEEDS = range(6200, 6203)


def grid() -> Iterator[Config]:
    for seed in SEEDS:
        of = arms(GPT2, "lmd_claims_gpt2_tuning", seed)
        for optimizer in (ADAMW, FOR_MODEL, NO_PRIOR, NOISELESS, EVERYTHING):
            for format in (FLOAT32, MXFP4):
                yield replace(of[optimizer, format], telemetry_every=200)
