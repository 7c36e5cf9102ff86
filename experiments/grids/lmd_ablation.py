"""What does each part of LMD do? Prior, weight decay, noise, parameterization, gradient scaling; both micro models.

Float32 throughout, 3 seeds, the same in every arm: equal initialization, batches and random words, so arms differ by
the setting alone and are compared seed by seed. The base is what LMD's defaults were when this was asked: shared,
log-normal prior, weight decay 0.1, kappa 1, noise 0.05, gradients scaled by the weights, the sign for a step, at the
rates tuned for that base then; no arm has a rate of its own, which favours the base. 29 arms, 174 runs,
instead of the full factorial: every factor varies alone around the base, and jointly with those that it could
interact with:

- prior on and off, its strength, and noise: shared, weight decay {0, 0.03, 0.1, 0.3} at noise 0.05, and {0, 0.1, 0.3}
  at noise {0, 0.2}. A log-normal prior of weight decay 0 is no prior: these arms show how far weights grow without.
- kind of prior and strength: split (shared has only one), {log-normal, half-normal, exponential, constant} x weight
  decay {0.03, 0.1, 0.3}, and the flat prior, which has no strength.
- parameterization and noise: split at noise {0, 0.2}, too.
- gradient scaling: off at the base, without noise, without a prior, and in the split form.

The prior acts on biases and gains, too, about their initial values; for the findings of 2026-11-22 it acted on tensors
of two and more dimensions only. Growth is to be watched, not cut off, so the bound on the loss that ends a run is 1000
times a uniform guess: rows of rare bytes grow unseen, and one batch that holds such bytes can cost 20 times a uniform
guess and leave no trace in the next.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

from experiments.grids.quickstart import TASKS
from experiments.training.config import Config
from experiments.training.optimizers import LMD, LMDSplit

RATES = {"gpt2-micro": 0.03, "vit-micro": 0.0075}
BASE: dict[str, Any] = {"weight_decay": 0.1, "kappa": 1.0, "saturation": 0.0}
STEPS, WARMUP_STEPS = 600, 60
SEEDS = (0, 1, 2)


def arms(lr: float) -> Iterator[LMD]:
    """The base first: tables compare with what comes first."""
    shared, split = (partial(kind, **{"lr": lr, **BASE}) for kind in (LMD, LMDSplit))
    yield shared()
    for weight_decay in (0.0, 0.03, 0.3):
        yield shared(weight_decay=weight_decay)
    for noise_scale in (0.0, 0.2):
        for weight_decay in (0.1, 0.0, 0.3):
            yield shared(weight_decay=weight_decay, noise_scale=noise_scale)
    yield shared(weight_scaling=False)
    yield shared(weight_decay=0.0, weight_scaling=False)
    yield shared(noise_scale=0.0, weight_scaling=False)
    for prior in ("log-normal", "half-normal", "exponential", "constant"):
        for weight_decay in (0.1, 0.03, 0.3):
            yield split(weight_decay=weight_decay, prior=prior)
    yield split(prior="flat")
    for noise_scale in (0.0, 0.2):
        yield split(noise_scale=noise_scale)
    yield split(weight_scaling=False)


def grid() -> Iterator[Config]:
    for seed in SEEDS:
        for network, data, batch_size in TASKS:
            for optimizer in arms(RATES[network.name]):
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
