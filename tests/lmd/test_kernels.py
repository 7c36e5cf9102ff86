"""The fused backend against the readable one, and against itself on other threads, splits and alignments."""

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lmd import LMD, cpu, foreach, kernels, plain
from lmd.priors import PRIORS

M0 = 0.02
NEW: dict[str, Any] = {"m0": M0, "prior_a": 0.0, "rms": torch.tensor(math.nan)}
# Stated bounds. A sample is compared in ulp of theta+ + theta-, a mean in ulp of max(|mean|, lr 2 m0 exp(sigma^2 / 2)),
# a momentum in ulp of the larger of its terms, a log center in units of 2^-24. A step whose u is within rounding of 0
# may take the other sign; the share of such elements is bounded.
SAMPLE_ULP = {0.05: 16, 0.3: 32, 1.0: 512}
MEAN_ULP, MOMENTUM_ULP, CENTER_ULP, FLIPS = 32, {0.0: 32, 0.05: 32, 0.3: 64, 1.0: 1024}, 16, 1e-3


@dataclass
class Case:
    """A weight of hostile magnitudes, its gradient and its group."""

    group: dict[str, Any]
    mean: Tensor
    gradient: Tensor
    state: dict[str, Any]

    def plan(self, backend: Any = cpu, number: int = 3) -> Any:
        """Copies of everything in a plan of one parameter: in float64 for the readable backend, else in float32."""
        dtype = torch.float64 if backend is plain else torch.float32
        state = {k: x.to(dtype, copy=True) if isinstance(x, Tensor) else x for k, x in self.state.items()}
        return backend.Plan([number], [torch.nn.Parameter(self.mean.to(dtype, copy=True))], [state])


def make_case(
    parameterization: str,
    count: int = 20_011,
    sigma: float = 0.05,
    rms: float | None = 2e-4,
    prior_a: float = 0.0,
    **settings: Any,
) -> Case:
    """rms: of u, the step before; None: there was none."""
    generator = torch.Generator().manual_seed(count)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    spread = 2.0 if settings.get("prior") in ("half-normal", "exponential") else 8.0  # their R is exponential in a
    a = spread * (2.0 * rand(count) - 1.0)
    mean = 2.0 * M0 * torch.sinh(torch.where(rand(count) < 0.3, 1e-4 * a, a))
    mean[0:1], mean[1:2] = 0.0, -0.0
    gradient = 1e-2 * torch.randn(count, generator=generator)
    gradient[2:4] = 0.0
    names = ("v",) if parameterization == "shared" else ("v_plus", "v_minus", "log_center")
    state: dict[str, Any] = {name: 1e-3 * torch.randn(count, generator=generator) for name in names}
    for x in state.values():
        x[2:3] = 0.0
    if parameterization == "split":
        state["log_center"] *= 300.0
    settings = {"parameterization": parameterization, "noise_scale": sigma, **settings}
    optimizer = LMD([torch.nn.Parameter(torch.zeros(1))], seed=2**63 + 17, **settings)
    optimizer.param_groups[0]["step"] = 5
    last = torch.tensor(math.nan if rms is None else rms)
    return Case(optimizer.param_groups[0], mean, gradient, {"m0": M0, **state, "prior_a": prior_a, "rms": last})


def ulp(x: Tensor) -> Tensor:
    return torch.from_numpy(np.spacing(x.abs().float().numpy())).double()


def largest(error: Tensor, unit: Tensor) -> float:
    return float((error.double().abs() / unit).max())


@pytest.mark.parametrize("parameterization", ["shared", "split"])
@pytest.mark.parametrize("sigma", SAMPLE_ULP)
def test_samples_and_totals_are_the_readable_ones_to_the_stated_ulp(parameterization, sigma):
    case = make_case(parameterization, sigma=sigma)
    exact, fused = case.plan(plain), case.plan(cpu)
    (total,) = exact.total(case.group, 7)
    for name in ("sample", "total"):
        (expected,), (got,) = getattr(exact, name)(case.group, 7), getattr(fused, name)(case.group, 7)
        assert largest(got - expected, ulp(total)) < SAMPLE_ULP[sigma]


