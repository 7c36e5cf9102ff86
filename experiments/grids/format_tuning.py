"""Which learning rate suits each optimizer in each format? The best one in float32 can be the wrong one in MXFP4.

The arms of the quickstart (two models, two optimizers, three formats), 12 rates each, the best 3 again on 3 more seeds;
none of the seeds is one of the quickstart. 12 arms, 252 runs. Other formats: `lpsim tune format_tuning --formats ...`.
"""

from collections.abc import Sequence

from experiments.grids import quickstart
from experiments.grids.tuning import Arm, LogUniform, Range, Tuning
from experiments.training.optimizers import AdamW, LMDForModel
from lpsim.formats import Format, mxfp4_e2m1, mxfp6_e3m2

RATES: dict[type, Range] = {AdamW: LogUniform(3e-4, 0.02), LMDForModel: LogUniform(2e-3, 0.13)}


def tune(formats: Sequence[Format] = (mxfp6_e3m2, mxfp4_e2m1)) -> Tuning:
    """formats: beside float32."""
    configs = [config for config in quickstart.grid(formats) if config.seed == 0]
    arms = [Arm(config, {"optimizer.lr": RATES[type(config.optimizer)]}) for config in configs]
    return Tuning(arms, trials=12, seeds=(2000,), finalists=3, final_seeds=(2001, 2002, 2003))
