"""The equations of Log-Normal Multiplicative Dynamics, one pure function each (derivation: lmd/README.md).

A weight is w = theta+ - theta-, with theta+- = m+- exp(sigma eps+-) and eps+- standard normal. The medians m+- are
written as m+- = center exp(+-a): `center` = sqrt(m+ m-) is one number a tensor in the shared parameterization and a
tensor in the split one, `a` is half the log ratio of the medians. The parameter tensor holds the posterior mean E[w]
= 2 center exp(sigma^2 / 2) sinh(a). Every function takes and returns tensors of one shape and dtype and changes none;
a NaN stays a NaN.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lmd.priors import Prior

FLOOR = 0.1  # the least size of a weight that a tensor without a scale of its own is made for

Noise = tuple[Tensor, Tensor]
Center = float | Tensor


def half_log_ratio(mean: Tensor, center: Center, noise_scale: float) -> Tensor:
    """a = asinh(mean / (2 center exp(sigma^2 / 2))), the inverse of `posterior_mean`."""
    return torch.asinh(mean / (2.0 * math.exp(0.5 * noise_scale**2) * center))


def posterior_mean(a: Tensor, center: Center, noise_scale: float) -> Tensor:
    """E[w] = 2 center exp(sigma^2 / 2) sinh(a)."""
    return torch.sinh(a) * (2.0 * math.exp(0.5 * noise_scale**2) * center)


def multipliers(a: Tensor, center: Center, noise_scale: float, noise: Noise | None) -> tuple[Tensor, Tensor]:
    """(theta+, theta-) = center exp(+-a + sigma eps+-).

    Their expectations, center exp(+-a + sigma^2 / 2), where `noise` is None.
    """
    if noise is None:
        log_plus = log_minus = torch.full_like(a, 0.5 * noise_scale**2)
    else:
        log_plus, log_minus = noise_scale * noise[0], noise_scale * noise[1]
    return torch.exp(a + log_plus) * center, torch.exp(log_minus - a) * center


def sample(mean: Tensor, center: Center, noise_scale: float, noise: Noise) -> Tensor:
    """w = theta+ - theta-, one draw from the posterior of mean `mean`."""
    plus, minus = multipliers(half_log_ratio(mean, center, noise_scale), center, noise_scale, noise)
    return plus - minus


def total(mean: Tensor, center: Center, noise_scale: float, noise: Noise | None) -> Tensor:
    """theta+ + theta-, what the shared parameterization scales a gradient by; its expectation where `noise` is None."""
    plus, minus = multipliers(half_log_ratio(mean, center, noise_scale), center, noise_scale, noise)
    return plus + minus


def momentum(v: Tensor, gradient: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """(u, v'): u = beta1 v + (1 - beta1) G decides the step, v' = beta2 v + (1 - beta2) G is kept."""
    beta1, beta2 = betas
    return beta1 * v + (1.0 - beta1) * gradient, beta2 * v + (1.0 - beta2) * gradient


def direction(u: Tensor, full: Center) -> Tensor:
    """clip(u / full, -1, 1): a step is proportional to u below `full` and has length 1 from there on.

    sign(u) where `full` is not a positive finite number. `full`: saturation times the root mean square that u had in
    its tensor in the step before.
    """
    full = torch.as_tensor(full, dtype=u.dtype, device=u.device)
    usable = torch.isfinite(full) & (full > 0.0)
    return torch.where(usable, (u / torch.where(usable, full, 1.0)).clamp(-1.0, 1.0), torch.sign(u))


def root_mean_square(*us: Tensor) -> Tensor:
    """Over the elements of all `us`, in their dtype; NaN where there are none."""
    return torch.stack([u.square().mean() for u in us]).mean().sqrt()


class Shared(NamedTuple):
    """What a step of the shared parameterization leaves: the posterior mean and the momentum; and the u it went by."""

    mean: Tensor
    v: Tensor
    us: tuple[Tensor]


def step_shared(
    mean: Tensor,
    v: Tensor,
    gradient: Tensor,
    m0: Center,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    noise_scale: float,
    noise: Noise | None,
    prior: Prior,
    weight_scaling: bool = True,
    full: Center = 0.0,
    prior_a: Center = 0.0,
) -> Shared:
    """One step with m+ m- = m0^2: G = g (theta+ + theta-), a' = a - lr (direction(u) + weight_decay R(a - prior_a)).

    full: of `direction`; 0 is the sign. prior_a: the prior's medians are m0 exp(+-prior_a).

    Without `weight_scaling` G = 2 g m0: the multipliers' center in their place, one number a tensor, so that the
    direction is that of the plain gradient's momentum.

    `gradient` is dl/dw at the sample that `noise` gives, or at the mean where `noise` is None. Needs a prior with
    `keeps_product`: for those R is odd, so m+ and m- move by opposite factors. u = 0 moves nothing but the decay.
    """
    a = half_log_ratio(mean, m0, noise_scale)
    plus, minus = multipliers(a, m0, noise_scale, noise) if weight_scaling else (m0, m0)
    u, v = momentum(v, gradient * (plus + minus), betas)
    a = a - lr * (direction(u, full) + weight_decay * prior.regularizer(a - prior_a, noise_scale))
    return Shared(posterior_mean(a, m0, noise_scale), v, (u,))


class Split(NamedTuple):
    """What a step of the split parameterization leaves: the mean, log(center / m0), two momenta; and its u+-."""

    mean: Tensor
    log_center: Tensor
    v_plus: Tensor
    v_minus: Tensor
    us: tuple[Tensor, Tensor]


def step_split(
    mean: Tensor,
    log_center: Tensor,
    v_plus: Tensor,
    v_minus: Tensor,
    gradient: Tensor,
    m0: Center,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    noise_scale: float,
    noise: Noise | None,
    prior: Prior,
    entropy: bool,
    weight_scaling: bool = True,
    full: Center = 0.0,
    prior_a: Center = 0.0,
) -> Split:
    """One EG+- step: G+- = +-g theta+-, log m+-' = log m+- - lr (direction(u+-) + weight_decay R(m+-)).

    Without `weight_scaling` G+- = +-g m0, as in `step_shared`.

    The medians are carried as (mean, log_center = log(sqrt(m+ m-) / m0)): log(m+- / m0) = log_center +- a, so the
    increments of the two logarithms, not the logarithms, are added and subtracted, and a small a keeps its digits.
    """
    center = m0 * torch.exp(log_center)
    a = half_log_ratio(mean, center, noise_scale)
    plus, minus = multipliers(a, center, noise_scale, noise) if weight_scaling else (m0, m0)
    u_plus, v_plus = momentum(v_plus, gradient * plus, betas)
    u_minus, v_minus = momentum(v_minus, -gradient * minus, betas)
    off = a - prior_a
    up = -lr * (direction(u_plus, full) + weight_decay * prior.regularizer(log_center + off, noise_scale, entropy))
    down = -lr * (direction(u_minus, full) + weight_decay * prior.regularizer(log_center - off, noise_scale, entropy))
    a = a + 0.5 * (up - down)
    log_center = log_center + 0.5 * (up + down)
    mean = posterior_mean(a, m0 * torch.exp(log_center), noise_scale)
    return Split(mean, log_center, v_plus, v_minus, (u_plus, u_minus))


class Start(NamedTuple):
    """Where the prior and the shared parameterization stand: medians m0 exp(+-prior_a), m+ m- = m0^2."""

    m0: float
    prior_a: float


def start(weights: Tensor, kappa: float) -> Start:
    """m0 = kappa s, with s the standard deviation of the initial weights, whatever their mean; and a prior about 0.

    A tensor that hardly varies about its mean (s < mean |w| / 2: LayerNorm gains, zero biases, a single number) has
    no such scale, and kappa does not enter. There m0 = max(mean |w|, FLOOR) / 2, FLOOR being 0.1, for matrices at most
    1 / sqrt(fan-in); and the prior is about the initial mean: a gain is drawn to 1, not to 0. The sums run in float64
    over rows of fixed length, so the thread count does not enter. Raises ValueError for a NaN or infinite weight.
    """
    count = weights.numel()
    floor = FLOOR if weights.ndim < 2 or count == 0 else min(FLOOR, (count / weights.shape[0]) ** -0.5)
    if count == 0:
        return Start(0.5 * floor, 0.0)
    flat = weights.detach().reshape(-1).double()
    mean = _total(flat) / count
    deviation = math.sqrt(_total((flat - mean).square()) / count)
    magnitude = _total(flat.abs()) / count
    if not math.isfinite(magnitude):
        raise ValueError("initial weights must be finite: LMD takes its scale from them")
    if deviation > 0.0 and deviation >= 0.5 * magnitude:
        return Start(kappa * deviation, 0.0)
    m0 = 0.5 * max(magnitude, floor)
    return Start(m0, math.asinh(mean / (2.0 * m0)))


def _total(x: Tensor) -> float:
    """The sum of a vector, in an order that the thread count does not change: rows of 4096 first, then their sums."""
    while x.numel() > 4096:
        whole = x.numel() // 4096 * 4096
        x = torch.cat((x[:whole].view(-1, 4096).sum(dim=1), x[whole:]))
    return float(x.sum())