def check_step(case: Case, at_sample: bool, fused: Any = None) -> None:
    """A step of `fused`, the CPU kernels' plan where None, is the readable one in float64 to the stated bounds."""
    exact, fused = case.plan(plain), fused or case.plan(cpu)
    sigma, lr = case.group["noise_scale"], case.group["lr"]
    exact.step(case.group, [case.gradient.double()], at_sample)
    fused.step(case.group, [case.gradient.to(fused.means[0].device)], at_sample)
    mean, state = fused.means[0].cpu(), {k: x.cpu() for k, x in fused.states[0].items() if isinstance(x, Tensor)}
    for name in (name for name in state if name.startswith("v")):
        terms = torch.maximum(exact.states[0][name].abs(), case.state[name].abs())
        assert largest(state[name] - exact.states[0][name], ulp(terms)) < MOMENTUM_ULP[sigma]
    move = lr * 2.0 * M0 * math.exp(0.5 * sigma**2)
    agree = (mean - exact.means[0]).abs() / ulp(exact.means[0].abs().clamp(min=move)) < MEAN_ULP
    if "log_center" in state:
        agree &= (state["log_center"] - exact.states[0]["log_center"]).abs() < CENTER_ULP * 2.0**-24
    assert (~agree).double().mean() < FLIPS
    if case.group["saturation"] > 0.0:
        torch.testing.assert_close(state["rms"].double(), exact.states[0]["rms"], rtol=1e-5, atol=0.0)


STEPS = [("shared", "log-normal"), ("shared", "flat"), *(("split", name) for name in PRIORS)]


@pytest.mark.parametrize(("parameterization", "prior"), STEPS)
@pytest.mark.parametrize("sigma", [0.0, *SAMPLE_ULP])
@pytest.mark.parametrize("at_sample", [True, False])
def test_a_step_is_the_readable_one_to_the_stated_ulp(parameterization, prior, sigma, at_sample):
    check_step(make_case(parameterization, sigma=sigma, prior=prior, lr=0.03, weight_decay=0.01), at_sample)


@pytest.mark.parametrize("parameterization", ["shared", "split"])
@pytest.mark.parametrize(
    "settings",
    [{"saturation": 0.0}, {"saturation": 3.0}, {"rms": None}, {"rms": 0.0}, {"rms": math.inf}, {"prior_a": 0.9}],
    ids=str,
)
def test_the_length_of_a_step_and_the_priors_center_are_the_readable_ones(parameterization, settings):
    check_step(make_case(parameterization, sigma=0.3, lr=0.03, weight_decay=0.01, **settings), True)


@pytest.mark.parametrize("parameterization", ["shared", "split"])
@pytest.mark.parametrize("at_sample", [True, False])
def test_an_unscaled_step_is_the_readable_one_to_the_stated_ulp(parameterization, at_sample):
    case = make_case(parameterization, sigma=0.3, lr=0.03, weight_decay=0.01, weight_scaling=False)
    check_step(case, at_sample)


@pytest.mark.parametrize(("parameterization", "prior"), STEPS)
@pytest.mark.parametrize("at_sample", [True, False])
@pytest.mark.parametrize("weight_scaling", [True, False])
def test_one_vector_for_a_group_is_its_parameters_one_by_one(parameterization, prior, at_sample, weight_scaling):
    """lmd/foreach.py in float32, within the kernels' bounds of lmd/plain.py in float64; to rounding in float64."""
    settings = {"sigma": 0.3, "prior": prior, "lr": 0.03, "weight_decay": 0.01, "weight_scaling": weight_scaling}
    cases = [make_case(parameterization, count=count, **settings) for count in (7, 3000, 1)]
    check_step(cases[1], at_sample, cases[1].plan(foreach))
    single = [case.plan(plain, number) for number, case in enumerate(cases)]
    copies = [case.plan(plain, number) for number, case in enumerate(cases)]
    together = foreach.Plan([0, 1, 2], [plan.params[0] for plan in copies], [plan.states[0] for plan in copies])
    group, gradients = cases[0].group, [cases[0].gradient.double(), None, cases[2].gradient.double()]
    for name in ("sample", "total"):
        for plan, got in zip(single, getattr(together, name)(group, 0), strict=True):
            torch.testing.assert_close(got, getattr(plan, name)(group, 0)[0], rtol=1e-13, atol=1e-17)
    together.step(group, gradients, at_sample)
    for i, plan in enumerate(single):
        plan.step(group, [gradients[i]], at_sample)
        for expected, got in zip(left_by(plan, 0), left_by(together, i), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-17)
    assert together.finite(gradients) and not together.finite([gradients[0], None, gradients[2] * math.nan])


