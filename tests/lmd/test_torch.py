"""LMD in torch: groups, schedules, other optimizers beside it, clipping, GradScaler, averages, data parallel."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules

from lmd import LMD, Combined, update
from tests.lmd.small_nets import BACKENDS, DTYPES, KINDS, equal, make_batch, make_net, one, same, train, values

# --- groups and schedules ---


def test_every_group_has_its_settings():
    """A group steps as an optimizer of its own would, with the parameters numbered on."""
    torch.manual_seed(0)
    weights = [torch.randn(20), torch.randn(30)]
    settings = [
        {"lr": 0.01, "weight_decay": 0.3, "noise_scale": 0.0},
        {
            "lr": 0.1,
            "betas": (0.5, 0.7),
            "kappa": 2.0,
            "parameterization": "split",
            "prior": "exponential",
            "noise_scale": 0.0,
        },
    ]
    together, alone = [], []
    both = LMD([{"params": [nn.Parameter(w.clone())], **s} for w, s in zip(weights, settings, strict=True)])
    for w, s, group in zip(weights, settings, both.param_groups, strict=True):
        p, single = one(w, **s)
        for q in (p, group["params"][0]):
            q.grad = torch.ones_like(q)
        single.step()
        alone.append(p.detach())
        together.append(group["params"][0])
    both.step()
    assert equal([p.detach() for p in together], alone)


def test_a_group_added_later_takes_part():
    p, optimizer = one(torch.randn(5))
    p.grad = torch.ones(5)
    optimizer.step()
    q = nn.Parameter(torch.randn(5))
    optimizer.add_param_group({"params": [q], "lr": 0.5})
    before = q.detach().clone()
    with optimizer.sampled_params():
        (p.sum() + q.sum()).backward()
    optimizer.step()
    assert (q < before).all() and optimizer.param_groups[1]["lr"] == 0.5
    with pytest.raises(ValueError, match="kappa"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "kappa": 0.0})
    assert len(optimizer.param_groups) == 2


def test_adamw_takes_groups_beside_it():
    net = make_net()
    matrices = [p for p in net.parameters() if p.ndim >= 2]
    vectors = [p for p in net.parameters() if p.ndim < 2]
    optimizers = [LMD(matrices), torch.optim.AdamW(vectors, lr=0.01)]
    losses = []
    for step in range(200):
        x, y = make_batch(step % 4)
        with optimizers[0].sampled_params():
            loss = (net(x) - y).square().mean()
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-20:]) < 0.3 * sum(losses[:20])


def combine(net: nn.Module) -> Combined:
    matrices, vectors = ([p for p in net.parameters() if (p.ndim >= 2) == two] for two in (True, False))
    return Combined(LMD(matrices, lr=0.03), torch.optim.AdamW(vectors, lr=0.01, weight_decay=0.1))


def train_combined(net: nn.Module, optimizer: Combined, steps: range) -> None:
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step, last_epoch=-1)
    for step in steps:
        x, y = make_batch(step)
        optimizer.zero_grad()
        with optimizer.sampled_params():
            (net(x) - y).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()


def test_combined_is_its_parts_stepped_one_after_the_other():
    nets = make_net(), make_net()
    train_combined(nets[0], combine(nets[0]), range(6))
    apart = combine(nets[1])
    parts = apart.lmd, *apart.others
    for step in range(6):
        x, y = make_batch(step)
        nets[1].zero_grad()
        with parts[0].sampled_params():
            (nets[1](x) - y).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(nets[1].parameters(), 1.0)
        for part, rate in zip(parts, (0.03, 0.01), strict=True):
            part.param_groups[0]["lr"] = rate * 0.9**step
            part.step()
    assert equal(values(nets[0]), values(nets[1]))


@pytest.mark.parametrize("clone", ["state_dict", "deepcopy", "pickle"])
def test_combined_resumes_bit_for_bit(clone):
    whole, parts = make_net(), make_net()
    one_go = combine(whole)
    optimizer = combine(parts)
    for steps in (range(4), range(4, 8)):
        train_combined(whole, one_go, steps)
    train_combined(parts, optimizer, range(4))
    if clone == "state_dict":
        saved = io.BytesIO()
        torch.save(optimizer.state_dict(), saved)
        saved.seek(0)
        optimizer = combine(parts)
        optimizer.load_state_dict(torch.load(saved, weights_only=True))
    else:
        pair = (parts, optimizer)
        parts, optimizer = copy.deepcopy(pair) if clone == "deepcopy" else pickle.loads(pickle.dumps(pair))
    train_combined(parts, optimizer, range(4, 8))
    assert equal(values(whole), values(parts))
    assert {id(g) for g in optimizer.param_groups} == {
        id(g) for part in (optimizer.lmd, *optimizer.others) for g in part.param_groups
    }
    assert all(optimizer.state[p] for p in parts.parameters())


class Counting(torch.optim.SGD):
    """Its state dict holds more than torch's do."""

    count = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict.pop("count")
        super().load_state_dict(state_dict)


