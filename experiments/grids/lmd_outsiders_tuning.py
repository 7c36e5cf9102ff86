"""The learning rate of AdamW for each model and format of `lmd_outsiders`: 5 trials, the best 2 on a second seed.

28 runs, 8 minutes on two cores. Write the choice beside this file, where `lmd_outsiders` reads it:

    lpsim tune lmd_outsiders_tuning --output experiments/grids/lmd_outsiders_tuning.json
"""

from dataclasses import replace

from experiments.grids.lmd_outsiders import STEPS, TASKS, at_defaults
from experiments.grids.tuning import Arm, LogUniform, Tuning
from experiments.training.optimizers import AdamW


def tune() -> Tuning:
    arms = [
        Arm(replace(config, optimizer=AdamW(lr=0.003), steps=STEPS // 2), {"optimizer.lr": LogUniform(0.0007, 0.02)})
        for config in at_defaults(TASKS, seed=0)
    ]
    return Tuning(arms, trials=5, seeds=(3000,), finalists=2, final_seeds=(3001,), rounds=1)
