"""What the weights of a model look like, in a few numbers: their size, their tails, and what a block's scale sees."""

import math

import torch
from torch import Tensor, nn

BLOCK = 32  # elements that share a scale in the MX formats


@torch.no_grad()
def weight_statistics(model: nn.Module) -> dict[str, float]:
    """Size, tails and crest of a model's weights.

    Over all parameters: the 2-norm, the largest and the mean magnitude. Over those of two or more dimensions, each
    weighted by its size: `kurtosis`, the fourth moment over the square of the second (3 for normal numbers), and
    `crest`, the mean over blocks of 32 along the last axis of the largest magnitude over the root mean square (about
    2.3 for normal numbers). A tensor of zeros has no shape and is left out; where none is left, both are NaN.
    """
    parameters = list(model.parameters())
    magnitudes = sum(p.abs().sum(dtype=torch.float64).item() for p in parameters)
    tensors = [p.double() for p in parameters if p.ndim >= 2 and p.any()]
    return {
        "norm": math.sqrt(sum(p.double().square().sum().item() for p in parameters)),
        "max": max(p.abs().max().item() for p in parameters),
        "mean_abs": magnitudes / sum(p.numel() for p in parameters),
        "kurtosis": _mean(tensors, [_kurtosis(p) for p in tensors]),
        "crest": _mean(tensors, [_crest(p) for p in tensors]),
    }


def _mean(tensors: list[Tensor], values: list[float]) -> float:
    sizes = [p.numel() for p in tensors]
    return sum(size * value for size, value in zip(sizes, values, strict=True)) / sum(sizes) if sizes else math.nan


def _kurtosis(p: Tensor) -> float:
    square = p.square()
    return (square.square().mean() / square.mean().square()).item()


def _crest(p: Tensor) -> float:
    """The last block of a row may be shorter; blocks of zeros are left out."""
    rows = p.reshape(-1, p.shape[-1])
    crests = []
    for block in rows.split(BLOCK, dim=1):
        rms = block.square().mean(dim=1).sqrt()
        crests.append((block.abs().amax(dim=1) / rms)[rms > 0])
    return torch.cat(crests).mean().item()
