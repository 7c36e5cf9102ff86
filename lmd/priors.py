"""The priors on theta = m exp(sigma eps), as data, and the regularizer R(m) that each gives (lmd/README.md, "Priors").

R is the derivative of KL(q || p) in log m over what `weight_decay` stands for; it is exact, nothing is sampled. All
five are one formula: for p(theta) ~ exp(-(theta / m0)^power / power) the cross-entropy gives the moment E[(theta /
m0)^power], for a log-normal p it is linear in log m, and the entropy of q gives -1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prior:
    """R(d) = linear d + [power > 0] exp(power d + power^2 sigma^2 / 2) + constant - entropy, with d = log(m / m0).

    m0 is the prior's median (log-normal) or scale (the others).
    """

    linear: float = 0.0
    power: float = 0.0
    constant: float = 0.0
    entropy: float = 0.0

    @property
    def keeps_product(self) -> bool:
        """Whether R is odd in d: then m+ and m- move by opposite factors and the shared parameterization can use it."""
        return self.power == self.constant == self.entropy == 0.0

    def offset(self, keep_entropy: bool) -> float:
        """What R adds to its terms in d; the entropy's -1 is dropped where `keep_entropy` is False."""
        return self.constant - (self.entropy if keep_entropy else 0.0)

    def regularizer(self, log_ratio: Tensor, noise_scale: float, keep_entropy: bool = True) -> Tensor:
        """R at d = `log_ratio`, of its shape and dtype. NaN in, NaN out; +inf where the moment overflows."""
        value = self.linear * log_ratio + self.offset(keep_entropy)
        if self.power:
            value = value + torch.exp(self.power * log_ratio + 0.5 * (self.power * noise_scale) ** 2)
        return value


PRIORS: dict[str, Prior] = {
    # log-normal(log m0, s0^2), weight_decay = lambda / s0^2: geometric decay towards m0
    "log-normal": Prior(linear=1.0),
    # half-normal of scale m0, weight_decay = lambda: an L2 penalty on theta, R = (m / m0)^2 e^(2 sigma^2) - 1
    "half-normal": Prior(power=2.0, entropy=1.0),
    # exponential of mean m0, weight_decay = lambda: an L1 penalty on theta, R = (m / m0) e^(sigma^2 / 2) - 1
    "exponential": Prior(power=1.0, entropy=1.0),
    # improper, uniform in log theta: the plain multiplicative update, under which weights grow
    "flat": Prior(),
    # no proper prior: both medians shrink at one rate, AdamW's decoupled decay seen multiplicatively
    "constant": Prior(constant=1.0),
}
