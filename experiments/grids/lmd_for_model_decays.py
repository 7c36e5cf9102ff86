"""Which weight decay should AdamW's part of `lmd.for_model` have by default, on embeddings, heads and tables?

Three decays, all else at the defaults; gpt2-micro and a Llama of transformers, in float32 and MXFP4. 2400 steps, 2
seeds that no comparison uses: 24 runs, 15 minutes on two cores. The image models do not take part in the choice: in the
middle of learning their seeds differ by 0.3 nats, more than a decay does. `lmd_defaults` has one.

The rule, fixed before the runs: of the decays at which no run diverges and none ends with a norm of all weights above 5
times its start (without decay the norm goes on growing, and at 10,000 steps 10 times is the limit), the one whose final
validation loss lies least above the best of the three, on the mean over models, formats and seeds; of two that differ
by less than 0.01 nats, the larger.
"""

from collections.abc import Iterator
from dataclasses import replace

from experiments.grids.lmd_claims_arms import GPT2
from experiments.grids.lmd_outsiders import TASKS, at_defaults
from experiments.training.config import Config
from experiments.training.optimizers import LMDForModel

LLAMA = TASKS[0]
DECAYS = (0.0, 0.1, 0.3)
STEPS = 2400


def grid() -> Iterator[Config]:
    for seed in (102, 103):
        for config in at_defaults((LLAMA, GPT2), seed):
            for decay in DECAYS:
                optimizer = LMDForModel(others_weight_decay=decay)
                yield replace(config, optimizer=optimizer, steps=STEPS, validate_every=600, checkpoint_every=1200)