@pytest.mark.parametrize("parameterization", ["shared", "split"])
def test_large_steps_and_decays_are_the_readable_ones(parameterization):
    """lr 1 and lr weight_decay near 1: the rotation by y loses e^(2 |y|) ulp of what it started from."""
    case = make_case(parameterization, lr=1.0, weight_decay=0.9)
    exact, fused = case.plan(plain), case.plan(cpu)
    exact.step(case.group, [case.gradient.double()], True)
    fused.step(case.group, [case.gradient], True)
    unit = ulp(case.mean.abs().clamp(min=2.0 * M0)) * torch.exp(1.0 + 0.9 * torch.asinh(case.mean.abs() / (2.0 * M0)))
    assert ((fused.means[0] - exact.means[0]).abs() > 64 * unit).double().mean() < FLIPS


def bits(case: Case, number: int = 3) -> list[Tensor]:
    """Everything a sample and a step leave."""
    plan = case.plan(number=number)
    samples = plan.sample(case.group, 0)
    plan.step(case.group, [case.gradient], True)
    return [*samples, *left_by(plan, 0)]


def left_by(plan: Any, i: int) -> list[Tensor]:
    return [plan.means[i], *(x for x in plan.states[i].values() if isinstance(x, Tensor))]


@pytest.mark.parametrize("parameterization", ["shared", "split"])
def test_threads_do_not_change_a_bit(parameterization):
    case = make_case(parameterization, count=3 * cpu.SERIAL + 13)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(bits(case))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], result, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 5, 15, 16, 17, 127, 128, 129, kernels.TILE - 1, kernels.TILE + 1])
@pytest.mark.parametrize("parameterization", ["shared", "split"])
def test_an_element_does_not_depend_on_the_size_of_its_tensor(parameterization, count):
    """So vector bodies, remainders, blocks and tiles compute the same bits."""
    case = make_case(parameterization, count=2 * kernels.TILE)
    short = Case(
        case.group,
        case.mean[:count],
        case.gradient[:count],
        {k: x[:count] if isinstance(x, Tensor) and x.ndim else x for k, x in case.state.items()},
    )
    *whole, _ = bits(case)
    *part, _ = bits(short)  # all but the root mean square, which is the tensor's
    assert all(torch.equal(x[:count], y) for x, y in zip(whole, part, strict=True))


def test_neighbours_in_memory_are_left_alone():
    case = make_case("shared", count=1001)
    arena = torch.full((3, 1200), 7.0)
    views = [row[50:1051] for row in arena]
    for view, x in zip(views, (case.mean, case.gradient, case.state["v"]), strict=True):
        view.copy_(x)
    plan = cpu.Plan([3], [views[0]], [{**case.state, "v": views[2], "rms": case.state["rms"].clone()}])
    plan.step(case.group, [views[1]], True)
    _, mean, v, _ = bits(case)
    assert torch.equal(views[0], mean) and torch.equal(views[2], v) and torch.equal(views[1], case.gradient)
    assert (arena[:, :50] == 7.0).all() and (arena[:, 1051:] == 7.0).all()


@pytest.mark.parametrize("parameterization", ["shared", "split"])
def test_many_tensors_in_a_call_are_each_as_if_alone(parameterization):
    cases = [make_case(parameterization, count=count) for count in (1, 700, kernels.TILE, 2, 3 * kernels.TILE + 5)]
    single = [case.plan() for case in cases]
    together = cpu.Plan(
        list(range(len(cases))), [plan.params[0] for plan in single], [plan.states[0] for plan in single]
    )
    samples = together.sample(cases[0].group, 0)
    together.step(cases[0].group, [case.gradient for case in cases], True)
    for i, case in enumerate(cases):
        alone = bits(case, number=i)
        assert all(torch.equal(x, y) for x, y in zip(alone, [samples[i], *left_by(together, i)], strict=True))


