"""How a step is computed: autocast, the batch in parts, activations computed twice. Each has a law."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.training import train as training
from experiments.training.config import Config, all_products, forward
from experiments.training.optimizers import LMD
from experiments.training.record import RunRecord
from lpsim import Quantizer, Rounding, formats, simulate
from lpsim.machine.arguments import lies_in
from tests.experiments.experiment_jobs import one_thread, tiny_config
from tests.experiments.test_train import metrics, weights

STOCHASTIC = all_products("mxfp4_e2m1", rounding=Rounding.STOCHASTIC)


@pytest.fixture(scope="module", autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def run(config: Config, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """All metrics and the last weights."""
    folder.mkdir()
    with closing(RunRecord(folder)) as record:
        assert training.train(config, record) is not None
    return metrics(folder), weights(folder)


def gradients(config: Config) -> tuple[tuple[float, float], list[Tensor]]:
    """Loss, norm and gradients of the first step, with the batch of the config."""
    model, optimizer = training.build(config)
    batch = config.data.load(config.model).train_batch(0, 0, config.batch_size)
    with simulate(model, config.recipe.build(), seed=0) as simulation:
        simulation.step = 0
        measured = training.gradients(config, model, optimizer, batch)
    assert not simulation.audit().escaped
    return measured, [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.parametrize(
    ("backend", "exact"), [("aot_eager", True), pytest.param("inductor", False, marks=pytest.mark.full)]
)
def test_a_compiled_run_is_the_run(backend: str, exact: bool, tmp_path: Path) -> None:
    """To the bit where the compiled code is torch's operations one by one, else its losses to rounding."""
    plain = run(tiny_config(optimizer=LMD(lr=0.03), steps=5), tmp_path / "plain")
    compiled = run(tiny_config(optimizer=LMD(lr=0.03), steps=5, compile=backend), tmp_path / "compiled")
    if exact:
        assert compiled[0] == plain[0]
        assert all(torch.equal(compiled[1][name], value) for name, value in plain[1].items())
    else:
        losses = [[line["loss"] for line in lines if "loss" in line] for lines in (compiled[0], plain[0])]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_what_is_simulated_or_observed_is_not_compiled() -> None:
    for fields in ({"recipe": STOCHASTIC}, {"telemetry_every": 2}):
        with pytest.raises(ValueError, match="compiled code cannot be simulated"):
            tiny_config(compile="inductor", **fields)
    with pytest.raises(ValueError, match=r"compile must be .*inductor.*, is 'indctor'"):
        tiny_config(compile="indctor")


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_recomputed_activations_give_the_same_bits(autocast: str | None, tmp_path: Path) -> None:
    """Metrics and weights of a whole run, with stochastic rounding in all products and LMD's noise."""
    common = {"recipe": STOCHASTIC, "optimizer": LMD(lr=0.03), "autocast": autocast, "steps": 5}
    kept = run(tiny_config(**common), tmp_path / "kept")
    again = run(tiny_config(**common, recompute=True), tmp_path / "again")
    assert again[0] == kept[0]
    assert all(torch.equal(again[1][name], value) for name, value in kept[1].items())


def test_recomputing_is_for_models_with_blocks() -> None:
    with pytest.raises(ValueError, match=r"modules in an nn\.ModuleList; this one has none"):
        training.recompute_blocks(nn.Linear(2, 2))


def test_recomputing_keeps_less_for_the_backward_pass() -> None:
    """At most the inputs of a block, for the whole block."""

    def kept(**fields: Any) -> int:
        config = tiny_config(**fields)
        model, _ = training.build(config)
        sizes: dict[int, int] = {}
        own = list(model.parameters())

        def keep(x: Tensor) -> Tensor:
            sizes[id(x)] = 0 if lies_in(x, own) else x.numel()
            return x

        inputs = torch.zeros(4, 16, 32)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model.blocks[0](inputs.requires_grad_())  # type: ignore[index]
        return sum(sizes.values())

    assert kept(recompute=True) <= 4 * 16 * 32 < kept()


@pytest.mark.parametrize("optimizer", [LMD(lr=0.03), LMD(lr=0.03, mc_samples=2)], ids=["one sample", "two samples"])
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(optimizer: LMD, micro_batches: int) -> None:
    """To float32's rounding of sums: 1e-5 of the largest; with blocks of 16 positions, in MXFP6 too."""
    for recipe in (forward("float32"), forward("mxfp6_e3m2")):
        common = {"optimizer": optimizer, "recipe": recipe, "clip_norm": None}
        (loss, norm), whole = gradients(tiny_config(**common))
        (again, same_norm), parts = gradients(tiny_config(**common, micro_batches=micro_batches))
        assert (again, same_norm) == pytest.approx((loss, norm), rel=1e-6)
        for expected, actual in zip(whole, parts, strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_under_autocast_operands_are_rounded_as_the_float32_numbers_that_their_bfloat16_values_are() -> None:
    """And weights, gradients and the loss are float32."""
    config = tiny_config(autocast="bfloat16", recipe=forward("mxfp4_e2m1"))
    seen: list[tuple[Tensor, Tensor, int]] = []
    model, _ = training.build(config)
    batch = config.data.load(config.model).train_batch(0, 0, 4)
    with simulate(model, config.recipe.build()) as simulation:

        def observe(call: Any, role: Any, quantizer: Quantizer | None, axis: int, x: Tensor, result: Tensor) -> None:
            if quantizer is not None:
                seen.append((x, result, axis))

        simulation.observer = observe
        with training.computing(config):
            loss = training.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
    quantizer = Quantizer(formats.mxfp4_e2m1)
    assert loss.dtype is torch.float32 and all(p.grad.dtype is p.dtype is torch.float32 for p in model.parameters())
    assert len(seen) > 8
    for x, result, axis in seen:
        assert x.dtype is result.dtype is torch.bfloat16
        assert torch.equal(result.float(), quantizer.quantize(x.float(), axis))


@pytest.mark.parametrize("chosen", [None, ":16:8"])
def test_a_gpu_s_products_are_allowed_to_be_deterministic(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses them without one of two values of this variable, and not every worker is one of ours (Dask's)."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", chosen or "")
    if chosen is None:
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with training.deterministic():
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == (chosen or ":4096:8")
