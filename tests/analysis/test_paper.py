"""Laws of several grids in one report, and of the tables for a paper."""

from pathlib import Path

import pandas as pd
import pytest

from analysis import load
from analysis.page import paper, report
from analysis.statistics import tables
from tests.analysis import run_folders as made


def grid(folder: Path, noise: float, seeds: range = range(3)) -> Path:
    configs = [made.config("gpt2-micro", "lmd", "float32", seed, noise_scale=noise) for seed in seeds]
    return made.write_runs(folder, [config | {"grid": folder.name} for config in configs])


@pytest.mark.usefixtures("undrawn")
def test_two_grids_that_differ_in_one_setting_show_its_effect(tmp_path: Path) -> None:
    first, second = grid(tmp_path / "a", 0.05), grid(tmp_path / "b", 0.0)
    both = load.read_all([first, second])
    assert tables.factors(both.runs)[4:] == ["optimizer.noise_scale"]
    (effect,) = tables.effects(both.runs).to_dict("records")
    assert (effect["factor"], effect["reference"], effect["level"]) == ("optimizer.noise_scale", "0.05", "0")
    change = load.runs(second)["primary_metric"] - load.runs(first)["primary_metric"]
    assert effect["n"] == 3 and effect["difference"] == pytest.approx(change.mean())
    target = report.write_report([first, second], figures=False)
    assert target == tmp_path / "a+b" / "report.html"
    assert "Changing noise scale from 0.05 to 0 makes lmd" in target.read_text()


def test_grids_that_differ_in_nothing_are_told_apart_by_their_names(tmp_path: Path) -> None:
    both = load.read_all([grid(tmp_path / "a", 0.0), grid(tmp_path / "b", 0.0)])
    assert tables.factors(both.runs)[4:] == ["grid"]


def test_a_run_of_two_grids_counts_once(tmp_path: Path) -> None:
    configs = made.quickstart(2)
    whole, half = made.write_runs(tmp_path / "a", configs), made.write_runs(tmp_path / "b", configs[:7])
    one, two = load.read(whole), load.read_all([half, whole])
    assert len(two.runs) == len(one.runs) == len(configs)
    assert len(two.metrics) == len(one.metrics)
    assert [two.grid_of(made.signature(config))[0] for config in (configs[0], configs[-1])] == [half, whole]
    columns = list(tables.arms(one.runs).columns)
    key = ["model", "optimizer", "format"]
    pd.testing.assert_frame_equal(
        tables.arms(two.runs)[columns].sort_values(key, ignore_index=True),
        tables.arms(one.runs).sort_values(key, ignore_index=True),
    )


def test_tables_for_a_paper_hold_every_row_and_escape_every_text(tmp_path: Path) -> None:
    runs = load.runs(made.write_runs(tmp_path / "grid", made.quickstart(2)))
    hostile = runs.assign(optimizer=runs["optimizer"].replace("lmd", "a|b & $x_1$ 5%"))
    for table in (tables.arms(hostile), tables.differences(hostile), tables.contrasts(hostile)):
        tex, lines = paper.latex(table), paper.markdown(table).splitlines()
        assert all(rule in tex for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
        assert tex.count(r"\\") == 1 + len(table)
        assert (r"a|b \& \$x\_1\$ 5\%" in tex) == (table["optimizer"].nunique() > 1)  # a constant is left out
        assert "$x_1$" not in tex.partition(r"\begin{tabular}")[2]  # above it there may be a comment
        assert len(lines) == 2 + len(table)
        assert len({line.replace(r"\|", "").count("|") for line in lines}) == 1


def test_a_paper_prints_the_numbers_of_the_report(tmp_path: Path) -> None:
    table = tables.differences(load.runs(made.write_runs(tmp_path / "grid", made.quickstart(2))))
    shown = paper.readable(table)
    assert list(shown.columns)[:3] == ["model", "data", "optimizer"]
    row = table.iloc[0]
    assert shown["difference"][0] == f"{row['difference']:+.4f}".replace("-", "−")
    assert shown["95% interval"][0] == f"[{row['low']:+.4f}, {row['high']:+.4f}]".replace("-", "−")


def test_a_latex_table_has_minus_signs_and_says_what_all_its_rows_have_in_common(tmp_path: Path) -> None:
    runs = load.runs(made.write_runs(tmp_path / "grid", made.quickstart(2)))
    table = tables.differences(runs[runs["model"] == runs["model"].iloc[0]])
    comment, tabular = paper.latex(table).split("\n", 1)
    assert comment.startswith(f"% in every row: model = {table['model'].iloc[0]}; data = ")
    assert f"metric = {table['metric'].iloc[0]}" in comment
    shown = [paper.readable(table)[name].str.count("−").sum() for name in ("difference", "95% interval")]
    assert tabular.count("$-$") == sum(shown) > 0


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("kind", ["latex", "markdown"])
def test_they_are_written_beside_the_report(tmp_path: Path, kind: str) -> None:
    folder = made.write_runs(tmp_path / "grid", made.quickstart(2))
    report.write_report(folder, tables_as=kind, figures=False)
    ending = paper.ENDINGS[kind]
    assert (folder / "tables" / f"arms{ending}").read_text("utf-8").count("lmd") == 6
    assert not (folder / "tables" / f"effects{ending}").exists()
    with pytest.raises(ValueError, match="no kind of table 'word'"):
        report.write_report(folder, tables_as="word")
