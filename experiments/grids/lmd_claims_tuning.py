"""The settings of the arms that `lmd_claims` compares: each optimizer tuned in each format, with the same budget.

Every arm has 8 trials of 800 steps on seed 3000 (4 quasi-random, 4 proposed by TPE in two rounds); its best 2 are run
again on seed 3001, and the better mean is chosen. The comparison runs 2400 steps: rates that suit 800 are a little too
high for it, for every arm alike. 30 arms, 300 runs, about 70 minutes on two cores. Write the choice beside this file:

    lpsim tune lmd_claims_tuning --output experiments/grids/lmd_claims_tuning.json
"""

from collections.abc import Iterator

from experiments.grids.tuning import Arm, LogUniform, Range, Tuning
from experiments.training.config import Config, forward, model
from experiments.training.data import Glyphs, StdlibText
from experiments.training.optimizers import LMD, AdamW, Lion, LMDForModel, Madam, OptimizerConfig
from lpsim import formats

GPT2 = (model("gpt2-micro"), StdlibText(), 16)
VIT = (model("vit-micro-glyphs"), Glyphs(), 32)
TASKS = (GPT2, VIT)
FORMATS = ("float32", "mxfp6_e3m2", "mxfp4_e2m1")

ADAMW, FOR_MODEL, EVERYTHING = "AdamW", "LMD for_model", "LMD on everything"
NOISELESS, LION, MADAM = "LMD for_model without noise", "Lion", "Madam"
OPTIMIZERS: dict[str, OptimizerConfig] = {
    ADAMW: AdamW(lr=0.006),
    FOR_MODEL: LMDForModel(),
    EVERYTHING: LMD(),
    NOISELESS: LMDForModel(noise_scale=0.0),
    LION: Lion(lr=0.001),
    MADAM: Madam(lr=0.01),
}
ENDS = (FORMATS[0], FORMATS[2])  # the formats of those that no claim about MXFP6 is about
WHERE = {ADAMW: FORMATS, FOR_MODEL: FORMATS, EVERYTHING: FORMATS, NOISELESS: ENDS, LION: ENDS, MADAM: ENDS}

LR, DECAY, OTHERS = "optimizer.lr", "optimizer.weight_decay", "optimizer.others_lr"
LMD_DECAY = LogUniform(0.1, 0.8)
RANGES: dict[str, dict[str, dict[str, Range]]] = {
    "gpt2-micro": {
        ADAMW: {LR: LogUniform(0.002, 0.03), DECAY: LogUniform(0.03, 0.5)},
        FOR_MODEL: {LR: LogUniform(0.004, 0.05), DECAY: LMD_DECAY, OTHERS: LogUniform(0.002, 0.03)},
        EVERYTHING: {LR: LogUniform(0.004, 0.05), DECAY: LMD_DECAY},
        LION: {LR: LogUniform(0.0003, 0.005), DECAY: LogUniform(0.03, 2.0)},
        MADAM: {LR: LogUniform(0.003, 0.1)},
    },
    "vit-micro-glyphs": {
        ADAMW: {LR: LogUniform(0.0005, 0.006), DECAY: LogUniform(0.03, 0.5)},
        FOR_MODEL: {LR: LogUniform(0.003, 0.04), DECAY: LMD_DECAY, OTHERS: LogUniform(0.0005, 0.006)},
        EVERYTHING: {LR: LogUniform(0.003, 0.04), DECAY: LMD_DECAY},
        LION: {LR: LogUniform(0.0001, 0.002), DECAY: LogUniform(0.03, 2.0)},
        MADAM: {LR: LogUniform(0.003, 0.1)},
    },
}
for of_model in RANGES.values():
    of_model[NOISELESS] = of_model[FOR_MODEL]


def arm(network: str, optimizer: str, name: str) -> str:
    """What the arm is called in the file of chosen values."""
    return f"{network}, {optimizer}, {name}"


def arms(steps: int) -> Iterator[tuple[str, str, Config]]:
    """(name of its arm, optimizer, config) of everything that is tuned, for runs of that many steps."""
    for network, data, batch_size in TASKS:
        for optimizer, settings in OPTIMIZERS.items():
            for name in WHERE[optimizer]:
                config = Config(
                    model=network,
                    data=data,
                    optimizer=settings,
                    recipe=forward(formats.get(name)),
                    steps=steps,
                    batch_size=batch_size,
                    warmup_steps=100,
                    validate_every=400,
                    checkpoint_every=400,
                )
                yield arm(network.name, optimizer, name), optimizer, config


def tune() -> Tuning:
    tuned = [Arm(config, RANGES[config.model.name][name], label) for label, name, config in arms(steps=800)]
    return Tuning(tuned, trials=8, seeds=(3000,), finalists=2, final_seeds=(3001,), rounds=3)
