"""The Triton backend against the readable one: in Triton's interpreter, or on the GPU where there is one."""

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from lmd import LMD, gpu, plain
from lmd.priors import PRIORS
from lmd.random import NoiseKey, words
from tests.lmd.test_kernels import (
    NEW,
    SAMPLE_ULP,
    Case,
    check_step,
    largest,
    make_case,
    ulp,
)

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNT = 2 * gpu.BLOCK + 7
KINDS = pytest.mark.parametrize("kind", ["shared", "split"])


def plans(case: Case) -> tuple[Any, Any]:
    """The readable plan in float64 and Triton's on the device; the stated bounds are those of the CPU's kernels."""
    state = {k: x.to(DEVICE, copy=True) if isinstance(x, Tensor) else x for k, x in case.state.items()}
    return case.plan(plain), gpu.Plan([3], [torch.nn.Parameter(case.mean.to(DEVICE, copy=True))], [state])


def test_words_are_those_of_the_other_backends():
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["number", *gpu.VARYING])  # or a compiled kernel gets a 1 as a Python int
    def copy_words(out, k0, k1, number, step, draw, COUNT: tl.constexpr):
        tl.store(out + tl.arange(0, COUNT), gpu.draw_words(0, k0, k1, number, step, draw, COUNT).to(tl.int64))

    for key in (
        NoiseKey(0),
        NoiseKey(2**64 - 1, 2**32 - 1, 2**32 - 1, 2**32 - 1),
        NoiseKey(12345678901234567890, 3, 7, 1),
    ):
        out = torch.zeros(256, dtype=torch.int64, device=DEVICE)
        copy_words[(1,)](out, key.seed & 0xFFFFFFFF, key.seed >> 32, key.parameter, key.step, key.draw, COUNT=256)
        assert torch.equal(out.cpu() & 0xFFFFFFFF, words(key, 256))


@KINDS
@pytest.mark.parametrize("sigma", SAMPLE_ULP)
def test_samples_and_totals_are_the_readable_ones_to_the_stated_ulp(kind, sigma):
    case = make_case(kind, count=COUNT, sigma=sigma)
    exact, fused = plans(case)
    (total,) = exact.total(case.group, 7)
    for name in ("sample", "total"):
        (expected,), (got,) = getattr(exact, name)(case.group, 7), getattr(fused, name)(case.group, 7)
        assert largest(got.cpu() - expected, ulp(total)) < SAMPLE_ULP[sigma]


@pytest.mark.parametrize(("kind", "prior"), [("shared", "log-normal"), *(("split", name) for name in PRIORS)])
@pytest.mark.parametrize(("sigma", "at_sample"), [(0.0, True), (0.05, True), (0.3, True), (0.3, False)])
def test_a_step_is_the_readable_one_to_the_stated_ulp(kind, prior, sigma, at_sample):
    case = make_case(kind, count=COUNT, sigma=sigma, prior=prior, lr=0.03, weight_decay=0.01)
    check_step(case, at_sample, plans(case)[1])


@KINDS
@pytest.mark.parametrize(
    "settings",
    [{"saturation": 0.0}, {"saturation": 3.0}, {"rms": None}, {"rms": 0.0}, {"rms": math.inf}, {"prior_a": 0.9}],
    ids=str,
)
def test_the_length_of_a_step_and_the_priors_center_are_the_readable_ones(kind, settings):
    case = make_case(kind, count=COUNT, sigma=0.3, lr=0.03, weight_decay=0.01, **settings)
    check_step(case, True, plans(case)[1])


@KINDS
@pytest.mark.parametrize("at_sample", [True, False])
def test_an_unscaled_step_is_the_readable_one_to_the_stated_ulp(kind, at_sample):
    case = make_case(kind, count=COUNT, sigma=0.3, lr=0.03, weight_decay=0.01, weight_scaling=False)
    check_step(case, at_sample, plans(case)[1])


@KINDS
def test_tensors_of_one_launch_are_what_each_is_alone(kind):
    """Of every size and alignment, with and without a gradient, bit for bit: samples, weights and all state."""
    sizes = [(gpu.BLOCK, 0), (0, 0), (7, 0), (COUNT, 0), (gpu.BLOCK + 4, 0), (12, 1), (gpu.BLOCK, 0), (1, 0), (8, 0)]
    idle = 6
    alone, whole, gradients = [], ([], [], []), []
    for number, (count, shift) in enumerate(sizes):
        case = make_case(kind, count=count + 1, sigma=0.3)
        state = {k: x[:count] if isinstance(x, Tensor) and x.ndim else x for k, x in case.state.items()}
        gradients.append(None if number == idle else case.gradient[:count].to(DEVICE))
        for plan in (None, whole):
            own = {k: x.to(DEVICE, copy=True) if isinstance(x, Tensor) else x for k, x in state.items()}
            mean = torch.nn.Parameter(case.mean.to(DEVICE, copy=True)[shift : count + shift])
            if plan is None:
                alone.append(gpu.Plan([number], [mean], [own]))
            else:
                for kept, value in zip(plan, (number, mean, own), strict=True):
                    kept.append(value)
    together, before = gpu.Plan(*whole), whole[1][idle].detach().clone()
    for name in ("sample", "total"):
        single = [getattr(plan, name)(case.group, 2)[0] for plan in alone]
        assert all(map(torch.equal, getattr(together, name)(case.group, 2), single))
    together.step(case.group, gradients, True)
    assert torch.equal(together.means[idle], before)
    for number, plan in enumerate(alone):
        plan.step(case.group, [gradients[number]], True)
        assert torch.equal(plan.means[0], together.means[number])
        for name, value in plan.states[0].items():
            assert name == "rms" or not isinstance(value, Tensor) or torch.equal(value, together.states[number][name])
        moved = number != idle and sizes[number][0] > 0
        assert plan.states[0]["rms"].equal(together.states[number]["rms"]) or not moved


