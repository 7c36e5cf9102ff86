"""The optimizers that a run can use: settings that build one, and the table OPTIMIZERS of their names.

A new one is a class here and an entry; one of your own is a subclass of `OptimizerSettings` in a grid's file, with a
`name` and `make`.

Every optimizer but LMD gets the same two parameter groups: tensors of two and more dimensions with its weight decay,
and biases and gains without, since a decay toward zero would shrink a LayerNorm's gain of one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn as nn
from torch.optim import Optimizer

from experiments.training import baselines
from experiments.training.settings import Settings
from lmd import LMD as LMDOptimizer
from lmd import Combined, for_model
from lmd.division import OTHERS_DEFAULTS
from lmd.optimizer import LR, NOISE_SCALE, WEIGHT_DECAY


@dataclass(frozen=True)
class OptimizerSettings(Settings):
    """Base of an optimizer's settings. lr: the learning rate at the peak of the schedule."""

    tag: ClassVar[str] = "name"
    name: ClassVar[str]

    lr: float
    weight_decay: float = 0.1

    def check(self) -> None:
        self.require(self.lr > 0, f"lr must be positive, is {self.lr}")
        self.require(self.weight_decay >= 0, f"weight_decay must not be negative, is {self.weight_decay}")
        for beta in (*getattr(self, "betas", ()), getattr(self, "momentum", 0.0), getattr(self, "beta", 0.0)):
            self.require(0 <= beta < 1, f"betas and momentum must lie in [0, 1), got {beta}")

    def build(self, model: nn.Module, seed: int) -> Optimizer:
        """The optimizer of all parameters of `model`; `seed` keys its noise, where it has any."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return self.make([group for group in groups if group["params"]], seed)

    def make(self, groups: list[dict[str, Any]], seed: int) -> Optimizer:
        """The optimizer of these parameter groups at rate `lr`; its state_dict holds all that a resumed run needs."""
        raise NotImplementedError


@dataclass(frozen=True)
class AdamW(OptimizerSettings):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101); torch's fused implementation."""

    name: ClassVar[str] = "adamw"

    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8

    def make(self, groups: list[dict[str, Any]], seed: int) -> Optimizer:
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


@dataclass(frozen=True)
class LMD(OptimizerSettings):
    """Log-Normal Multiplicative Dynamics, with one state tensor for each parameter; lmd.LMD explains the settings."""

    name: ClassVar[str] = "lmd"
    parameterization: ClassVar[str] = "shared"

    lr: float = LR
    weight_decay: float = WEIGHT_DECAY
    betas: tuple[float, float] = (0.9, 0.99)
    noise_scale: float = NOISE_SCALE
    prior: str = "log-normal"
    entropy: bool = True
    weight_scaling: bool = True
    saturation: float = 0.1
    kappa: float = 3.0
    mc_samples: int = 1

    def check(self) -> None:
        super().check()
        self.make([{"params": [torch.zeros(1, 1, requires_grad=True)], "weight_decay": self.weight_decay}], seed=0)

    def build(self, model: nn.Module, seed: int) -> Optimizer:
        """All parameters in one group: LMD's prior draws biases and gains to their initial values, not to zero."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        return self.make([{"params": parameters, "weight_decay": self.weight_decay}], seed)

    def make(self, groups: list[dict[str, Any]], seed: int) -> Optimizer:
        return LMDOptimizer(groups, self.lr, mc_samples=self.mc_samples, seed=seed, **self.settings())

    def settings(self) -> dict[str, Any]:
        """LMD's own settings, which a group may have."""
        names = ("betas", "weight_decay", "noise_scale", "prior", "entropy", "weight_scaling", "saturation", "kappa")
        return {name: getattr(self, name) for name in (*names, "parameterization")}


@dataclass(frozen=True)
class LMDSplit(LMD):
    """LMD in the EG± form: both medians and both momenta are stored."""

    name: ClassVar[str] = "lmd-split"
    parameterization: ClassVar[str] = "split"


