"""LMD as a torch optimizer: initialization, memory, the step, closures, bad input."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lmd import LMD, update
from lmd.random import NoiseKey, normal_pair
from tests.lmd.small_nets import BACKENDS, KINDS, equal, make_batch, make_net, one, same, train, values

# --- initialization and memory ---


@BACKENDS
@KINDS
def test_construction_and_sampling_leave_the_function_computed_as_it_was(kind, fused):
    net = make_net()
    before, (x, _) = values(net), make_batch(0)
    output = net(x)
    optimizer = LMD(net.parameters(), parameterization=kind, fused=fused)
    with optimizer.sampled_params():
        assert not torch.equal(net(x), output)
    assert equal(values(net), before) and torch.equal(net(x), output)


@BACKENDS
@pytest.mark.parametrize(("kind", "expected"), [("shared", 4), ("split", 12)])
def test_state_bytes_per_float32_parameter(kind, expected, fused):
    net = make_net()
    optimizer = LMD(net.parameters(), parameterization=kind, fused=fused)
    train(net, optimizer, range(2))
    count = sum(p.numel() for p in net.parameters())
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    numbers = 4 * len(optimizer.state)  # one of each tensor
    assert sum(x.untyped_storage().nbytes() for x in tensors) == expected * count + numbers
    adamw = torch.optim.AdamW(net.parameters())
    adamw.step()
    vectors = [x for state in adamw.state.values() for x in state.values() if x.numel() > 1 or x.dim()]
    assert sum(x.untyped_storage().nbytes() for x in vectors) == 8 * count


def test_a_sample_adds_one_vector_and_gives_it_back():
    p, optimizer = one(torch.randn(1000))
    memory = p.data_ptr()
    with optimizer.sampled_params():
        assert p.data_ptr() != memory and p.untyped_storage().nbytes() == 4000
    assert p.data_ptr() == memory


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (5, 7)])
@BACKENDS
@KINDS
def test_any_shape(shape, kind, fused):
    p, optimizer = one(torch.full(shape, 0.3), parameterization=kind, fused=fused)
    for _ in range(3):
        optimizer.zero_grad()
        with optimizer.sampled_params():
            (p**2).sum().backward()
        optimizer.step()
    assert p.shape == shape and torch.isfinite(p).all() and (p < 0.3).all()


@KINDS
def test_layouts_share_one_trajectory(kind):
    """A transposed parameter is stepped in its own memory by the readable path."""
    torch.manual_seed(0)
    w = torch.randn(8, 5)
    plain, strided = nn.Parameter(w.clone()), nn.Parameter(w.t().contiguous().t())
    optimizers = [LMD([p], parameterization=kind, fused=False) for p in (plain, strided)]
    memory = strided.data_ptr()
    for step in range(5):
        for p, optimizer in zip((plain, strided), optimizers, strict=True):
            p.grad = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    torch.testing.assert_close(
        plain, strided, rtol=1e-5, atol=0.0
    )  # torch's own functions differ by layout in the last bit
    assert strided.data_ptr() == memory and strided.stride() == (1, 8)


def test_a_gradient_of_another_layout_is_the_same_gradient():
    torch.manual_seed(0)
    w, g = torch.randn(8, 5), torch.randn(8, 5)
    left, right = nn.Parameter(w.clone()), nn.Parameter(w.clone())
    left.grad, right.grad = g.clone(), g.t().contiguous().t()
    LMD([left]).step()
    LMD([right]).step()
    assert torch.equal(left, right)


# --- the step ---


@BACKENDS
@KINDS
def test_a_step_scales_the_gradient_by_the_sample_it_was_taken_at(kind, fused):
    """By hand: draw, weight-scale, step; and gradients at the mean are scaled by the expectations."""
    for at_sample in (True, False):
        torch.manual_seed(0)
        p, optimizer = one(torch.randn(40), parameterization=kind, fused=fused, noise_scale=0.3)
        mean, g = p.detach().clone(), torch.randn(40)
        if at_sample:
            with optimizer.sampled_params():
                pass
        p.grad = g.clone()
        optimizer.step()
        assert torch.equal(p.grad, g)
        m0 = update.start(mean, optimizer.defaults["kappa"]).m0
        drawn = normal_pair(NoiseKey(0), mean.double()) if at_sample else None
        a = update.half_log_ratio(mean.double(), m0, 0.3)
        plus, minus = update.multipliers(a, m0, 0.3, drawn)
        state = optimizer.state[p]
        if kind == "shared":
            torch.testing.assert_close(state["v"].double(), 0.01 * g * (plus + minus), rtol=1e-5, atol=1e-9)
        else:
            torch.testing.assert_close(state["v_plus"].double(), 0.01 * g * plus, rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(state["v_minus"].double(), -0.01 * g * minus, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("noise_scale", [0.0, 0.2])
@BACKENDS
def test_averaged_samples_are_the_average_of_the_weight_scaled_gradients(noise_scale, fused):
    torch.manual_seed(0)
    p, optimizer = one(torch.randn(40), noise_scale=noise_scale, mc_samples=3, fused=fused)
    mean, gradients = p.detach().clone(), torch.randn(3, 40)
    for g in gradients:
        with optimizer.sampled_params():
            (p * g).sum().backward()
    optimizer.step()
    m0 = update.start(mean, optimizer.defaults["kappa"]).m0
    a = update.half_log_ratio(mean.double(), m0, noise_scale)
    expected = torch.zeros(40, dtype=torch.float64)
    for draw, g in enumerate(gradients):
        drawn = normal_pair(NoiseKey(0, draw=draw), mean.double())
        expected += g * sum(update.multipliers(a, m0, noise_scale, drawn)) / 3
    torch.testing.assert_close(optimizer.state[p]["v"].double(), 0.01 * expected, rtol=1e-5, atol=1e-9)


@BACKENDS
def test_without_weight_scaling_averaged_samples_are_the_average_of_the_gradients(fused):
    torch.manual_seed(0)
    p, optimizer = one(torch.randn(40), noise_scale=0.2, mc_samples=3, weight_scaling=False, fused=fused)
    m0, gradients = update.start(p.detach(), optimizer.defaults["kappa"]).m0, torch.randn(3, 40)
    for g in gradients:
        with optimizer.sampled_params():
            (p * g).sum().backward()
    torch.testing.assert_close(p.grad, gradients.mean(0), rtol=1e-5, atol=1e-6)
    optimizer.step()
    expected = 0.01 * 2.0 * m0 * gradients.mean(0)
    torch.testing.assert_close(optimizer.state[p]["v"], expected, rtol=1e-5, atol=1e-8)


def test_the_number_of_samples_must_be_a_multiple():
    p, optimizer = one(torch.randn(4), mc_samples=2)
    for _ in range(3):
        with optimizer.sampled_params():
            p.sum().backward()
    with pytest.raises(RuntimeError, match="ran 3 times since the last step, mc_samples is 2"):
        optimizer.step()
    with optimizer.sampled_params():
        p.sum().backward()
    optimizer.step()


@pytest.mark.parametrize("fails", [0, 1])
def test_a_block_among_averaged_samples_that_ends_in_an_exception_counts_for_nothing(fails):
    """It may be entered again, as after a lack of memory."""
    torch.manual_seed(0)
    w = torch.randn(4)
    (p, optimizer), (q, smooth) = (one(w, mc_samples=2) for _ in range(2))
    for step in range(2):
        for parameter, o, failing in ((p, optimizer, True), (q, smooth, False)):
            o.zero_grad()
            for draw in range(2):
                gradient = parameter.grad
                if failing and (step, draw) == (0, fails):
                    with pytest.raises(KeyError), o.sampled_params():
                        parameter.exp().sum().backward()
                        raise KeyError
                    assert parameter.grad is gradient
                with o.sampled_params():
                    parameter.exp().sum().backward()
            o.step()
        assert torch.equal(p, q)


def test_gradients_accumulate_over_blocks_of_one_sample():
    torch.manual_seed(0)
    w, g = torch.randn(30), torch.randn(2, 30)
    (whole, once), (parts, twice) = one(w), one(w)
    with once.sampled_params():
        (whole * g.sum(0)).sum().backward()
    for part in g:
        with twice.sampled_params():
            (parts * part).sum().backward()
    once.step()
    twice.step()
    torch.testing.assert_close(whole, parts, rtol=1e-6, atol=0.0)


@BACKENDS
def test_parameters_without_a_gradient_are_left_alone(fused):
    net = make_net()
    optimizer = LMD(net.parameters(), fused=fused)
    before = values(net)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    optimizer.step()
    after = values(net)
    assert not torch.equal(before[0], after[0]) and equal(before[1:], after[1:])


def test_a_step_without_gradients_is_an_error():
    _, optimizer = one()
    with pytest.raises(RuntimeError, match=r"call backward\(\) before step"):
        optimizer.step()


@pytest.mark.parametrize("mc_samples", [1, 2])
@BACKENDS
def test_a_sparse_gradient_is_the_dense_one_that_it_stands_for(mc_samples, fused):
    weights = []
    for sparse in (False, True):
        torch.manual_seed(0)
        embedding = nn.Embedding(10, 3, sparse=sparse)
        optimizer = LMD(embedding.parameters(), mc_samples=mc_samples, fused=fused)
        for step in range(4):
            optimizer.zero_grad()
            for draw in range(mc_samples):
                with optimizer.sampled_params():
                    embedding(torch.tensor([1, step, 1, draw])).square().sum().backward()
            optimizer.step()
        weights.append(embedding.weight.detach())
    assert torch.equal(*weights)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@BACKENDS
@KINDS
def test_a_gradient_that_is_not_finite_raises_before_anything_changes(value, kind, fused):
    net = make_net()
    optimizer = LMD(net.parameters(), parameterization=kind, fused=fused)
    train(net, optimizer, range(2))
    before, state = values(net), copy.deepcopy(optimizer.state_dict())
    net[3].bias.grad[0] = value
    with pytest.raises(FloatingPointError, match=r"\(1 of 6 parameters, of shapes \[\(1,\)\]\); nonfinite='skip'"):
        optimizer.step()
    assert equal(values(net), before)
    assert same(optimizer.state_dict(), state)


@BACKENDS
def test_such_a_step_can_be_skipped_and_is_counted(fused):
    net = make_net()
    optimizer = LMD(net.parameters(), nonfinite="skip", fused=fused)
    train(net, optimizer, range(2))
    before = values(net)
    net[3].bias.grad[0] = math.nan
    optimizer.step()
    optimizer.step()
    assert equal(values(net), before) and optimizer.skipped_steps == 2
    other = LMD(make_net().parameters(), nonfinite="skip")
    other.load_state_dict(optimizer.state_dict())
    assert other.skipped_steps == 2


# --- closures ---


@pytest.mark.parametrize("mc_samples", [1, 3])
def test_a_closure_is_evaluated_under_the_samples(mc_samples):
    """step(closure) is the loop of blocks and a step, bit for bit; it returns the mean loss."""
    nets = make_net(), make_net()
    by_closure, by_blocks = (LMD(net.parameters(), mc_samples=mc_samples) for net in nets)
    for step in range(3):
        x, y = make_batch(step)

        def loss_of(net: nn.Module, x: Tensor = x, y: Tensor = y) -> Tensor:
            return (net(x) - y).square().mean()

        def closure(loss_of: Callable[[nn.Module], Tensor] = loss_of) -> Tensor:
            by_closure.zero_grad()
            loss = loss_of(nets[0])
            loss.backward()
            return loss

        returned = by_closure.step(closure)
        by_blocks.zero_grad()
        losses = []
        for _ in range(mc_samples):
            with by_blocks.sampled_params():
                loss = loss_of(nets[1])
                loss.backward()
                losses.append(loss.detach())
        by_blocks.step()
        assert equal(values(nets[0]), values(nets[1]))
        torch.testing.assert_close(returned.detach(), torch.stack(losses).mean())


@pytest.mark.parametrize("mc_samples", [1, 2])
def test_a_closure_may_return_nothing(mc_samples):
    p, optimizer = one(torch.ones(3), mc_samples=mc_samples)
    assert optimizer.step(lambda: p.sum().backward()) is None


def test_a_step_inside_the_block_is_refused():
    p, optimizer = one(torch.randn(4))
    with optimizer.sampled_params():
        p.sum().backward()
        for closure in (None, lambda: p.sum()):
            with pytest.raises(RuntimeError, match="leave the block first"):
                optimizer.step(closure)
        with pytest.raises(RuntimeError, match="leave the block first"):
            optimizer.state_dict()


@pytest.mark.parametrize("settings", [{}, {"mc_samples": 2}, {"parameterization": "split"}], ids=str)
@BACKENDS
def test_function_modes_see_the_model_and_the_closure_not_the_optimizer(settings, fused):
    """So a simulated machine neither rounds the optimizer's arithmetic nor slows it down."""

    class Seen(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(isinstance(x, Tensor) for x in args):
                self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    p, optimizer = one(torch.randn(40), fused=fused, **settings)
    with Seen() as seen:
        for _ in range(optimizer.mc_samples):
            with optimizer.sampled_params():
                p.sum().backward()
        optimizer.step()
        assert seen.names == ["sum", "backward"] * optimizer.mc_samples
        optimizer.step(lambda: p.exp().sum().backward() or 0.0)
        assert seen.names.count("exp") == optimizer.mc_samples


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, "lr"),
        ({"lr": 1.5}, "lr must be at most 1"),
        ({"lr": math.nan}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
        ({"lr": torch.ones(2)}, "lr must be a number"),
        ({"lr": "0.1"}, "lr must be a number, finite and at least 0, not '0.1'"),
        ({"kappa": None}, "kappa must be a number"),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"betas": ("0.9", 0.9)}, "betas must be two numbers"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"lr": 0.5, "weight_decay": 2.0}, "weight_decay must be below 1 / lr"),
        ({"noise_scale": -0.1}, "noise_scale"),
        ({"noise_scale": math.inf}, "noise_scale"),
        ({"noise_scale": 5.0}, "noise_scale must be at most 4"),
        ({"kappa": 0.0}, "kappa"),
        ({"prior": "laplace"}, "prior must be one of .*half-normal"),
        ({"prior": ["flat"]}, "prior must be one of"),
        ({"prior": "exponential"}, "use parameterization='split'"),
        ({"parameterization": "both"}, "parameterization must be one of"),
        ({"mc_samples": 0}, "mc_samples"),
        ({"mc_samples": 2, "parameterization": "split"}, "needs parameterization='shared'"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of"),
        ({"entropy": "no"}, "entropy must be True or False"),
        ({"weight_scaling": 0}, "weight_scaling must be True or False"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
    ],
    ids=str,
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        LMD([nn.Parameter(torch.ones(3))], **settings)


@pytest.mark.parametrize("setting", [{"mc_samples": 2}, {"nonfinite": "skip"}], ids=str)
def test_a_group_has_no_setting_of_the_whole_optimizer(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is a setting of the whole optimizer"):
        LMD([{"params": [nn.Parameter(torch.ones(3))], **setting}])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn], ids=str)
def test_parameters_must_be_real_floats(dtype):
    with pytest.raises(TypeError, match="real floating-point parameters of 16, 32 or 64 bits"):
        LMD([nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=dtype.is_complex)])


def test_parameters_must_have_values_before_a_step():
    p, optimizer = one(torch.ones(3, device="meta"))
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="no values yet"):
        optimizer.step()


def test_weights_that_are_not_finite_are_refused_where_their_scale_is_read():
    p, optimizer = one(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="finite"), optimizer.sampled_params():
        pass
    assert p.isnan().tolist() == [False, True]
