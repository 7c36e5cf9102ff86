"""Is LMD stable at its defaults? 10,000 steps, LMD on everything and `lmd.for_model`, both micro models, three formats.

Stable means: no run diverges, and the norm of all weights ends at no more than 10 times what it was at the start. 36
runs, one seed after the other, so that the grid can be stopped after a seed; about 30 minutes a seed on two cores.
"""

from collections.abc import Iterator

from experiments.grids.lmd_claims_arms import GPT2, VIT
from experiments.training.config import Config, forward
from experiments.training.optimizers import LMD, LMDForModel


def grid() -> Iterator[Config]:
    for seed in (0, 1, 2):
        for network, data, batch_size in (GPT2, VIT):
            for optimizer in (LMD(), LMDForModel()):
                for name in ("mxfp4_e2m1", "float32", "mxfp6_e3m2"):
                    yield Config(
                        model=network,
                        data=data,
                        optimizer=optimizer,
                        recipe=forward(name),
                        seed=seed,
                        steps=10_000,
                        batch_size=batch_size,
                        warmup_steps=100,
                        validate_every=1000,
                        checkpoint_every=1000,
                    )
