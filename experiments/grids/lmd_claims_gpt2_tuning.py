"""The settings of the arms of `lmd_claims` that train gpt2-micro on text: 15 arms, 150 runs, 120,000 steps.

Write the choice beside this file, where `lmd_claims` reads it:

    lpsim tune lmd_claims_gpt2_tuning --output experiments/grids/lmd_claims_gpt2_tuning.json
"""

from experiments.grids.lmd_claims_arms import GPT2, tuning
from experiments.grids.tuning import Tuning


def tune() -> Tuning:
    return tuning(GPT2)
