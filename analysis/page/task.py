"""The section of a report about one model on one data set: what it reached, what each setting and format changed, how
steadily it trained, what it took.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pandas as pd

from analysis import load
from analysis.figures import comparisons, drawings, resources, weights
from analysis.figures.plots import LABELS
from analysis.figures.saving import Drawing
from analysis.load import Results
from analysis.page import attribution, mixed, summary, telemetry, worst
from analysis.page import html as page
from analysis.page.first import named
from analysis.page.html import Column
from analysis.page.summary import of_task, plain, signed
from analysis.statistics import tables
from analysis.statistics.tables import BASELINE, TASK

Part = str | Drawing


def section(
    results: Results, frames: dict[str, pd.DataFrame], task: tuple[str, str], runs: pd.DataFrame
) -> Iterator[Part]:
    """One model on one data set: what it reached, against float32, optimizers compared, settings, curves, stability."""
    mine = {name: of_task(frame, task) for name, frame in frames.items() if set(TASK) <= set(frame.columns)}
    metric = runs["metric"].iloc[0]
    label = LABELS[metric]
    better = "higher" if tables.higher_is_better(metric) else "lower"
    roles = drawings.roles(runs, tables.factors(results.runs), results.runs)

    yield page.heading(3, f"Final {label}")
    yield page.paragraph(f"Every arm; {better} is better, the best mean is bold.", "note")
    yield _arms(mine["arms"])
    yield from some(drawings.final_metric(runs, roles))
    yield from some(_map(mine["arms"], metric))
    if len(mine["differences"]):
        yield from _against_float32(mine["differences"], roles, label)
    elif len(mine["arms"]) > 1:
        yield from _against_first(mine["against_first"], roles, label)
    if len(mine["contrasts"]):
        yield from _contrasts(mine["contrasts"], roles, label)
    if len(mine["optimizers"]):
        yield from _optimizers(mine["optimizers"], roles, label)
    if len(mine["effects"]):
        yield from _effects(mine["effects"], roles, label)
    if len(mine["sensitivity"]):
        yield from worst.section(mine["sensitivity"])
    if len(mine["mixed"]):
        yield mixed.section(mine["mixed"])
    yield page.heading(3, "Training")
    yield from some(drawings.curves(runs, results.metrics, roles, "validation", "loss", "validation loss (nats)"))
    yield from some(drawings.curves(runs, results.metrics, roles, "train", "loss", "training loss (nats)"))
    yield page.heading(3, "Stability")
    yield _stability(mine["stability"])
    names = summary.varying(mine["arms"])
    by_arm = runs.assign(arm=[summary.arm_name(row, names) for row in runs.to_dict("records")])
    yield from some(resources.divergences(telemetry.with_site(by_arm, results.telemetry)))
    if len(mine["learning_rates"]):
        yield page.heading(3, "Largest stable learning rate")
        yield _learning_rates(mine["learning_rates"])
        yield from some(drawings.learning_rates(runs, roles))
    yield from some(drawings.weight_growth(runs, results.metrics, roles))
    yield from some(weights.histograms(by_arm, results.weights, results.weight_values))
    yield from telemetry.section(runs, results.telemetry, results.cosines, tables.factors(results.runs), names)
    yield from attribution.section(runs, results.attribution, tables.factors(results.runs), names, label)
    if took := resources.costs(_with_costs(by_arm, results)):
        yield page.heading(3, "Time and memory")
        yield took


def some(drawing: Drawing | None) -> Iterator[Drawing]:
    if drawing is not None:
        yield drawing


def _map(arms: pd.DataFrame, metric: str) -> Drawing | None:
    """The arms by format, or by the other factor that fills a map best."""
    names = summary.varying(arms)
    choices = [name for name in names if arms[name].nunique(dropna=False) > 1]
    if "format" in choices or not choices:
        column = "format"
    else:
        column = max(choices, key=lambda name: _filled(arms, name, names))
    rest = [name for name in names if name != column]
    cells = arms.assign(
        row=[summary.arm_name(row, rest) for row in arms.to_dict("records")],
        **{summary.short(column): [tables.text(value) for value in arms[column]]},
    )
    return comparisons.factor_map(cells, "row", summary.short(column), metric, drawings.levels(arms[column]))


def _filled(arms: pd.DataFrame, column: str, names: list[str]) -> float:
    """The share of the cells of a map with this factor as its columns that hold an arm."""
    rest = [name for name in names if name != column]
    return len(arms) / (arms.groupby(rest, dropna=False).ngroups * arms[column].nunique(dropna=False))


def _with_costs(runs: pd.DataFrame, results: Results) -> pd.DataFrame:
    """The runs with time_ms, the median of a step, and peak_memory_mb of their first session, where they are known."""
    metrics, environment = results.metrics, results.environment
    steps = metrics[(metrics["split"] == "train") & (metrics["metric"] == "time_ms")]
    out = runs.assign(time_ms=runs["signature"].map(steps.groupby("signature")["value"].median()))
    if "peak_memory_mb" in environment:
        known = environment.dropna(subset="peak_memory_mb").drop_duplicates("signature").set_index("signature")
        out["peak_memory_mb"] = out["signature"].map(known["peak_memory_mb"])
    return out


def _against_float32(rows: pd.DataFrame, roles: drawings.Roles, label: str) -> Iterator[Part]:
    yield page.heading(3, f"Difference to {BASELINE}")
    yield page.paragraph(f"Paired by seed, all other settings the same: {label} in the format − in {BASELINE}.", "note")
    yield _differences(rows)
    caption = f"Mean over seeds of format − {BASELINE} with its 95% interval; hollow: n = 1."
    title, change = f"Difference to {BASELINE}", f"change in {label}"
    yield from some(comparisons.forest(named(rows), roles, title, change, caption, "differences"))


def _contrasts(rows: pd.DataFrame, roles: drawings.Roles, label: str) -> Iterator[Part]:
    reference = _reference(rows)
    yield page.heading(3, "Loss to the format, optimizers compared")
    yield page.paragraph(
        f"(format − {BASELINE}) of the optimizer minus (format − {BASELINE}) of {reference}, paired by seed. "
        "Better: the optimizer loses less to the format than the reference does.",
        "note",
    )
    yield _differences(rows)
    caption = f"Difference of the differences to {reference}, with its 95% interval; hollow: n = 1."
    change = f"change in {label}, less the reference's"
    yield from some(comparisons.forest(named(rows), roles, "Loss to the format", change, caption, "contrasts"))


def _optimizers(rows: pd.DataFrame, roles: drawings.Roles, label: str) -> Iterator[Part]:
    reference = _reference(rows)
    yield page.heading(3, "Where they end, optimizers compared")
    yield page.paragraph(f"Of the optimizer − of {reference} in the same format, paired by seed: {label}.", "note")
    yield _differences(rows)
    caption = f"Difference to {reference} in the same format, with its 95% interval; hollow: n = 1."
    title, change = "Optimizers compared in each format", f"difference in {label}"
    yield from some(comparisons.forest(named(rows), roles, title, change, caption, "optimizers"))


def _reference(rows: pd.DataFrame) -> str:
    """The optimizer that the others are compared to, with its settings where it has several."""
    settings = ", ".join(dict.fromkeys(rows["reference_settings"])).strip(", ")
    return str(rows["reference"].iloc[0]) + (f" ({settings})" if settings else "")


def _arms(rows: pd.DataFrame) -> str:
    names = summary.varying(rows)
    best = tables.best_arm(rows)
    flags = [best is not None and index == best.name for index in rows.index]
    columns = [
        *factor_columns(rows, names),
        Column("runs", texts(rows["runs"], str), number=True),
        Column("n", texts(rows["n"], str), number=True),
        Column("mean", texts(rows["mean"], plain), number=True),
        Column("sd", texts(rows["sd"], plain), number=True),
        *(
            Column(name, texts(rows[name], str), number=True)
            for name in ("diverged", "failed", "unfinished", "excluded")
        ),
        *(
            Column(name.removeprefix(load.FINAL), texts(rows[name], plain), number=True)
            for name in load.own_metrics(rows)
            if rows[name].notna().any()
        ),
    ]
    return page.table(columns, best=flags, new=_new(rows, names))


def _differences(rows: pd.DataFrame) -> str:
    names = summary.varying(rows)
    return page.table([*factor_columns(rows, names), *_difference_columns(rows)], new=_new(rows, names))


def _difference_columns(rows: pd.DataFrame) -> list[Column]:
    records = rows.to_dict("records")
    return [
        Column("n", texts(rows["n"], str), number=True),
        Column("difference", texts(rows["difference"], signed), number=True),
        Column(
            "95% interval",
            [summary.bracket(row) if row["n"] > 1 else "–" for row in records],
            number=True,
        ),
        Column("reads as", [summary.verdict(row) for row in records]),
        Column("runs excluded", texts(rows["excluded"], str), number=True),
    ]


def _against_first(rows: pd.DataFrame, roles: drawings.Roles, label: str) -> Iterator[Part]:
    names, first_arm = summary.varying(rows), rows.iloc[0]
    first = summary.arm_name(first_arm, names)
    differ = [
        [name for name in names if tables.text(row[name]) != tables.text(first_arm[name])] for _, row in rows.iterrows()
    ]
    labels = [summary.arm_name(row, some) for some, row in zip(differ, rows.to_dict("records"), strict=True)]
    labelled = rows.assign(name=labels)
    yield page.heading(3, "Against the first arm")
    yield page.paragraph(f"Paired by seed: {label} of the arm − of {first}, which the grid lists first.", "note")
    yield _differences(rows.drop(columns="mean").iloc[1:])
    caption = "Named by what differs from the first arm; mean over seeds with its 95% interval; hollow: n = 1."
    yield from some(
        comparisons.forest(labelled.iloc[1:], roles, "Against the first arm", f"change in {label}", caption, "first")
    )


def _effects(rows: pd.DataFrame, roles: drawings.Roles, label: str) -> Iterator[Part]:
    yield page.heading(3, "What each setting does")
    yield page.paragraph(
        f"Change in {label} from the level that the grid lists first to another, paired with all else equal and "
        "averaged over the other settings within a seed; n is the number of seeds.",
        "note",
    )
    columns = [
        Column("optimizer", list(rows["optimizer"])),
        Column("setting", list(rows["factor"])),
        Column("from", list(rows["reference"])),
        Column("to", list(rows["level"])),
        Column("runs", texts(rows["runs"], str), number=True),
        *_difference_columns(rows),
    ]
    yield page.table(columns, new=_new(rows, ["optimizer", "factor"]))
    caption = "Change from the first level, all else equal, with its 95% interval over seeds; hollow: n = 1."
    yield from some(
        comparisons.forest(named(rows), roles, "What each setting does", f"change in {label}", caption, "effects")
    )


def _stability(rows: pd.DataFrame) -> str:
    names = summary.varying(rows.rename(columns={"runs": "metric"}))
    rates = [
        f"{row['diverged']} of {row['runs']} [{row['rate_low']:.0%}, {row['rate_high']:.0%}]" if row["runs"] else "–"
        for row in rows.to_dict("records")
    ]
    columns = [
        *factor_columns(rows, names),
        Column("diverged [95%]", rates, number=True),
        Column("spikes a run", texts(rows["spikes"], lambda value: plain(value, 1)), number=True),
        Column("largest spike (nats)", texts(rows["largest_spike"], lambda value: plain(value, 2)), number=True),
        Column(
            "weight growth (log / 1000 steps)",
            texts(rows["weight_growth"], lambda value: plain(value, 3)),
            number=True,
        ),
        Column("gradient noise (log)", texts(rows["gradient_noise"], lambda value: plain(value, 2)), number=True),
    ]
    return page.table(columns, new=_new(rows, names))


def _learning_rates(rows: pd.DataFrame) -> str:
    names = summary.varying(rows.rename(columns={"tried": "metric"}))
    columns = [
        *factor_columns(rows, names),
        Column("tried", list(rows["tried"])),
        Column(
            "largest stable",
            texts(rows["largest_stable"], lambda value: f"{value:g}" if value == value else "none"),
            number=True,
        ),
        Column(
            "smallest unstable",
            texts(rows["smallest_unstable"], lambda value: f"{value:g}" if value == value else "none tried"),
            number=True,
        ),
    ]
    return page.table(columns, new=_new(rows, names))


def factor_columns(rows: pd.DataFrame, names: list[str]) -> list[Column]:
    return [
        Column(
            summary.short(name), texts(rows[name], tables.text), number=pd.api.types.is_numeric_dtype(rows[name].dtype)
        )
        for name in names
    ]


def _new(rows: pd.DataFrame, names: list[str]) -> list[bool]:
    """True where the first factor that varies takes another value than in the row above."""
    first = next((name for name in names if rows[name].nunique(dropna=False) > 1), None)
    if first is None:
        return [False] * len(rows)
    values = texts(rows[first], tables.text)
    return [index > 0 and values[index] != values[index - 1] for index in range(len(values))]


def texts(values: pd.Series, write: Callable[..., str]) -> list[str]:
    return [write(value) for value in values.tolist()]
