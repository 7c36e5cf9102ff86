"""Figures that are pointed at and zoomed: Vega-Lite charts, made with Altair, that the page's script fills with rows.

A chart holds no data, so the same few charts serve every task and every choice of what is drawn, and the numbers stand
in the page once. A row is a run; its numbers are lists, which the chart unfolds. Colours come with the rows, ink and
paper from the page, so that they follow it into dark mode. Each chart exists with a linear and a logarithmic axis,
since Vega-Lite has no switch for that.
"""

from __future__ import annotations

from typing import Any, Literal

import altair as alt
from altair.utils.schemapi import debug_mode

from analysis.figures.plots import INK

PAGE_INK = "currentColor"  # the colour of the page's text, light or dark
HAS_VALUE = "isValid(datum.value)"
Axis = Literal["linear", "log"]


def charts() -> dict[str, dict[str, Any]]:
    """Every chart by its name: `curves`, `runs` (over names) and `numbers` (over a numeric setting), each with
    `-linear` and `-log`; `small` and `by-role`, of one run.

    Rows of all of them are called `rows`. What a chart needs in them its function says.
    """
    with debug_mode(False):  # they depend on no data, so a test validates them, and no report does again
        made: dict[str, alt.LayerChart] = {"small": small(), "by-role": by_role()}
        for axis in ("linear", "log"):
            made[f"curves-{axis}"] = curves(axis)
            made[f"runs-{axis}"] = final(axis, numbers=False)
            made[f"numbers-{axis}"] = final(axis, numbers=True)
        return {name: chart.to_dict(validate=False) for name, chart in made.items()}


def page_colour(colour: str) -> str:
    """The ink of the static figures, a level's colour for float32, is the page's own."""
    return PAGE_INK if colour == INK else colour


def curves(axis: Axis) -> alt.LayerChart:
    """One line a run over the step; with the parameter `bands`, a median and a band for each level in their place.

    Rows: signature, run (its name), status, final, level, colour, steps and values (lists of finite numbers), end_step
    and end_value of a diverged run. Pointing at a line thickens it.
    """
    hover = _hover()
    bands = alt.param(name="bands", value=False)
    lines = _unfolded()
    drawn = lines.transform_filter("!bands || datum.status === 'diverged'")
    y = _value(axis)
    spread = lines.transform_filter("bands && datum.status !== 'diverged'").transform_aggregate(
        groupby=["level", "colour", "step"], low="min(value)", middle="median(value)", high="max(value)"
    )
    level = alt.Detail("level:N")
    area = spread.mark_area(opacity=0.18, tooltip=None).encode(
        x=_step(), y=_value(axis, "low"), y2="high:Q", color=_colour(), detail=level
    )
    middle = spread.mark_line(strokeWidth=2.2).encode(
        x=_step(),
        y=_value(axis, "middle"),
        color=_colour(),
        detail=level,
        tooltip=[alt.Tooltip("level:N", title="median and range of")],
    )
    seen = drawn.mark_line(strokeWidth=1.4).encode(
        x=_step(),
        y=y,
        color=_colour(),
        detail="signature:N",
        strokeWidth=alt.when(hover, empty=False).then(alt.value(3.6)).otherwise(alt.value(1.4)),
        opacity=alt.when(hover, empty=True).then(alt.value(0.85)).otherwise(alt.value(0.25)),
    )
    target = drawn.mark_line(strokeWidth=11, opacity=0).encode(
        x=_step(), y=y, detail="signature:N", tooltip=_tooltips()
    )  # what one points at: a line of 1.4 pixels is hard to hit
    ends = (
        _rows()
        .transform_filter("isValid(datum.end_value)")
        .mark_point(shape="cross", angle=45, size=70, filled=True)
        .encode(x=_step("end_step"), y=_value(axis, "end_value"), color=_colour(), tooltip=_tooltips())
    )
    named = target.add_params(hover, _zoom(("x", "y"))).properties(name="lines")
    return _finished(alt.LayerChart(layer=[area, middle, seen, ends, named]).add_params(bands), height=340)


