"""The simulation beside other machinery of torch: DistributedDataParallel, torch.compile, GradScaler, other modes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lpsim import Gemm, Quantizer, Recipe, formats, simulate

FP4 = Quantizer(formats.get("mxfp4_e2m1"))
THREE = Recipe(Gemm(FP4, FP4), Gemm(FP4, FP4), Gemm(FP4, FP4), vector=Quantizer(formats.get("bfloat16")))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))


def batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(64, 16, generator=generator), torch.randint(0, 4, (64,), generator=generator)


def gradients(model: nn.Module, rank: int) -> list[Tensor]:
    model.zero_grad()
    x, y = batch(rank)
    F.cross_entropy(model(x), y).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def distributed(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(network())
    with simulate(model, THREE) as sim:
        grads = gradients(model, rank)
    assert sim.audit().escaped == ()
    torch.save(grads, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
def test_two_processes_average_the_simulated_gradients(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(distributed, (str(tmp_path),), nprocs=2)
    model = network()
    with simulate(model, THREE):
        alone = [gradients(model, rank) for rank in range(2)]
    averages = [(a / 2 + b / 2) for a, b in zip(*alone, strict=True)]
    for rank in range(2):
        for got, expected in zip(torch.load(tmp_path / f"{rank}.pt", weights_only=True), averages, strict=True):
            assert torch.equal(got, expected)


def test_a_function_compiled_with_dynamo_is_simulated() -> None:
    model, (x, _) = network(), batch(0)
    compiled = torch.compile(lambda x: torch.tanh(model(x)), backend="eager")
    plain = compiled(x)
    with simulate(model, THREE) as sim:
        assert torch.equal(compiled(x), torch.tanh(model(x)))
    assert not torch.equal(compiled(x), sim.recipe.vector.quantize(plain))  # type: ignore[union-attr]
    assert torch.equal(compiled(x), plain)


def test_gradient_scaling_is_not_the_models_arithmetic() -> None:
    """With a power of two as scale the update is the unscaled one's, bit for bit."""

    def weights(scaled: bool) -> list[Tensor]:
        model, (x, y) = network(), batch(0)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        with simulate(model, Recipe.forward(FP4.format)):
            scaler.scale(F.cross_entropy(model(x), y)).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        return [p.detach() for p in model.parameters()]

    assert all(map(torch.equal, weights(True), weights(False)))


def test_another_mode_may_be_entered_inside() -> None:
    model = network()
    with simulate(model, THREE) as sim:
        with FlopCounterMode(display=False) as flops:
            inside = gradients(model, 0)
        sim.advance()
    assert flops.get_total_flops() == 2 * 64 * (
        16 * 32 * 2 + 32 * 4 * 3
    )  # the input of the first layer has no gradient
    with simulate(model, THREE):
        assert all(map(torch.equal, inside, gradients(model, 0)))


def test_a_copy_of_the_model_is_simulated_too() -> None:
    """Modules that are not the model's run at their caller's path: nothing stays in full precision."""
    model = network()
    twin = copy.deepcopy(model)
    x, _ = batch(0)
    with simulate(model, THREE):
        assert torch.equal(twin(x), model(x))
