"""Laws of the figures: the same bytes each time, text that is text, and the numbers of the runs."""

import math
from collections.abc import Callable, Iterable

import altair as alt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from analysis.figures import comparisons, drawings, interactive, plots, printing, resources, rounding, saving, weights


def bars(width: float) -> Figure:
    figure = Figure(figsize=(width, 2), layout="constrained")
    figure.subplots().bar(["a − b", "c"], [1, 2])
    return figure


def nameless_bars(width: float) -> Figure:
    figure = bars(width)
    figure.axes[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure


def texts(drawing: saving.Drawing | None) -> list[str]:
    assert drawing is not None
    return [text.get_text() for ax in drawing.figure.axes for text in ax.texts]


def test_a_figure_is_the_same_each_time_and_its_text_is_text() -> None:
    one, other = (saving.drawn("bars", "Bars", "Two.", bars) for _ in range(2))
    assert (one.svg, one.narrow, one.pdf) == (other.svg, other.narrow, other.pdf)
    assert "a − b".encode() in one.svg and b"/FontFile2" in one.pdf
    assert b"CreationDate" not in one.pdf and b"<dc:date>" not in one.svg


def test_another_process_makes_the_same_bytes_and_its_death_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[bytes] = []  # what came from there
    there = printing._answer
    monkeypatch.setattr(printing, "_answer", lambda *args: answers.append(there(*args)) or answers[-1])

    def forms(build: Callable[[float], Figure], elsewhere: bool) -> list[bytes]:
        drawings = [saving.drawn("bars", "Bars", "Two.", build) for _ in range(3)]
        if elsewhere:
            with printing.Printer() as printer:
                for drawing in drawings:
                    printer.begin(drawing)
                printer.finish(drawings)
        return [getattr(drawing, form) for drawing in drawings for form in saving.FORMS]

    assert forms(bars, elsewhere=True) == forms(bars, elsewhere=False)
    assert 1 <= len(answers) < 3  # the last is made here, while the other process makes the first
    assert forms(nameless_bars, elsewhere=True) == forms(nameless_bars, elsewhere=False)  # cannot be sent there
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert forms(bars, elsewhere=True) == forms(bars, elsewhere=False)


def test_the_interactive_charts_are_valid_vega_lite() -> None:
    for specification in interactive.charts().values():
        alt.LayerChart.from_dict(specification)  # validates


def cells(means: Iterable[float]) -> pd.DataFrame:
    names = [(row, column) for row in ("x", "y") for column in ("f", "g")]
    frame = pd.DataFrame(names, columns=["row", "format"])
    return frame.assign(mean=list(means), n=[3, 2, 3, 0], runs=3)


def test_a_map_holds_every_mean_with_its_n() -> None:
    drawing = comparisons.factor_map(cells([1.0, 2.0, 3.0, math.nan]), "row", "format", "validation_loss", ["f", "g"])
    assert texts(drawing)[:3] == ["1.000\nn = 3", "2.000\nn = 2 of 3", "3.000\nn = 3"]
    one_row = cells([1.0, 2.0, 3.0, 4.0]).iloc[:2]
    assert comparisons.factor_map(one_row, "row", "format", "validation_loss", ["f", "g"]) is None


def test_histograms_hold_the_shares_of_all_weights() -> None:
    rows = [(0, -math.inf, 20), (0, -1.0, 30), (0, 0.0, 50), (9, -1.0, 100)]
    frame = pd.DataFrame(rows, columns=["step", "log2", "count"]).assign(signature="s", of="rounded", width=0.25)
    runs, values = pd.DataFrame({"signature": ["s"], "arm": ["a"]}), np.array([0.5, 1.0])
    ax = Figure().subplots()
    weights.histogram(frame.assign(time=frame["step"].map({0: "start", 9: "end"})), ax, values=values)
    start, end = (patch.get_data().values for patch in ax.patches)
    assert start.sum() == pytest.approx(0.8) and end.tolist() == [1.0]
    marks = [line.get_xdata()[0] for line in ax.get_lines()]
    assert marks == [-1.0, 0.0]
    drawing = weights.histograms(runs, frame, pd.DataFrame({"signature": "s", "value": values}))
    assert drawing is not None
    assert weights.histograms(runs, frame.iloc[:0], pd.DataFrame(columns=["signature", "value"])) is None


def test_time_and_divergences_are_by_arm() -> None:
    runs = pd.DataFrame({"arm": ["a", "a", "a", "b"], "time_ms": [1.0, 2.0, 9.0, 4.0]})
    assert texts(resources.costs(runs)) == ["2", "4"]
    assert resources.costs(runs.assign(time_ms=math.nan)) is None
    lost = runs.assign(status=["finished", "diverged", "finished", "finished"], step=[10, 4, 10, 10], where="nan at x")
    assert texts(resources.divergences(lost)) == ["nan at x"]
    assert resources.divergences(lost.assign(status="finished")) is None


def test_the_scale_of_a_rounding_map_is_that_of_what_it_shows() -> None:
    """A finer quantizer, whose operands are left out, does not darken those that are drawn."""
    sites = [(f"s{k}", 15 + k / 10) for k in range(rounding.SITES)] + [(f"v{k}", 55.0) for k in range(5)]
    rows = pd.DataFrame(sites, columns=["site", "sqnr_db"]).assign(
        signature="a", role="fprop.lhs", step=0, clipped=0.0, underflowed=0.0, rounded_to="mx"
    )
    (drawing,) = rounding.maps(pd.DataFrame({"signature": ["a"], "format": "f"}), rows)
    (mesh,) = drawing.figure.axes[0].collections
    assert mesh.get_clim() == (15.0, 15 + (rounding.SITES - 1) / 10)


def test_a_diverged_run_does_not_flatten_the_others() -> None:
    """In every panel the axis spans the runs that did not diverge; the end of one that did stands at its edge."""
    runs = pd.DataFrame({"signature": list("abc"), "optimizer": ["x", "x", "y"], "format": "float32"})
    runs["status"] = ["finished", "diverged", "finished"]
    losses = {"a": [2.0, 1.5], "b": [2.0, 1e12], "c": [2.5, 1.0]}
    rows = [(name, step, loss) for name, found in losses.items() for step, loss in enumerate(found)]
    metrics = pd.DataFrame(rows, columns=["signature", "step", "value"]).assign(split="validation", metric="loss")
    roles = drawings.Roles("format", {"float32": plots.INK}, "optimizer", ["x", "y"], [])
    drawing = drawings.curves(runs, metrics, roles, "validation", "loss", "loss")
    assert drawing is not None and "Diverged curves leave the figure" in drawing.caption
    for ax in drawing.figure.axes:
        low, high = ax.get_ylim()
        assert 0.8 < low < 1.0 and 2.5 < high < 2.7
    (mark,) = [line for line in drawing.figure.axes[0].lines if line.get_marker() == "x"]
    assert mark.get_ydata().tolist() == [drawing.figure.axes[0].get_ylim()[1]]
    within = drawings.curves(runs, metrics.replace(1e12, 2.2), roles, "validation", "loss", "loss")
    assert within is not None and "leave" not in within.caption
    alone = drawings.curves(runs[1:2], metrics, roles, "validation", "loss", "loss")
    assert alone is not None and "leave" not in alone.caption


def test_the_numbers_of_medians_keep_off_the_next_panel() -> None:
    runs = pd.DataFrame({"arm": ["a", "b"], "time_ms": [1234.0, 2.0], "peak_memory_mb": [500.0, 600.0]})
    drawing = resources.costs(runs)
    assert drawing is not None
    drawing.figure.draw_without_rendering()
    left, right = drawing.figure.axes
    beside = max(text.get_window_extent().x1 for text in left.texts)
    assert beside + 0.1 * drawing.figure.dpi < right.get_window_extent().x0


def test_long_names_of_arms_stay_inside_the_figure() -> None:
    long = [
        f"lmd-for-model, noise_scale 0.05, weight_decay {k}, prior half-normal, recipe stochastic" for k in range(6)
    ]
    rows = pd.DataFrame({"name": long, "format": "f", "metric": "validation_loss", "difference": 0.1})
    rows = rows.assign(low=0.05, high=0.3)
    drawing = comparisons.costs([comparisons.Costs("t", rows, rows, ["f"], "")])
    assert drawing is not None
    for figure in (drawing.figure, drawing.slim):
        figure.draw_without_rendering()
        (key,) = figure.legends
        box = key.get_window_extent()
        assert [text.get_text().replace("\n", " ") for text in key.get_texts()] == long
        assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height
        assert figure.axes[0].get_window_extent().height > 1.3 * figure.dpi and not box.overlaps(figure.axes[0].bbox)


def test_costs_are_drawn_while_their_arms_can_be_told_apart() -> None:
    rows = pd.DataFrame({"name": ["a", "b"], "format": "f", "metric": "validation_accuracy", "difference": [0.1, 0.2]})
    rows = rows.assign(low=0.05, high=0.3)
    seeds = pd.DataFrame({"name": ["a", "a", "b"], "format": "f", "difference": [0.08, 0.12, 0.2]})
    two = comparisons.Costs("t", rows, seeds, ["f"], "t, a 90.0%")
    one = comparisons.Costs("u", rows[:1], seeds[:2], ["f"], "u, a 80.0%")  # has one arm alone
    drawing = comparisons.costs([two, one])
    assert drawing is not None and "In float32: t, a 90.0%; u, a 80.0%." in drawing.caption
    first, second = ([line.get_ydata() for line in ax.lines] for ax in drawing.figure.axes)
    mean_a, interval_a, seeds_a, mean_b, _, seeds_b, _ = (list(map(float, y)) for y in first)  # in percentage points
    assert [*mean_a, *interval_a, *seeds_a] == pytest.approx([0, 10, 5, 30, 8, 12])
    assert [*mean_b, *seeds_b] == pytest.approx([0, 20, 20])
    assert len(second) == 4  # of the one arm, and the line at 0
    many = pd.concat([rows.assign(name=f"arm {k}") for k in range(len(plots.DISTINCT) + 1)])
    assert comparisons.costs([comparisons.Costs("t", many, many, ["f"], "")]) is None
