"""LMD's state: a resumed run goes on bit for bit, and whatever happens to state and parameters is followed."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lmd import LMD, Combined, update
from tests.lmd.small_nets import BACKENDS, DTYPES, KINDS, equal, make_batch, make_net, one, same, train, values


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
    for optimizer in (LMD(net.parameters()), Combined(LMD(net.parameters()))):
        with pytest.raises(ValueError, match="no optimizer's state: a dict with `state` and `param_groups`"):
            optimizer.load_state_dict({})


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


@KINDS
def test_a_state_of_parameters_of_other_shapes_is_refused_and_changes_nothing(kind):
    net, wider = make_net(), nn.Sequential(nn.Linear(6, 18), nn.LayerNorm(18), nn.GELU(), nn.Linear(18, 1))
    optimizer, other = (LMD(n.parameters(), parameterization=kind) for n in (net, wider))
    train(net, optimizer, range(2))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"has shape \(17, 6\), its parameter \(18, 6\)"):
        other.load_state_dict(optimizer.state_dict())
    assert same(other.state_dict(), before)


@BACKENDS
@KINDS
def test_a_parameter_of_another_shape_than_its_state_or_gradient_is_an_error(kind, fused):
    """Else the kernels would write beyond its memory."""
    p, optimizer = one(torch.randn(20, 4), parameterization=kind, fused=fused)
    p.grad = torch.randn(20, 4)
    optimizer.step()
    whole = p.detach().clone()
    p.data = p.data[:5]
    for use in (optimizer.step, optimizer.sampled_params().__enter__):
        with pytest.raises(ValueError, match=r"has shape \(20, 4\), its parameter \(5, 4\): .* delete"):
            use()
    del optimizer.state[p]
    with pytest.raises(ValueError, match=r"a gradient has shape \(20, 4\), its parameter \(5, 4\): .* zero_grad"):
        optimizer.step()
    assert torch.equal(p, whole[:5])


def test_a_copy_within_a_block_is_refused():
    """It would hold the sample for good."""
    net = make_net()
    for optimizer in (LMD(net.parameters()), Combined(LMD(net.parameters()))):
        with optimizer.sampled_params():
            for clone in (copy.deepcopy, pickle.dumps):
                with pytest.raises(RuntimeError, match="leave the block first"):
                    clone(optimizer)


@KINDS
def test_a_parameter_that_becomes_narrower_gets_a_master(kind):
    """From its value then; the trajectory goes on as that of the master alone."""
    net, wide = make_net(), make_net()
    optimizers = [LMD(n.parameters(), parameterization=kind, fused=False) for n in (net, wide)]
    for n, optimizer in zip((net, wide), optimizers, strict=True):
        train(n, optimizer, range(2))
    net.bfloat16()
    for p, q in zip(net.parameters(), wide.parameters(), strict=True):
        q.data.copy_(p.data)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for p, q in zip(net.parameters(), wide.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
            q.grad = p.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(net.parameters(), wide.parameters(), strict=True):
        assert p.dtype == torch.bfloat16 and torch.equal(optimizers[0].state[p]["master"], q)
        assert torch.equal(p, q.bfloat16())


@BACKENDS
@KINDS
@DTYPES
@pytest.mark.parametrize("change", ["dtype", "layout"])
def test_a_state_in_another_dtype_or_layout_is_the_same_state(change, kind, dtype, fused):
    """As that of a float64 or a channels-last model, in a float32 or a contiguous one."""
    torch.manual_seed(0)
    w, g = torch.randn(4, 5).to(dtype), torch.randn(2, 4, 5).to(dtype)
    (p, optimizer), (q, other) = (one(w, parameterization=kind, fused=fused) for _ in range(2))
    for gradient in g:
        p.grad, q.grad = gradient, gradient.clone()
        optimizer.step()
        other.step()
        for name, value in other.state[q].items():
            if isinstance(value, torch.Tensor) and value.ndim:
                other.state[q][name] = value.double() if change == "dtype" else value.t().contiguous().t()
    other.step()
    optimizer.step()
    assert torch.equal(p, q) and same(dict(optimizer.state[p]), dict(other.state[q]))


@BACKENDS
def test_a_gradient_of_another_dtype_is_the_one_in_the_parameters(fused):
    torch.manual_seed(0)
    w, g = torch.randn(20), torch.randn(20).bfloat16()
    found = []
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        p, optimizer = one(w, fused=fused)
        p.grad_dtype = None
        p.grad = g.to(dtype)
        optimizer.step()
        found.append(p.detach())
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[1])


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
