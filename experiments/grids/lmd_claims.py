"""Does LMD lose less than AdamW to a low-precision forward pass, and why? The claims of its paper, with intervals.

Arms: AdamW, `lmd.for_model` and LMD on everything in float32, MXFP6 E3M2 and MXFP4; `lmd.for_model` without noise and,
of gpt2-micro, Lion and Madam in float32 and MXFP4; each tuned in its format with the same budget (`lmd_claims_arms`).
Further, with the values of the arm that they differ from: `lmd.for_model` without its prior (weight decay 0), in
float32 and MXFP4; and without noise in MXFP4 with a scale that never clips, rounding to nearest and stochastically.
gpt2-micro on text and vit-micro on glyphs, 2400 steps, 8 seeds that nothing was tuned or screened on: 152 and 120 runs,
an hour each on two quiet cores.

The rule, fixed before the runs. A claim predicts that the means over seeds of some differences, paired by seed, lie
below a bound, and that some arms never diverge. Each mean is tested against its bound by a two-sided t test; the
p-values of all claims about one model are corrected together (Holm). Below 0.05 a prediction is true or false by the
side on which the mean lies, otherwise undecided. One diverged run in an arm that is to be steady makes a prediction
false; seeds of which a run diverged are left out of a difference, which then cannot come out true. A claim is supported
when all its predictions are true, refuted when one is false, else undecided. Losses are final validation losses in nats
per byte; a margin of 0.01 nats is what seeds differ by. Lion and Madam are there to compare with; no claim rests on
them.
"""

from collections.abc import Iterator
from dataclasses import replace

from experiments.grids import claims as claim
from experiments.grids.claims import Claim, Contrast
from experiments.grids.lmd_claims_arms import (
    ADAMW,
    EVERYTHING,
    FOR_MODEL,
    FORMATS,
    GPT2,
    LION,
    MADAM,
    NOISELESS,
    STEPS,
    VIT,
    WHERE,
    Task,
    arm,
    config,
)
from experiments.grids.tuning import tuned
from experiments.training.config import Config, forward
from lpsim import Rounding, ScaleRule, formats

TASKS = {"lmd_claims_gpt2_tuning": GPT2, "lmd_claims_vit_tuning": VIT}
SEEDS = range(4000, 4008)
FLOAT32, MXFP6, MXFP4 = FORMATS
UNCLIPPED = replace(formats.mxfp4_e2m1, name="mxfp4_unclipped", scale_rule=ScaleRule.CEIL)
NEAREST, STOCHASTIC, NO_PRIOR = "to nearest", "stochastic", "LMD for_model without prior"
MARGIN = 0.01  # nats

Arms = dict[tuple[str, str], Config]  # by (optimizer, format or rounding)


def arms(task: Task, tuning: str, seed: int) -> Arms:
    """Every arm of a task, for one seed."""
    chosen, found = tuned(tuning), Arms()
    _, steps = STEPS[task[0].name]
    for optimizer, names in WHERE[task[0].name].items():
        for format in names:
            run = config(task, optimizer, format, seed=seed, steps=steps, validate_every=300, checkpoint_every=1200)
            found[optimizer, format] = chosen.config(run, arm(task[0], optimizer, format))
    noiseless = found[NOISELESS, MXFP4]
    found[NOISELESS, NEAREST] = replace(noiseless, recipe=forward(UNCLIPPED))
    found[NOISELESS, STOCHASTIC] = replace(noiseless, recipe=forward(UNCLIPPED, rounding=Rounding.STOCHASTIC))
    for format in (FLOAT32, MXFP4):
        run = found[FOR_MODEL, format]
        found[NO_PRIOR, format] = replace(run, optimizer=replace(run.optimizer, weight_decay=0.0))
    return found


def grid() -> Iterator[Config]:
    """What the claims rest on first, a seed after the other; then Lion and Madam."""
    for tuning, task in TASKS.items():
        for last in (False, True):
            for seed in SEEDS:
                for (optimizer, _), run in arms(task, tuning, seed).items():
                    if (optimizer in (LION, MADAM)) == last:
                        yield run


def claims() -> Iterator[Claim]:
    for tuning, task in TASKS.items():
        of = arms(task, tuning, SEEDS[0])

        def minus(name: str, one: Config, other: Config, metric: str = "validation_loss", below: float = 0) -> Contrast:
            return Contrast(name, [one], [other], metric, below)

        def lost(name: str, one: str, other: str, low: str, of: Arms = of) -> Contrast:
            return claim.lost(name, (of[one, FLOAT32], of[one, low]), (of[other, FLOAT32], of[other, low]))

        steady = [of[name, format] for name in (FOR_MODEL, EVERYTHING) for format in FORMATS]
        yield Claim(
            f"a, {task[0].name}",
            "LMD trains from scratch stably, and in float32 as accurately as AdamW.",
            [
                minus("for_model − AdamW, float32", of[FOR_MODEL, FLOAT32], of[ADAMW, FLOAT32], below=MARGIN),
                minus("everything − AdamW, float32", of[EVERYTHING, FLOAT32], of[ADAMW, FLOAT32], below=MARGIN),
            ],
            steady,
        )
        for letter, low, name in (("b", MXFP6, "MXFP6"), ("c", MXFP4, "MXFP4")):
            yield Claim(
                f"{letter}, {task[0].name}",
                f"LMD loses less to {name} than AdamW does, and ends better there.",
                [
                    lost(f"({name} − float32) of for_model − of AdamW", FOR_MODEL, ADAMW, low),
                    minus(f"for_model − AdamW, {name}", of[FOR_MODEL, low], of[ADAMW, low]),
                ],
            )
        yield Claim(
            f"d, {task[0].name}",
            "LMD's noise helps in MXFP4, as stochastic rounding does.",
            [
                lost("(MXFP4 − float32) with noise − without", FOR_MODEL, NOISELESS, MXFP4),
                minus("stochastic − to nearest, no noise", of[NOISELESS, STOCHASTIC], of[NOISELESS, NEAREST]),
            ],
        )
        yield Claim(
            f"e, {task[0].name}",
            "LMD's prior stops the growth of the weights, and that is worth something in MXFP4.",
            [
                minus(
                    "growth with prior − without, float32",
                    of[FOR_MODEL, FLOAT32],
                    of[NO_PRIOR, FLOAT32],
                    "weight_growth",
                ),
                minus("with prior − without, MXFP4", of[FOR_MODEL, MXFP4], of[NO_PRIOR, MXFP4]),
                lost("(MXFP4 − float32) with prior − without", FOR_MODEL, NO_PRIOR, MXFP4),
            ],
        )