def test_combined_saves_as_torch_does_and_loads_what_earlier_versions_saved():
    """Numbered through as torch numbers the parameters of one optimizer; parts in a list, where they have more."""
    net = make_net()
    optimizer = combine(net)
    train_combined(net, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    ordered = [p for group in optimizer.param_groups for p in group["params"]]
    assert [i for group in saved["param_groups"] for i in group["params"]] == list(range(len(ordered)))
    assert all(same(saved["state"][i], dict(optimizer.state[p])) for i, p in enumerate(ordered))
    again = combine(net)
    again.load_state_dict({"parts": [copy.deepcopy(part.state_dict()) for part in optimizer.parts]})
    assert same(again.state_dict(), saved)
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    counting, fresh = (Combined(LMD([p]), Counting([q], lr=0.1)) for _ in range(2))
    counting.others[0].count = 3
    fresh.load_state_dict(counting.state_dict())
    assert fresh.others[0].count == 3


def test_combined_skips_what_lmd_skips():
    net = make_net()
    optimizer = combine(net)
    optimizer.lmd.nonfinite = "skip"
    before = values(net)
    for p in net.parameters():
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert equal(values(net), before) and optimizer.lmd.skipped_steps == 1


def test_combined_refuses_what_it_cannot_do():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        Combined(LMD([p]), torch.optim.SGD([p], lr=0.1))
    with pytest.raises(TypeError, match="one LMD"):
        Combined(LMD([p]), LMD([q]))
    with pytest.raises(TypeError, match="one LMD"):
        Combined(torch.optim.SGD([p], lr=0.1))
    with pytest.raises(ValueError, match="must be 1 here"):
        Combined(LMD([p], mc_samples=2), torch.optim.SGD([q], lr=0.1))
    optimizer = Combined(LMD([p]), torch.optim.SGD([q], lr=0.1))
    with pytest.raises(ValueError, match="has 1 parameter groups, the combined optimizers have 2"):
        optimizer.load_state_dict(LMD([p]).state_dict())
    with pytest.raises(ValueError, match="of 1 combined optimizers, not of 2"):
        optimizer.load_state_dict({"parts": [LMD([p]).state_dict()]})


def test_what_is_deleted_from_a_combined_state_is_deleted_from_the_parts():
    net = make_net()
    optimizer = combine(net)
    train_combined(net, optimizer, range(1))
    for p in net.parameters():
        del optimizer.state[p]
        assert not any(p in part.state for part in optimizer.parts)
        with pytest.raises(KeyError):
            del optimizer.state[p]
    train_combined(net, optimizer, range(1))
    optimizer.state.clear()
    assert not any(part.state for part in optimizer.parts)


@pytest.mark.parametrize("by_closure", [False, True])
def test_combined_trains_the_others_while_lmds_parameters_are_frozen(by_closure):
    """As a head is trained first, and the rest later."""
    p, q, r = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer, alone = Combined(LMD([p]), torch.optim.SGD([q], lr=0.1)), torch.optim.SGD([r], lr=0.1)
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        optimizer.step(lambda: None) if by_closure else optimizer.step()
    p.requires_grad_(False)

    def closure() -> None:
        (p * q).square().sum().backward()

    optimizer.step(closure) if by_closure else (closure(), optimizer.step())
    r.square().sum().backward()
    alone.step()
    assert torch.equal(q, r) and torch.equal(p, torch.ones(3))
    p.requires_grad_(True)
    closure()
    optimizer.step()
    assert not (p == 1.0).any()


def test_combined_evaluates_as_lmd_does():
    torch.manual_seed(0)
    p, q = nn.Parameter(torch.randn(9)), nn.Parameter(torch.ones(2))
    lmd = LMD([p])
    optimizer = Combined(lmd, torch.optim.SGD([q], lr=0.1))
    found: list[list[Tensor]] = []
    for one_ in (lmd, optimizer):
        found.append([])
        for block in (one_.median_params(), *one_.posterior_samples(2)):
            with block:
                found[-1].append(p.detach().clone())
    assert equal(*found)


def test_one_cycle_takes_combined_optimizers_that_all_have_betas():
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = Combined(LMD([p]), torch.optim.AdamW([q]))
    schedules.OneCycleLR(optimizer, max_lr=0.05, total_steps=5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05 / 25] * 2)
    assert [group["betas"][0] for group in optimizer.param_groups] == [0.95] * 2
    mixed = Combined(LMD([p]), torch.optim.SGD([q], lr=0.1))
    with pytest.raises(ValueError, match="must support momentum"):
        schedules.OneCycleLR(mixed, max_lr=0.05, total_steps=5)
    schedules.OneCycleLR(mixed, max_lr=0.05, total_steps=5, cycle_momentum=False)


