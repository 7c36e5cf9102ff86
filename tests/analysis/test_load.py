"""Laws of reading run folders: what was written comes back, and what cannot be read is listed, never dropped in
silence.
"""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from analysis import load
from tests.analysis import run_folders as made

ROOT = Path(__file__).parents[2]


def small() -> list[made.Config]:
    return [made.config("gpt2-micro", "adamw", format, seed) for format in made.FORMATS for seed in (0, 1)]


def test_the_usual_schedule_is_named_where_a_run_has_another(tmp_path: Path) -> None:
    usual, other = small()[:2]
    other["schedule"] = {"name": "wsd", "decay_fraction": 0.2}
    made.write_runs(tmp_path, [usual, other])
    assert list(load.runs(tmp_path)["schedule.name"]) == ["cosine", "wsd"]


def test_a_row_of_runs_is_the_config_and_the_result(tmp_path: Path) -> None:
    configs = made.quickstart()
    made.write_runs(tmp_path, configs)
    runs = load.runs(tmp_path)
    assert list(runs["signature"]) == [made.signature(config) for config in configs]  # the order of the grid
    for row, config in zip(runs.to_dict("records"), configs, strict=True):
        assert row["model"] == config["model"]["name"]
        assert row["data"] == config["data"]["name"]
        assert row["optimizer"] == config["optimizer"]["name"]
        assert row["format"] == config["recipe"]["format"]
        assert row["optimizer.lr"] == config["optimizer"]["lr"]
        assert row["optimizer.betas"] == "[0.9, 0.99]"
        assert row["seed"] == config["seed"]
        assert (row["status"], row["step"]) == ("finished", config["steps"])
        text = config["model"]["name"] == "gpt2-micro"
        loss = made.final_loss(config) + 0.0
        assert row["metric"] == ("validation_loss" if text else "validation_accuracy")
        assert row["primary_metric"] == row[f"final.{row['metric']}"]
        assert abs(row["final.validation_loss"] - loss) < 0.02
    assert pd.isna(runs.loc[runs["optimizer"] == "adamw", "optimizer.noise_scale"]).all()


def test_metrics_hold_every_number_once(tmp_path: Path) -> None:
    config = made.config("vit-micro", "lmd", "float32", 0)
    made.write_runs(tmp_path, [config])
    long = load.metrics(tmp_path)
    lines = made.metric_lines(config)
    assert len(long) == sum(len(line) - 2 for line in lines)
    back = {(row.step, row.split, row.metric): row.value for row in long.itertuples()}
    for line in lines:
        for name in line.keys() - {"step", "split"}:
            assert back[line["step"], line["split"], name] == line[name]


def test_non_finite_numbers_come_back(tmp_path: Path) -> None:
    made.write_runs(tmp_path, small(), lambda config: ("diverged", 60) if config["seed"] else ("finished", None))
    long = load.metrics(tmp_path)
    last = long[(long["split"] == "train") & (long["step"] == 60)].set_index(["signature", "metric"])["value"]
    for config in [config for config in small() if config["seed"] == 1]:
        assert math.isnan(last[made.signature(config), "loss"])
        assert last[made.signature(config), "grad_norm"] == math.inf


def test_a_value_that_is_no_plain_number_changes_no_other_row(tmp_path: Path) -> None:
    """Files of plain numbers alone are read as columns, all others line by line."""
    made.write_runs(tmp_path, small())
    before = load.metrics(tmp_path)
    for config in small():
        with (tmp_path / made.signature(config) / "metrics.jsonl").open("ab") as file:
            file.write(b'{"step": 401, "split": "train", "mine": "NaN", "loss": null, "whole": 3}\n')
    after = load.metrics(tmp_path)
    added = after[after["step"] == 401]
    assert [*added["metric"].unique()] == ["mine", "whole"] and len(added) == 2 * len(small())
    pd.testing.assert_frame_equal(after.drop(added.index).reset_index(drop=True), before)


