"""Tuning: equal effort for every arm, a diverged trial is never chosen, a kill changes nothing, seeds stay apart."""

import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.command import cli, tune
from experiments.grids import load_grid
from experiments.grids.adaptive import Adaptive, Rounds
from experiments.grids.source_files import SourceError
from experiments.grids.tuning import Arm, Choice, LogUniform, Tuning, Uniform, load_tuning, tuned
from experiments.grids.tuning.search import Trial
from experiments.grids.tuning.tuned import arm_name
from experiments.running.grid import run_grid
from experiments.training import record
from experiments.training.config import Config, forward
from experiments.training.optimizers import LMD, AdamW
from lpsim.formats import float32, mxfp4_e2m1
from tests.experiments.experiment_jobs import Here, tiny_config
from tests.experiments.test_adaptive import Killed

Loss = Callable[[Mapping[str, Any]], float]  # of a config as JSON; not finite: the run diverges


def bowl(config: Mapping[str, Any]) -> float:
    """Best at a rate of 0.01, another bowl for each seed; diverges at large rates."""
    optimizer = config["optimizer"]
    loss = math.log10(optimizer["lr"] / 0.01) ** 2 + optimizer["weight_decay"] + 0.01 * math.sin(config["seed"])
    return math.inf if optimizer["lr"] > 0.05 else loss


class Pretends(Here):
    """Writes a run folder without training: its loss is a function of its config. Dies after so many runs."""

    def __init__(self, loss: Loss = bowl, runs: float = math.inf) -> None:
        super().__init__()
        self.loss, self.left = loss, runs

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        if self.left <= 0:
            raise Killed
        self.left -= 1
        self.submitted += 1
        config, folder = args
        loss = self.loss(config)
        status, final = ("finished", {"validation_loss": loss}) if math.isfinite(loss) else ("diverged", {})
        result = {"version": 1, "status": status, "step": 1, "cause": None, "final": final}
        record.write_json(Path(folder) / "config.json", config)
        record.write_json(Path(folder) / "result.json", result)
        future: Future[Any] = Future()
        future.set_result(result)
        return future


RATE = {"optimizer.lr": LogUniform(1e-3, 0.1)}


def arms() -> list[Arm]:
    base = tiny_config()
    two = RATE | {"optimizer.weight_decay": Uniform(0.0, 0.2)}
    three = two | {"optimizer.betas": Choice(((0.9, 0.99), (0.9, 0.999)))}
    return [
        Arm(base, RATE),
        Arm(replace(base, optimizer=LMD(lr=0.03)), two),
        Arm(replace(base, recipe=forward("mxfp4_e2m1")), three),
    ]


def tuning(**fields: Any) -> Tuning:
    settings: dict[str, Any] = {"trials": 8, "finalists": 2, "final_seeds": (1001, 1002), "rounds": 3}
    return Tuning(**({"arms": arms()} | settings | fields))


def run(given: Tuning, folder: Path, executor: Here) -> list[Trial]:
    """As `lpsim tune` does, but for the files."""
    trials: list[Trial] = []

    def play() -> Rounds:
        trials[:] = yield from given.play()

    run_grid(Adaptive(play, Path("g.py")), folder, executor)
    return trials


def run_and_write(given: Tuning, folder: Path, executor: Here) -> None:
    """As `lpsim tune` does."""
    tune.write(given, run(given, folder, executor), folder, folder / "tuned.json")


def written(folder: Path) -> dict[str, bytes]:
    return {
        name: (folder / name).read_bytes() for name in ("tables/tuning.csv", "tuning.svg", "tuned.json", "grid.json")
    }


