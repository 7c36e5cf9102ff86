"""Which rounding costs what, in the report: tables of `lpsim attribute`, and runs of parts of a recipe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis import load
from analysis.figures.attribution import GRADIENT, drawing
from analysis.page.report import write_report
from analysis.statistics import attribution
from tests.analysis import run_folders as made

FACTORS = ["model", "data", "optimizer", "format"]


def rows(shift: float = 0.0) -> list[dict[str, Any]]:
    """An attribution of two sites of one role, with changes of 0.25 and 0.5 (plus shift each), together 1."""

    def row(by: str, part: str, rounded: str, change: float, site: str = "", role: str = "") -> dict[str, Any]:
        names = {"recipe": "mxfp4_e2m1", "by": by, "part": part, "site": site, "role": role, "rounded": rounded}
        return names | {"roundings": 1, "loss": 2.0 + change, "change": change, "logits_sqnr_db": 20.0}

    found = [row("-", "-", "nothing", 0.0), row("-", "-", "all", 1.0), row("role", "fprop.weight", "only", 1.0)]
    for site, change in (("a/linear", 0.25), ("<b>/linear", 0.5)):
        for by, part in (("site", site), ("site-role", f"{site} fprop.weight")):
            found.append(row(by, part, "only", change + shift, site, "fprop.weight"))
            found.append(row(by, part, "all but", change + shift + 0.125, site, "fprop.weight"))
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """AdamW in float32 and MXFP4, two seeds; both MXFP4 runs have an attribution."""
    configs = [made.config("gpt2-micro", "adamw", name, seed) for name in ("float32", "mxfp4_e2m1") for seed in (0, 1)]
    made.write_runs(tmp_path, configs)
    for seed in (0, 1):
        run = tmp_path / made.signature(made.config("gpt2-micro", "adamw", "mxfp4_e2m1", seed))
        pd.DataFrame(rows(shift=seed / 8)).to_parquet(run / "attribution.parquet")
    return tmp_path


def test_parts_are_averaged_over_seeds(folder: Path) -> None:
    results = load.read(folder)
    table = attribution.by_part(results.runs, load.attribution(folder), FACTORS)
    assert list(table["part"]) == [
        *("everything", "fprop.weight", "a/linear", "a/linear fprop.weight", "<b>/linear", "<b>/linear fprop.weight")
    ]
    site = table.set_index("part").loc["a/linear"]
    assert (site["n"], site["change"], site["absent"]) == (2, 0.3125, 0.4375)
    assert site["high"] - site["low"] == pytest.approx(2 * 12.7062 * 0.0625, rel=1e-5)  # t of 1 degree of freedom
    sums = attribution.additivity(table, FACTORS).set_index("by")
    assert list(sums.index) == ["role", "site", "site-role"]
    assert (sums.loc["site", "sum"], sums.loc["site", "gap"]) == (0.875, 0.125) and sums.loc["role", "gap"] == 0


def test_the_report_shows_the_table_and_the_map_with_words_for_it(folder: Path) -> None:
    page = write_report(folder).read_text()
    assert "Which rounding costs what" in page and "In training" not in page
    assert "Worst in adamw, mxfp4_e2m1, rounded to mxfp4_e2m1: &lt;b&gt;/linear, fprop.weight (+0.5625)." in page
    assert "<b>/linear" not in page
    saved = pd.read_parquet(folder / "tables" / "attribution.parquet")
    pd.testing.assert_frame_equal(saved, load.attribution(folder))


def test_runs_of_parts_are_compared_with_float32_and_with_everything(tmp_path: Path) -> None:
    whole = "mxfp4_e2m1"
    names = ("float32", whole, f"{whole}, only linear", f"{whole}, all but linear", f"{whole}, only attention")
    configs = [made.config("gpt2-micro", "adamw", name, seed) for name in names for seed in range(3)]
    made.write_runs(tmp_path, configs)
    results = load.read(tmp_path)
    values = results.runs.set_index(["format", "seed"])["primary_metric"]
    table = attribution.in_training(results.runs, FACTORS).set_index("part")
    assert list(table.index) == ["everything", "linear", "attention"]
    alone, absent = (values[names[2]] - values["float32"]).mean(), (values[whole] - values[names[3]]).mean()
    assert table.loc["linear", "alone"] == pytest.approx(alone)
    assert table.loc["linear", "absent"] == pytest.approx(absent)
    assert table.loc["everything", "alone"] == pytest.approx((values[whole] - values["float32"]).mean())
    assert list(table["n"]) == [3, 3, 3] and list(table["n_absent"]) == [0, 3, 0]
    assert math.isnan(table.loc["attention", "absent"])
    assert "In training: change in validation loss (nats)" in write_report(tmp_path).read_text()


def test_without_either_there_is_nothing_of_it(tmp_path: Path) -> None:
    made.write_runs(tmp_path, made.quickstart(seeds=1))
    assert load.attribution(tmp_path).empty
    assert "Which rounding costs what" not in write_report(tmp_path).read_text()


def test_many_sites_fit_and_the_worst_stay() -> None:
    frame = pd.DataFrame(
        [{"site": f"s{k}", "role": "fprop.weight", "change": k / 1000, GRADIENT: 60.0 - k} for k in range(60)]
    )
    for measure, worst in (("change", "s59, fprop.weight (+0.0590)"), (GRADIENT, "s59, fprop.weight (1.0 dB)")):
        drawn = drawing({"x": frame}, measure)
        assert drawn is not None and drawn.svg.startswith(b"<?xml")
        assert f"The 40 worst sites are drawn, of 60. Worst in x: {worst}." in drawn.caption
    assert drawing({"x": frame.assign(change=math.nan)}) is None
