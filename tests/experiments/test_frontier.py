"""Frontiers: where a known truth breaks, what contradicts the assumption, and that a kill changes nothing."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import load
from experiments.command import cli, frontier
from experiments.grids import load_grid
from experiments.grids.adaptive import Adaptive, Outcome, Rounds
from experiments.grids.frontier import Arm, Frontier, LogUniform, load_frontier
from experiments.grids.frontier.judge import Found, Trial, judged
from experiments.grids.source_files import SourceError
from experiments.running.grid import run_grid
from experiments.training import record
from experiments.training.config import Config, forward
from experiments.training.optimizers import LMD
from lpsim import Rounding
from tests.experiments.experiment_jobs import one_thread, tiny_config
from tests.experiments.test_adaptive import Killed, KilledAfter
from tests.experiments.test_grid import Here
from tests.experiments.test_tuning import Loss, Pretends

STOCHASTIC = forward("mxfp4_e2m1", rounding=Rounding.STOCHASTIC)
RATES = LogUniform(1e-3, 1.0)


@pytest.fixture(scope="module", autouse=True)
def on_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def arms() -> list[Arm]:
    base = tiny_config()
    quantized, noiseless = replace(base, recipe=STOCHASTIC), replace(base, optimizer=LMD(lr=0.03, noise_scale=0.0))
    return [Arm(base, RATES), Arm(quantized, RATES), Arm(noiseless, LogUniform(1e-2, 1.0))]


def sought(**fields: Any) -> Frontier:
    return Frontier(**({"arms": arms(), "seeds": (0, 1, 2)} | fields))


def seek(given: Frontier, folder: Path, executor: Here) -> list[Found]:
    """As `lpsim frontier` does, but for the files."""
    found: list[Found] = []

    def play() -> Rounds:
        found[:] = yield from given.play()

    run_grid(Adaptive(play, Path("g.py")), folder, executor)
    return found


def played(given: Frontier, loss: Loss) -> list[Found]:
    """What is found where a run is a function of its config, without a folder."""
    rounds = given.play()
    try:
        asked = next(rounds)
        while True:
            asked = rounds.send([outcome(loss(config.to_dict()), config) for config in asked])
    except StopIteration as end:
        return list(end.value)


def outcome(loss: float, config: Config) -> Outcome:
    finished = math.isfinite(loss)
    final = {"validation_loss": loss} if finished else {}
    return Outcome(config, config.signature(), "finished" if finished else "diverged", final)


def tables(given: Frontier, loss: Loss, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The tables of arms and of runs, as the analysis reads them."""
    record.write_json(folder / "grid.json", {"version": 1, "signatures": []})
    frontier.write(given, played(given, loss), folder)
    return load.frontier(folder), load.frontier_runs(folder)


def seek_and_write(given: Frontier, folder: Path, executor: Here) -> dict[str, bytes]:
    """As `lpsim frontier` does; what it wrote."""
    files, _ = frontier.write(given, seek(given, folder, executor), folder)
    return {file.name: file.read_bytes() for file in (*files, folder / "grid.json")}


def breaks_at(points: Mapping[str, float], diverging: float = 8.0) -> Loss:
    """Best at a tenth of the point of the config's format; 1 nat worse above the point, diverged `diverging` above."""

    def loss(config: Mapping[str, Any]) -> float:
        ratio = config["optimizer"]["lr"] / points[config["recipe"]["format"]]
        seed = 3.0 * config["seed"]  # seeds differ by far more than the margin
        if ratio > diverging:
            return math.nan
        return 2.0 + seed + 0.02 * math.log(10 * ratio) ** 2 + (1.0 if ratio > 1 else 0.0)

    return loss


# --- what is found ---


