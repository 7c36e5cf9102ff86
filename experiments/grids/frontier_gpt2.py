"""How far can the learning rate of gpt2-micro be pushed, for AdamW and LMD, in float32, MXFP6 and MXFP4, with nearest
and stochastic rounding of the forward products?

    lpsim frontier frontier_gpt2 --jobs 2 --report

10 arms of 2 seeds and runs of 400 steps: 6 or 7 rates a factor of at most 2.5 apart, then one bisection, about 60,000
steps where none diverges. A rate breaks when a seed diverges or ends 0.2 nats above its run at the arm's best rate;
seeds of this length differ by 0.07. `lmd.for_model` is pushed by LMD's rate alone: that of its AdamW part
stays at its default.
"""

from experiments.grids.frontier import Arm, Frontier, LogUniform
from experiments.training.config import Config, forward, model
from experiments.training.data import StdlibText
from experiments.training.optimizers import AdamW, LMDForModel
from lpsim import Rounding

STEPS = 400
NEAREST, STOCHASTIC = Rounding.TIES_TO_EVEN, Rounding.STOCHASTIC
RATES = {AdamW(lr=0.006): LogUniform(0.004, 0.25), LMDForModel(): LogUniform(0.01, 1.0)}
RECIPES = [forward("float32")] + [
    forward(name, rounding=rounding) for name in ("mxfp6_e3m2", "mxfp4_e2m1") for rounding in (NEAREST, STOCHASTIC)
]


def frontier() -> Frontier:
    arms = [
        Arm(
            Config(
                model=model("gpt2-micro"),
                data=StdlibText(),
                optimizer=optimizer,
                recipe=recipe,
                steps=STEPS,
                validate_every=STEPS // 5,
                checkpoint_every=STEPS,
                telemetry_every=STEPS // 10,
            ),
            rates,
        )
        for optimizer, rates in RATES.items()
        for recipe in RECIPES
    ]
    return Frontier(arms, seeds=(4000, 4001), margin=0.2, share=1.0, spacing=2.5, resolution=1.6)
