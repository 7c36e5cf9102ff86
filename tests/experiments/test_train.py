"""The training loop: a function of its config, whatever interrupts it; divergence is an outcome."""

import json
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.training import train as training
from experiments.training.config import Config, RecipeConfig, all_products, forward, model, named_recipe
from experiments.training.data import Digits, Glyphs
from experiments.training.optimizers import LMD, OPTIMIZERS, SGD, AdamW
from experiments.training.record import RunFolderError, RunRecord
from experiments.training.train import train
from experiments.training.weights import weight_statistics
from lpsim import Recipe, Rounding, simulate
from tests.experiments.experiment_jobs import one_thread, tiny_config


@pytest.fixture(scope="module", autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines, times left out."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time_ms"} for line in lines]


def weights(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


class Stopper:
    """Says stop after so many steps."""

    def __init__(self, after: int) -> None:
        self.after = after

    def __call__(self) -> bool:
        self.after -= 1
        return self.after == 0


def run(config: Config, folder: Path, stops: tuple[int, ...] = ()) -> dict[str, Any]:
    """Train to the end, stopped and resumed after each of `stops` further steps. Without times."""
    folder.mkdir(exist_ok=True)
    for after in stops:
        with closing(RunRecord(folder)) as record:
            assert train(config, record, Stopper(after)) is None
    with closing(RunRecord(folder)) as record:
        result = train(config, record)
    assert result is not None
    result.pop("time_s")
    return result


STOCHASTIC = forward("mxfp4_e2m1", rounding=Rounding.STOCHASTIC)
CONFIGS = {
    **{name: tiny_config(optimizer=OPTIMIZERS[name](lr=0.01)) for name in OPTIMIZERS},
    "lmd stochastic": tiny_config(optimizer=LMD(lr=0.03), recipe=STOCHASTIC),
    "adamw mxfp6": tiny_config(recipe=forward("mxfp6_e3m2", vector="bfloat16")),
    "adamw nvfp4 training": tiny_config(recipe=named_recipe("nvfp4")),
    "adamw all products": tiny_config(recipe=all_products("mxfp4_e2m1", rounding=Rounding.STOCHASTIC)),
    "glyphs": tiny_config(model=model("vit-micro-glyphs"), data=Glyphs(validation_images=36)),
    "vit": tiny_config(model=model("vit-micro"), data=Digits(), batch_size=60, validate_every=9, recipe=STOCHASTIC),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_resumed_run_is_bit_equal(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    whole = run(config, tmp_path / "a")
    parts = run(config, tmp_path / "b", stops=(1, 5, 3))
    assert whole == parts
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    assert (tmp_path / "a" / "weights.json").read_bytes() == (tmp_path / "b" / "weights.json").read_bytes()
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_run_killed_after_its_last_checkpoint_repeats_the_steps_since(tmp_path: Path) -> None:
    """What kill -9 leaves: later metrics than the checkpoint's, and a torn last line."""
    config = tiny_config(optimizer=LMD(lr=0.03))
    whole = run(config, tmp_path / "a")
    (tmp_path / "b").mkdir()
    with closing(RunRecord(tmp_path / "b")) as record:
        assert train(config, record, Stopper(6)) is None
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "split": "train", "loss": 9.0}\n{"step": 8, "split": "tra')
    assert run(config, tmp_path / "b") == whole
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


def test_a_run_killed_before_its_result_has_the_same_result(tmp_path: Path) -> None:
    config = tiny_config()
    first = run(config, tmp_path)
    before = metrics(tmp_path)
    assert run(config, tmp_path) == first  # from the checkpoint of the last step
    assert metrics(tmp_path) == before


def test_what_a_finished_run_leaves(tmp_path: Path) -> None:
    config = tiny_config(steps=10, validate_every=5, log_every=2)
    result = run(config, tmp_path)
    lines = metrics(tmp_path)
    steps = {
        split: [line["step"] for line in lines if line["split"] == split]
        for split in ("train", "validation", "weights")
    }
    assert steps == {"train": [2, 4, 6, 8, 10], "validation": [0, 5, 10], "weights": [0, 5, 10]}
    last = [line for line in lines if line["step"] == 10]
    assert result["final"] == {"train_loss": last[0]["loss"], "validation_loss": last[1]["loss"]}
    assert (result["status"], result["step"], result["cause"]) == ("finished", 10, None)
    assert lines[0]["loss"] == pytest.approx(math.log(256), abs=0.1)


def test_runs_do_not_read_or_move_the_global_random_state(tmp_path: Path) -> None:
    config = tiny_config(optimizer=LMD(lr=0.03), recipe=STOCHASTIC)
    torch.manual_seed(1)
    first = run(config, tmp_path / "a")
    drawn = torch.rand(1)
    torch.manual_seed(2)
    assert run(config, tmp_path / "b") == first
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)


def test_arms_of_one_seed_start_from_the_same_weights_and_batches(tmp_path: Path) -> None:
    runs = []
    for i, optimizer in enumerate((AdamW(lr=0.01), LMD(lr=0.03, noise_scale=0.0))):
        run(tiny_config(optimizer=optimizer), tmp_path / str(i))
        runs.append(metrics(tmp_path / str(i)))
    assert runs[0][:2] == runs[1][:2]  # validation and weights at step 0
    assert runs[0][2]["loss"] == runs[1][2]["loss"] and runs[0][2] != runs[1][2]  # the first step differs in its rate


def test_float32_is_plain_torch_bit_for_bit() -> None:
    """The loop's loss and gradients equal a few lines of torch that know nothing of simulation."""
    config = tiny_config(clip_norm=None)
    data = config.data.load(config.model)
    simulated, optimizer = training.build(config)
    plain, _ = training.build(config)
    batch = data.train_batch(config.seed, 0, config.batch_size)
    with simulate(simulated, config.recipe.build()):
        loss, _ = training.gradients(config, simulated, optimizer, batch)
    expected = torch.nn.functional.cross_entropy(plain(batch[0]).flatten(0, 1), batch[1].flatten())
    expected.backward()
    assert loss == expected.item()
    for a, b in zip(simulated.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


def test_gradients_are_taken_at_a_sample_and_validation_at_the_mean() -> None:
    config = tiny_config(optimizer=LMD(lr=0.03, noise_scale=0.3), clip_norm=None)
    data = config.data.load(config.model)
    network, optimizer = training.build(config)
    at_mean = training.validate(config, network, data)
    batch = data.train_batch(0, 0, 4)
    means = [p.detach().clone() for p in network.parameters()]
    sampled_loss, _ = training.gradients(config, network, optimizer, batch)
    assert all(torch.equal(p, mean) for p, mean in zip(network.parameters(), means, strict=True))
    plain_loss = training.cross_entropy(network(batch[0]), batch[1]).item()
    assert sampled_loss != plain_loss
    assert training.validate(config, network, data) == at_mean


def test_the_gradient_is_clipped_to_the_norm() -> None:
    for clip_norm in (1e-3, None):
        config = tiny_config(clip_norm=clip_norm)
        network, optimizer = training.build(config)
        batch = config.data.load(config.model).train_batch(0, 0, 4)
        _, before = training.gradients(config, network, optimizer, batch)
        after = math.sqrt(sum(p.grad.square().sum().item() for p in network.parameters() if p.grad is not None))
        assert after == pytest.approx(before if clip_norm is None else clip_norm, rel=1e-3)
        assert before > 0.1


def test_learning_rate_schedule() -> None:
    config = tiny_config(steps=10, warmup_steps=4, final_lr_fraction=0.1, optimizer=AdamW(lr=2.0))
    _, optimizer = training.build(config)
    rates = [training.set_learning_rate(config, optimizer, step) for step in range(10)]
    cosine = [2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 6))) for i in range(1, 7)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, 2.0, *cosine])
    assert rates[-1] == pytest.approx(0.2)
    assert {group["lr"] for group in optimizer.param_groups} == {rates[-1]}