@pytest.mark.parametrize("resolution", [1.1, 2.0])
@pytest.mark.parametrize("point", [0.0123, 0.1, 0.37])
def test_a_known_point_lies_in_the_bracket(resolution: float, point: float) -> None:
    given = sought(resolution=resolution, margin=0.5)
    points = {"float32": point, "mxfp4_e2m1": point / 3}
    for arm, found in zip(given.arms, played(given, breaks_at(points)), strict=True):
        truth = points[arm.config.recipe.name]
        assert found.frontier is not None and found.breaks is not None and not found.contradicting
        assert found.frontier.rate <= truth < found.breaks.rate <= found.frontier.rate * resolution * (1 + 1e-9)
        rates = [trial.rate for trial in found.trials]
        assert len(rates) <= len(given.first_rates(arm)) + given.bisections(arm)
        assert max(b / a for a, b in itertools.pairwise(rates)) <= given.spacing * 1.001
        assert rates[0] == arm.rates.low and rates[-1] == arm.rates.high


def found_of(table: Mapping[float, Sequence[float]], share: float = 1.0, margin: float = 0.1) -> Found:
    configs = [tiny_config(seed=seed) for seed in range(2)]
    trials = [Trial(rate, tuple(map(outcome, losses, configs))) for rate, losses in table.items()]
    return judged(trials, margin, share)


D = math.inf  # diverged


@pytest.mark.parametrize(
    ("table", "share", "expected"),  # expected: best, frontier, breaks, contradicting
    [
        ({1: [3, 3], 2: [2, 2], 4: [2.05, 2.1], 8: [2.2, 2.2]}, 1.0, (2, 4, 8, [])),
        ({1: [3, 3], 2: [2, 2], 4: [2.05, 2.2], 8: [2.2, 2.2]}, 1.0, (2, 2, 4, [])),
        ({1: [3, 3], 2: [2, 2], 4: [2.05, 2.2], 8: [2.2, 2.2]}, 0.5, (2, 4, 8, [])),
        ({1: [2, 4], 2: [2.1, 3.9], 4: [2.1, 4.1]}, 1.0, (1, 4, None, [])),  # a margin of 0.1 is still in it
        ({1: [2, 4], 2: [4, 2]}, 1.0, (1, 1, 2, [])),  # equal means, but paired the second seed's gain undoes nothing
        ({1: [2, 2], 2: [2, 2.01], 4: [2, D], 8: [D, D]}, 1.0, (1, 2, 4, [])),
        ({1: [2, 2], 2: [2, 2.01], 4: [2, D], 8: [D, D]}, 0.5, (1, 4, 8, [])),
        ({1: [2, 2], 2: [3, 3], 4: [2.05, 2.05], 8: [4, 4]}, 1.0, (1, 1, 2, [4])),
        ({1: [D, 2.4], 2: [2, 2], 4: [D, D]}, 1.0, (2, 2, 4, [1])),
        ({1: [9, 9], 2: [2, 2], 4: [D, D]}, 1.0, (2, 2, 4, [])),  # too low a rate breaks nothing
        ({1: [2.3, 2.3], 2: [2, 2]}, 1.0, (2, 2, None, [])),
        ({1: [2.5, D], 2: [2, D], 4: [2.05, 7]}, 0.5, (4, 4, None, [])),  # fewest diverge at 4
        ({1: [D, D], 2: [D, D]}, 1.0, (None, None, None, [])),
    ],
)  # fmt: skip
def test_what_holds_and_what_breaks(table: dict[float, list[float]], share: float, expected: tuple[Any, ...]) -> None:
    found = found_of(table, share)
    rates = tuple(None if t is None else t.rate for t in (found.best, found.frontier, found.breaks))
    assert (*rates, [t.rate for t in found.contradicting]) == expected


