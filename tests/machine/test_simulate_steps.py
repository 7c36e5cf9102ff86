"""The step follows the optimizers of an unmodified loop: resumed, accumulated, evaluated in between, several."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lmd import LMD, Combined
from lpsim import Gemm, Quantizer, Recipe, Rounding, formats, simulate
from lpsim.machine.simulate import Simulation
from lpsim.machine.telemetry import Telemetry

STOCHASTIC = Quantizer(formats.get("mxfp4_e2m1"), rounding=Rounding.STOCHASTIC)
RECIPE = Recipe(Gemm(STOCHASTIC, STOCHASTIC), Gemm(STOCHASTIC, STOCHASTIC), Gemm(STOCHASTIC, STOCHASTIC))


DROPOUT = {f"{place}_pdrop": 0.0 for place in ("resid", "embd", "attn")}  # the Trainer's evaluations shift its bits


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32))


def data(step: int) -> Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(step))


def gradients(model: nn.Module, *steps: int) -> list[Tensor]:
    """Those of the batches of `steps`, accumulated; they stay in .grad."""
    model.zero_grad()
    for step in steps:
        model(data(step)).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def same(a: Iterable[Tensor], b: Iterable[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("make", [AdamW, LMD], ids=["adamw", "lmd"])
def test_it_is_the_step_that_a_loop_would_set(make: Any) -> None:
    runs = []
    for sets in (True, False):
        model = mlp()
        optimizer = make(model.parameters(), lr=0.01)
        with simulate(model, RECIPE, seed=3) as sim:
            for step in range(4):
                if sets:
                    sim.step = step
                assert sim.step == step
                gradients(model, step, step + 100)  # accumulated: one step
                optimizer.step()
        runs.append(list(model.parameters()))
    assert same(*runs)


@pytest.mark.parametrize("make", [AdamW, LMD], ids=["adamw", "lmd"])
def test_a_new_process_goes_on_where_the_optimizer_stands(make: Any) -> None:
    def train(model: nn.Module, optimizer: Optimizer, sim: Simulation, steps: range) -> None:
        for step in steps:
            gradients(model, step)
            optimizer.step()
        assert sim.step == steps.stop

    whole = mlp()
    optimizer = make(whole.parameters(), lr=0.01)
    with simulate(whole, RECIPE, seed=3) as sim:
        train(whole, optimizer, sim, range(2))
        saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
        train(whole, optimizer, sim, range(2, 4))
    resumed = mlp()
    optimizer = make(resumed.parameters(), lr=0.01)
    with simulate(resumed, RECIPE, seed=3) as sim:
        resumed.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        train(resumed, optimizer, sim, range(2, 4))
    assert same(whole.parameters(), resumed.parameters())


@pytest.mark.parametrize("where", ["before the forward pass", "between accumulated ones", "after the update"])
def test_an_evaluation_shifts_no_random_bits(where: str) -> None:
    """Whether it is before, within or after a step; and each of its batches draws bits of its own."""
    runs: list[list[Tensor]] = []
    drawn: list[Tensor] = []

    def evaluate(model: nn.Module) -> None:
        with torch.no_grad():
            drawn.extend(model(data(99)) for _ in range(3))

    for evaluates in (None, where):
        model = mlp()
        optimizer = AdamW(model.parameters(), lr=0.01)
        with simulate(model, RECIPE, seed=3):
            for step in range(3):
                model.zero_grad()
                for i, batch in enumerate((step, step + 100)):
                    if evaluates == ("before the forward pass", "between accumulated ones")[i]:
                        evaluate(model)
                    model(data(batch)).square().sum().backward()
                optimizer.step()
                if evaluates == "after the update":
                    evaluate(model)
        runs.append(list(model.parameters()))
    assert same(*runs)
    assert len({tuple(x.flatten().tolist()) for x in drawn}) == len(drawn)


def test_a_step_that_was_skipped_is_none() -> None:
    """As under GradScaler, which does not call step then."""
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.01)
    with simulate(model, RECIPE) as sim:
        first = gradients(model, 0)
        assert not same(first, gradients(model, 0))  # further bits of the same step
        assert sim.step == 0
        optimizer.step()
        assert sim.step == 1


def test_optimizers_that_step_together_make_one_step() -> None:
    model = mlp()
    pair = SGD(model[0].parameters(), 0.01), AdamW(model[2].parameters(), 0.01)
    with simulate(model, RECIPE) as sim:
        for step in range(3):
            assert sim.step == step
            gradients(model, step)
            for optimizer in pair:
                optimizer.step()
    model = mlp()
    combined = Combined(LMD(model[0].parameters()), AdamW(model[2].parameters(), 0.01))
    with simulate(model, RECIPE) as sim:
        for step in range(3):
            assert sim.step == step
            with combined.sampled_params():
                gradients(model, step)
            combined.step()


def test_the_optimizer_of_another_model_counts_nothing() -> None:
    model, other = mlp(), mlp()
    foreign = AdamW(other.parameters(), lr=0.01)
    with simulate(model, RECIPE) as sim:
        gradients(model, 0)
        other(data(0)).sum().backward()
        foreign.step()
        assert sim.step == 0
    foreign.step()
    with simulate(model, RECIPE) as sim:
        gradients(model, 0)
        assert sim.step == 0


def test_a_step_that_the_loop_sets_is_the_loops() -> None:
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.01)
    with simulate(model, RECIPE) as sim:
        sim.step = 7
        gradients(model, 0)
        optimizer.step()
        assert sim.step == 7


def test_the_audit_is_of_the_first_step() -> None:
    model = mlp()
    optimizer = AdamW(model.parameters(), lr=0.01)
    with simulate(model, RECIPE) as sim:
        gradients(model, 0)
        optimizer.step()
        first = sim.audit()
        gradients(model, 1)
        optimizer.step()
    assert first.rows and sim.audit() == first


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
def test_the_optimizer_computes_as_outside(fused: bool) -> None:
    runs = []
    for inside in (False, True):
        model = mlp()
        optimizer = AdamW(model.parameters(), lr=0.01, fused=fused, foreach=not fused)
        for step in range(3):
            with simulate(model, RECIPE, audit=False) as sim:
                sim.step = step
                gradients(model, step)
                if inside:
                    optimizer.step()
            if not inside:
                optimizer.step()
        runs.append(list(model.parameters()))
    assert same(*runs)


def test_what_a_closure_computes_is_the_machines() -> None:
    seen: list[list[Tensor]] = []
    for inside in (False, True):
        model = mlp()
        optimizer = SGD(model.parameters(), lr=0.01)
        with simulate(model, RECIPE) as sim:
            gradients(model, 0)
            sim.step = 1  # the audit has ended

            def closure(model: nn.Module = model) -> float:
                seen.append(gradients(model, 1))
                return 0.0

            if inside:
                optimizer.step(closure)
            else:
                closure()
    assert same(*seen)


class Broken(SGD):
    def step(self, closure: Any = None) -> Any:
        raise FloatingPointError


@pytest.mark.parametrize("calls", ["a module", "a function"])
def test_an_exception_in_the_optimizer_leaves_the_machine_on(calls: str) -> None:
    """For what is called next, whether in a module or outside of all."""

    def run(breaks: bool) -> list[Tensor]:
        model = mlp()
        optimizer = Broken(model.parameters(), lr=0.01)
        with simulate(model, RECIPE, audit=False) as sim:
            sim.step = 0
            gradients(model, 0)
            if breaks:
                with contextlib.suppress(FloatingPointError):
                    optimizer.step()
            sim.step = 1
            if calls == "a module":
                return gradients(model, 1)
            return [torch.nn.functional.linear(data(1), model[0].weight)]

    assert same(run(False), run(True))


def test_a_mode_entered_after_an_exception_is_not_left_in_the_wrong_order() -> None:
    model = mlp()
    optimizer = Broken(model.parameters(), lr=0.01)
    with simulate(model, RECIPE, audit=False):
        try:
            optimizer.step()
        except FloatingPointError:
            with torch.device("cpu"), pytest.raises(RuntimeError, match="leave that mode first"):
                model(data(0))
        quantized = model(data(0))
    assert not torch.equal(quantized, model(data(0)))


def test_telemetry_follows_and_continues() -> None:
    def rows(stop: int | None) -> Any:
        model = mlp()
        optimizer = AdamW(model.parameters(), lr=0.01)
        with simulate(model, RECIPE, seed=3) as sim:
            telemetry = Telemetry(sim, every=2)
            for step in range(5):
                if step == stop:
                    break
                gradients(model, step)
                optimizer.step()
            if stop is None:
                return telemetry.parquet()
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), telemetry.state_dict()))
        model = mlp()
        optimizer = AdamW(model.parameters(), lr=0.01)
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        with simulate(model, RECIPE, seed=3) as sim:
            telemetry = Telemetry(sim, every=2)
            telemetry.load_state_dict(saved[2])
            for step in range(stop, 5):
                gradients(model, step)
                optimizer.step()
            return telemetry.parquet()

    whole = rows(None)
    assert all(rows(stop) == whole for stop in (1, 2, 3))


def test_the_trainer_of_transformers_unmodified(tmp_path: Path) -> None:
    """Stopped after half and resumed it ends in the same bits as undisturbed, evaluations or not."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(1)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 64, (12, 16))]

    def model() -> Any:
        torch.manual_seed(0)
        config = transformers.GPT2Config(
            vocab_size=64, n_positions=16, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, **DROPOUT
        )
        return transformers.GPT2LMHeadModel(config)

    class Stop(transformers.TrainerCallback):  # type: ignore[name-defined]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    def train(name: str, stop: bool, resume: bool, evaluate: bool) -> list[Tensor]:
        trained = model()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / name),
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            eval_strategy="steps" if evaluate else "no",
            eval_steps=1,
            learning_rate=0.01,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
        )
        callbacks = [Stop()] if stop else []
        with simulate(trained, RECIPE, seed=5) as sim:
            trainer = transformers.Trainer(
                model=trained, args=arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=callbacks
            )
            trainer.train(resume_from_checkpoint=resume)
            assert sim.step == (3 if stop else 6)
        return [p.detach().clone() for p in trained.parameters()]

    whole = train("whole", stop=False, resume=False, evaluate=True)
    half = train("stopped", stop=True, resume=False, evaluate=False)
    assert not same(whole, half)
    assert same(whole, train("stopped", stop=False, resume=True, evaluate=False))