def test_a_tensor_without_a_gradient_is_passed_over():
    cases = [make_case("shared", count=count) for count in (700, 3, 5000)]
    single = [case.plan() for case in cases]
    plan = cpu.Plan([0, 1, 2], [one.params[0] for one in single], [one.states[0] for one in single])
    plan.step(cases[0].group, [cases[0].gradient, None, cases[2].gradient], True)
    for i, case in enumerate(cases):
        expected = [case.mean, case.state["v"], case.state["rms"]] if i == 1 else bits(case, number=i)[1:]
        assert all(torch.equal(x, y) for x, y in zip(expected, left_by(plan, i), strict=True))
    nan = torch.full((3,), math.nan)
    assert plan.finite([cases[0].gradient, None, None]) and not plan.finite([None, nan, None])


@pytest.mark.parametrize("parameterization", ["shared", "split"])
@pytest.mark.parametrize("name", ["mean", "gradient", "momentum"])
def test_a_nan_stays_a_nan(parameterization, name):
    case = make_case(parameterization, count=100)
    place = {"mean": case.mean, "gradient": case.gradient, "momentum": case.state[list(case.state)[1]]}[name]
    place[41] = math.nan
    plan = case.plan()
    plan.step(case.group, [case.gradient], True)
    assert plan.means[0][41].isnan()
    assert not plan.means[0][:41].isnan().any() and not plan.means[0][42:].isnan().any()


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_mean_does_not_become_finite(value):
    for parameterization in ("shared", "split"):
        case = make_case(parameterization, count=100)
        case.mean[41] = value
        plan = case.plan()
        (drawn,) = plan.sample(case.group, 0)
        plan.step(case.group, [case.gradient], True)
        assert not drawn[41].isfinite() and not plan.means[0][41].isfinite()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_finite_finds_one_value_anywhere(value):
    tensors = [torch.zeros(5), torch.full((2 * kernels.TILE + 3,), 3e38), torch.zeros(1)]
    states = [{**NEW, "v": torch.zeros_like(tensor)} for tensor in tensors]
    for backend in (plain, cpu):
        plan = backend.Plan([0, 1, 2], tensors, states)
        assert plan.finite(tensors)
        for i in range(len(tensors)):
            for place in (0, -1):
                changed = [tensor.clone() for tensor in tensors]
                changed[i][place] = value
                assert not plan.finite(changed)


@pytest.mark.parametrize("parameterization", ["shared", "split"])
def test_both_backends_train_alike(parameterization):
    """The same curve: the losses of 60 steps within 1e-2 of one another, where they fall by a factor of more than 3.

    They part exponentially, as float32 and float64 do in the readable one.
    """

    def losses(fused: bool) -> list[float]:
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(6, 40), torch.nn.LayerNorm(40), torch.nn.GELU(), torch.nn.Linear(40, 1)
        )
        x = torch.randn(128, 6)
        y = x[:, :1] * x[:, 1:2] + x[:, 2:3].sin()
        optimizer = LMD(net.parameters(), parameterization=parameterization, fused=fused)
        curve = []
        for _ in range(60):
            optimizer.zero_grad()
            with optimizer.sampled_params():
                loss = (net(x) - y).square().mean()
                loss.backward()
            optimizer.step()
            curve.append(loss.item())
        return curve

    fused, readable = losses(True), losses(False)
    assert fused == pytest.approx(readable, rel=1e-2)
    assert fused[-1] < fused[0] / 3


def test_a_forked_child_steps():
    """The threads of the pool do not survive a fork; the child makes its own. (torch makes none: the child avoids
    it.)
    """
    case = make_case("shared", count=3 * cpu.SERIAL)
    before, after = case.plan(), case.plan()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before.step(case.group, [case.gradient], True)
        child = os.fork()
        if child == 0:
            after.step(case.group, [case.gradient], True)
            os._exit(0 if np.array_equal(before.means[0].numpy(), after.means[0].numpy()) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        torch.set_num_threads(threads)