def test_a_better_best_rate_that_the_bisection_finds_moves_the_frontier() -> None:
    """Between 0.1 and 0.2 hides a loss so low that 0.1 no longer holds: it is not the frontier, but below the best."""

    def loss(config: Mapping[str, Any]) -> float:
        lr = config["optimizer"]["lr"]
        return 1.0 if 0.12 < lr < 0.16 else 2.0 if lr <= 0.12 else 3.0

    given = Frontier([Arm(tiny_config(), LogUniform(0.1, 0.2))], margin=0.5, resolution=1.2)
    (found,) = played(given, loss)
    assert found.best is not None and found.frontier is not None and found.breaks is not None
    assert 0.12 < found.best.rate <= found.frontier.rate < 0.16 <= found.breaks.rate <= 1.2 * found.frontier.rate
    assert not found.contradicting


def test_the_tables_say_what_broke_and_name_the_runs(tmp_path: Path) -> None:
    given = sought(margin=0.5)
    table, runs = tables(given, breaks_at({"float32": 0.1, "mxfp4_e2m1": 0.3}, diverging=1.0), tmp_path)
    assert list(table["arm"]) == [
        "gpt2-tiny, adamw, float32",
        "gpt2-tiny, adamw, mxfp4_e2m1, stochastic",
        "gpt2-tiny, lmd, float32, noise 0",
    ]
    assert table["rounding"].fillna("").tolist() == ["", "stochastic", ""]
    assert table["noise"].isna().tolist() == [True, True, False] and table["noise"].iloc[2] == 0.0
    assert set(table["status"]) == {"bracketed"} and set(table["broke"]) == {"3 of 3 diverge"}
    assert set(table["share"]) == {1.0} and set(table["monotone"]) == {"true"}
    configs = {c.signature(): c for arm in given.arms for t in runs["rate"].unique() for c in arm.configs(t, (0, 1, 2))}
    for row in runs.to_dict("records"):
        assert configs[row["signature"]].seed == row["seed"] and configs[row["signature"]].optimizer.lr == row["rate"]
        assert (row["status"] == "diverged") == math.isnan(row["loss"])
    at_best = runs[runs["place"].str.startswith("best")]
    assert set(at_best["excess"]) == {0.0} and len(at_best) == 9
    means = at_best.groupby("arm", sort=False)["loss"].mean()
    pd.testing.assert_series_equal(means, table.set_index("arm")["best_loss"], check_names=False)
    assert "3 of 3 diverge); 100% of the seeds hold at the frontier; best" in frontier.summary(table)
    bracket = ["frontier", "breaks"]
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "frontier.csv")[bracket], table[bracket])


def test_what_ends_worse_is_told_with_its_size(tmp_path: Path) -> None:
    """Above its point a run ends 1 nat worse, and 0.02 ln² of it more."""
    table, _ = tables(sought(margin=0.5), breaks_at({"float32": 0.1, "mxfp4_e2m1": 0.1}), tmp_path)
    assert table["broke"].str.fullmatch(r"3 of 3 end up to 1\.[01]\d nats worse").all()


def test_open_and_empty_brackets_are_told(tmp_path: Path) -> None:
    table, _ = tables(sought(margin=0.5), breaks_at({"float32": 50.0, "mxfp4_e2m1": 1e-5}), tmp_path)
    assert list(table["status"]) == ["open", "none", "open"]
    assert table["frontier"].tolist()[::2] == [1.0, 1.0] and table["breaks"].isna().all()
    text = frontier.summary(table)
    assert "gpt2-tiny, adamw, float32: at least 1, the largest tried (best 1 at" in text
    assert "its best rate lies at the upper bound of those tried, 0.001 to 1" in text
    assert "stochastic: none, every rate from 0.001 to 1 breaks; try lower ones" in text


def test_a_grid_of_which_every_run_diverges_has_tables_and_a_picture(tmp_path: Path) -> None:
    table, runs = tables(sought(arms=arms()[:1]), lambda config: math.nan, tmp_path)
    assert list(table["status"]) == ["none"] and table["frontier"].isna().all() and set(runs["status"]) == {"diverged"}
    assert "<svg" in (tmp_path / "frontier.svg").read_text()