@dataclass(frozen=True)
class LMDWithAdamW(LMD):
    """LMD for the tensors of two and more dimensions, AdamW (lr `adamw_lr`, no decay) for biases and gains."""

    name: ClassVar[str] = "lmd-adamw"

    adamw_lr: float = 0.003

    def check(self) -> None:
        super().check()
        self.require(self.adamw_lr > 0, f"adamw_lr must be positive, is {self.adamw_lr}")

    def make(self, groups: list[dict[str, Any]], seed: int) -> Optimizer:
        matrices = [{**group, "params": [p for p in group["params"] if p.ndim >= 2]} for group in groups]
        vectors = [p for group in groups for p in group["params"] if p.ndim < 2]
        lmd = super().make([group for group in matrices if group["params"]], seed)
        assert isinstance(lmd, LMDOptimizer)
        adamw = AdamW(self.adamw_lr, weight_decay=0.0, betas=self.betas)
        return Combined(lmd, *([adamw.make([{"params": vectors, "weight_decay": 0.0}], seed)] if vectors else []))


@dataclass(frozen=True)
class LMDForModel(LMD):
    """`lmd.for_model`: LMD for hidden matrices, AdamW (lr `others_lr`) for all other parameters.

    others_weight_decay: AdamW's, of embeddings, heads and tables; its vectors have none.
    """

    name: ClassVar[str] = "lmd-for-model"
    later: ClassVar[Mapping[str, Any]] = {"others_weight_decay": 0.0}

    others_lr: float = OTHERS_DEFAULTS["lr"]
    others_weight_decay: float = OTHERS_DEFAULTS["weight_decay"]

    def check(self) -> None:
        super().check()
        self.require(self.others_lr > 0, f"others_lr must be positive, is {self.others_lr}")
        self.require(
            self.others_weight_decay >= 0, f"others_weight_decay must not be negative, is {self.others_weight_decay}"
        )
        self.require(self.mc_samples == 1, "mc_samples must be 1 where another optimizer takes part")

    def build(self, model: nn.Module, seed: int) -> Optimizer:
        settings = {**self.settings(), "others_lr": self.others_lr, "others_weight_decay": self.others_weight_decay}
        return for_model(model, self.lr, seed=seed, **settings)


@dataclass(frozen=True)
class SGD(OptimizerSettings):
    """Stochastic gradient descent with momentum; the decay is torch's, added to the gradient."""

    name: ClassVar[str] = "sgd"

    momentum: float = 0.9

    def make(self, groups: list[dict[str, Any]], seed: int) -> Optimizer:
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum)


@dataclass(frozen=True)
class Lion(OptimizerSettings):
    """The sign of a momentum (Chen et al. 2023, arXiv:2302.06675)."""

    name: ClassVar[str] = "lion"

    betas: tuple[float, float] = (0.9, 0.99)

    def make(self, groups: list[dict[str, Any]], seed: int) -> Optimizer:
        return baselines.Lion(groups, lr=self.lr, betas=self.betas)


@dataclass(frozen=True)
class Signum(OptimizerSettings):
    """The sign of the averaged gradient (Bernstein et al. 2018, arXiv:1802.04434)."""

    name: ClassVar[str] = "signum"

    momentum: float = 0.9

    def make(self, groups: list[dict[str, Any]], seed: int) -> Optimizer:
        return baselines.Signum(groups, lr=self.lr, momentum=self.momentum)


@dataclass(frozen=True)
class Madam(OptimizerSettings):
    """Multiplicative updates in Adam's manner (Bernstein et al. 2020, arXiv:2006.14560).

    Weights are kept small by a clamp in place of a weight decay, which must be 0.
    """

    name: ClassVar[str] = "madam"
    clamp: ClassVar[float | None] = 3.0

    weight_decay: float = 0.0
    beta: float = 0.999

    def check(self) -> None:
        super().check()
        self.require(self.weight_decay == 0, "Madam has no weight decay; it bounds weights by its clamp")

    def make(self, groups: list[dict[str, Any]], seed: int) -> Optimizer:
        return baselines.Madam(groups, lr=self.lr, beta=self.beta, clamp=self.clamp)


@dataclass(frozen=True)
class MadamUnclamped(Madam):
    """Madam without the bound on its weights, to see them grow."""

    name: ClassVar[str] = "madam-unclamped"
    clamp: ClassVar[float | None] = None


OPTIMIZERS: dict[str, type[Settings]] = {
    entry.name: entry
    for entry in (AdamW, LMD, LMDSplit, LMDWithAdamW, LMDForModel, SGD, Lion, Signum, Madam, MadamUnclamped)
}