@pytest.mark.full
@pytest.mark.parametrize("sampler", ["tpe", "quasi-random"])
def test_killed_ten_times_it_ends_in_the_same_table(tmp_path: Path, sampler: str) -> None:
    given = tuning(sampler=sampler)
    whole = Pretends()
    run_and_write(given, tmp_path / "whole" / "g", whole)
    for _ in range(10):
        with pytest.raises(Killed):
            run_and_write(given, tmp_path / "g", Pretends(runs=whole.submitted // 11))
    run_and_write(given, tmp_path / "g", Pretends())
    assert written(tmp_path / "g") == written(tmp_path / "whole" / "g")


@pytest.mark.parametrize("sampler", ["tpe", "quasi-random"])
def test_every_arm_gets_the_same_trials_and_finals(tmp_path: Path, sampler: str) -> None:
    given = tuning(sampler=sampler)
    table = given.table(run(given, tmp_path / "g", Pretends()))
    assert list(table["arm"].unique()) == [arm.name for arm in given.arms]
    for _, mine in table.groupby("arm"):
        assert len(mine) == 8 and mine["finalist"].sum() == 2 and mine["chosen"].sum() == 1
        assert sorted(mine["rank"]) == list(range(1, 9))
        assert (mine.loc[mine["finalist"], "seeds"] == "1000 1001 1002").all()
        assert (mine.loc[~mine["finalist"], "seeds"] == "1000").all()
        assert (mine["sampler"] == "tpe").sum() == (4 if sampler == "tpe" else 0)
    assert table["optimizer.lr"].between(1e-3, 0.1).all()
    assert table["optimizer.weight_decay"].dropna().between(0.0, 0.2).all()


def test_the_choice_has_the_best_mean_over_all_its_seeds(tmp_path: Path) -> None:
    given = tuning()
    trials = run(given, tmp_path / "g", Pretends())
    for arm in given.arms:
        finalists = [trial for trial in trials if trial.arm is arm and trial.finalist]
        means = {
            trial.number: sum(bowl(c.to_dict()) for c in trial.configs(given.all_seeds)) / 3 for trial in finalists
        }
        (chosen,) = [trial for trial in finalists if trial.chosen]
        assert means[chosen.number] == min(means.values())
        first = {t.number: bowl(t.configs([1000])[0].to_dict()) for t in trials if t.arm is arm}
        assert {trial.number for trial in finalists} == set(sorted(first, key=first.__getitem__)[:2])


def test_a_trial_that_diverged_on_any_seed_is_never_chosen_over_one_that_did_not(tmp_path: Path) -> None:
    """The better a rate looks on the first seed, the surer it diverges on the others; only the worst two hold."""

    def treacherous(config: Mapping[str, Any]) -> float:
        return config["optimizer"]["lr"] if config["seed"] == 1000 or config["optimizer"]["lr"] > 0.03 else math.nan

    given = tuning(arms=[Arm(tiny_config(), RATE)], sampler="quasi-random")
    trials = run(given, tmp_path / "g", Pretends(treacherous))
    (chosen,) = [trial for trial in trials if trial.chosen]
    assert chosen.values["optimizer.lr"] == min(lr for t in trials if (lr := t.values["optimizer.lr"]) > 0.03)
    assert chosen.rank == 1 and not chosen.diverged
    ranked = [trial.diverged for trial in sorted(trials, key=lambda trial: trial.rank)]
    assert ranked == sorted(ranked)


def test_an_arm_that_always_diverges_has_no_choice(tmp_path: Path) -> None:
    given = tuning(arms=[Arm(tiny_config(), RATE)])
    trials = run(given, tmp_path / "g", Pretends(lambda config: math.nan))
    assert not any(trial.chosen or trial.finalist for trial in trials)
    assert "no choice, each of 8 trials diverged" in tune.summary(given, trials)
    tune.write(given, trials, tmp_path / "g", tmp_path / "g" / "tuned.json")
    with pytest.raises(ValueError, match="has no values for 'gpt2-tiny, adamw, float32': each of its trials diverged"):
        tuned(tmp_path / "g" / "tuned.json").config(tiny_config())


def test_equal_values_are_run_once(tmp_path: Path) -> None:
    given = tuning(arms=[Arm(tiny_config(), {"clip_norm": Choice((1.0, 2.0))})])
    executor = Pretends()
    trials = run(given, tmp_path / "g", executor)
    assert len(trials) == 8 and executor.submitted <= 2 * 3


def test_the_first_trials_of_all_arms_are_the_same_points(tmp_path: Path) -> None:
    trials = run(tuning(), tmp_path / "g", Pretends())
    rates = [[t.values["optimizer.lr"] for t in trials if t.arm.name == arm.name][:4] for arm in arms()]
    assert rates[0] == rates[1] == rates[2]


def test_an_edge_is_told(tmp_path: Path) -> None:
    given = tuning(arms=[Arm(tiny_config(), {"optimizer.lr": LogUniform(1e-5, 1e-3)})], trials=16)
    trials = run(given, tmp_path / "g", Pretends())
    text = tune.summary(given, trials)
    assert "lies at the upper edge of its range, 1e-05 to 0.001: the best may lie beyond, widen the range" in text
    assert "edge" not in tune.summary(tuning(), run(tuning(arms=arms()[:1]), tmp_path / "h", Pretends()))


# --- what a grid reads ---


@pytest.fixture(scope="module")
def choice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("choice") / "g"
    run_and_write(tuning(), folder, Pretends())
    return folder / "tuned.json"


def test_a_grid_reads_the_choice_of_its_arm(choice: Path) -> None:
    table = pd.read_csv(choice.parent / "tables" / "tuning.csv")
    chosen = table[table["chosen"]].set_index("arm")
    read = tuned(choice)
    for arm in arms():
        config = read.config(replace(arm.config, seed=3))
        assert config.seed == 3 and config.optimizer.lr == chosen.loc[arm.name, "optimizer.lr"]
        assert replace(config, optimizer=arm.config.optimizer) == replace(arm.config, seed=3)
    assert config.optimizer.betas in ((0.9, 0.99), (0.9, 0.999))
    float32 = read.config(replace(arms()[2].config, seed=3), arm=arms()[0].name)
    assert float32.optimizer == AdamW(lr=chosen.loc[arms()[0].name, "optimizer.lr"])


def test_a_choice_names_the_runs_that_it_rests_on(choice: Path) -> None:
    document = json.loads(choice.read_text())
    for name, arm in document["arms"].items():
        runs = [json.loads((choice.parent / run / "config.json").read_text()) for run in arm["runs"]]
        assert [run["seed"] for run in runs] == document["seeds"], name
        assert all(run["optimizer"]["lr"] == arm["values"]["optimizer.lr"] for run in runs)


@pytest.mark.parametrize("seed", [1000, 1001, 1002])
def test_a_seed_of_the_tuning_is_refused_in_a_comparison(choice: Path, seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed {seed} tuned the values .* take a seed other than 1000, 1001, 1002"):
        tuned(choice).config(tiny_config(seed=seed))


def test_what_was_not_tuned_is_refused(choice: Path) -> None:
    other = tiny_config(optimizer=LMD(lr=0.1), recipe=forward("mxfp6_e3m2"))
    with pytest.raises(ValueError, match=r"tuned no arm 'gpt2-tiny, lmd, mxfp6_e3m2'; there are: .*gpt2-tiny, lmd"):
        tuned(choice).config(other)


def test_a_missing_or_torn_choice_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no such file\); make it with: lpsim tune GRID --output "):
        tuned(tmp_path / "tuned.json")
    (tmp_path / "tuned.json").write_text('{"version"')
    with pytest.raises(ValueError, match=r"is torn or not JSON .* lpsim tune GRID"):
        tuned(tmp_path / "tuned.json")
    (tmp_path / "tuned.json").write_text("{}")
    with pytest.raises(ValueError, match="is no file of tuned values of version 1"):
        tuned(tmp_path / "tuned.json")


def test_the_shipped_tuning_is_of_the_quickstarts_arms_and_shares_no_seed_with_a_comparison() -> None:
    given = load_tuning("format_tuning")[1]
    compared = [config for name in ("quickstart", "lmd_ablation") for config in listed(name)]
    assert {arm.name for arm in given.arms} == {arm_name(config) for config in listed("quickstart")}
    assert not {config.seed for config in compared} & set(given.all_seeds)
    for arm in given.arms:
        (span,) = arm.ranges.values()
        assert isinstance(span, LogUniform) and span.low < arm.config.optimizer.lr < span.high


def listed(name: str) -> list[Config]:
    configs = load_grid(name)[1]
    assert isinstance(configs, list)
    return configs


# --- mistakes ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogUniform(0.0, 1.0), "LogUniform: low must be positive, is 0; Uniform may begin at 0"),
        (lambda: LogUniform(0.1, 0.1), "LogUniform: low must be below high, got 0.1 and 0.1"),
        (lambda: Uniform(2.0, math.inf), "Uniform.high must be a finite number, is inf"),
        (lambda: Choice((1,)), "Choice: needs two or more different values, got 1"),
        (lambda: Choice((1, object())), "Choice: values must be texts, numbers"),
        (lambda: Arm(tiny_config(), {}), "has no ranges"),
        (lambda: Arm(tiny_config(), {"optimizer.rate": LogUniform(1, 2)}), "AdamW has no field 'rate'; there are: "),
        (lambda: Arm(tiny_config(), {"optimizer.lr.x": Uniform(1, 2)}), "optimizer.lr.x: float has no field 'x'"),
        (lambda: Arm(tiny_config(), {"seed": Choice((1, 2))}), "seed is no setting to tune"),
        (lambda: Arm(tiny_config(), {"steps": Uniform(10, 20)}), "Config.steps must be int, is 10.0"),
        (lambda: Arm(tiny_config(), {"optimizer.lr": Uniform(0.0, 0.1)}), "AdamW: lr must be positive, is 0.0"),
        (lambda: Arm(tiny_config(), {"optimizer.lr": (0.1, 1)}), "needs a LogUniform, Uniform or Choice"),
        (lambda: tuning(arms=[]), "arms must be one or more Arm"),
        (
            lambda: tuning(arms=[*arms(), arms()[0]]),
            "two arms are called 'gpt2-tiny, adamw, float32'; give each a name",
        ),
        (lambda: tuning(trials=0), "trials must be at least 1, is 0"),
        (lambda: tuning(finalists=9), "finalists must be at most trials, 8; is 9"),
        (lambda: tuning(seeds=5), "seeds must be a list, is 5"),
        (lambda: tuning(seeds=()), "seeds must name one seed or more"),
        (lambda: tuning(final_seeds=(1000,)), "seeds and final_seeds must all differ, got 1000, 1000"),
        (lambda: tuning(seeds=(-1,)), "seed must lie in"),
        (lambda: tuning(metric="loss"), "metric must be one of validation_loss, .*; is 'loss'"),
        (lambda: tuning(sampler="random"), "sampler must be one of .*; is 'random'"),
    ],
)
def test_a_mistake_says_what_would_be_right(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


def test_without_optuna_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs Optuna: pip install 'lpsim\[tune\]'; or take 'quasi-random'"):
        tuning()
    tuning(sampler="quasi-random")


def test_a_metric_that_the_runs_do_not_have_is_told(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no validation_accuracy to tune by; it has: validation_loss"):
        run(tuning(metric="validation_accuracy"), tmp_path / "g", Pretends())


TUNE = """
from experiments.grids.tuning import Arm, LogUniform, Tuning
from tests.experiments.experiment_jobs import tiny_config
def tune():
    arm = Arm(tiny_config(steps=3, warmup_steps=1), {"optimizer.lr": LogUniform(1e-3, 0.1)})
    return Tuning([arm], trials=3, finalists=1, final_seeds=[1001], rounds=2)
"""


def test_the_command_tunes_and_a_grid_reads_what_it_chose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rates.py").write_text(TUNE)
    command = ["tune", str(tmp_path / "rates.py"), "--runs", str(tmp_path), "--jobs", "1"]
    assert cli.main([*command, "--output", str(tmp_path / "rates.json"), "--report"]) == 0
    output = capsys.readouterr().out
    assert "4 runs: 4 finished (4 of them run now)" in output
    assert "gpt2-tiny, adamw, float32: optimizer.lr " in output and "mean over 2 seeds; 3 trials" in output
    for file in ("rates/tables/tuning.csv", "rates/tuning.svg", "rates.json", "rates/report.html"):
        assert (tmp_path / file).exists() and (file == "rates/report.html" or str(tmp_path / file) in output)
    assert cli.main(command) == 0
    assert "(0 of them run now)" in capsys.readouterr().out
    assert (tmp_path / "rates" / "tuned.json").read_bytes() == (tmp_path / "rates.json").read_bytes()


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("tune", "def grid():\n    yield 1\n", r"defines no function tune(); it must be: def tune() -> Tuning"),
        (
            "run",
            TUNE,
            "defines no function grid(); it must be: def grid() -> Iterator[Config]; it is a tuning: lpsim tune",
        ),
        ("tune", "def tune():\n    return 3\n", "tune() must return a Tuning, it returned 3"),
        (
            "tune",
            TUNE.replace("trials=3", "trials=0"),
            "rates.py:6: ValueError: Tuning: trials must be at least 1, is 0",
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, text: str, message: str
) -> None:
    (tmp_path / "rates.py").write_text(text)
    assert cli.main([command, str(tmp_path / "rates.py"), "--runs", str(tmp_path)]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and output.out == ""


def test_formats_are_chosen_on_the_command_line(tmp_path: Path) -> None:
    text = TUNE.replace("tune():", "tune(formats=()):").replace(
        "[arm]", "[Arm(arm.config, arm.ranges, f.name) for f in formats]"
    )
    (tmp_path / "rates.py").write_text(text)
    given = load_tuning(str(tmp_path / "rates.py"), [float32, mxfp4_e2m1])[1]
    assert [arm.name for arm in given.arms] == ["float32", "mxfp4_e2m1"]
