"""The settings of the arms of `lmd_claims` that train vit-micro-glyphs: 11 arms, 110 runs, 40 minutes on two cores.

The choice is written beside this file:

    lpsim tune lmd_claims_vit_tuning --output experiments/grids/lmd_claims_vit_tuning.json
"""

from experiments.grids.lmd_claims_arms import VIT, tuning
from experiments.grids.tuning import Tuning


def tune() -> Tuning:
    return tuning(VIT)
