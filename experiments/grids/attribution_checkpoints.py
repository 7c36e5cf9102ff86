"""Where does MXFP4's loss come from in models that are trained already? The checkpoints that the finding is about.

gpt2-micro with AdamW and with `lmd.for_model`, trained in float32 and in MXFP4, each with the values that were tuned
for it, as in `lmd_claims`; 2400 steps, two seeds that nothing was tuned, screened or compared on before. Then, for each
of the 8 runs: `lpsim attribute runs/attribution_checkpoints/SIGNATURE --format mxfp4_e2m1 --but-one`.
"""

from collections.abc import Iterator

from experiments.grids.lmd_claims_arms import ADAMW, FOR_MODEL, GPT2, arm, config
from experiments.grids.tuning import tuned
from experiments.training.config import Config

SEEDS = (5000, 5001)


def grid() -> Iterator[Config]:
    chosen = tuned("lmd_claims_gpt2_tuning")
    for seed in SEEDS:
        for optimizer in (ADAMW, FOR_MODEL):
            for format in ("float32", "mxfp4_e2m1"):
                run = config(GPT2, optimizer, format, seed=seed, steps=2400, validate_every=300, checkpoint_every=1200)
                yield chosen.config(run, arm(GPT2[0], optimizer, format))
