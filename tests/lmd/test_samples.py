"""LMD's samples in place of the weights: drawn from the seed and the step, and always put back."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from lmd import LMD, update
from tests.lmd.small_nets import BACKENDS, DTYPES, KINDS, equal, make_net, one, train, values


@BACKENDS
@KINDS
@DTYPES
def test_an_exception_inside_restores_the_weights(kind, dtype, fused):
    net = make_net(dtype)
    optimizer = LMD(net.parameters(), parameterization=kind, fused=fused)
    before = values(net)
    with pytest.raises(KeyError), optimizer.sampled_params():
        assert not equal(values(net), before)
        for p in net.parameters():
            p.data.mul_(2.0)
        raise KeyError
    assert equal(values(net), before)
    train(net, optimizer, range(1))  # and the optimizer can be used


def test_nesting_is_refused_and_changes_nothing():
    p, optimizer = one(torch.randn(10))
    before = p.detach().clone()
    for inner in (optimizer.sampled_params, optimizer.median_params, lambda: next(optimizer.posterior_samples(1))):
        with optimizer.sampled_params():
            inside = p.detach().clone()
            with pytest.raises(RuntimeError, match="already in place"), inner():
                pass
            assert torch.equal(p, inside)
        assert torch.equal(p, before)


def test_without_noise_the_block_is_free():
    p, optimizer = one(torch.randn(10), noise_scale=0.0)
    memory, version = p.data_ptr(), p._version
    with optimizer.sampled_params():
        assert p.data_ptr() == memory
    assert p._version == version and not optimizer.state


def test_backward_after_the_block_raises_instead_of_using_other_weights():
    p, optimizer = one(torch.randn(10))
    with optimizer.sampled_params():
        loss = (p**2).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    early = (p**2).sum()
    with optimizer.sampled_params(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        early.backward()


@BACKENDS
def test_a_step_counts_as_a_change_in_place(fused):
    p, optimizer = one(torch.randn(10), fused=fused)
    loss = (p**2).sum()
    p.grad = torch.ones(10)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_casts_the_weights_that_are_in_place():
    """It keeps the casts of leaves until its block ends."""
    p, optimizer = one(torch.randn(4, 4), noise_scale=1.0)
    x, found, expected = torch.eye(4), [], []
    with torch.autocast("cpu", torch.bfloat16):
        for block in (nullcontext(), optimizer.sampled_params(), *optimizer.posterior_samples(2), nullcontext()):
            with block:
                found.append(nn.functional.linear(x, p).detach())
                expected.append(p.detach().t().bfloat16())
    assert equal(found, expected)
    assert not any(torch.equal(found[i], found[i + 1]) for i in range(4))


@BACKENDS
@KINDS
@DTYPES
def test_a_sample_may_be_taken_in_inference_mode_before_training(kind, dtype, fused):
    nets = make_net(dtype), make_net(dtype)
    optimizers = [LMD(net.parameters(), parameterization=kind, fused=fused) for net in nets]
    with torch.inference_mode():
        for block in optimizers[0].posterior_samples(1):
            with block:
                pass
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, range(2))
    assert equal(values(nets[0]), values(nets[1]))


def test_frozen_parameters_are_not_sampled():
    net = make_net()
    net[0].requires_grad_(False)
    optimizer = LMD(net.parameters())
    before = values(net)
    with optimizer.sampled_params():
        after = values(net)
    assert equal(before[:2], after[:2]) and not any(map(torch.equal, before[2:], after[2:]))


@BACKENDS
@KINDS
def test_the_sample_is_a_function_of_seed_and_step(kind, fused):
    """The same one until the next step, whatever is evaluated in between; another one afterwards, and for another
    seed.
    """

    def samples(seed: int) -> list[Tensor]:
        torch.manual_seed(0)
        p, optimizer = one(torch.randn(50), parameterization=kind, fused=fused, seed=seed, lr=0.0)
        drawn = []
        for _ in range(2):
            for _ in range(2):
                with optimizer.sampled_params():
                    drawn.append(p.detach().clone())
                torch.rand(3)
                for sample in optimizer.posterior_samples(2):
                    with sample:
                        drawn.append(p.detach().clone())
            p.grad = torch.zeros(50)
            optimizer.step()
        return drawn

    first, other = samples(1), samples(2)
    for step in (0, 6):
        assert equal(first[step : step + 3], first[step + 3 : step + 6])
    distinct = [*first[:3], *first[6:9], *other[:3]]
    assert all(not torch.equal(x, y) for i, x in enumerate(distinct) for y in distinct[:i])


def test_the_median_is_the_mean_without_the_noise_factor():
    p, optimizer = one(torch.randn(10), noise_scale=0.7)
    mean = p.detach().clone()
    with optimizer.median_params():
        torch.testing.assert_close(p.detach(), mean * math.exp(-0.5 * 0.7**2))
    assert torch.equal(p, mean)


def test_posterior_samples_average_to_the_mean():
    """4000 samples of 50 weights: every average within 5 standard errors, one comparison of probability 3e-5."""
    torch.manual_seed(0)
    p, optimizer = one(torch.randn(50), noise_scale=0.3)
    total = torch.zeros(50, dtype=torch.float64)
    for sample in optimizer.posterior_samples(4000):
        with sample:
            total += p.detach().double()
    m0 = update.start(p, optimizer.defaults["kappa"]).m0
    a = update.half_log_ratio(p.detach().double(), m0, 0.3)
    variance = 2.0 * m0**2 * torch.cosh(2.0 * a) * math.exp(0.09) * math.expm1(0.09)
    assert ((total / 4000 - p.detach()).abs() < 5.0 * (variance / 4000).sqrt()).all()
