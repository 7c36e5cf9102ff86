"""LMD as a torch optimizer: samples in place, state, resume, closures, dtypes, bad input."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lmd import LMD, update
from lmd.random import NoiseKey, normal_pair

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


# --- samples in place ---


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


def test_an_exception_among_averaged_samples_keeps_the_earlier_gradient():
    p, optimizer = one(torch.randn(4), mc_samples=2)
    with optimizer.sampled_params():
        p.sum().backward()
    gradient = p.grad
    with pytest.raises(KeyError), optimizer.sampled_params():
        p.sum().backward()
        raise KeyError
    assert p.grad is gradient


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
    with pytest.raises(FloatingPointError, match="nonfinite='skip'"):
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


# --- state ---


@BACKENDS
@KINDS
@DTYPES
def test_resume_is_bit_equal(kind, dtype, fused):
    """Through torch.save and weights_only=True, into a fresh net and a fresh optimizer."""

    def make(seed: int) -> tuple[nn.Module, LMD]:
        net = make_net(dtype, seed)
        groups = [{"params": net[0].parameters(), "lr": 0.02, "noise_scale": 0.1}, {"params": net[1:].parameters()}]
        return net, LMD(groups, parameterization=kind, fused=fused, seed=2**63 + 5)

    net, optimizer = make(0)
    train(net, optimizer, range(8))
    half, half_optimizer = make(0)
    train(half, half_optimizer, range(4))
    file = io.BytesIO()
    torch.save((half.state_dict(), half_optimizer.state_dict()), file)
    file.seek(0)
    resumed, resumed_optimizer = make(1)
    net_state, optimizer_state = torch.load(file, weights_only=True)
    resumed.load_state_dict(net_state)
    resumed_optimizer.load_state_dict(optimizer_state)
    train(resumed, resumed_optimizer, range(4, 8))
    assert equal(values(resumed), values(net))
    assert same(resumed_optimizer.state_dict(), optimizer.state_dict())


@KINDS
def test_a_loaded_state_is_a_copy(kind):
    net = make_net()
    optimizer = LMD(net.parameters(), parameterization=kind)
    train(net, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    reference = copy.deepcopy(state)
    train(net, optimizer, range(2))
    assert same(state, reference)


@KINDS
def test_the_other_parameterization_is_refused_with_the_reason(kind):
    net = make_net()
    optimizer = LMD(net.parameters(), parameterization=kind)
    other = LMD(net.parameters(), parameterization={"shared": "split", "split": "shared"}[kind])
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=rf"saved with parameterization='{kind}'"):
        other.load_state_dict(optimizer.state_dict())
    assert same(other.state_dict(), before)


def test_a_state_without_a_newer_setting_takes_the_optimizers():
    net = make_net()
    optimizer = LMD(net.parameters())
    train(net, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["weight_scaling"]
    other = LMD(net.parameters(), weight_scaling=False)
    other.load_state_dict(saved)
    assert other.param_groups[0]["weight_scaling"] is False
    train(net, other, range(2, 3))


def test_a_foreign_state_is_refused():
    net = make_net()
    with pytest.raises(ValueError, match="not a state of LMD"):
        LMD(net.parameters()).load_state_dict(torch.optim.AdamW(net.parameters()).state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copied_optimizer_goes_on_alike(clone):
    net = make_net()
    optimizer = LMD(net.parameters(), mc_samples=2, nonfinite="skip", fused=False)
    other_net, other = clone((net, optimizer))
    assert (other.mc_samples, other.nonfinite, other.fused) == (2, "skip", False)

    def run(net: nn.Module, optimizer: LMD) -> None:
        x, y = make_batch(0)
        for _ in range(2):
            with optimizer.sampled_params():
                (net(x) - y).square().mean().backward()
        optimizer.step()

    run(net, optimizer)
    run(other_net, other)
    assert equal(values(net), values(other_net))


def test_master_weights_see_steps_that_bfloat16_does_not():
    """40 steps of a factor of 2^-11 each: below half a bfloat16 ulp one by one, 2% together."""
    p, optimizer = one(torch.ones(8, dtype=torch.bfloat16), lr=2.0**-11, weight_decay=0.0, noise_scale=0.0)
    for _ in range(40):
        p.grad = torch.ones_like(p)
        optimizer.step()
    exact = torch.tensor(1.0)
    m0 = 0.5
    expected = update.posterior_mean(update.half_log_ratio(exact, m0, 0.0) - 40 * 2.0**-11, m0, 0.0)
    assert p.dtype == torch.bfloat16 and optimizer.state[p]["master"].dtype == torch.float32
    torch.testing.assert_close(optimizer.state[p]["master"], expected.expand(8), rtol=1e-5, atol=0.0)
    assert torch.equal(p, optimizer.state[p]["master"].bfloat16())


@KINDS
def test_one_vector_for_a_group_follows_the_same_trajectory_in_every_dtype_at_once(kind):
    nets = [make_net(dtype) for _ in range(2) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    for i, foreach in ((0, False), (3, True)):
        settings = {"parameterization": kind, "fused": False, "foreach": foreach}
        optimizer = LMD([p for net in nets[i : i + 3] for p in net.parameters()], **settings)
        for step in range(3):
            for number, net in enumerate(nets[i : i + 3]):
                for p in net.parameters():
                    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + number)).to(p)
            with optimizer.sampled_params():
                pass
            optimizer.step()
    for one_by_one, together in zip(nets[:3], nets[3:], strict=True):
        for p, q in zip(one_by_one.parameters(), together.parameters(), strict=True):
            torch.testing.assert_close(q, p)


@BACKENDS
def test_state_that_is_replaced_or_cleared_is_taken_note_of(fused):
    """Nothing is kept from before: clearing is starting afresh, and a tensor that is put in is the one that is used."""
    torch.manual_seed(0)
    w, g = torch.randn(20), torch.randn(20)
    p, optimizer = one(w, fused=fused)
    q, fresh = one(w, fused=fused)
    for optimizer_, parameter in ((optimizer, p), (fresh, q)):
        parameter.grad = g
        optimizer_.step()
    optimizer.state.clear()
    second = LMD([q], fused=fused)
    second.param_groups[0]["step"] = 1
    optimizer.step()
    second.step()
    assert torch.equal(p, q) and optimizer.state[p]["m0"] == second.state[q]["m0"]
    optimizer.state[p]["v"] = torch.zeros(20)
    optimizer.step()
    scale = 0.01 * (optimizer.state[p]["v"] / g)
    assert (scale > 0).all() and p.data_ptr() != q.data_ptr()


@BACKENDS
def test_a_parameter_that_moves_is_followed(fused):
    torch.manual_seed(0)
    net, other = make_net(), make_net()
    optimizers = [LMD(n.parameters(), fused=fused) for n in (net, other)]
    for step in range(4):
        for n, optimizer in zip((net, other), optimizers, strict=True):
            train(n, optimizer, range(step, step + 1))
        for p in net.parameters():
            p.data = p.data.clone()
    assert equal(values(net), values(other))


def test_a_parameter_that_is_frozen_and_thawed_goes_on():
    net = make_net()
    optimizer = LMD(net.parameters())
    for step, trained in enumerate((True, False, True)):
        net[0].requires_grad_(trained)
        before = values(net)
        train(net, optimizer, range(step, step + 1))
        after = values(net)
        assert all(torch.equal(x, y) != trained for x, y in zip(before[:2], after[:2], strict=True))
        assert not any(map(torch.equal, before[2:], after[2:]))


# --- bad input ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, "lr"),
        ({"lr": 1.5}, "lr must be at most 1"),
        ({"lr": math.nan}, "lr"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"lr": 0.5, "weight_decay": 2.0}, "weight_decay must be below 1 / lr"),
        ({"noise_scale": -0.1}, "noise_scale"),
        ({"noise_scale": math.inf}, "noise_scale"),
        ({"noise_scale": 5.0}, "noise_scale must be at most 4"),
        ({"kappa": 0.0}, "kappa"),
        ({"prior": "laplace"}, "prior must be one of .*half-normal"),
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


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool], ids=str)
def test_parameters_must_be_real_floats(dtype):
    with pytest.raises(TypeError, match="real floating-point"):
        LMD([nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=dtype.is_complex)])


def test_weights_that_are_not_finite_are_refused_where_their_scale_is_read():
    p, optimizer = one(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="finite"), optimizer.sampled_params():
        pass
    assert p.isnan().tolist() == [False, True]