def test_divergence_is_an_outcome_with_step_and_cause(tmp_path: Path) -> None:
    config = tiny_config(optimizer=SGD(lr=1e4, weight_decay=0.0), clip_norm=None)
    result = run(config, tmp_path)
    assert result["status"] == "diverged"
    last = metrics(tmp_path)[-1]
    assert (last["step"], last["split"]) == (result["step"], "train")
    bound = 3 * math.log(256)
    assert 1 < result["step"] < 12
    if isinstance(last["loss"], float) and math.isfinite(last["loss"]) and math.isfinite(last["grad_norm"]):
        assert last["loss"] > bound
        assert result["cause"] == f"the training loss {last['loss']:.4g} is above {bound:.4g}, 3 times a uniform guess"


@pytest.mark.parametrize(
    ("loss", "norm", "cause"),
    [
        (math.nan, 1.0, "the training loss is nan"),
        (math.inf, 1.0, "the training loss is inf"),
        (5.0, math.nan, "the gradient's norm is nan"),
        (16.7, 1.0, "the training loss 16.7 is above 16.64, 3 times a uniform guess"),
        (16.6, 1.0, None),
    ],
)
def test_what_counts_as_divergence(loss: float, norm: float, cause: str | None) -> None:
    assert training.divergence(tiny_config(), loss, norm, classes=256) == cause