def test_a_contradiction_is_told(tmp_path: Path) -> None:
    def loss(config: Mapping[str, Any]) -> float:
        return 3.0 if 0.01 < config["optimizer"]["lr"] < 0.02 else 2.0

    given = Frontier([Arm(tiny_config(), LogUniform(0.001, 0.032))], spacing=2.0)
    table, _ = tables(given, loss, tmp_path)
    (row,) = table.to_dict("records")
    assert row["frontier"] <= 0.01 < row["breaks"] < 0.02 and row["monotone"] == "false"
    assert row["contradicting"] == "0.032"
    assert "0.032 contradicts that what has broken stays broken" in frontier.summary(table)


def test_a_torn_file_is_a_problem_and_the_runs_are_kept(tmp_path: Path) -> None:
    tables(sought(margin=0.5), breaks_at({"float32": 0.1, "mxfp4_e2m1": 0.1}), tmp_path)
    (tmp_path / "frontier.json").write_text('{"version": 1, "arms": [{"arm": "a"}]}')
    results = load.read(tmp_path)
    assert results.frontier.empty and results.frontier_runs.empty
    (problem,) = results.problems.to_dict("records")
    assert problem["reason"] == "frontier.json has no column model in its table arms; lpsim frontier writes it again"


# --- killed and resumed ---


