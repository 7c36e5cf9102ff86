"""Does LMD lose less than AdamW to a low-precision forward pass? Each optimizer trains two micro models from scratch in
three formats, with three seeds each.

Other formats than MXFP6 and MXFP4: `lpsim run quickstart --formats NAME ...`. The models are small enough for a
laptop, so the answer is a direction at most. AdamW's learning rates are those that `quickstart_tuning.py` found best in
float32 (FINDINGS.md); LMD is `lmd.for_model` at its defaults, untuned.
"""

from collections.abc import Sequence

from experiments.grids.product import product
from experiments.training.config import Config, forward, model
from experiments.training.data import Digits, StdlibText
from experiments.training.optimizers import AdamW, LMDForModel
from lpsim.formats import Format, float32, mxfp4_e2m1, mxfp6_e3m2

TASKS = ((model("gpt2-micro"), StdlibText(), 16), (model("vit-micro"), Digits(), 64))  # model, data, batch size
STEPS, WARMUP_STEPS = 400, 40
TUNED = {"gpt2-micro": AdamW(lr=0.006), "vit-micro": AdamW(lr=0.0015)}


def grid(formats: Sequence[Format] = (mxfp6_e3m2, mxfp4_e2m1)) -> list[Config]:
    """formats: beside the float32 that they are compared to."""
    network, data, _ = TASKS[0]
    return product(
        Config(
            network, data, LMDForModel(), steps=STEPS, warmup_steps=WARMUP_STEPS, validate_every=50, checkpoint_every=50
        ),
        seed=(0, 1, 2),
        task=[dict(zip(("model", "data", "batch_size"), task, strict=True)) for task in TASKS],
        optimizer=lambda config: (TUNED[config.model.name], LMDForModel()),
        recipe=[forward(fmt) for fmt in dict.fromkeys((float32, *formats))],
    )