@pytest.mark.parametrize(
    "torn", [b'{"step": 401, "spl', b'{"step": 401, "split": "train", "loss": 1.', b"\x00\x00\xff", b"{}x"]
)
def test_a_torn_last_line_changes_nothing(tmp_path: Path, torn: bytes) -> None:
    made.write_runs(tmp_path, small())
    before = load.read(tmp_path)
    with (tmp_path / made.signature(small()[0]) / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    after = load.read(tmp_path)
    pd.testing.assert_frame_equal(after.metrics, before.metrics)
    pd.testing.assert_frame_equal(after.runs, before.runs)
    assert after.problems.empty


def test_a_run_without_result_is_unfinished_at_its_last_step(tmp_path: Path) -> None:
    configs = small()
    made.write_runs(tmp_path, configs, lambda config: ("unfinished", 35) if config["seed"] else ("finished", None))
    runs = load.runs(tmp_path).set_index("signature")
    for config in configs:
        row = runs.loc[made.signature(config)]
        assert (row["status"], row["step"]) == (("unfinished", 35) if config["seed"] else ("finished", 400))
        assert pd.isna(row["primary_metric"]) == (config["seed"] == 1)


def overwrite(path: Path, **fields: object) -> None:
    made.write_json(path, json.loads(path.read_text()) | fields)


DAMAGE = {
    "config.json is torn": lambda run: (run / "config.json").write_text('{"version": 1, "model": {"na'),
    "no config.json": lambda run: (run / "config.json").unlink(),
    "config.json is of version 2": lambda run: overwrite(run / "config.json", version=2),
    "config.json does not say the run's seed": lambda run: overwrite(run / "config.json", seed=None),
    "config.json does not say the run's optimizer": lambda run: overwrite(run / "config.json", optimizer={}),
    "config.json has the key 'status'": lambda run: overwrite(run / "config.json", status="fine"),
    "config.json holds no JSON object": lambda run: (run / "config.json").write_text("[1]"),
    "env.json is torn": lambda run: (run / "env.json").write_text(""),
    "env.json: resumed is no list": lambda run: overwrite(run / "env.json", resumed="yes"),
    "result.json is of version 2": lambda run: overwrite(run / "result.json", version=2),
    "result.json is of version None": lambda run: (run / "result.json").write_text('{"status": "finished"}'),
    "result.json has the status 'great'": lambda run: overwrite(run / "result.json", status="great"),
    "result.json does not say the last step": lambda run: overwrite(run / "result.json", step=None),
    "result.json: validation_loss is 'low'": lambda run: overwrite(
        run / "result.json", final={"validation_loss": "low"}
    ),
    "metrics.jsonl line 1 is torn": lambda run: (run / "metrics.jsonl").write_text(
        '{"step"\n{"step": 1, "split": "train"}\n'
    ),
    "metrics.jsonl line 1 is no object": lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n'),
    "metrics.jsonl line 1: loss is True": lambda run: (run / "metrics.jsonl").write_text(
        '{"step": 1, "split": "train", "loss": true}\n'
    ),
}


@pytest.mark.parametrize("reason", DAMAGE)
def test_an_unreadable_run_is_listed_and_the_others_are_read(tmp_path: Path, reason: str) -> None:
    configs = small()
    made.write_runs(tmp_path, configs)
    damaged = made.signature(configs[2])
    DAMAGE[reason](tmp_path / damaged)
    results = load.read(tmp_path)
    assert list(results.problems["folder"]) == [damaged]
    found = results.problems["reason"].iloc[0]
    assert found.startswith(reason)
    assert "\n" not in found
    assert set(results.runs["signature"]) == {made.signature(config) for config in configs} - {damaged}
    assert damaged not in set(results.metrics["signature"])


def test_every_signature_of_the_grid_is_somewhere(tmp_path: Path) -> None:
    configs = small()
    made.write_runs(tmp_path, configs, lambda config: ("failed", 5) if config["seed"] else ("finished", None))
    shutil.rmtree(tmp_path / made.signature(configs[0]))
    (tmp_path / made.signature(configs[1]) / "env.json").write_text("{")
    stray = made.write_run(tmp_path, made.config("gpt2-micro", "adamw", "float32", 77)).name
    (tmp_path / "tables").mkdir()
    results = load.read(tmp_path)
    assert results.not_started == [made.signature(configs[0])]
    assert (set(results.problems["folder"]), results.not_listed) == ({made.signature(configs[1])}, [stray])
    seen = [*results.runs["signature"], *results.not_started, *results.problems["folder"], *results.not_listed]
    assert sorted(seen) == sorted([*(made.signature(config) for config in configs), stray])


def test_a_torn_grid_file_is_a_problem_and_every_run_is_read(tmp_path: Path) -> None:
    made.write_runs(tmp_path, small())
    (tmp_path / "grid.json").write_text('{"version"')
    results = load.read(tmp_path)
    assert set(results.runs["signature"]) == {made.signature(config) for config in small()}
    assert results.problems["reason"].iloc[0].startswith("grid.json is torn")


def test_a_diverged_run_stays_in_the_metric_of_its_task(tmp_path: Path) -> None:
    configs = [config for config in made.quickstart() if config["model"]["name"] == "vit-micro"]
    made.write_runs(tmp_path, configs, lambda config: ("diverged", 60) if config["seed"] else ("finished", None))
    assert set(load.runs(tmp_path)["metric"]) == {"validation_accuracy"}


def test_resumed_sessions_are_rows_of_the_environment_and_change_nothing_else(tmp_path: Path) -> None:
    made.write_runs(tmp_path, small())
    before = load.read(tmp_path)
    first = tmp_path / made.signature(small()[0]) / "env.json"
    later = json.loads(first.read_text()) | {"threads": 2}
    overwrite(first, resumed=[later])
    after = load.read(tmp_path)
    pd.testing.assert_frame_equal(after.runs, before.runs)
    assert len(after.environment) == len(before.environment) + 1
    assert list(after.environment["threads"])[:2] == [1, 2]
    assert after.environment["time_s"].sum() == before.environment["time_s"].sum()


def test_text_that_utf8_cannot_hold_is_replaced(tmp_path: Path) -> None:
    made.write_runs(tmp_path, small()[:1])
    path = tmp_path / made.signature(small()[0]) / "result.json"
    path.write_text(path.read_text().replace('"cause": null', '"cause": "half \\ud800 pair"'))
    assert load.runs(tmp_path)["cause"].iloc[0] == "half ? pair"


def test_what_is_no_grid_folder_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load.runs(tmp_path / "absent")
    made.write_runs(tmp_path / "one", small()[:1])
    with pytest.raises(ValueError, match=r"no grid folder .* did you mean .*one\?"):
        load.problems(tmp_path)


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after `statement`."""
    code = f"{statement}; import sys; print(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in out.stdout.split()}


def test_analysis_imports_neither_torch_nor_another_package_of_ours() -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "analysis").rglob("*.py")]
    loaded = loaded_by("import " + ", ".join(module.removesuffix(".__init__") for module in modules))
    assert "analysis" in loaded
    assert not loaded & {"torch", "numba", "triton", "lpsim", "lmd", "experiments"}


def test_the_import_test_sees_an_import(tmp_path: Path) -> None:
    (tmp_path / "lmd.py").write_text("")
    assert "lmd" in loaded_by(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import analysis.load, lmd")
