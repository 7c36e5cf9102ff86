"""The learning rates of the quickstart: six each for AdamW and LMD, a factor of 2 apart, in float32, on seeds that the
quickstart does not use.
"""

from collections.abc import Iterator

from experiments.grids.quickstart import STEPS, TASKS, WARMUP_STEPS
from experiments.training.config import Config
from experiments.training.optimizers import AdamW, LMDForModel

RATES = {AdamW: (0.000375, 0.00075, 0.0015, 0.003, 0.006, 0.012), LMDForModel: (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)}
SEEDS = (1000, 1001, 1002, 1003)


def grid() -> Iterator[Config]:
    for network, data, batch_size in TASKS:
        for optimizer, rates in RATES.items():
            for rate in rates:
                for seed in SEEDS:
                    yield Config(
                        model=network,
                        data=data,
                        optimizer=optimizer(lr=rate),
                        seed=seed,
                        steps=STEPS,
                        batch_size=batch_size,
                        warmup_steps=WARMUP_STEPS,
                        validate_every=50,
                        checkpoint_every=50,
                    )
