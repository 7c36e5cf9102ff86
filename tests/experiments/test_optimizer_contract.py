"""One contract for every optimizer of the table. Exceptions are fields of an entry."""

import copy
import io
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from experiments.training.models.gpt2 import MICRO as GPT2_MICRO
from experiments.training.optimizers import (
    LMD,
    OPTIMIZERS,
    SGD,
    AdamW,
    Lion,
    LMDForModel,
    LMDSplit,
    LMDWithAdamW,
    Madam,
    MadamUnclamped,
    OptimizerSettings,
    Signum,
)

STEPS = 200


@dataclass(frozen=True)
class Entry:
    """settings: as in a config, with a rate that suits the convex problem."""

    settings: OptimizerSettings
    crosses_zero: bool = True  # a weight can change its sign
    decays: bool = True  # has a weight decay toward zero
    reached: float = 1e-2  # of the initial loss, on the convex problem


ENTRIES = [
    Entry(AdamW(lr=0.1, weight_decay=0.0)),
    Entry(LMD(lr=0.1, weight_decay=0.0)),
    Entry(LMD(lr=0.1, weight_decay=0.0, noise_scale=0.0)),
    Entry(LMDSplit(lr=0.1, weight_decay=0.0)),
    Entry(LMDWithAdamW(lr=0.1, weight_decay=0.0)),
    Entry(LMDForModel(lr=0.1, weight_decay=0.0)),
    Entry(SGD(lr=0.1, weight_decay=0.0)),
    Entry(Lion(lr=0.05, weight_decay=0.0)),
    Entry(Signum(lr=0.05, weight_decay=0.0)),
    Entry(Madam(lr=0.05), crosses_zero=False, decays=False),
    Entry(MadamUnclamped(lr=0.05), crosses_zero=False, decays=False),
]
every_optimizer = pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: f"{e.settings.name}-{ENTRIES.index(e)}")


def make(entry: Entry, *parameters: nn.Parameter, weight_decay: float | None = None) -> Optimizer:
    """The optimizer of a model that holds these parameters."""
    decay = entry.settings.weight_decay if weight_decay is None else weight_decay
    return replace(entry.settings, weight_decay=decay).build(nn.ParameterList(parameters), seed=0)


class Regression:
    """mean |x w - x target|² in `dtype`: convex, its minimum 0 at the target."""

    def __init__(self, entry: Entry, dtype: torch.dtype = torch.float32) -> None:
        random = torch.Generator().manual_seed(0)
        start = torch.randn(8, 4, generator=random)
        target = torch.randn(8, 4, generator=random)
        if not entry.crosses_zero:
            target = target.abs() * start.sign()
        self.inputs = torch.randn(64, 8, generator=random).to(dtype)
        self.target = target.clamp(-1.5, 1.5).to(dtype)
        self.weight = nn.Parameter(start.to(dtype))

    def loss(self) -> Tensor:
        return (self.inputs @ (self.weight - self.target)).square().mean()


def train(problem: Regression, optimizer: Optimizer, steps: range, total: int = STEPS) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 - step / total)
        optimizer.zero_grad()
        problem.loss().backward()
        optimizer.step()


def test_the_table_is_covered() -> None:
    assert {entry.settings.name for entry in ENTRIES} == set(OPTIMIZERS)


@every_optimizer
def test_converges_on_a_convex_problem(entry: Entry) -> None:
    problem = Regression(entry)
    first = problem.loss().item()
    train(problem, make(entry, problem.weight), range(STEPS))
    assert problem.loss().item() < entry.reached * first


@every_optimizer
def test_is_deterministic(entry: Entry) -> None:
    problems = [Regression(entry), Regression(entry)]
    for problem in problems:
        torch.rand(3)  # the global random state is no input
        train(problem, make(entry, problem.weight), range(20))
    assert torch.equal(problems[0].weight, problems[1].weight)


