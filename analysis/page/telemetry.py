"""What rounding did, from the telemetry of the runs that have it: tables, maps, and their part of the report.

Rows are those of `load.telemetry`: one a run, sampled step, site and role. The sums are the simulation's; here are only
medians and extremes over rows, and nothing is averaged over sites of different size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from analysis.figures.rounding import maps
from analysis.figures.saving import Drawing
from analysis.page import html as page
from analysis.page.html import Column
from analysis.page.summary import arm_name, count
from analysis.statistics.tables import text

SHARES = ("clipped", "underflowed", "swallowed", "oscillated")


def origins(runs: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """One row a run that saw a NaN or Inf, the first of them: signature, status, step, site, role, kind.

    step: updates before it; that of a step that was not sampled is known where the run ended in it.
    """
    first = rows[rows["origin"] != ""].rename(columns={"origin": "kind"})
    return runs[["signature", "status"]].merge(
        first[["signature", "step", "site", "role", "kind"]], on="signature", validate="one_to_one"
    )


def rounding(runs: pd.DataFrame, rows: pd.DataFrame, factors: Sequence[str]) -> pd.DataFrame:
    """One row an arm and role that something rounds: its factors, role, rounded_to, runs, sites, sqnr_db (the median
    over runs, steps and sites), lowest_db and lowest_site (of the sites' medians), clipped, underflowed, swallowed and
    oscillated (the largest of the sites' medians).
    """
    rounded = _with_factors(runs, rows, factors).query("rounded_to != ''")
    groups = rounded.groupby([*factors, "role", "rounded_to"], dropna=False, sort=False)
    numbers = ["sqnr_db", *SHARES]
    medians = rounded.groupby([groups.ngroup().rename("place"), "site"], sort=False)[numbers].median()
    of_sites = dict(tuple(medians.reset_index("site").groupby("place")))
    out = []
    for place, (key, group) in enumerate(groups):
        sites = of_sites[place].set_index("site")
        out.append(
            dict(zip([*factors, "role", "rounded_to"], key, strict=True))
            | {"runs": group["signature"].nunique(), "sites": len(sites)}
            | {"sqnr_db": group["sqnr_db"].median(), "lowest_db": sites["sqnr_db"].min()}
            | {"lowest_site": sites["sqnr_db"].idxmin() if sites["sqnr_db"].notna().any() else ""}
            | {name: sites[name].max() for name in SHARES}
        )
    columns = ["role", "rounded_to", "runs", "sites", "sqnr_db", "lowest_db", "lowest_site"]
    return pd.DataFrame(out, columns=[*factors, *columns, *SHARES])


def gradients(runs: pd.DataFrame, cosines: pd.DataFrame, factors: Sequence[str]) -> pd.DataFrame:
    """One row an arm: its factors, runs, cosine (the median over runs, steps and parameters), lowest and parameter (the
    least of the parameters' medians), norm_ratio (the median).
    """
    out = []
    for key, group in _with_factors(runs, cosines, factors).groupby(list(factors), dropna=False, sort=False):
        each = group.groupby("parameter", sort=False)["cosine"].median()
        out.append(
            dict(zip(factors, key, strict=True))
            | {"runs": group["signature"].nunique(), "cosine": group["cosine"].median(), "lowest": each.min()}
            | {"parameter": each.idxmin() if each.notna().any() else "", "norm_ratio": group["norm_ratio"].median()}
        )
    return pd.DataFrame(out, columns=[*factors, "runs", "cosine", "lowest", "parameter", "norm_ratio"])


def _with_factors(runs: pd.DataFrame, rows: pd.DataFrame, factors: Sequence[str]) -> pd.DataFrame:
    """The rows of these runs with the factors beside them; a row's own format is `rounded_to`."""
    return runs[["signature", *factors]].merge(rows.rename(columns={"format": "rounded_to"}), on="signature")


def with_site(runs: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The runs with `where`: site and role of the first NaN or Inf that telemetry saw in a run, else empty."""
    if rows.empty:
        return runs.assign(where="")
    first = rows[rows["origin"] != ""].drop_duplicates("signature").set_index("signature")
    where = (first["origin"] + " at " + first["site"] + ", " + first["role"]).to_dict()
    return runs.assign(where=[where.get(signature, "") for signature in runs["signature"]])


def section(
    runs: pd.DataFrame, rows: pd.DataFrame, cosines: pd.DataFrame, factors: Sequence[str], names: Sequence[str]
) -> Iterator[str | Drawing]:
    """The part of a task's section of the report; nothing where none of its runs has telemetry.

    names: the factors that tell the arms apart.
    """
    rows, cosines = (frame[frame["signature"].isin(runs["signature"])] for frame in (rows, cosines))
    if rows.empty:
        return
    observed = count(rows["signature"].nunique(), "run")
    yield page.heading(3, "What rounding did")
    yield page.paragraph(f"Telemetry of {observed}, of the steps that were sampled; a step counts updates.", "note")
    first = origins(runs, rows)
    if first.empty:
        yield page.paragraph("No NaN and no Inf was seen.")
    else:
        named = [
            arm_name(row, [*names, "seed"])
            for row in runs.set_index("signature").loc[first["signature"]].to_dict("records")
        ]
        yield page.paragraph("The first NaN or Inf of each run that saw one:")
        yield page.table(
            [
                Column("run", named),
                *(
                    Column(name, [text(value) for value in first[name]])
                    for name in ("status", "step", "site", "role", "kind")
                ),
            ]
        )
    table = rounding(runs, rows, factors)
    if len(table):
        yield page.table(
            [
                Column("arm", [arm_name(row, names) for row in table.to_dict("records")]),
                Column("role", list(table["role"])),
                Column("rounded to", list(table["rounded_to"])),
                Column("SQNR (dB)", _numbers(table["sqnr_db"], ".1f"), number=True),
                Column("lowest", _numbers(table["lowest_db"], ".1f"), number=True),
                Column("at", list(table["lowest_site"]), wrap=True),
                *(Column(name, _numbers(table[name], ".2%"), number=True) for name in SHARES),
            ]
        )
        yield page.paragraph(
            "Medians over runs and steps. Clipped, underflowed (to zero), swallowed (weights whose update rounding "
            "undid) and oscillated (weights that flipped to a neighbouring value and back in two updates) are the "
            "shares at the worst site.",
            "note",
        )
    yield from maps(runs, rows.rename(columns={"format": "rounded_to"}))
    table = gradients(runs, cosines, factors)
    if len(table):
        yield page.paragraph("The simulated gradient against that of the same weights and batch in full precision:")
        yield page.table(
            [
                Column("arm", [arm_name(row, names) for row in table.to_dict("records")]),
                Column("cosine (median)", _numbers(table["cosine"], ".4f"), number=True),
                Column("lowest parameter's", _numbers(table["lowest"], ".4f"), number=True),
                Column("parameter", list(table["parameter"])),
                Column("norm ratio (median)", _numbers(table["norm_ratio"], ".4f"), number=True),
            ]
        )


def _numbers(values: pd.Series, style: str) -> list[str]:
    return ["–" if pd.isna(value) else format(value, style) for value in values]
