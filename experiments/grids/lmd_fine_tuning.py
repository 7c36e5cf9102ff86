"""Does a model that was trained in float32 fine-tune in MXFP4, and does LMD lose less there than AdamW?

gpt2-micro trains 2400 steps in float32 on the first half of the text, with AdamW or `lmd.for_model` at their tuned
settings, then 800 steps on the other half with the same optimizer, in float32 and with the forward pass in MXFP4, at 1,
0.3 and 0.1 of the learning rates it began with. An arm is read at the fraction with its lowest mean. What a run's
validation loss is before its first step is what rounding the trained model costs. 4 seeds: 8 + 48 runs, 15 minutes on
two cores. The second round begins with the weights of the first, so the grid is adaptive.
"""

from dataclasses import replace
from typing import Any

from experiments.grids.adaptive import Rounds
from experiments.grids.lmd_claims_arms import ADAMW, FOR_MODEL, GPT2, STEPS, arm, config
from experiments.grids.tuning import tuned
from experiments.training.config import Config, forward
from experiments.training.data import StdlibText

SEEDS = range(6100, 6104)
FRACTIONS = (1.0, 0.3, 0.1)


def grid() -> Rounds:
    trained = yield [pretraining(optimizer, seed) for seed in SEEDS for optimizer in (ADAMW, FOR_MODEL)]
    yield [
        fine_tuning(outcome.config, outcome.signature, format, fraction)
        for outcome in trained
        if outcome.status == "finished"
        for format in ("mxfp4_e2m1", "float32")
        for fraction in FRACTIONS
    ]


def pretraining(optimizer: str, seed: int) -> Config:
    _, steps = STEPS[GPT2[0].name]
    task = (GPT2[0], StdlibText(half=1), GPT2[2])
    run = config(task, optimizer, "float32", seed=seed, steps=steps, validate_every=300, checkpoint_every=1200)
    return tuned("lmd_claims_gpt2_tuning").config(run, arm(GPT2[0], optimizer, "float32"))


def fine_tuning(trained: Config, signature: str, format: str, fraction: float) -> Config:
    rates: dict[str, Any] = {
        name: fraction * getattr(trained.optimizer, name)
        for name in ("lr", "others_lr")
        if hasattr(trained.optimizer, name)
    }
    return replace(
        trained,
        begin_with=signature,
        data=StdlibText(half=2),
        optimizer=replace(trained.optimizer, **rates),
        recipe=forward(format),
        steps=800,
        validate_every=100,
        checkpoint_every=800,
    )
