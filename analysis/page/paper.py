"""Tables for a paper: LaTeX with booktabs' rules, and Markdown, from the frames of `statistics` or of the report."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from analysis.page.files import replace
from analysis.page.summary import plain, signed
from analysis.statistics.tables import text

ENDINGS = {"latex": ".tex", "markdown": ".md"}
PAPER = (
    *("arms", "differences", "contrasts", "effects", "against_first", "sensitivity", "mixed", "stability"),
    "learning_rates",
)
SIGNED = ("difference", "estimate", "low", "high")


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """The table as texts, numbers as in the report: columns that hold one value in many rows left out (counts and
    metrics stay), low and high as one interval.
    """
    left_out = _same_in_all_rows(table)
    kept = [name for name in table.columns if name not in left_out]
    out: dict[str, list[str]] = {}
    for name in kept:
        start = name.removesuffix("low")
        if name.endswith("low") and f"{start}high" in table:
            pairs = zip(table[name], table[f"{start}high"], strict=True)
            write = signed if {"difference", "estimate"} & set(table) else plain
            out[f"{start}95% interval".replace("_", " ")] = [
                "–" if pd.isna(low) else f"[{write(low)}, {write(high)}]" for low, high in pairs
            ]
        elif not (name.endswith("high") and f"{name.removesuffix('high')}low" in table):
            out[_heading(name)] = [_cell(name, value) for value in table[name]]
    return pd.DataFrame(out, dtype="str")


def latex(table: pd.DataFrame) -> str:
    r"""The table as a LaTeX tabular, which needs \usepackage{booktabs}; every text is escaped.

    A comment on top has what is the same in every row and so has no column.
    """
    shown = readable(table)
    style = shown.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
    numbers = ["r" if _numeric(table, name) else "l" for name in shown.columns]
    written = str(style.to_latex(hrules=True, column_format="".join(numbers)))
    for sign, command in (("−", "$-$"), ("–", "--"), ("…", r"\ldots{}")):
        written = written.replace(sign, command)
    common = {_heading(name): " ".join(text(value).split()) for name, value in _same_in_all_rows(table).items()}
    same = [f"{heading} = {value}" for heading, value in common.items() if value]
    return f"% in every row: {'; '.join(same)}\n{written}" if same else written


def markdown(table: pd.DataFrame) -> str:
    """The table as a pipe table of Markdown; a pipe or a line's end in a text is escaped."""
    shown = readable(table)
    texts = shown.map(lambda value: value.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " "))
    texts.columns = [name.replace("|", "\\|") for name in texts.columns]
    align = ["right" if _numeric(table, name) else "left" for name in shown.columns]
    return str(texts.to_markdown(index=False, disable_numparse=True, colalign=align if len(texts) else None)) + "\n"


def write(tables: dict[str, pd.DataFrame], folder: Path, kind: str) -> list[Path]:
    """Writes the tables that a paper prints, those with rows, as `latex` or `markdown` into `folder`. Raises ValueError
    for another kind, OSError when a file cannot be written.
    """
    if kind not in ENDINGS:
        raise ValueError(f"no kind of table {kind!r}; there are: {', '.join(ENDINGS)}")
    convert = latex if kind == "latex" else markdown
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in PAPER:
        if name in tables and len(tables[name]):
            paths.append(folder / f"{name}{ENDINGS[kind]}")
            replace(paths[-1], convert(tables[name]).encode())
    return paths


def _cell(name: str, value: object) -> str:
    if pd.isna(value):
        return "–"
    if isinstance(value, float):
        is_setting = "." in name or name in ("tried", "largest_stable", "smallest_unstable")
        return text(value) if is_setting else signed(value) if name.removeprefix("worst_") in SIGNED else plain(value)
    return text(value)


def _heading(name: str) -> str:
    return name.removeprefix("optimizer.").removeprefix("recipe.").replace("_", " ")


def _same_in_all_rows(table: pd.DataFrame) -> dict[str, object]:
    """What several rows have in common, up to the column of the metric's name: column -> value."""
    last = list(table.columns).index("metric") if "metric" in table else 0
    names = list(table.columns[: last + 1]) if last and len(table) > 1 else []
    return {name: table[name].iloc[0] for name in names if table[name].nunique(dropna=False) == 1}


def _numeric(table: pd.DataFrame, heading: str) -> bool:
    """Whether a column of `readable` holds numbers."""
    name = next((name for name in table if _heading(name) == heading), None)
    return name is None or pd.api.types.is_numeric_dtype(table[name].dtype)
