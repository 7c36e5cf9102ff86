"""The settings of the arms of `lmd_claims` that train vit-micro-glyphs: 15 arms, 150 runs.

It has not been run; `lmd_claims` has no arms of this model before it has. Write the choice beside this file:

    lpsim tune lmd_claims_vit_tuning --output experiments/grids/lmd_claims_vit_tuning.json
"""

from experiments.grids.lmd_claims_arms import VIT, tuning
from experiments.grids.tuning import Tuning


def tune() -> Tuning:
    return tuning(VIT)
