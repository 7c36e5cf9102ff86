"""Telemetry in the analysis: read, tabulated and drawn from made-up rows; absent where no run has any."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import load
from analysis.figures.rounding import maps
from analysis.page import telemetry
from analysis.page.report import write_report
from tests.analysis import run_folders as made

FACTORS = ("model", "data", "optimizer", "format")
SITES = ("blocks.0.qkv/linear", "head/linear")


def row(step: int, site: str, role: str, format: str, **values: Any) -> dict[str, Any]:
    zeros = {"calls": 1, "elements": 64, "sqnr_db": math.nan, "bias": 0.0, "clipped": 0.0, "underflowed": 0.0}
    zeros |= {"nan": 0, "inf": 0, "amax": 1.0, "swallowed": math.nan, "origin": ""}
    return {"step": step, "site": site, "role": role, "format": format} | zeros | values


def sqnr(site: str, step: int, seed: int) -> float:
    return {"blocks.0.qkv/linear": 20.0, "head/linear": 12.0}[site] + step / 100 + seed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two seeds in float32 and MXFP4, telemetry at steps 0 and 100; the second seed's MXFP4 run met an Inf."""
    configs = [made.config("gpt2-micro", "adamw", name, seed) for name in ("float32", "mxfp4_e2m1") for seed in (0, 1)]
    made.write_runs(tmp_path, configs)
    for config in configs:
        name, seed = config["recipe"]["format"], config["seed"]
        rows = [row(step, "loss", "vector", "") for step in (0, 100)]
        if name != "float32":
            rows += [
                row(step, site, "fprop.rhs", name, sqnr_db=sqnr(site, step, seed), swallowed=0.5 if step else 0.25)
                for step in (0, 100)
                for site in SITES
            ]
            if seed:
                rows.append(row(100, "blocks.0/softmax", "vector", "", inf=3, origin="inf"))
        run = tmp_path / made.signature(config)
        pd.DataFrame(rows).to_parquet(run / "telemetry.parquet")
        cosines = [
            (step, p, c - seed / 100, 1.0) for step in (0, 100) for p, c in (("head.weight", 0.9), ("bias", 0.8))
        ]
        columns = ["step", "parameter", "cosine", "norm_ratio"]
        pd.DataFrame(cosines, columns=columns).to_parquet(run / "telemetry_cosines.parquet")
    return tmp_path


def test_every_row_is_read_with_its_signature(folder: Path) -> None:
    results = load.read(folder)
    rows = load.telemetry(folder)
    assert len(rows) == 4 * 2 + 2 * 4 + 1 and len(results.cosines) == 16
    assert list(dict.fromkeys(rows["signature"])) == list(results.runs["signature"])
    assert results.problems.empty


def test_the_first_nonfinite_value_of_each_run_that_saw_one(folder: Path) -> None:
    results = load.read(folder)
    (first,) = telemetry.origins(results.runs, results.telemetry).to_dict("records")
    signature = made.signature(made.config("gpt2-micro", "adamw", "mxfp4_e2m1", 1))
    assert first == {"signature": signature, "status": "finished", "step": 100, "site": "blocks.0/softmax"} | {
        "role": "vector",
        "kind": "inf",
    }


def test_what_rounding_did_by_arm_and_role(folder: Path) -> None:
    results = load.read(folder)
    (line,) = telemetry.rounding(results.runs, results.telemetry, FACTORS).to_dict("records")
    assert (line["format"], line["rounded_to"], line["role"]) == ("mxfp4_e2m1", "mxfp4_e2m1", "fprop.rhs")
    assert (line["runs"], line["sites"]) == (2, 2)
    assert line["lowest_site"] == "head/linear" and line["lowest_db"] == 13.0  # the median of 12, 13, 13, 14
    assert line["sqnr_db"] == 17.0 and line["swallowed"] == 0.375


