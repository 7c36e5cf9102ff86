"""Which rounding costs what: the part of the report where runs were attributed, or trained with parts of a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from analysis.figures import attribution as maps
from analysis.figures.saving import Drawing
from analysis.page import html as page
from analysis.page.html import Column
from analysis.page.summary import arm_name, count, signed
from analysis.statistics import attribution
from analysis.statistics.tables import text

KINDS = ("class", "role")  # the kinds of parts whose rows stand in the table; those by site are drawn


def section(
    runs: pd.DataFrame, rows: pd.DataFrame, factors: Sequence[str], names: Sequence[str], label: str
) -> Iterator[str | Drawing]:
    """The part of a task's section; nothing where there are neither attributions nor runs of parts of a recipe.

    rows: load.attribution's. names: the factors that tell the arms apart. label: of the primary metric.
    """
    rows = rows[rows["signature"].isin(runs["signature"])]
    trained = attribution.in_training(runs, factors)
    if rows.empty and trained.empty:
        return
    yield page.heading(3, "Which rounding costs what")
    if len(trained):
        yield from _in_training(trained, names, label)
    if len(rows):
        yield from _afterwards(runs, rows, factors, names)


def _in_training(table: pd.DataFrame, names: Sequence[str], label: str) -> Iterator[str]:
    yield page.paragraph(
        f"In training: change in {label} where only this part of the machine's rounding is done, less float32; and "
        "what the part adds where all the rest is rounded, everything less all but this. Means over seeds, paired, "
        "with 95% intervals.",
        "note",
    )
    named = table.to_dict("records")
    yield page.table(
        [
            Column("arm", [arm_name(row, [name for name in names if name in table]) for row in named]),
            Column("part", list(table["part"])),
            Column("n", [str(n) for n in table["n"]], number=True),
            Column("alone", [signed(x) for x in table["alone"]], number=True),
            Column("95% interval", [_bracket(row["low"], row["high"]) for row in named], number=True),
            Column("n", [str(n) for n in table["n_absent"]], number=True),
            Column("beside the rest", [signed(x) for x in table["absent"]], number=True),
            Column("95% interval", [_bracket(row["absent_low"], row["absent_high"]) for row in named], number=True),
        ],
        new=[row["part"] == "everything" and place > 0 for place, row in enumerate(named)],
    )


def _afterwards(
    runs: pd.DataFrame, rows: pd.DataFrame, factors: Sequence[str], names: Sequence[str]
) -> Iterator[str | Drawing]:
    table = attribution.by_part(runs, rows, factors)
    yield page.paragraph(
        f"After training, of {count(rows['signature'].nunique(), 'run')} (lpsim attribute): what rounding a part alone "
        "adds to the loss of the trained model, mean over runs with its 95% interval; what the loss has less where all "
        "but this part is rounded; and the SQNR of the logits (median). Nothing was trained with it.",
        "note",
    )
    shown = table[table["by"].isin(KINDS) | (table["part"] == "everything")]
    named = shown.to_dict("records")
    yield page.table(
        [
            Column("arm", [arm_name(row, names) for row in named]),
            Column("rounded to", list(shown["recipe"])),
            Column("part", list(shown["part"])),
            Column("n", [str(n) for n in shown["n"]], number=True),
            Column("alone", [signed(x) for x in shown["change"]], number=True),
            Column("95% interval", [_bracket(row["low"], row["high"]) for row in named], number=True),
            Column("in its absence", [signed(x) for x in shown["absent"]], number=True),
            Column("SQNR (dB)", [f"{x:.1f}" for x in shown["logits_sqnr_db"]], number=True),
        ],
        new=[row["part"] == "everything" and place > 0 for place, row in enumerate(named)],
    )
    both = table[table["by"] == "site-role"]
    sites = rows[(rows["by"] == "site-role") & (rows["rounded"] == "only")].drop_duplicates("part")
    both = both.merge(sites[["part", "site", "role"]], on="part")
    panels = {
        ", ".join([arm_name(dict(zip(factors, key, strict=False)), names), f"rounded to {key[-1]}"]): group
        for key, group in both.groupby([*factors, "recipe"], dropna=False, sort=False)
    }
    drawing = maps.drawing(panels)
    if drawing is not None:
        yield drawing
    sums = attribution.additivity(table, factors)
    named = sums.to_dict("records")
    yield page.paragraph("Do the parts add up? The gap is what they make of each other.")
    yield page.table(
        [
            Column("arm", [arm_name(row, names) for row in named]),
            Column("rounded to", list(sums["recipe"])),
            Column("parts by", [text(by) for by in sums["by"]]),
            Column("parts", [str(n) for n in sums["parts"]], number=True),
            Column("sum of the parts", [signed(x) for x in sums["sum"]], number=True),
            Column("everything", [signed(x) for x in sums["everything"]], number=True),
            Column("gap", [signed(x) for x in sums["gap"]], number=True),
        ]
    )


def _bracket(low: float, high: float) -> str:
    return "–" if low != low else f"[{signed(low)}, {signed(high)}]"