def test_killed_ten_times_it_ends_in_the_same_files(tmp_path: Path) -> None:
    loss = breaks_at({"float32": 0.1, "mxfp4_e2m1": 0.02})
    given = sought(arms=arms()[:2], seeds=(0, 1), margin=0.5, spacing=8.0, resolution=2.0)
    whole = Pretends(loss)
    written = seek_and_write(given, tmp_path / "whole" / "g", whole)
    for _ in range(10):
        with pytest.raises(Killed):
            seek_and_write(given, tmp_path / "g", Pretends(loss, runs=whole.submitted // 11))
    assert seek_and_write(given, tmp_path / "g", Pretends(loss)) == written


@pytest.mark.full
def test_a_real_frontier_killed_and_resumed_is_the_same(tmp_path: Path) -> None:
    """Runs of 8 steps of a tiny model, which diverge at the largest rate."""
    base = tiny_config(steps=8, warmup_steps=1, clip_norm=None, divergence_factor=1.5)
    given = Frontier(
        [Arm(replace(base, recipe=recipe), LogUniform(0.003, 3.0)) for recipe in (base.recipe, STOCHASTIC)],
        seeds=(0, 1), margin=0.3, spacing=10.0, resolution=4.0,
    )  # fmt: skip
    whole = seek_and_write(given, tmp_path / "whole" / "g", Here())
    for runs in (3, 9, 6):
        with pytest.raises(Killed):
            seek(given, tmp_path / "g", KilledAfter(runs))
    assert seek_and_write(given, tmp_path / "g", Here()) == whole
    table = load.frontier(tmp_path / "g")
    assert list(table["status"]) == ["bracketed", "bracketed"] and (table["breaks"] <= 4 * table["frontier"]).all()


# --- the command, and mistakes ---

FRONTIER = """
from experiments.grids.frontier import Arm, Frontier, LogUniform
from tests.experiments.experiment_jobs import tiny_config
def frontier():
    config = tiny_config(steps=6, warmup_steps=1, telemetry_every=2)
    return Frontier([Arm(config, LogUniform(0.01, 10.0))], seeds=[5], margin=0.2, spacing=40.0, resolution=10.0)
"""


def test_the_command_finds_writes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "push.py").write_text(FRONTIER)
    command = ["frontier", str(tmp_path / "push.py"), "--runs", str(tmp_path), "--jobs", "1"]
    assert cli.main([*command, "--dry-run"]) == 0
    assert "1 arms on 1 seeds: about 4 runs, 24 steps where none diverges" in capsys.readouterr().out
    assert not (tmp_path / "push").exists()
    assert cli.main([*command, "--report"]) == 0
    output = capsys.readouterr().out
    assert "gpt2-tiny, adamw, float32: " in output and " breaks (1 of 1 " in output
    for file in ("frontier.json", "frontier.csv", "frontier.svg", "report.html"):
        assert str(tmp_path / "push" / file) in output and (tmp_path / "push" / file).exists()
    before = (tmp_path / "push" / "frontier.json").read_bytes()
    assert cli.main(command) == 0
    assert "(0 of them run now)" in capsys.readouterr().out
    assert (tmp_path / "push" / "frontier.json").read_bytes() == before
    page = (tmp_path / "push" / "report.html").read_text()
    assert page.count("How far the learning rate can be pushed") == 1
    assert "Frontiers: gpt2-tiny, adamw, float32: " in page  # the picture in words
    signs = pd.read_csv(tmp_path / "push" / "tables" / "frontier_instability.csv")
    assert (signs["largest_logit"] > 0).all() and (signs["cosine"] > 0.999).all()


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("frontier", "def grid():\n    yield 1\n", "it must be: def frontier() -> Frontier; it is a grid: lpsim run"),
        ("run", FRONTIER, "it must be: def grid() -> Iterator[Config]; it seeks a frontier: lpsim frontier"),
        ("frontier", "def frontier():\n    return 3\n", "frontier() must return a Frontier, it returned 3"),
        ("frontier", FRONTIER.replace("margin=0.2", "margin=0"), "push.py:6: ValueError: Frontier: margin must be"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, text: str, message: str
) -> None:
    (tmp_path / "push.py").write_text(text)
    assert cli.main([command, str(tmp_path / "push.py"), "--runs", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and output.out == ""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Arm(tiny_config(), (0.1, 1.0)), "rates must be a LogUniform"),  # type: ignore[arg-type]
        (lambda: sought(arms=[]), "arms must be one or more frontier.Arm"),
        (lambda: sought(arms=arms()[:1] * 2), "two arms are called 'gpt2-tiny, adamw, float32'; give each a name"),
        (lambda: sought(seeds=5), "seeds must be a list, is 5"),
        (lambda: sought(seeds=(1, 1)), "seeds must be one or more different ones, got 1, 1"),
        (lambda: sought(seeds=(-1,)), "seed must lie in"),
        (lambda: sought(margin=math.nan), "margin must be a finite number, is nan"),
        (lambda: sought(share=0.0), r"share must lie in \(0, 1\], is 0"),
        (lambda: sought(share=50), r"share must lie in \(0, 1\], is 50"),
        (lambda: sought(resolution=1.0), "resolution is a factor of at least 1.01, is 1"),
        (lambda: sought(spacing=1.1), "spacing is a factor of at least the resolution, 1.25; is 1.1"),
    ],
)
def test_a_mistake_says_what_would_be_right(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_runs_without_the_loss_are_told() -> None:
    rounds = sought().play()
    strange = [Outcome(config, "", "finished", {"accuracy": 1.0}) for config in next(rounds)]
    with pytest.raises(ValueError, match="gpt2-tiny, adamw, float32 has no validation_loss to judge by"):
        rounds.send(strange)


def test_the_shipped_frontier_asks_what_it_says() -> None:
    given = load_frontier("frontier_gpt2")[1]
    kinds = {(arm.config.optimizer.name, arm.config.recipe.name, arm.rounding) for arm in given.arms}
    formats = [("float32", "")] + [(f, r) for f in ("mxfp6_e3m2", "mxfp4_e2m1") for r in ("ties_to_even", "stochastic")]
    assert kinds == {(optimizer, *pair) for optimizer in ("adamw", "lmd-for-model") for pair in formats}
    rates = [len(given.first_rates(arm)) + given.bisections(arm) for arm in given.arms]
    steps = sum(n * len(given.seeds) * arm.config.steps for n, arm in zip(rates, given.arms, strict=True))
    assert steps <= 200_000 and {arm.config.model.name for arm in given.arms} == {"gpt2-micro"}
    with pytest.raises(SourceError, match="it seeks a frontier: lpsim frontier"):
        load_grid("frontier_gpt2")