def test_a_non_finite_gradient_ends_the_run_before_it_reaches_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(optimizer=LMD(lr=0.03), checkpoint_every=1)
    original = training.gradients

    def poisoned(config: Config, network: torch.nn.Module, *rest: Any) -> tuple[float, float]:
        loss, norm = original(config, network, *rest)
        return (loss, norm) if optimizer_steps(network) < 3 else (loss, math.nan)

    def optimizer_steps(network: torch.nn.Module) -> int:
        calls.append(None)
        return len(calls) - 1

    calls: list[None] = []
    monkeypatch.setattr(training, "gradients", poisoned)
    result = run(config, tmp_path)
    assert (result["status"], result["step"]) == ("diverged", 4)
    assert metrics(tmp_path)[-1]["grad_norm"] == "NaN"
    assert all(torch.isfinite(value).all() for value in weights(tmp_path).values())


def test_a_run_begins_with_the_weights_that_another_ended_with(tmp_path: Path) -> None:
    first = tiny_config(steps=4, validate_every=4)
    with pytest.raises(RunFolderError, match="which has not finished"):
        run(replace(first, begin_with=first.signature()), tmp_path / "second")
    (tmp_path / first.signature()).mkdir()
    with closing(RunRecord(tmp_path / first.signature())) as record:
        result = train(first, record)
        assert result is not None
        record.finish(result)
    second = replace(first, begin_with=first.signature(), seed=7)
    assert Config.from_dict(second.to_dict()) == second
    run(second, tmp_path / "stopped", stops=(2,))
    run(second, tmp_path / "whole")
    last, begun = metrics(tmp_path / first.signature()), metrics(tmp_path / "whole")
    for split in ("validation", "weights"):
        ended = [line for line in last if line["split"] == split][-1]
        began = next(line for line in begun if line["split"] == split)
        assert {**ended, "step": 0} == began
    assert metrics(tmp_path / "stopped") == begun


def test_weight_statistics() -> None:
    network = torch.nn.Linear(2, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[3.0, -12.0]]))
        network.bias.copy_(torch.tensor([4.0]))
    mean_square = (9 + 144) / 2
    assert weight_statistics(network) == pytest.approx(
        {"norm": 13.0, "max": 12.0, "mean_abs": 19 / 3}
        | {"kurtosis": (81 + 20736) / 2 / mean_square**2, "crest": 12 / mean_square**0.5}
    )


def test_a_weight_of_two_values_has_neither_tails_nor_a_crest_and_zeros_are_left_out() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(40, 2, bias=False), torch.nn.Linear(40, 2, bias=False))
    signs = torch.tensor([[0.5, -0.5] * 20, [0.0] * 40])
    with torch.no_grad():
        network[0].weight.copy_(signs)
        network[1].weight.zero_()
    found = weight_statistics(network)
    assert (found["kurtosis"], found["crest"]) == (2.0, 1.0)  # half of the first tensor is zero


def test_an_escaped_product_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lpsim.machine.audit import Auditor

    monkeypatch.setattr(Auditor, "_owner_of", lambda *_: None)
    with pytest.raises(RuntimeError, match="matrix products ran outside the recipe: aten"):
        run(tiny_config(), tmp_path)


def test_every_recipe_of_the_quickstart_learns_a_little(tmp_path: Path) -> None:
    for name in ("float32", "mxfp6_e3m2", "mxfp4_e2m1"):
        config = replace(tiny_config(), recipe=forward(name), steps=40)
        result = run(config, tmp_path / name)
        assert result["final"]["validation_loss"] < 5.2


def test_the_deterministic_setting_is_put_back(tmp_path: Path) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    run(tiny_config(steps=3, recipe=RecipeConfig()), tmp_path)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert Recipe() == RecipeConfig().build()
