"""Telemetry from the training loop: the first Inf is named; identical tables whatever the threads and interruptions."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from analysis import load
from analysis.page.report import write_report
from experiments.running.grid import run_grid
from experiments.training.config import Config, all_products, forward
from experiments.training.optimizers import LMD, SGD
from experiments.training.record import RunRecord
from experiments.training.train import build, train
from lpsim import Rounding
from tests.experiments.experiment_jobs import Here, one_thread, tiny_config
from tests.experiments.test_train import Stopper, metrics, run, weights

STOCHASTIC = all_products("mxfp4_e2m1", vector="bfloat16", rounding=Rounding.STOCHASTIC)
OBSERVED = tiny_config(optimizer=LMD(lr=0.03), recipe=STOCHASTIC, telemetry_every=4)
OVERFLOWS = tiny_config(optimizer=SGD(lr=1e30, weight_decay=0.0), clip_norm=None)  # update 2 (warm-up) leaves float32
RISING = 30.0  # a rate that diverges within a few steps
ATTENTION = "blocks.0.attention/scaled_dot_product_attention"


@pytest.fixture(scope="module", autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def tables(folder: Path) -> list[pd.DataFrame]:
    return [pd.read_parquet(folder / f"{name}.parquet") for name in ("telemetry", "telemetry_cosines")]


def assert_same_tables(first: Path, second: Path) -> None:
    for a, b in zip(tables(first), tables(second), strict=True):
        pd.testing.assert_frame_equal(a, b, check_exact=True)


def modules_not_finite(config: Config, folder: Path, updates: int) -> list[str]:
    """The modules, in order, whose results are not finite after so many updates: by hooks, in plain torch."""
    folder.mkdir()
    with closing(RunRecord(folder)) as record:
        assert train(config, record, Stopper(updates)) is None
    network, _ = build(config)
    network.load_state_dict(weights(folder))
    found: list[str] = []

    def note(path: str, result: Tensor) -> None:
        if not torch.isfinite(result).all():
            found.append(path)

    for path, module in network.named_modules():
        module.register_forward_hook(lambda _, __, result, path=path: note(path, result))
    network(config.data.load(config.model).train_batch(config.seed, updates, config.batch_size)[0])
    return found


def origin(folder: Path) -> tuple[int, str, str, str]:
    (row,) = tables(folder)[0].query("origin != ''").itertuples()
    return row.step, row.site, row.role, row.origin


@pytest.mark.parametrize("every", [1, 5])  # the step that overflows, the second, is sampled or not
def test_the_first_nan_of_a_run_is_named(every: int, tmp_path: Path) -> None:
    config = replace(OVERFLOWS, telemetry_every=every)
    result = run(config, tmp_path / "run")
    first = modules_not_finite(config, tmp_path / "plain", updates=1)[0]
    assert origin(tmp_path / "run") == (1, f"{first}/layer_norm", "vector", "nan")
    assert (result["status"], result["step"]) == ("diverged", 2)
    assert result["cause"] == f"the training loss is nan; the first nan after 1 updates at {first}/layer_norm, vector"


def test_the_first_inf_of_a_run_is_named(tmp_path: Path) -> None:
    """The product of queries and keys overflows, all before it is finite; blocks of finite numbers give no NaN."""
    config = replace(OVERFLOWS, optimizer=SGD(lr=1e16, weight_decay=0.0), recipe=forward("mxfp4_e2m1"))
    results = [run(replace(config, telemetry_every=n), tmp_path / str(n)) for n in (1, 5)]
    assert modules_not_finite(config, tmp_path / "plain", updates=1)[0] == "blocks.0.attention.proj"
    for n in (1, 5):
        assert origin(tmp_path / str(n)) == (1, f"{ATTENTION}.qk", "fprop.out", "inf")
    cause = f"the training loss is nan; the first inf after 1 updates at {ATTENTION}.qk, fprop.out"
    assert [result["cause"] for result in results] == [cause, cause]
    last = [tables(tmp_path / str(n))[0].query("step == 1").reset_index(drop=True) for n in (1, 5)]
    pd.testing.assert_frame_equal(*last, check_exact=True)


def test_identical_when_repeated_at_two_threads_and_resumed(tmp_path: Path) -> None:
    run(OBSERVED, tmp_path / "once")
    run(OBSERVED, tmp_path / "again")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        run(OBSERVED, tmp_path / "threads")
    finally:
        torch.set_num_threads(threads)
    run(OBSERVED, tmp_path / "parts", stops=(1, 4, 2))  # after a sampled step, after another, between two
    for name in ("again", "threads", "parts"):
        assert_same_tables(tmp_path / "once", tmp_path / name)
    rows, cosines = tables(tmp_path / "once")
    assert sorted(set(rows["step"])) == sorted(set(cosines["step"])) == [0, 4, 8]
    assert cosines["cosine"].between(0.2, 1).mean() > 0.9
    swallowed = rows.query("role == 'fprop.rhs' and site.str.endswith('/linear')")["swallowed"]
    assert swallowed.between(0, 1).all() and swallowed.mean() > 0.05


def test_a_diverged_run_is_the_same_when_resumed(tmp_path: Path) -> None:
    config = replace(OVERFLOWS, telemetry_every=5, recipe=STOCHASTIC, optimizer=SGD(lr=RISING, weight_decay=0.0))
    whole = run(config, tmp_path / "a")
    assert whole["status"] == "diverged" and whole["step"] > 2
    assert run(config, tmp_path / "b", stops=(1, 1)) == whole
    assert_same_tables(tmp_path / "a", tmp_path / "b")
    assert tables(tmp_path / "a")[0]["step"].max() == whole["step"] - 1  # the step it ended in is always there


def test_a_run_killed_between_its_tables_and_its_checkpoint(tmp_path: Path) -> None:
    run(OBSERVED, tmp_path / "a")
    (tmp_path / "b").mkdir()
    with closing(RunRecord(tmp_path / "b")) as record:
        assert train(OBSERVED, record, Stopper(5)) is None
        checkpoint = (tmp_path / "b" / "checkpoint.pt").read_bytes()
        assert train(OBSERVED, record, Stopper(4)) is None
    (tmp_path / "b" / "checkpoint.pt").write_bytes(checkpoint)
    run(OBSERVED, tmp_path / "b")
    assert_same_tables(tmp_path / "a", tmp_path / "b")


def test_observing_changes_no_run_and_leaves_nothing_when_off(tmp_path: Path) -> None:
    assert run(OBSERVED, tmp_path / "a") == run(replace(OBSERVED, telemetry_every=None), tmp_path / "b")
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert {p.name for p in (tmp_path / "a").iterdir()} - {p.name for p in (tmp_path / "b").iterdir()} == {
        "telemetry.parquet",
        "telemetry_cosines.parquet",
    }


def test_a_full_precision_run_has_cosines_of_one(tmp_path: Path) -> None:
    run(tiny_config(telemetry_every=10), tmp_path)
    rows, cosines = tables(tmp_path)
    assert (cosines["cosine"] > 1 - 1e-12).all() and set(rows["format"]) == {""}


def test_several_samples_a_step_are_compared_once(tmp_path: Path) -> None:
    run(replace(OBSERVED, optimizer=LMD(lr=0.03, mc_samples=2), steps=3), tmp_path)
    rows, cosines = tables(tmp_path)
    assert not cosines.duplicated(["step", "parameter"]).any()
    assert set(rows["calls"]) == {2}


def test_the_report_of_a_grid_with_telemetry(tmp_path: Path) -> None:
    formats = ("float32", "mxfp4_e2m1")
    grid = [tiny_config(telemetry_every=5, recipe=forward(name), steps=6) for name in formats]
    assert [row.status for row in run_grid(grid, tmp_path / "g", Here())] == ["finished", "finished"]
    assert set(load.telemetry(tmp_path / "g")["step"]) == {0, 5}
    page = write_report(tmp_path / "g").read_text()
    assert "What rounding did" in page and "No NaN and no Inf was seen." in page and f"{ATTENTION}.qk" in page
