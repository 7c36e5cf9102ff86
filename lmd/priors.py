"""The priors on a multiplicative weight and their regularizers R(m) (derivation: lmd/README.md, "Priors").

With theta = m exp(sigma eps), R is the derivative of KL(q || p) in log m, divided by what `weight_decay` stands for.
All are exact; none is sampled. `log_ratio` is log(m / m0), where m0 is the prior's median or scale; `entropy` is the
constant c that the entropy of q contributes: 1 for the exact derivative, 0 to drop it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Regularizer = Callable[[Tensor, float, float], Tensor]


@dataclass(frozen=True)
class Prior:
    """`regularizer(log_ratio, noise_scale, entropy)` is R(m), of log_ratio's shape. NaN in, NaN out; +inf where exp
    overflows.

    `keeps_product`: with opposite signs of the two updates, the product m+ m- = m0**2 stays where it is, which is
    what the shared parameterization needs.
    """

    regularizer: Regularizer
    keeps_product: bool


def log_normal(log_ratio: Tensor, noise_scale: float, entropy: float) -> Tensor:
    """log(m / m0), for p = log-normal(log m0, s0^2) and weight_decay = lambda / s0^2: geometric decay towards m0."""
    return log_ratio


def half_normal(log_ratio: Tensor, noise_scale: float, entropy: float) -> Tensor:
    """(m / m0)^2 e^(2 sigma^2) - c, for p = half-normal of scale m0, weight_decay = lambda: an L2 penalty on theta."""
    return torch.exp(2.0 * (log_ratio + noise_scale**2)) - entropy


def exponential(log_ratio: Tensor, noise_scale: float, entropy: float) -> Tensor:
    """(m / m0) e^(sigma^2 / 2) - c, for p = exponential of mean m0, weight_decay = lambda: an L1 penalty on theta."""
    return torch.exp(log_ratio + 0.5 * noise_scale**2) - entropy


def flat(log_ratio: Tensor, noise_scale: float, entropy: float) -> Tensor:
    """0: the plain multiplicative update, under which weights grow."""
    return torch.zeros_like(log_ratio)


def constant(log_ratio: Tensor, noise_scale: float, entropy: float) -> Tensor:
    """1: both medians shrink at one rate, AdamW's decoupled decay seen multiplicatively. No proper prior has it."""
    return torch.ones_like(log_ratio)


PRIORS: dict[str, Prior] = {
    "log-normal": Prior(log_normal, keeps_product=True),
    "half-normal": Prior(half_normal, keeps_product=False),
    "exponential": Prior(exponential, keeps_product=False),
    "flat": Prior(flat, keeps_product=True),
    "constant": Prior(constant, keeps_product=False),
}