def test_combined_calls_the_hooks_of_its_state():
    net = make_net()
    optimizer, calls = combine(net), []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("before saving"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "epoch": 3})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: calls.append(state["epoch"]))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["before saving", 3, "loaded"]


@BACKENDS
@KINDS
def test_a_setting_may_be_a_tensor(kind, fused):
    nets = make_net(), make_net()
    numbers = {"lr": 0.0625, "betas": (0.5, 0.75), "weight_decay": 0.5, "noise_scale": 0.125}
    tensors = {**{name: torch.tensor(number) for name, number in numbers.items()}, "betas": (torch.tensor(0.5), 0.75)}
    for net, settings in zip(nets, (numbers, tensors), strict=True):
        train(net, LMD(net.parameters(), parameterization=kind, fused=fused, **settings), range(3))
    assert equal(values(nets[0]), values(nets[1]))


def test_torch_schedules_set_the_step():
    p, optimizer = one(torch.ones(3), noise_scale=0.0, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    a = update.half_log_ratio(p.detach().double(), 0.5, 0.0)
    for _ in range(10):
        rate = scheduler.get_last_lr()[0]
        p.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
        a = a - rate
    torch.testing.assert_close(p.detach().double(), update.posterior_mean(a, 0.5, 0.0), rtol=1e-5, atol=0.0)


SCHEDULES: dict[str, Callable[[LMD], Any]] = {
    "step": lambda optimizer: schedules.StepLR(optimizer, step_size=2),
    "linear": lambda optimizer: schedules.LinearLR(optimizer, start_factor=0.1, total_iters=5),
    "one cycle": lambda optimizer: schedules.OneCycleLR(optimizer, max_lr=[0.05, 0.01], total_steps=12),
    "warm restarts": lambda optimizer: schedules.CosineAnnealingWarmRestarts(optimizer, T_0=3),
    "plateau": lambda optimizer: schedules.ReduceLROnPlateau(optimizer, patience=0),
    "in sequence": lambda optimizer: schedules.SequentialLR(
        optimizer, [schedules.ConstantLR(optimizer, 0.5, 3), schedules.ExponentialLR(optimizer, 0.9)], milestones=[3]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_scheduled_run_is_the_run_with_its_rates_and_betas_set_by_hand(name):
    nets = make_net(), make_net()

    def make(net: nn.Sequential) -> LMD:
        vectors = [p for p in net.parameters() if p.ndim < 2]
        return LMD([{"params": [net[0].weight, net[3].weight]}, {"params": vectors, "lr": 0.01}])

    scheduled, by_hand = make(nets[0]), make(nets[1])
    scheduler = SCHEDULES[name](scheduled)
    used = []
    for step in range(10):
        for ours, theirs in zip(by_hand.param_groups, scheduled.param_groups, strict=True):
            ours["lr"], ours["betas"] = theirs["lr"], theirs["betas"]
        used.append(tuple(group["lr"] for group in by_hand.param_groups))
        for net, optimizer in zip(nets, (scheduled, by_hand), strict=True):
            train(net, optimizer, range(step, step + 1))
        scheduler.step(1.0) if name == "plateau" else scheduler.step()
    assert equal(values(nets[0]), values(nets[1])) and len(set(used)) > 1


@KINDS
def test_a_noise_schedule_keeps_the_means(kind):
    torch.manual_seed(0)
    p, optimizer = one(torch.randn(20), parameterization=kind)
    for noise_scale in (0.0, 0.5, 0.1):
        optimizer.param_groups[0]["noise_scale"] = noise_scale
        before = p.detach().clone()
        with optimizer.sampled_params():
            assert torch.equal(p, before) == (noise_scale == 0.0)
            p.sum().backward()
        assert torch.equal(p, before)
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
        torch.testing.assert_close(p.detach(), before, rtol=1e-5, atol=1e-7)


def test_a_schedule_out_of_range_is_an_error_at_the_step():
    p, optimizer = one()
    p.grad = torch.tensor(1.0)
    for name, value in (("lr", -0.1), ("noise_scale", math.nan), ("weight_decay", 200.0)):
        optimizer.param_groups[0][name], good = value, optimizer.param_groups[0][name]
        with pytest.raises(ValueError, match=name):
            optimizer.step()
        optimizer.param_groups[0][name] = good
    optimizer.step()


# --- the rest of torch ---


@BACKENDS
@KINDS
@DTYPES
def test_a_rate_of_zero_moves_no_weight_by_a_bit(kind, dtype, fused):
    """torch.distributed.checkpoint makes the state of a new optimizer by such a step, after the weights are loaded."""
    net = make_net(dtype)
    optimizer = LMD(net.parameters(), parameterization=kind, fused=fused)
    train(net, optimizer, range(3))
    before, masters = values(net), [state["master"].clone() for state in optimizer.state.values() if "master" in state]
    optimizer.param_groups[0]["lr"] = 0.0
    train(net, optimizer, range(3, 6))
    assert equal(values(net), before)
    assert equal([state["master"] for state in optimizer.state.values() if "master" in state], masters)


def test_clipping_scales_and_the_step_follows():
    p, optimizer = one(torch.ones(3), noise_scale=0.0)
    p.grad = torch.full((3,), 100.0)
    torch.nn.utils.clip_grad_norm_([p], 1.0)
    clipped = p.grad.clone()
    optimizer.step()
    scale = math.hypot(1.0, 2.0 * 0.5)
    torch.testing.assert_close(optimizer.state[p]["v"], 0.01 * clipped * scale)


def test_grad_scaler_skips_and_unscales():
    net, reference = make_net(), make_net()
    optimizer, reference_optimizer = LMD(net.parameters()), LMD(reference.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for step in range(3):
        x, y = make_batch(step)
        optimizer.zero_grad()
        with optimizer.sampled_params():
            scaler.scale((net(x) - y).square().mean()).backward()
        if step == 1:
            before = values(net)
            net[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            assert equal(values(net), before) and scaler.get_scale() == 2.0**9
    train(reference, reference_optimizer, range(1))
    train(reference, reference_optimizer, range(2, 3))
    assert equal(values(net), values(reference))  # powers of two scale exactly


@pytest.mark.parametrize("mc_samples", [1, 2])
def test_a_compiled_training_step_is_the_same_step(mc_samples):
    nets = make_net(), make_net()
    x, y = make_batch(0)
    for net, decorate in zip(nets, (lambda f: f, torch.compile(backend="eager")), strict=True):
        optimizer = LMD(net.parameters(), mc_samples=mc_samples)

        def step(net: nn.Module = net, optimizer: LMD = optimizer) -> None:
            optimizer.zero_grad()
            for _ in range(mc_samples):
                with optimizer.sampled_params():
                    (net(x) - y).square().mean().backward()
            optimizer.step()

        run = decorate(step)
        for _ in range(3):
            run()
    assert equal(values(nets[0]), values(nets[1]))


def test_averaged_model_averages_the_means():
    net = make_net()
    optimizer = LMD(net.parameters())
    averaged = torch.optim.swa_utils.AveragedModel(net)
    kept = []
    for step in range(3):
        train(net, optimizer, range(step, step + 1))
        averaged.update_parameters(net)
        kept.append(values(net))
    for i, p in enumerate(averaged.module.parameters()):
        torch.testing.assert_close(p.detach(), torch.stack([values[i] for values in kept]).mean(0))


def data_parallel_worker(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}/meet", rank=rank, world_size=2)
    results = []
    for kind in ("shared", "split"):
        net = make_net(seed=rank)  # DistributedDataParallel takes over the weights of rank 0
        wrapped = nn.parallel.DistributedDataParallel(net)
        optimizer = LMD(net.parameters(), parameterization=kind)
        for step in range(5):
            x, y = make_batch(10 * step + rank)
            optimizer.zero_grad()
            with optimizer.sampled_params():
                (wrapped(x) - y).square().mean().backward()
            optimizer.step()
        results.append({"net": values(net), "optimizer": optimizer.state_dict()})
    torch.save(results, f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_stay_bit_equal(tmp_path):
    """Each with its own batches, after averaging the gradients; and close to one process with the averaged gradient."""
    torch.multiprocessing.spawn(data_parallel_worker, (str(tmp_path),), nprocs=2)
    left, right = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(left, right)
    for kind, result in zip(("shared", "split"), left, strict=True):
        net = make_net(seed=0)
        optimizer = LMD(net.parameters(), parameterization=kind)
        for step in range(5):
            optimizer.zero_grad()
            with optimizer.sampled_params():
                for rank in (0, 1):
                    x, y = make_batch(10 * step + rank)
                    (0.5 * (net(x) - y).square().mean()).backward()
            optimizer.step()
        for p, q in zip(net.parameters(), result["net"], strict=True):
            torch.testing.assert_close(p.detach(), q, rtol=1e-4, atol=1e-6)
