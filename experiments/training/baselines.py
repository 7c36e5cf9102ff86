"""Sign and multiplicative optimizers to compare LMD with: Lion, Signum, Madam. State is one tensor a parameter.

Written from the published equations because no package in common use holds all three. Gradients are read, never
changed.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Parameters = Iterable[Tensor] | Iterable[dict[str, Any]]


class _OneStateOptimizer(Optimizer):
    """The loop over groups and parameters; a subclass gives the state's first value and the update of one parameter."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Returns the closure's loss, or None without a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if not state:
                        state.update(self.initial_state(parameter, group))
                    self.update(parameter, parameter.grad, state, group)
        return loss

    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return {"momentum": torch.zeros_like(parameter)}

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        raise NotImplementedError


class Lion(_OneStateOptimizer):
    """w <- (1 - lr λ) w - lr sign(β₁ m + (1 - β₁) g);  m <- β₂ m + (1 - β₂) g.

    Chen et al. 2023, arXiv:2302.06675, algorithm 2.
    """

    def __init__(
        self, params: Parameters, lr: float, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        momentum = state["momentum"]
        direction = torch.lerp(gradient, momentum, beta1).sign_()
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])
        momentum.lerp_(gradient, 1 - beta2)


class Signum(_OneStateOptimizer):
    """m <- β m + (1 - β) g;  w <- (1 - lr λ) w - lr sign(m).

    Bernstein et al. 2018, arXiv:1802.04434, algorithm 2; the decay is decoupled.
    """

    def __init__(self, params: Parameters, lr: float, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        momentum = state["momentum"].lerp_(gradient, 1 - group["momentum"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(momentum.sign(), alpha=group["lr"])


class Madam(_OneStateOptimizer):
    """w <- w exp(-lr sign(w) clamp(g / g_rms, ±g_bound)), then clamped to ±w_bound.

    Bernstein et al. 2020, arXiv:2006.14560.
    g_rms is the bias-corrected root of the running mean of g²; w_bound is `clamp` times the initial root mean square of
    the tensor, None for no bound. Signs never change, and a weight that is zero stays zero: its update is zero.
    """

    def __init__(
        self, params: Parameters, lr: float, beta: float = 0.999, clamp: float | None = 3.0, g_bound: float = 10.0
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "clamp": clamp, "g_bound": g_bound})

    def initial_state(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = {"step": 0, "mean_square": torch.zeros_like(parameter)}
        if group["clamp"] is not None:
            state["bound"] = group["clamp"] * parameter.square().mean().sqrt().item()
        return state

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["step"] += 1
        beta = group["beta"]
        mean_square = state["mean_square"].mul_(beta).addcmul_(gradient, gradient, value=1 - beta)
        rms = (mean_square / (1 - beta ** state["step"])).sqrt_()
        relative = torch.where(rms > 0, gradient / rms, 0).clamp_(-group["g_bound"], group["g_bound"])
        parameter.mul_(torch.exp_(relative.mul_(parameter.sign()).mul_(-group["lr"])))
        if "bound" in state:
            parameter.clamp_(-state["bound"], state["bound"])