class Part:
    """Rows `first` and on of a tensor that other processes have the rest of."""

    def __init__(self, first: int, mean: Tensor, count: int) -> None:
        self.firsts, self.counts, self.memory, self.sums = [first], [count], [mean], []

    def rows_of(self, state: dict[str, Any]) -> dict[str, Any]:
        return state

    def sum(self, number: Tensor) -> Tensor:
        self.sums.append(number)
        return number


@KINDS
@pytest.mark.parametrize("first", [1, 6, gpu.BLOCK, gpu.BLOCK + 515])
def test_a_part_of_a_tensor_is_that_part_of_the_whole(kind, first):
    """Samples and a step; what the parts add up for the root mean square is the whole's to the stated 1e-6."""
    case = make_case(kind, count=COUNT, sigma=0.3)
    _, whole = plans(case)
    sample, total = whole.sample(case.group, 7)[0], 0.0
    whole.step(case.group, [case.gradient.to(DEVICE)], True)
    for rows in (slice(0, first), slice(first, COUNT)):
        state = {k: x[rows] if isinstance(x, Tensor) and x.ndim else x for k, x in case.state.items()}
        state = {k: x.to(DEVICE, copy=True) if isinstance(x, Tensor) else x for k, x in state.items()}
        mean = torch.nn.Parameter(case.mean[rows].to(DEVICE, copy=True))
        part = gpu.Plan([3], [mean], [state], Part(rows.start, mean.data, COUNT))
        torch.testing.assert_close(part.sample(case.group, 7)[0], sample[rows], rtol=1e-6, atol=1e-8)
        part.step(case.group, [case.gradient[rows].to(DEVICE, copy=True)], True)
        torch.testing.assert_close(mean.data, whole.means[0][rows], rtol=1e-5, atol=1e-7)
        total += part.shards.sums[0].squeeze()
    rms = (total / (COUNT * (1 if kind == "shared" else 2))).sqrt()
    torch.testing.assert_close(rms.float(), whole.states[0]["rms"], rtol=1e-6, atol=0.0)


@KINDS
def test_a_nan_stays_a_nan(kind):
    for name in ("mean", "gradient", "momentum"):
        case = make_case(kind, count=100)
        {"mean": case.mean, "gradient": case.gradient, "momentum": case.state[list(case.state)[1]]}[name][41] = math.nan
        _, fused = plans(case)
        fused.step(case.group, [case.gradient.to(DEVICE)], True)
        assert fused.means[0].isnan().nonzero().tolist() == [[41]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_finite_finds_one_value(value):
    tensors = [torch.zeros(5, device=DEVICE), torch.zeros(0, device=DEVICE), torch.full((3,), 3e38, device=DEVICE)]
    plan = gpu.Plan([0, 1, 2], tensors, [NEW for _ in tensors])
    assert plan.finite(tensors) and plan.finite([None, None, None])
    tensors[2][1] = value
    assert not plan.finite(tensors) and plan.finite([tensors[0], tensors[1], None])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@KINDS
def test_a_gpu_trains_as_the_cpu_does(kind):
    curves = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.GELU(), torch.nn.Linear(40, 1))
        x = torch.randn(128, 6)
        y = x[:, :1] * x[:, 1:2] + x[:, 2:3].sin()
        net, x, y = net.to(device), x.to(device), y.to(device)
        optimizer = LMD(net.parameters(), parameterization=kind)
        curve = []
        for _ in range(60):
            optimizer.zero_grad()
            with optimizer.sampled_params():
                loss = (net(x) - y).square().mean()
                loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[1] == pytest.approx(curves[0], rel=1e-2)


@pytest.mark.full
def test_kernels_compile_for_gpus_that_are_not_there():
    """Through the host code of a launch, in a fresh interpreter without TRITON_INTERPRET."""
    code = """
import torch, triton
from triton.runtime import driver
from lmd import LMD, gpu
from tests.lmd.test_kernels import make_case
from tests.quantization.compile_kernels import TARGETS, no_assembler

class Nowhere:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

launch, compiled = triton.JITFunction.run, []
def compile_only(kernel, *arguments, grid, warmup, **options):
    compiled.append(launch(kernel, *arguments, grid=grid, warmup=True, **options))
triton.JITFunction.run = compile_only
targets = [name for name in TARGETS if not no_assembler(name)]
for target in map(TARGETS.get, targets):
    Nowhere.get_current_target = staticmethod(lambda: target)
    driver.set_active(Nowhere())
    for kind in ("shared", "split"):
        case = make_case(kind, count=5000)
        plan = gpu.Plan([3], [case.mean], [case.state])
        plan.sample(case.group, 0)
        for at_sample in (True, False):
            plan.step(case.group, [case.gradient], at_sample)
assembled = [kernel for kernel in compiled if kernel.asm.get("ptx") or kernel.asm.get("amdgcn")]
print(len(compiled) == 14 * len(targets) > 0, len(assembled) == len(compiled))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split() == ["True", "True"], done.stderr
