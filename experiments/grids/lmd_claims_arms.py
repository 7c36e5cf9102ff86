"""The arms that `lmd_claims` compares: each optimizer tuned in each format, with the same budget.

`lmd_claims_gpt2_tuning` and `lmd_claims_vit_tuning` seek their settings. Every arm has 8 trials on seed 3000 (4
quasi-random, 4 proposed by TPE in two rounds); its best 2 are run again on seed 3001, and the better mean is chosen.
The comparison is longer than the trials (`STEPS`): rates that suit a trial may be a little too high for it, for every
arm alike. The ViT's trials are longer: after 800 steps of 32 images it has not begun to learn at most rates. The AdamW
within `for_model` has no weight decay here, which was its default when the arms were tuned.
"""

from typing import Any

from experiments.grids.tuning import Arm, LogUniform, Range, Tuning
from experiments.training.config import Config, forward, model
from experiments.training.data import DataConfig, Glyphs, ModelConfig, StdlibText
from experiments.training.optimizers import LMD, AdamW, Lion, LMDForModel, Madam, OptimizerSettings

Task = tuple[ModelConfig, DataConfig, int]  # and the batch size

GPT2: Task = (model("gpt2-micro"), StdlibText(), 16)
VIT: Task = (model("vit-micro-glyphs"), Glyphs(), 32)
STEPS = {"gpt2-micro": (800, 2400), "vit-micro-glyphs": (1600, 2400)}  # of a trial, of the comparison
FORMATS = ("float32", "mxfp6_e3m2", "mxfp4_e2m1")

ADAMW, FOR_MODEL, EVERYTHING = "AdamW", "LMD for_model", "LMD on everything"
NOISELESS, LION, MADAM = "LMD for_model without noise", "Lion", "Madam"
OPTIMIZERS: dict[str, OptimizerSettings] = {
    ADAMW: AdamW(lr=0.006),
    FOR_MODEL: LMDForModel(others_weight_decay=0.0),
    EVERYTHING: LMD(),
    NOISELESS: LMDForModel(noise_scale=0.0, others_weight_decay=0.0),
    LION: Lion(lr=0.001),
    MADAM: Madam(lr=0.01),
}
ENDS = (FORMATS[0], FORMATS[2])  # the formats of those that no claim about MXFP6 is about
WHERE = {  # by model
    "gpt2-micro": {
        ADAMW: FORMATS,
        FOR_MODEL: FORMATS,
        EVERYTHING: FORMATS,
        NOISELESS: ENDS,
        LION: ENDS,
        MADAM: ENDS,
    },
    "vit-micro-glyphs": {ADAMW: FORMATS, FOR_MODEL: FORMATS, EVERYTHING: FORMATS, NOISELESS: ENDS},
}

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
        ADAMW: {LR: LogUniform(0.0005, 0.01), DECAY: LogUniform(0.03, 0.5)},
        FOR_MODEL: {LR: LogUniform(0.002, 0.02), DECAY: LMD_DECAY, OTHERS: LogUniform(0.002, 0.03)},
        EVERYTHING: {LR: LogUniform(0.002, 0.02), DECAY: LMD_DECAY},
        LION: {LR: LogUniform(0.0001, 0.002), DECAY: LogUniform(0.03, 2.0)},
        MADAM: {LR: LogUniform(0.003, 0.1)},
    },
}


def arm(network: ModelConfig, optimizer: str, format: str) -> str:
    """What the arm is called in the file of chosen values."""
    return f"{network.name}, {optimizer}, {format}"


def config(task: Task, optimizer: str, format: str, **settings: Any) -> Config:
    """A run of an arm, at settings that are not tuned; `settings` are Config's: steps, seed, ..."""
    network, data, batch_size = task
    return Config(
        model=network,
        data=data,
        optimizer=OPTIMIZERS[optimizer],
        recipe=forward(format),
        batch_size=batch_size,
        warmup_steps=100,
        **settings,
    )


def tuning(task: Task) -> Tuning:
    """The tuning of one task's arms; without noise the ranges are those of for_model."""
    network, ranges = task[0], RANGES[task[0].name]
    steps, _ = STEPS[task[0].name]
    arms = [
        Arm(
            config(task, optimizer, format, steps=steps, validate_every=400, checkpoint_every=400),
            ranges[FOR_MODEL if optimizer == NOISELESS else optimizer],
            arm(network, optimizer, format),
        )
        for optimizer, formats in WHERE[network.name].items()
        for format in formats
    ]
    return Tuning(arms, trials=8, seeds=(3000,), finalists=2, final_seeds=(3001,), rounds=3)
