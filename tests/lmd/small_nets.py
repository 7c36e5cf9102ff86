"""What the tests of LMD share: small nets, how to train them, and when states and weights are equal."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmd import LMD

BACKENDS = pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
KINDS = pytest.mark.parametrize("kind", ["shared", "split"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)


def make_net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 17), nn.LayerNorm(17), nn.GELU(), nn.Linear(17, 1)).to(dtype)


def make_batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(32, 6, generator=generator)
    return x.to(dtype), (x[:, :1] * x[:, 1:2]).to(dtype)


def train(net: nn.Module, optimizer: LMD, steps: range, loss_scale: float = 1.0) -> list[float]:
    dtype, losses = next(net.parameters()).dtype, []
    for step in steps:
        x, y = make_batch(step, dtype)
        optimizer.zero_grad()
        with optimizer.sampled_params():
            loss = (net(x) - y).square().mean()
            (loss * loss_scale).backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def values(net: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in net.parameters()]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(left, right, strict=True))


def same(left: Any, right: Any) -> bool:
    """Equality of state dicts, tensors bit for bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return torch.equal(left, right) and left.dtype == right.dtype if isinstance(left, Tensor) else left == right


def one(value: Any = 1.0, **settings: Any) -> tuple[nn.Parameter, LMD]:
    p = nn.Parameter(torch.as_tensor(value).clone())
    return p, LMD([p], **settings)