def test_gradients_by_arm(folder: Path) -> None:
    results = load.read(folder)
    lines = telemetry.gradients(results.runs, results.cosines, FACTORS)
    assert list(lines["format"]) == ["float32", "mxfp4_e2m1"] and set(lines["parameter"]) == {"bias"}
    assert lines["lowest"].tolist() == pytest.approx([0.795, 0.795])
    assert lines["cosine"].tolist() == pytest.approx([0.845, 0.845])


@pytest.mark.usefixtures("undrawn")
def test_the_report_shows_it(folder: Path) -> None:
    page = write_report(folder, figures=False).read_text()
    for part in ("What rounding did", "Signal to rounding noise by site", "head/linear", "blocks.0/softmax"):
        assert part in page
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "tables" / "telemetry.parquet"), load.telemetry(folder))
    assert not (folder / "tables" / "telemetry.csv").exists()


def test_many_sites_and_formats_fit(folder: Path) -> None:
    """60 operands, 8 formats, one step: 40 of the lowest SQNR, 6 panels, said in the caption."""
    runs = pd.DataFrame({"signature": [f"s{i}" for i in range(8)], "format": [f"f{i}" for i in range(8)]})
    rows = [
        row(0, f"m{k}/linear", "fprop.lhs", f"f{i}", sqnr_db=float(k)) | {"signature": f"s{i}"}
        for i in range(8)
        for k in range(60)
    ]
    (drawing,) = maps(runs, pd.DataFrame(rows).rename(columns={"format": "rounded_to"}))  # nothing is clipped
    assert drawing.svg.startswith(b"<?xml")
    assert "The 40 operands of the lowest medians in a format are drawn, of 60." in drawing.caption
    assert "Panels for f6, f7 are left out." in drawing.caption


@pytest.mark.usefixtures("undrawn")
def test_a_torn_file_is_a_problem_and_the_run_is_kept(folder: Path) -> None:
    torn = made.signature(made.config("gpt2-micro", "adamw", "float32", 0))
    (folder / torn / "telemetry.parquet").write_bytes(b"PAR1")
    results = load.read(folder)
    (problem,) = results.problems.to_dict("records")
    assert problem["folder"] == torn and problem["reason"].startswith("telemetry.parquet cannot be read")
    assert torn in set(results.runs["signature"]) and torn not in set(results.telemetry["signature"])
    assert "telemetry.parquet cannot be read" in write_report(folder, figures=False).read_text()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("name", "missing"), [("telemetry", "origin"), ("telemetry_cosines", "cosine")])
def test_a_table_without_a_column_that_is_read_is_a_problem(name: str, missing: str, folder: Path) -> None:
    strange = made.signature(made.config("gpt2-micro", "adamw", "float32", 0))
    path = folder / strange / f"{name}.parquet"
    pd.read_parquet(path).drop(columns=missing).to_parquet(path)
    (problem,) = load.read(folder).problems.to_dict("records")
    assert problem["folder"] == strange and problem["reason"].startswith(f"{name}.parquet has no column {missing}; ")
    assert f"{name}.parquet has no column {missing}" in write_report(folder, figures=False).read_text()


@pytest.mark.usefixtures("undrawn")
def test_without_telemetry_there_is_nothing_of_it(tmp_path: Path) -> None:
    made.write_runs(tmp_path, made.quickstart(seeds=1))
    assert load.telemetry(tmp_path).empty
    assert "What rounding did" not in write_report(tmp_path, figures=False).read_text()
    assert not (tmp_path / "tables" / "telemetry.parquet").exists()


@pytest.mark.usefixtures("undrawn")
def test_runs_of_another_call_are_counted_and_no_problem(tmp_path: Path) -> None:
    configs = [made.config("gpt2-micro", "adamw", name, 0) for name in made.FORMATS]
    made.write_runs(tmp_path, configs)
    made.write_grid(tmp_path, configs[:2])
    results = load.read(tmp_path)
    assert results.problems.empty and results.not_listed == [made.signature(configs[2])]
    page = write_report(tmp_path, figures=False).read_text()
    assert "1 run in this folder that grid.json does not list" in page and "mxfp4_e2m1" not in page
