"""The arms of `paper_gpt2` and `paper_vit`: the shape of the experiment of arXiv:2506.17768.

Three optimizers in three forward formats, gradients in the compute dtype; then what the paper takes LMD's steadiness
to come from: its noise, its prior, and stochastic rounding in place of noise. Rounding is compared in formats whose
scales never clip, where stochastic rounding is unbiased. What the paper's abstract does not say (steps, batches, rates)
is what the grids' own docstrings say. The claims are those of `lmd_claims`, under its rule, as far as these arms decide
them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from experiments.grids.claims import Claim, Contrast, lost
from experiments.training.config import Config, RecipeConfig, forward
from experiments.training.optimizers import AdamW, LMDForModel, Madam, OptimizerSettings
from lpsim import Rounding, ScaleRule, formats

FORMATS = ("float32", "mxfp6_e3m2", "mxfp4_e2m1")
UNCLIPPED = tuple(
    replace(format, name=f"{format.name}_unclipped", scale_rule=ScaleRule.CEIL)
    for format in (formats.mxfp6_e3m2, formats.mxfp4_e2m1)
)
SEEDS = (0, 1, 2)
MARGIN = 0.01  # nats


def twin(base: Config) -> Config:
    """The run of a small model, data set and batch, at a length that CPUs finish."""
    return replace(base, steps=800, warmup_steps=80, log_every=1, checkpoint_every=200, device="cpu")


@dataclass(frozen=True)
class Experiment:
    """A run, of which the arms differ in optimizer and recipe alone, and the three optimizers at their settings."""

    base: Config
    adamw: AdamW
    madam: Madam
    lmd: LMDForModel

    @property
    def noiseless(self) -> LMDForModel:
        return replace(self.lmd, noise_scale=0.0)

    @property
    def without_prior(self) -> LMDForModel:
        return replace(self.lmd, weight_decay=0.0)

    def arms(self) -> Iterator[tuple[OptimizerSettings, RecipeConfig]]:
        louder = replace(self.lmd, noise_scale=2 * self.lmd.noise_scale)
        for format in FORMATS:
            for optimizer in (self.adamw, self.madam, self.lmd, self.noiseless, louder, self.without_prior):
                yield optimizer, forward(format)
        for unclipped in UNCLIPPED:
            for optimizer in (self.adamw, self.noiseless):
                for rounding in (Rounding.TIES_TO_EVEN, Rounding.STOCHASTIC):
                    yield optimizer, forward(unclipped, rounding=rounding)

    def runs(self) -> Iterator[Config]:
        """26 arms of every seed, a seed after the other; the first of each seed is what tables compare with."""
        for seed in SEEDS:
            for optimizer, recipe in self.arms():
                yield replace(self.base, optimizer=optimizer, recipe=recipe, seed=seed)

    def claims(self) -> Iterator[Claim]:
        float32, mxfp6, mxfp4 = (forward(format) for format in FORMATS)
        nearest, stochastic = (
            self._run(self.noiseless, forward(UNCLIPPED[1], rounding=rounding))
            for rounding in (Rounding.TIES_TO_EVEN, Rounding.STOCHASTIC)
        )
        even = Contrast(
            "LMD − AdamW, float32", [self._run(self.lmd, float32)], [self._run(self.adamw, float32)], below=MARGIN
        )
        yield Claim(
            "a",
            "LMD trains from scratch stably, and in float32 as accurately as AdamW.",
            [even],
            [self._run(self.lmd, recipe) for recipe in (float32, mxfp6, mxfp4)],
        )
        for letter, low, name in (("b", mxfp6, "MXFP6"), ("c", mxfp4, "MXFP4")):
            yield Claim(
                letter,
                f"LMD loses less to {name} than AdamW does, and ends better there.",
                [
                    self._lost(f"({name} − float32) of LMD − of AdamW", self.lmd, self.adamw, low),
                    Contrast(f"LMD − AdamW, {name}", [self._run(self.lmd, low)], [self._run(self.adamw, low)]),
                ],
            )
        yield Claim(
            "d",
            "LMD's noise helps in MXFP4, as stochastic rounding does.",
            [
                self._lost("(MXFP4 − float32) with noise − without", self.lmd, self.noiseless, mxfp4),
                Contrast("stochastic − to nearest, no noise", [stochastic], [nearest]),
            ],
        )
        kept, free = (self._run(each, float32) for each in (self.lmd, self.without_prior))
        yield Claim(
            "e",
            "LMD's prior stops the growth of the weights, and that is worth something in MXFP4.",
            [
                Contrast("growth with prior − without, float32", [kept], [free], "weight_growth"),
                self._lost("(MXFP4 − float32) with prior − without", self.lmd, self.without_prior, mxfp4),
            ],
        )

    def _run(self, optimizer: OptimizerSettings, recipe: RecipeConfig) -> Config:
        return replace(self.base, optimizer=optimizer, recipe=recipe)

    def _lost(self, name: str, one: OptimizerSettings, other: OptimizerSettings, low: RecipeConfig) -> Contrast:
        first, second = ((self._run(each, forward("float32")), self._run(each, low)) for each in (one, other))
        return lost(name, first, second)