@every_optimizer
def test_resumes_bit_for_bit(entry: Entry) -> None:
    whole, first, second = Regression(entry), Regression(entry), Regression(entry)
    train(whole, make(entry, whole.weight), range(20))
    optimizer = make(entry, first.weight)
    train(first, optimizer, range(7))
    file = io.BytesIO()
    torch.save({"weight": first.weight.detach(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    with torch.no_grad():
        second.weight.copy_(saved["weight"])
    resumed = make(entry, second.weight)
    resumed.load_state_dict(saved["optimizer"])
    train(second, resumed, range(7, 20))
    assert torch.equal(whole.weight, second.weight)


@every_optimizer
def test_leaves_gradients_untouched(entry: Entry) -> None:
    problem = Regression(entry)
    optimizer = make(entry, problem.weight, weight_decay=0.1 if entry.decays else None)
    for _ in range(3):
        problem.weight.grad = None
        problem.loss().backward()
        before = copy.deepcopy(problem.weight.grad)
        optimizer.step()
        assert before is not None and problem.weight.grad is not None
        assert torch.equal(before, problem.weight.grad)


@every_optimizer
def test_groups_have_their_own_rate_and_decay(entry: Entry) -> None:
    random = torch.Generator().manual_seed(1)
    values = torch.rand(4, 4, generator=random) ** 3 + 0.01  # LMD's prior is about 0 for weights that vary so much
    moving, still, decayed = (nn.Parameter(values.clone()) for _ in range(3))
    optimizer = make(entry, moving)
    optimizer.add_param_group({"params": [still], "lr": 0.0, "weight_decay": 0.0})
    if entry.decays:
        optimizer.add_param_group({"params": [decayed], "weight_decay": 0.5})
    for parameter in (moving, still, decayed):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert (moving < values).all()
    assert torch.allclose(still, values, rtol=1e-6, atol=0)  # a rate of 0 is no move, to rounding
    if entry.decays:
        assert (decayed < moving).all()


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_keeps_dtype_and_learns_in_it(entry: Entry, dtype: torch.dtype) -> None:
    problem = Regression(entry, dtype)
    first = problem.loss().item()
    train(problem, make(entry, problem.weight), range(50), total=50)
    assert problem.weight.dtype == dtype
    assert problem.loss().item() < 0.5 * first


@every_optimizer
def test_evaluates_a_closure_and_returns_its_loss(entry: Entry) -> None:
    plain, closed = Regression(entry), Regression(entry)
    optimizer = make(entry, closed.weight)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = closed.loss()
        loss.backward()
        losses.append(loss.item())
        return loss

    returned = optimizer.step(closure)
    assert len(losses) == 1 and isinstance(returned, Tensor) and returned.item() == losses[0]
    other = make(entry, plain.weight)
    with getattr(other, "sampled_params", torch.enable_grad)():
        plain.loss().backward()
    other.step()
    assert torch.equal(plain.weight, closed.weight)


@every_optimizer
def test_leaves_parameters_without_a_gradient_alone(entry: Entry) -> None:
    problem = Regression(entry)
    unused = nn.Parameter(torch.ones(1, 3))
    optimizer = make(entry, problem.weight, unused, weight_decay=0.1 if entry.decays else None)
    problem.loss().backward()
    optimizer.step()
    assert torch.equal(unused, torch.ones(1, 3))


@every_optimizer
def test_a_zero_gradient_moves_nothing(entry: Entry) -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
    optimizer = make(entry, weight)
    weight.grad = torch.zeros(2, 2)
    optimizer.step()
    assert torch.allclose(weight, torch.tensor([[1.0, -2.0], [0.5, 3.0]]), rtol=1e-6, atol=0)


def test_madam_equals_its_equation() -> None:
    weight = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64, requires_grad=True)
    start, rms = weight.detach().clone(), (5 / 3) ** 0.5
    optimizer = Madam(lr=0.1).make([{"params": [weight]}], seed=0)
    gradient = torch.tensor([3.0, -1.0, 2.0], dtype=torch.float64)
    weight.grad = gradient
    optimizer.step()  # g / g_rms is sign(g) at the first step
    assert torch.allclose(weight, start * torch.exp(-0.1 * start.sign() * gradient.sign()))
    for _ in range(100):
        weight.grad = -start  # away from zero, up to the bound
        optimizer.step()
    assert torch.allclose(weight, torch.tensor([3 * rms, -3 * rms, 0.0], dtype=torch.float64))


def test_lion_and_signum_equal_their_equations() -> None:
    gradients = [torch.tensor([1.0, -3.0]), torch.tensor([-8.0, 1.0])]
    lion, signum = (torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True) for _ in range(2))
    steps = [
        Lion(lr=0.1, betas=(0.5, 0.75)).make([{"params": [lion], "weight_decay": 0.5}], seed=0),
        Signum(lr=0.1, momentum=0.75).make([{"params": [signum], "weight_decay": 0.5}], seed=0),
    ]
    for gradient in gradients:
        for parameter, optimizer in zip((lion, signum), steps, strict=True):
            parameter.grad = gradient.double()
            optimizer.step()
    # Lion: directions sign(g1), sign(0.5 * 0.25 g1 + 0.5 g2); Signum: sign(0.25 g1), sign(0.75 * 0.25 g1 + 0.25 g2)
    assert torch.allclose(lion, torch.tensor([(0.95 - 0.1) * 0.95 + 0.1, (-0.95 + 0.1) * 0.95 - 0.1]).double())
    assert torch.allclose(signum, torch.tensor([(0.95 - 0.1) * 0.95 + 0.1, (-0.95 + 0.1) * 0.95 + 0.1]).double())


def test_lmd_for_model_passes_its_settings_on() -> None:
    model = GPT2_MICRO.build()
    others: dict[str, Any] = {"others_lr": 0.01, "others_weight_decay": 0.2}
    settings = LMDForModel(lr=0.02, weight_decay=0.3, noise_scale=0.1, kappa=2.0, betas=(0.8, 0.9), **others)
    optimizer = settings.build(model, seed=7)
    ours, *theirs = optimizer.param_groups
    wanted = {"lr": 0.02, "weight_decay": 0.3, "noise_scale": 0.1, "kappa": 2.0, "betas": (0.8, 0.9), "seed": 7}
    assert {name: ours[name] for name in wanted} == wanted
    assert [(group["lr"], group["weight_decay"]) for group in theirs] == [(0.01, 0.2), (0.01, 0.0)]
    assert any(p is model.tokens.weight for p in theirs[0]["params"])
    with pytest.raises(ValueError, match="mc_samples"):
        LMDForModel(lr=0.02, mc_samples=2)
    with pytest.raises(ValueError, match="others_lr"):
        LMDForModel(lr=0.02, others_lr=0.0)
    with pytest.raises(ValueError, match="others_weight_decay"):
        LMDForModel(lr=0.02, others_weight_decay=-0.1)
