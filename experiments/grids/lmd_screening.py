"""Which settings of LMD are worth being its defaults? A screening: one seed, 2400 steps, so a direction and no result.

`lmd.for_model` and LMD on everything, at settings between which the defaults were chosen, and at the defaults that came
of it; AdamW at one rate a model beside them. gpt2-micro on text and vit-micro-glyphs on characters; float32 and MXFP4
forward. 36 runs.
"""

from collections.abc import Iterator

from experiments.training.config import Config, forward, model
from experiments.training.data import Glyphs, StdlibText
from experiments.training.optimizers import LMD, AdamW, LMDForModel, OptimizerSettings

TASKS = ((model("gpt2-micro"), StdlibText(), 16), (model("vit-micro-glyphs"), Glyphs(), 64))
ADAMW_LR = {"gpt2-micro": 0.008, "vit-micro-glyphs": 0.0015}
OPTIMIZERS: tuple[LMD, ...] = (
    LMDForModel(lr=0.02, weight_decay=0.5, kappa=3.0, noise_scale=0.05, others_lr=0.006, others_weight_decay=0.0),
    LMD(lr=0.02, weight_decay=0.5, kappa=3.0, noise_scale=0.05),
    LMDForModel(lr=0.02, weight_decay=0.5, kappa=3.0, noise_scale=0.0, others_lr=0.003, others_weight_decay=0.0),
    LMDForModel(lr=0.01, weight_decay=0.5, kappa=3.0, noise_scale=0.0, others_lr=0.003, others_weight_decay=0.0),
    LMD(lr=0.01, weight_decay=0.5, kappa=3.0, noise_scale=0.0),
    LMD(lr=0.03, weight_decay=0.3, kappa=1.0, noise_scale=0.0),
    LMDForModel(),
    LMD(),
)


def grid() -> Iterator[Config]:
    for network, data, batch_size in TASKS:
        optimizers: tuple[OptimizerSettings, ...] = (AdamW(ADAMW_LR[network.name]), *OPTIMIZERS)
        for optimizer in optimizers:
            for name in ("mxfp4_e2m1", "float32"):
                yield Config(
                    model=network,
                    data=data,
                    optimizer=optimizer,
                    recipe=forward(name),
                    seed=100,
                    steps=2400,
                    batch_size=batch_size,
                    warmup_steps=100,
                    validate_every=300,
                    checkpoint_every=1200,
                )
