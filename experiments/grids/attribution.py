"""Which part of MXFP4's rounding costs what while gpt2-micro is trained, with AdamW and with `lmd.for_model`?

For each optimizer: nothing rounded, everything, and for each op class (linear, attention) and role (weights,
activations) this part alone and all but it; both operands of every forward product are rounded in "everything". Each
arm has the values that were tuned for MXFP4 (`lmd_claims_gpt2_tuning`), in float32 too: so arms differ by rounding
alone, and the float32 of this grid is not the best float32. 2400 steps, 4 seeds that nothing was tuned on; 80 runs;
by what `lmd_claims` takes, less than an hour on two quiet cores.
"""

from collections.abc import Iterator

from experiments.grids.leave_one import leave_one
from experiments.grids.lmd_claims_arms import ADAMW, FOR_MODEL, GPT2, arm, config
from experiments.grids.tuning import tuned
from experiments.training.config import Config

MXFP4 = "mxfp4_e2m1"
SEEDS = range(5000, 5004)


def grid() -> Iterator[Config]:
    chosen = tuned("lmd_claims_gpt2_tuning")
    bases = []
    for optimizer in (ADAMW, FOR_MODEL):
        run = config(GPT2, optimizer, MXFP4, seed=SEEDS[0], steps=2400, validate_every=300, checkpoint_every=1200)
        bases.append(chosen.config(run, arm(GPT2[0], optimizer, MXFP4)))
    runs = [run for base in bases for run in leave_one(base, SEEDS)]
    yield from sorted(runs, key=lambda run: run.seed)