def final(axis: Axis, numbers: bool) -> alt.LayerChart:
    """A point a run: its final metric over the level of a factor, or over a positive number on a logarithmic axis. A
    run without a final metric is a cross at the edge where the metric is bad.

    Rows: signature, run, status, final (as text), value (or null), x, colour. Parameter: higher_is_better.
    """
    hover = _hover()
    x = (
        alt.X("x:Q", scale=alt.Scale(type="log", nice=False, padding=16), axis=alt.Axis(title=None, labelOverlap=True))
        if numbers
        else alt.X("x:N", sort=None, axis=_names())
    )
    shared: dict[str, Any] = {"x": x, "color": _colour(), "detail": "signature:N", "tooltip": _tooltips()}
    size = alt.when(hover, empty=False).then(alt.value(220)).otherwise(alt.value(64))
    points = (
        _rows()
        .transform_filter(HAS_VALUE)
        .mark_point(filled=True, opacity=0.75)
        .encode(y=_value(axis), size=size, **shared)
        .add_params(hover, _zoom(("x", "y") if numbers else ("y",)))
        .properties(name="points")
    )
    lost = (
        _rows()
        .transform_filter(f"!{HAS_VALUE}")
        .mark_point(shape="cross", angle=45, size=80, filled=True)
        .encode(y=alt.value(alt.ExprRef("higher_is_better ? height - 8 : 8")), **shared)
    )
    better = alt.param(name="higher_is_better", value=False)
    return _finished(alt.LayerChart(layer=[points, lost]).add_params(better), height=280)


def _names() -> alt.Axis:
    """Names of arms, each part on a line of its own where there is room, else askew."""
    room = "width / domain('x').length > 100"
    return alt.Axis(
        title=None,
        labelExpr=f"{room} ? split(datum.label, ', ') : datum.label",
        labelAngle=alt.ExprRef(f"{room} ? 0 : -40"),
        labelAlign=alt.ExprRef(f"{room} ? 'center' : 'right'"),
        labelBaseline=alt.ExprRef(f"{room} ? 'top' : 'middle'"),
        labelLimit=alt.ExprRef(f"{room} ? 130 : 90"),
        labelOverlap=False,
        minExtent=80,
    )


def small() -> alt.LayerChart:
    """The curve of one run over those of its arm. Rows as those of `curves`, and `mine`."""
    other = _unfolded().transform_filter("!datum.mine").mark_line(strokeWidth=1, opacity=0.3)
    mine = _unfolded().transform_filter("datum.mine").mark_line(strokeWidth=1.6)
    lines = [
        each.encode(
            x=_step(), y=_value("linear"), color=_colour(), detail="signature:N", tooltip=[alt.Tooltip("run:N")]
        )
        for each in (other, mine)
    ]
    return _finished(alt.LayerChart(layer=lines), height=150)


def by_role() -> alt.LayerChart:
    """SQNR over the sampled steps, a line a role, named at its end. Rows: level (the role), colour, steps, values."""
    encoded = _unfolded().encode(
        x=_step(), y=_value("linear"), color=_colour(), detail="level:N", tooltip=[alt.Tooltip("level:N")]
    )
    return _finished(
        alt.LayerChart(layer=[encoded.mark_line(strokeWidth=1.8), encoded.mark_point(filled=True, size=26)]), 170
    )


def _rows() -> alt.Chart:
    return alt.Chart(alt.NamedData("rows"))


def _unfolded() -> alt.Chart:
    return _rows().transform_flatten(["steps", "values"], as_=["step", "value"])


def _step(field: str = "step") -> alt.X:
    return alt.X(f"{field}:Q", title="step", axis=alt.Axis(tickCount=5, format="~s"))


def _value(axis: Axis, field: str = "value") -> alt.Y:
    scale = alt.Scale(type="log", padding=8) if axis == "log" else alt.Scale(zero=False, padding=8)
    return alt.Y(f"{field}:Q", title=None, scale=scale, axis=alt.Axis(tickCount=6))


def _colour() -> alt.Color:
    return alt.Color("colour:N", scale=None, legend=None)


def _tooltips() -> list[alt.Tooltip]:
    return [alt.Tooltip(f"{name}:N") for name in ("run", "status", "final", "signature")]


def _hover() -> alt.Parameter:
    return alt.selection_point(name="hover", fields=["signature"], on="pointerover", clear="pointerout")


def _zoom(encodings: tuple[Literal["x", "y"], ...]) -> alt.Parameter:
    """Dragging moves; pinching, or the wheel with Ctrl, zooms, so that the wheel alone still scrolls the page."""
    return alt.selection_interval(name="zoom", bind="scales", encodings=list(encodings), zoom="wheel![event.ctrlKey]")


def _finished(chart: alt.LayerChart, height: int) -> alt.LayerChart:
    """With the width of its place, the page's font, and ink and paper of the page."""
    return (
        chart.properties(
            width="container",
            height=height,
            background="transparent",
            autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
        )
        .configure(font="inherit", aria=False)
        .configure_mark(aria=False)  # the place of the chart has words; its marks would be nameless images
        .configure_view(stroke=None)
        .configure_axis(
            aria=False,
            labelColor=PAGE_INK,
            titleColor=PAGE_INK,
            domainColor="#8c959f",
            tickColor="#8c959f",
            gridColor="#8c959f44",
            labelFontSize=12,
            titleFontSize=12,
            titleFontWeight="normal",
        )
    )
