"""The simulation beside other machinery of torch: DistributedDataParallel, torch.compile, GradScaler, other modes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lpsim import Gemm, Quantizer, Recipe, Rounding, formats, simulate

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


@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks")
@pytest.mark.parametrize("audit", [False, True])
@pytest.mark.parametrize("compiled_first", [False, True])
def test_what_is_compiled_runs_uncompiled_in_a_simulation(audit: bool, compiled_first: bool) -> None:
    """Compiled code calls no torch function: it would run in full precision, or in a mixture."""
    model, (x, _) = network(), batch(0)
    functions = [
        torch.compile(model, backend="aot_eager"),
        torch.compile(lambda x: model(x), backend="aot_eager"),
        torch.compile(model.forward, backend="aot_eager", fullgraph=True),
    ]
    plain = model(x)
    for compiled in functions:
        if compiled_first:
            assert torch.allclose(compiled(x), plain)
        with simulate(model, THREE, audit=audit) as sim:
            expected = model(x)
            assert torch.equal(compiled(x), expected)
        assert not audit or not sim.audit().escaped
        assert torch.allclose(compiled(x), plain) and not torch.allclose(expected, plain)


def test_a_simulation_is_not_entered_in_compiled_code() -> None:
    model, (x, _) = network(), batch(0)

    def step(x: Tensor) -> Tensor:
        with simulate(model, THREE):
            return model(x)

    with pytest.raises(RuntimeError, match="enter it around the call"):
        torch.compile(step, backend="eager")(x)


@pytest.mark.filterwarnings("ignore:Using `torch.compile.module.` when there are global hooks")
def test_what_wraps_the_model_has_no_part_in_its_paths() -> None:
    """A wrapper of the simulated model, compiled or not, leaves sites, overrides and random bits as they are."""
    model, (x, _) = network(), batch(0)
    stochastic = Quantizer(FP4.format, Rounding.STOCHASTIC)
    recipe = Recipe(Gemm(stochastic, stochastic), overrides={"2": Recipe.forward(formats.get("mxfp6_e3m2"))})

    def run(called: Callable[[Tensor], Tensor]) -> Tensor:
        with simulate(model, recipe):
            return called(x)

    expected = run(model)
    assert torch.equal(run(nn.Sequential(model)), expected)
    assert torch.equal(run(torch.compile(model, backend="eager")), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_calls_that_cannot_be_seen_are_refused() -> None:
    model, (x, _) = network(), batch(0)
    scripted = torch.jit.trace(model, x)
    with simulate(model, THREE), pytest.raises(TypeError, match="Call the original"):
        scripted(x)
    parallel = nn.DataParallel(model)
    with simulate(model, THREE):
        assert torch.equal(parallel(x), model(x))  # no devices, no threads
        parallel.device_ids = [0, 1]
        with pytest.raises(TypeError, match="use DistributedDataParallel"):
            parallel(x)
    with ThreadPoolExecutor(1) as pool:
        with simulate(model, THREE), pytest.raises(RuntimeError, match="in another thread"):
            pool.submit(model, x).result()
        assert torch.equal(pool.submit(model, x).result(), model(x))


def test_each_thread_simulates_for_itself() -> None:
    model, (x, _) = network(), batch(0)

    def run() -> Tensor:
        with simulate(model, THREE):
            return model(x)

    expected = run()
    with simulate(model, THREE), ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(done.result(), expected) for done in [pool.submit(run) for _ in range(8)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: torch.vmap(m)(x), "torch.func"),
        (lambda m, x: torch.func.jvp(m, (x,), (x,)), "torch.func"),
        (lambda m, x: torch.jit.trace(m, x), "torch.jit.trace outside"),
        (lambda m, x: m(torch.nested.nested_tensor([x[:3], x[3:]])), "pad them"),
        (lambda m, x: m.to("meta")(x.to("meta")), "no values"),
        (lambda m, x: torch.complex(x, x) @ torch.complex(x, x).mT, "real and imaginary"),
    ],
    ids=["vmap", "jvp", "trace", "nested", "meta", "complex"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore::DeprecationWarning")
def test_tensors_that_stand_for_others_are_refused(call: Callable[..., Any], message: str) -> None:
    model, (x, _) = network(), batch(0)
    with simulate(model, THREE), pytest.raises(NotImplementedError, match=message):
        call(model, x)


def test_other_ways_to_call_the_model() -> None:
    model, (x, _) = network(), batch(0)
    with simulate(model, THREE):
        expected = model(x)
        assert torch.equal(torch.func.functional_call(model, dict(model.named_parameters()), (x,)), expected)
        with torch.inference_mode():
            assert torch.equal(model(x), expected)
        assert torch.equal(torch.fx.symbolic_trace(model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)


def test_a_generator_that_ends_late_or_raises() -> None:
    """The context ends with the generator, also when it is closed or thrown into."""
    model, (x, _) = network(), batch(0)

    def outputs() -> Iterator[Tensor]:
        with simulate(model, THREE):
            while True:
                yield model(x)

    plain = model(x)
    closed, thrown = outputs(), outputs()
    first = next(closed)
    closed.close()
    assert torch.equal(model(x), plain) and not torch.equal(first, plain)
    next(thrown)
    with pytest.raises(ZeroDivisionError):
        thrown.throw(ZeroDivisionError)  # type: ignore[attr-defined]
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize(
    "make",
    [
        lambda layer: nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        lambda layer: nn.TransformerEncoder(layer, 2),
        lambda layer: layer,
        lambda layer: layer.self_attn,
    ],
    ids=["encoder", "nested", "layer", "attention"],
)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_fused_evaluation(make: Callable[[Any], Any], grad: bool) -> None:
    """torch evaluates encoders by one kernel: a recipe of Nones does, too, and any other takes them apart."""
    torch.manual_seed(0)
    model = make(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)).eval()
    x, padding = torch.randn(3, 10, 32), torch.zeros(3, 10, dtype=torch.bool)
    padding[1, 6:] = True
    attention = isinstance(model, nn.MultiheadAttention)
    inputs, mask = (x, x, x) if attention else (x,), {f"{'' if attention else 'src_'}key_padding_mask": padding}

    def outputs(recipe: Recipe | None) -> list[Tensor]:
        results = []
        for arguments in ({}, mask):
            with torch.set_grad_enabled(grad), simulate(model, recipe) if recipe else nullcontext() as sim:
                out = model(*inputs, **arguments)
            results.append(out[0] if attention else out)
            if recipe is not None:
                audit = sim.audit()
                assert audit.escaped == () and len({owner for _, _, owner in audit.products}) == 1
        return results

    plain = outputs(None)
    assert all(map(torch.equal, plain, outputs(Recipe())))
    everything_left = Recipe(overrides={"*/linear": Recipe(), "*": Recipe()})
    assert all(map(torch.equal, plain, outputs(everything_left)))
    assert not any(map(torch.equal, plain, outputs(Recipe(Gemm(FP4, FP4)))))


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
