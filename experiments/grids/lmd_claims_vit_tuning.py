"""The settings of the arms of `lmd_claims` that train vit-micro-glyphs: 15 arms, 150 runs, 30 minutes on two cores.

Write the choice beside this file, where `lmd_claims` reads it:

    lpsim tune lmd_claims_vit_tuning --output experiments/grids/lmd_claims_vit_tuning.json
"""

from experiments.grids.lmd_claims_arms import VIT, tuning
from experiments.grids.tuning import Tuning


def tune() -> Tuning:
    return tuning(VIT)
