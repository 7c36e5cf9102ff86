"""What does each part of LMD do? Prior, weight decay, noise, parameterization, gradient scaling; both micro models.

Float32 throughout, 3 seeds, the same in every arm: equal initialization, batches and random words, so arms differ by
the setting alone and are compared seed by seed. The base is the quickstart's LMD: shared, log-normal prior, weight
decay 0.1, noise 0.05, gradients scaled by the weights, at the rate tuned for that base (quickstart_tuning); no arm has
a rate of its own, which favours the base. 29 arms, 174 runs, instead of the full factorial: every factor varies alone
around the base, and jointly with those that it could interact with:

- prior on and off, its strength, and noise: shared, weight decay {0, 0.03, 0.1, 0.3} at noise 0.05, and {0, 0.1, 0.3}
  at noise {0, 0.2}. A log-normal prior of weight decay 0 is no prior: these arms show how far weights grow without.
- kind of prior and strength: split (shared has only one), {log-normal, half-normal, exponential, constant} x weight
  decay {0.03, 0.1, 0.3}, and the flat prior, which has no strength.
- parameterization and noise: split at noise {0, 0.2}, too.
- gradient scaling: off at the base, without noise, without a prior, and in the split form.

Weight decay, so the prior, acts on tensors of two and more dimensions only, as in every other grid. Growth is to be
watched, not cut off, so the bound on the loss that ends a run is 1000 times a uniform guess: rows of rare bytes grow
unseen, and one batch that holds such bytes can cost 20 times a uniform guess and leave no trace in the next.
"""

from collections.abc import Iterator

from experiments.grids.quickstart import TASKS, TUNED
from experiments.training.config import Config
from experiments.training.optimizers import LMD, LMDSplit

STEPS, WARMUP_STEPS = 600, 60
SEEDS = (0, 1, 2)


def arms(lr: float) -> Iterator[LMD]:
    """The base first: tables compare with what comes first."""
    yield LMD(lr)
    for weight_decay in (0.0, 0.03, 0.3):
        yield LMD(lr, weight_decay)
    for noise_scale in (0.0, 0.2):
        for weight_decay in (0.1, 0.0, 0.3):
            yield LMD(lr, weight_decay, noise_scale=noise_scale)
    yield LMD(lr, weight_scaling=False)
    yield LMD(lr, weight_decay=0.0, weight_scaling=False)
    yield LMD(lr, noise_scale=0.0, weight_scaling=False)
    for prior in ("log-normal", "half-normal", "exponential", "constant"):
        for weight_decay in (0.1, 0.03, 0.3):
            yield LMDSplit(lr, weight_decay, prior=prior)
    yield LMDSplit(lr, prior="flat")
    for noise_scale in (0.0, 0.2):
        yield LMDSplit(lr, noise_scale=noise_scale)
    yield LMDSplit(lr, weight_scaling=False)


def grid() -> Iterator[Config]:
    for seed in SEEDS:
        for network, data, batch_size in TASKS:
            (rate,) = (tuned.lr for tuned in TUNED[network.name] if isinstance(tuned, LMD))
            for optimizer in arms(rate):
                yield Config(
                    model=network,
                    data=data,
                    optimizer=optimizer,
                    seed=seed,
                    steps=STEPS,
                    batch_size=batch_size,
                    warmup_steps=WARMUP_STEPS,
                    validate_every=50,
                    checkpoint_every=100,
                    divergence_factor=1000.0,
                )
