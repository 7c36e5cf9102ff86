"""What LMD's settings, parameters and saved states may be, and the errors that say so."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lmd.priors import PRIORS

PARAMETERIZATIONS = ("shared", "split")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of parameters

Group = dict[str, Any]


def check_state(state_dict: object) -> None:
    """Raises ValueError for what no optimizer's state_dict gave."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError("this is no optimizer's state: a dict with `state` and `param_groups`, as state_dict() gives")


def check_whole(group: Group) -> None:
    """Raises ValueError for a setting that a group cannot have of its own."""
    for name in ("mc_samples", "nonfinite"):
        if name in group:
            raise ValueError(f"{name} is a setting of the whole optimizer, not of a group: LMD(..., {name}=...)")


def check_dtypes(group: Group) -> None:
    """Raises TypeError for a parameter of another dtype than DTYPES."""
    for p in group["params"]:
        if p.dtype not in DTYPES:
            raise TypeError(f"LMD optimizes real floating-point parameters of 16, 32 or 64 bits, not {p.dtype}")


def check_shapes(state: Mapping[str, Any], p: Tensor) -> None:
    """Raises ValueError for a state that is of another parameter than p: kernels would write beyond its memory."""
    for name, value in state.items():
        if isinstance(value, Tensor) and name != "rms" and value.shape != p.shape:
            raise ValueError(
                f"the state {name!r} has shape {tuple(value.shape)}, its parameter {tuple(p.shape)}: load the state of "
                "the same model; for a parameter that has changed its shape, delete optimizer.state[p]"
            )


def in_numbers(group: Group) -> Group:
    """The group, with numbers where settings are tensors of one element."""
    betas = group["betas"] if isinstance(group["betas"], Sequence) else ()  # what else it is, a step refuses
    if not any(isinstance(value, Tensor) for value in (*group.values(), *betas)):
        return group
    found = {name: value.item() if isinstance(value, Tensor) else value for name, value in group.items()}
    return found | {"betas": tuple(map(float, betas))}


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except (TypeError, ValueError, RuntimeError):  # for tensors of several elements, too
        return False


def check_settings(group: Group, mc_samples: int) -> None:
    """Raises ValueError for a setting out of range; called in every step, since schedules change them."""

    def require(condition: bool, name: str, what: str) -> None:
        if not condition:
            raise ValueError(f"{name} must be {what}, not {group[name]!r}")

    betas, prior, parameterization = group["betas"], group["prior"], group["parameterization"]
    for name in ("lr", "weight_decay", "noise_scale", "saturation"):
        require(_is_finite(group[name]) and group[name] >= 0.0, name, "a number, finite and at least 0")
    require(group["lr"] <= 1.0, "lr", "at most 1, a factor of e a step")
    require(group["noise_scale"] <= 4.0, "noise_scale", "at most 4, a factor of 50 a standard deviation")
    require(_is_finite(group["kappa"]) and group["kappa"] > 0.0, "kappa", "a number, finite and above 0")
    pair = isinstance(betas, Sequence) and len(betas) == 2
    require(pair and all(_is_finite(beta) and 0.0 <= beta < 1.0 for beta in betas), "betas", "two numbers in [0, 1)")
    require(group["lr"] * group["weight_decay"] < 1.0, "weight_decay", "below 1 / lr")
    require(isinstance(prior, str) and prior in PRIORS, "prior", f"one of {tuple(PRIORS)}")
    require(parameterization in PARAMETERIZATIONS, "parameterization", f"one of {PARAMETERIZATIONS}")
    for name in ("entropy", "weight_scaling"):
        require(isinstance(group[name], bool), name, "True or False")
    require(isinstance(group["seed"], int) and 0 <= group["seed"] < 2**64, "seed", "an integer of 64 bits")
    if parameterization == "shared" and not PRIORS[prior].keeps_product:
        raise ValueError(
            f"prior {prior!r} moves the product m+ m-, which the shared parameterization holds fixed: "
            "use parameterization='split', or prior='log-normal' or 'flat'"
        )
    if parameterization == "split" and mc_samples > 1:
        raise ValueError(
            "mc_samples > 1 needs parameterization='shared': the averages of g theta+ and g theta- do not both fit "
            "into the one gradient that clipping and GradScaler act on"
        )
