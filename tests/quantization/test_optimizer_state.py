"""An optimizer whose parameters and state are kept in narrow formats."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lmd import LMD
from lpsim import Key, Quantizer, Rounding, formats
from lpsim.quantization.optimizer_state import store

FP8 = Quantizer(formats.get("float8_e4m3fn"))
BF16 = Quantizer(formats.get("bfloat16"))
STOCHASTIC = Quantizer(formats.get("bfloat16"), rounding=Rounding.STOCHASTIC)


def parameter(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.clone())


def test_sgd_with_momentum_written_out() -> None:
    w0, gradients = torch.randn(40), torch.randn(3, 40)
    w = parameter(w0)
    optimizer = torch.optim.SGD([w], lr=0.1, momentum=0.9)
    store(optimizer, {"parameters": BF16, "momentum_buffer": FP8})
    expected, momentum = BF16.quantize(w0), torch.zeros(40)
    assert torch.equal(w.detach(), expected)
    for g in gradients:
        w.grad = g.clone()
        optimizer.step()
        momentum = momentum * 0.9 + g
        expected = BF16.quantize(expected.add(momentum, alpha=-0.1))  # with the momentum before it is stored
        momentum = FP8.quantize(momentum)
        assert torch.equal(w.detach(), expected)
        assert torch.equal(optimizer.state[w]["momentum_buffer"], momentum)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda p: torch.optim.AdamW(p, 0.01), ["exp_avg", "exp_avg_sq"]),
        (lambda p: torch.optim.AdamW(p, 0.01, fused=True), ["exp_avg"]),
        (lambda p: torch.optim.Adagrad(p, 0.01), ["sum"]),
        (lambda p: LMD(p, lr=0.01, noise_scale=0.0, seed=0), ["momentum"]),
    ],
    ids=["adamw", "fused", "adagrad", "lmd"],
)
def test_any_state_of_any_optimizer(make: Callable[..., torch.optim.Optimizer], names: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 4)
    optimizer = make(model.parameters())
    model(torch.randn(3, 8)).sum().backward()
    optimizer.step()
    known = {key for state in optimizer.state.values() for key, t in state.items() if isinstance(t, Tensor) and t.dim()}
    names = [name for name in names if name in known] or sorted(known)[:1]
    store(optimizer, dict.fromkeys(names, BF16))
    optimizer.step()
    for state in optimizer.state.values():
        for name in names:
            assert torch.equal(state[name], BF16.quantize(state[name]))
    assert not torch.equal(model.weight, BF16.quantize(model.weight))


def test_stochastic_rounding_is_keyed_by_tensor_and_step() -> None:
    def run(steps: int, first: int = 0, start: Tensor | None = None) -> Tensor:
        w = parameter(torch.full((64,), 1.0) if start is None else start)
        optimizer = torch.optim.SGD([w], lr=1.0)
        stored = store(optimizer, {"parameters": STOCHASTIC}, seed=9)
        stored.step = first
        for _ in range(steps):
            w.grad = torch.full((64,), -1e-3)
            optimizer.step()
        return w.detach()

    once = STOCHASTIC.quantize(torch.full((64,), 1.001), key=Key(9, zlib.crc32(b"optimizer/0/0/parameters"), 1))
    assert torch.equal(run(1), once)
    assert 0 < (run(1) != 1).sum() < 64  # an eighth of the spacing: some move
    assert torch.equal(run(3), run(2, first=1, start=run(1)))


def test_swallowed_updates_are_counted() -> None:
    w = parameter(torch.ones(10))
    optimizer = torch.optim.SGD([w], lr=1.0)
    stored = store(optimizer, {"parameters": BF16})
    assert math.isnan(stored.swallowed)
    w.grad = torch.tensor([-1e-3] * 6 + [-0.5] * 2 + [0.0] * 2)
    optimizer.step()
    assert stored.swallowed == 6 / 8
    stored.remove()
    optimizer.step()
    assert not torch.equal(w.detach(), BF16.quantize(w.detach()))


def test_bad_arguments() -> None:
    w = parameter(torch.ones(3))
    optimizer = torch.optim.SGD([w], lr=1.0)
    with pytest.raises(TypeError, match="must be a Quantizer"):
        store(optimizer, {"parameters": formats.get("bfloat16")})  # type: ignore[dict-item]
    store(optimizer, {"exp_avg": BF16})
    w.grad = torch.ones(3)
    with pytest.raises(ValueError, match="no parameter has a state tensor 'exp_avg'"):
        optimizer.step()
