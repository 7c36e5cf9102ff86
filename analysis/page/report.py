"""Tables and figures of a grid folder -> one HTML file that needs nothing else.

The same folders give the same bytes, the date of writing apart. Files are written beside their final name and renamed,
so a reader never sees half a report, and a full disk leaves the previous one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path

import pandas as pd

from analysis import load
from analysis.figures import drawings as figures
from analysis.figures.plots import LABELS
from analysis.load import Results
from analysis.page import answer as answers
from analysis.page import claims as claims_part
from analysis.page import explore, explore_data, paper, scripts, summary, telemetry, terms, worst
from analysis.page import html as page
from analysis.page.html import Column
from analysis.page.summary import count, of_task, plain, signed, task_name
from analysis.statistics import claims, stability, tables
from analysis.statistics.sensitivity import sensitivity
from analysis.statistics.tables import BASELINE, TASK

LONG = ("metrics", "telemetry", "telemetry_cosines")  # tables that are written as Parquet alone
TIMES = ("started_at", "time_s")  # of the environment; they differ in every run


def write_report(
    grid_folder: str | Path | Sequence[str | Path], output: str | Path | None = None, tables_as: str | None = None
) -> Path:
    """Writes the report of a grid folder and returns its path: `<grid_folder>/report.html`, or `output`; beside it, in
    `tables/`, the tables as CSV and Parquet (metrics and telemetry as Parquet alone), and for a paper where `tables_as`
    is "latex" or "markdown". Several folders are one report, `A+B/report.html` beside the first.

    Only `environment` and the metric `time_ms` hold times: the other tables of a resumed grid equal those of an
    uninterrupted one. Raises ValueError when a folder is no grid folder, `output` is a folder or `tables_as` is another
    word, OSError when the files cannot be written.
    """
    folders = [grid_folder] if isinstance(grid_folder, (str, Path)) else list(grid_folder)
    if tables_as is not None and tables_as not in paper.ENDINGS:
        raise ValueError(f"no kind of table {tables_as!r}; there are: {', '.join(paper.ENDINGS)}")
    results = load.read_all(folders)
    target = results.folder / "report.html" if output is None else Path(output)
    if target.is_dir():
        raise ValueError(
            f"{target} is a folder; say the name of the HTML file to write, such as {target / 'report.html'}"
        )
    frames = all_tables(results)
    text = render(results, frames, written_at=datetime.now(UTC))
    try:
        (target.parent / "tables").mkdir(parents=True, exist_ok=True)
        for name, frame in frames.items():
            _write(target.parent / "tables" / f"{name}.parquet", frame.to_parquet(index=False))
            if name not in LONG:
                csv = frame.to_csv(index=False, lineterminator="\n")
                _write(target.parent / "tables" / f"{name}.csv", csv.encode())
        if tables_as is not None:
            paper.write(frames, target.parent / "tables", tables_as)
        _write(target, text.encode())
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"cannot write the report to {target}: {reason}") from error
    return target


def all_tables(results: Results) -> dict[str, pd.DataFrame]:
    """Every table of the report by the name of its file."""
    runs, per_run = results.runs, stability.by_run(results.metrics)
    return {
        "runs": runs,
        "metrics": results.metrics,
        "environment": results.environment,
        "problems": results.problems,
        "arms": tables.arms(runs),
        "differences": tables.differences(runs),
        "contrasts": tables.contrasts(runs),
        "effects": tables.effects(runs),
        "against_first": tables.against_first(runs),
        "growth_against_first": tables.against_first(runs, "weight_growth", per_run),
        "sensitivity": sensitivity(runs),
        "stability": stability.by_arm(runs, per_run),
        "stability_by_run": per_run,
        "learning_rates": stability.largest_stable_learning_rate(runs),
        **_claims(results, per_run),
        **({"telemetry": results.telemetry} if len(results.telemetry) else {}),
        **({"telemetry_cosines": results.cosines} if len(results.cosines) else {}),
    }


def _claims(results: Results, per_run: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The tables of the claims that the grid made, where it made any."""
    made = results.grid.get("claims", [])
    if not made:
        return {}
    predicted = claims.predictions(made, results.runs, per_run)
    return {"predictions": predicted, "claims": claims.verdicts(made, predicted)}


def render(results: Results, frames: dict[str, pd.DataFrame], written_at: datetime) -> str:
    """The whole page as HTML."""
    name = str(results.grid.get("grid", results.folder.name))
    sections: list[tuple[str, str, list[str]]] = []  # anchor, title, HTML
    for number, (task, runs) in enumerate(results.runs.groupby(list(TASK), dropna=False, sort=False)):
        sections.append((f"task-{number}", task_name(task), list(_task(results, frames, task, runs))))
    if len(results.runs):
        sections.append(("explore", "Explore the runs", list(explore.section(results, frames["arms"]))))
    sections.append(("incomplete", "Runs that did not finish", list(_incomplete(results))))
    sections.append(("where", "What ran where", list(_provenance(results))))
    sections.append(("legend", "Terms, and how intervals are computed", [page.definitions(terms.LEGEND)]))
    statements = "".join(
        page.heading(4, title) + page.bullets(sentences) for title, sentences in summary.statements(frames)
    )
    claimed = claims_part.section(frames["claims"], frames["predictions"]) if "claims" in frames else []
    answer = [*claimed] or [*_answers(frames)]
    stamp = written_at.strftime("%Y-%m-%d %H:%M UTC")
    source = results.grid.get("source") or "not recorded"
    body = [
        page.heading(1, f"Grid {name}"),
        *(page.paragraph(text, "lead") for text in summary.question(results)),
        page.paragraph(f"Grid file {source} · report written at {stamp}", "meta"),
        page.paragraph(summary.lead(results), "lead" if summary.complete(results) else "lead warn"),
        *answer,
        page.paragraph(
            "Brackets are 95% intervals over seeds. Each statement is about these runs, at these settings and this "
            "number of steps; terms are explained at the end. The tables lie beside this file in tables/, as CSV and "
            "Parquet.",
            "note",
        ),
        page.folded("Every comparison in words", statements),
        page.contents((anchor, title) for anchor, title, _ in sections),
    ]
    for anchor, title, parts in sections:
        body += [page.heading(2, title, anchor), *parts]
    explored = explore_data.data(results, frames["arms"]) if len(results.runs) else None
    return page.document(f"Grid {name}", body, style=scripts.style(), end=scripts.scripts(explored))


def _answers(frames: dict[str, pd.DataFrame]) -> Iterator[str]:
    """For every task what it shows, a picture of it, and what else is decided."""
    rows = frames["differences"]
    for (task, group), answer in zip(
        frames["arms"].groupby(list(TASK), dropna=False, sort=False), answers.answers(frames), strict=True
    ):
        yield page.heading(3, answer.title)
        yield page.paragraph(" ".join(answer.sentences), "lead")
        mine = of_task(rows, task)
        if len(mine):
            names = [name for name in summary.varying(group) if name != "format"]
            named = mine.assign(name=[summary.arm_name(row, names) for row in mine.to_dict("records")])
            yield from _figure(figures.costs(named, list(dict.fromkeys(mine["format"]))))
        yield page.bullets(answer.decided) if answer.decided else ""
        yield page.paragraph(answer.undecided, "note") if answer.undecided else ""


def _task(
    results: Results, frames: dict[str, pd.DataFrame], task: tuple[str, str], runs: pd.DataFrame
) -> Iterator[str]:
    """One model on one data set: what it reached, against float32, optimizers compared, settings, curves, stability."""
    mine = {name: of_task(frame, task) for name, frame in frames.items() if set(TASK) <= set(frame.columns)}
    metric = runs["metric"].iloc[0]
    label = LABELS[metric]
    better = "higher" if tables.higher_is_better(metric) else "lower"
    roles = figures.roles(runs, tables.factors(results.runs), results.runs)

    yield page.heading(3, f"Final {label}")
    yield page.paragraph(f"Every arm; {better} is better, the best mean is bold.", "note")
    yield _arms(mine["arms"])
    yield from _figure(figures.final_metric(runs, roles))
    if len(mine["differences"]):
        yield page.heading(3, f"Difference to {BASELINE}")
        yield page.paragraph(
            f"Paired by seed, all other settings the same: {label} in the format − in {BASELINE}.", "note"
        )
        yield _differences(mine["differences"])
        caption = f"Mean over seeds of format − {BASELINE} with its 95% interval; hollow: n = 1."
        named = _named(mine["differences"])
        yield from _figure(figures.forest(named, roles, f"Difference to {BASELINE}", f"change in {label}", caption))
    elif len(mine["arms"]) > 1:
        yield from _against_first(mine["against_first"], roles, label)
    if len(mine["contrasts"]):
        rows = mine["contrasts"]
        settings = ", ".join(dict.fromkeys(rows["reference_settings"])).strip(", ")
        reference = rows["reference"].iloc[0] + (f" ({settings})" if settings else "")
        yield page.heading(3, "Loss to the format, optimizers compared")
        yield page.paragraph(
            f"(format − {BASELINE}) of the optimizer minus (format − {BASELINE}) of {reference}, paired by seed. "
            "Better: the optimizer loses less to the format than the reference does.",
            "note",
        )
        yield _differences(rows)
        caption = f"Difference of the differences to {reference}, with its 95% interval; hollow: n = 1."
        yield from _figure(
            figures.forest(
                _named(rows), roles, "Loss to the format", f"change in {label}, less the reference's", caption
            )
        )
    if len(mine["effects"]):
        yield from _effects(mine["effects"], roles, label)
    if len(mine["sensitivity"]):
        yield from worst.section(mine["sensitivity"])
    yield page.heading(3, "Training")
    yield from _figure(figures.curves(runs, results.metrics, roles, "validation", "loss", "validation loss (nats)"))
    yield from _figure(figures.curves(runs, results.metrics, roles, "train", "loss", "training loss (nats)"))
    yield page.heading(3, "Stability")
    yield _stability(mine["stability"])
    if len(mine["learning_rates"]):
        yield page.heading(3, "Largest stable learning rate")
        yield _learning_rates(mine["learning_rates"])
        yield from _figure(figures.learning_rates(runs, roles))
    yield from _figure(figures.weight_growth(runs, results.metrics, roles))
    yield from telemetry.section(
        runs, results.telemetry, results.cosines, tables.factors(results.runs), summary.varying(mine["arms"])
    )


def _arms(rows: pd.DataFrame) -> str:
    names = summary.varying(rows)
    best = tables.best_arm(rows)
    flags = [best is not None and index == best.name for index in rows.index]
    columns = [
        *_factor_columns(rows, names),
        Column("runs", _texts(rows["runs"], str), number=True),
        Column("n", _texts(rows["n"], str), number=True),
        Column("mean", _texts(rows["mean"], plain), number=True),
        Column("sd", _texts(rows["sd"], plain), number=True),
        *(
            Column(name, _texts(rows[name], str), number=True)
            for name in ("diverged", "failed", "unfinished", "excluded")
        ),
    ]
    return page.table(columns, best=flags, new=_new(rows, names))


def _differences(rows: pd.DataFrame) -> str:
    names = summary.varying(rows)
    return page.table([*_factor_columns(rows, names), *_difference_columns(rows)], new=_new(rows, names))


def _difference_columns(rows: pd.DataFrame) -> list[Column]:
    records = rows.to_dict("records")
    return [
        Column("n", _texts(rows["n"], str), number=True),
        Column("difference", _texts(rows["difference"], signed), number=True),
        Column(
            "95% interval",
            [summary.bracket(row) if row["n"] > 1 else "–" for row in records],
            number=True,
        ),
        Column("reads as", [summary.verdict(row) for row in records]),
        Column("runs excluded", _texts(rows["excluded"], str), number=True),
    ]


def _against_first(rows: pd.DataFrame, roles: figures.Roles, label: str) -> Iterator[str]:
    names, first_arm = summary.varying(rows), rows.iloc[0]
    first = summary.arm_name(first_arm, names)
    differ = [
        [name for name in names if tables.text(row[name]) != tables.text(first_arm[name])] for _, row in rows.iterrows()
    ]
    labels = [summary.arm_name(row, some) for some, row in zip(differ, rows.to_dict("records"), strict=True)]
    named = rows.assign(name=labels)
    yield page.heading(3, "Against the first arm")
    yield page.paragraph(f"Paired by seed: {label} of the arm − of {first}, which the grid lists first.", "note")
    yield _differences(rows.drop(columns="mean").iloc[1:])
    caption = "Named by what differs from the first arm; mean over seeds with its 95% interval; hollow: n = 1."
    yield from _figure(figures.forest(named.iloc[1:], roles, "Against the first arm", f"change in {label}", caption))


def _effects(rows: pd.DataFrame, roles: figures.Roles, label: str) -> Iterator[str]:
    yield page.heading(3, "What each setting does")
    yield page.paragraph(
        f"Change in {label} from the level that the grid lists first to another, paired with all else equal and "
        "averaged over the other settings within a seed; n is the number of seeds.",
        "note",
    )
    records = rows.to_dict("records")
    named = rows.assign(name=[f"{row['optimizer']}: {summary.effect_name(row)}" for row in records])
    columns = [
        Column("optimizer", list(rows["optimizer"])),
        Column("setting", list(rows["factor"])),
        Column("from", list(rows["reference"])),
        Column("to", list(rows["level"])),
        Column("runs", _texts(rows["runs"], str), number=True),
        *_difference_columns(rows),
    ]
    yield page.table(columns, new=_new(rows, ["optimizer", "factor"]))
    caption = "Change from the first level, all else equal, with its 95% interval over seeds; hollow: n = 1."
    yield from _figure(figures.forest(named, roles, "What each setting does", f"change in {label}", caption))


def _stability(rows: pd.DataFrame) -> str:
    names = summary.varying(rows.rename(columns={"runs": "metric"}))
    rates = [
        f"{row['diverged']} of {row['runs']} [{row['rate_low']:.0%}, {row['rate_high']:.0%}]" if row["runs"] else "–"
        for row in rows.to_dict("records")
    ]
    columns = [
        *_factor_columns(rows, names),
        Column("diverged [95%]", rates, number=True),
        Column("spikes a run", _texts(rows["spikes"], lambda value: plain(value, 1)), number=True),
        Column("largest spike (nats)", _texts(rows["largest_spike"], lambda value: plain(value, 2)), number=True),
        Column(
            "weight growth (log / 1000 steps)",
            _texts(rows["weight_growth"], lambda value: plain(value, 3)),
            number=True,
        ),
        Column("gradient noise (log)", _texts(rows["gradient_noise"], lambda value: plain(value, 2)), number=True),
    ]
    return page.table(columns, new=_new(rows, names))


def _learning_rates(rows: pd.DataFrame) -> str:
    names = summary.varying(rows.rename(columns={"tried": "metric"}))
    columns = [
        *_factor_columns(rows, names),
        Column("tried", list(rows["tried"])),
        Column(
            "largest stable",
            _texts(rows["largest_stable"], lambda value: f"{value:g}" if value == value else "none"),
            number=True,
        ),
        Column(
            "smallest unstable",
            _texts(rows["smallest_unstable"], lambda value: f"{value:g}" if value == value else "none tried"),
            number=True,
        ),
    ]
    return page.table(columns, new=_new(rows, names))


def _incomplete(results: Results) -> Iterator[str]:
    runs = results.runs[results.runs["status"] != "finished"]
    names = [name for name in tables.factors(results.runs) if results.runs[name].nunique(dropna=False) > 1]
    if runs.empty:
        yield page.paragraph(
            "Every run that could be read has finished." if len(results.runs) else "No run could be read."
        )
    else:
        columns = [
            Column("status", list(runs["status"])),
            *_factor_columns(runs, names),
            Column("seed", _texts(runs["seed"], str), number=True),
            Column("step", _texts(runs["step"], lambda step: f"{step:.0f}"), number=True),
            Column("cause", _texts(runs["cause"], _text_or_dash), wrap=True),
            Column("signature", list(runs["signature"])),
        ]
        yield page.table(columns)
        for row in runs[runs["traceback"].notna()].to_dict("records"):
            title = f"Traceback of {summary.arm_name(row, [*names, 'seed'])} ({row['signature']})"
            yield page.folded(title, page.preformatted(row["traceback"]))
    if len(results.problems):
        yield page.heading(3, "Folders that could not be used")
        columns = [
            Column("folder", list(results.problems["folder"])),
            Column("reason", list(results.problems["reason"]), wrap=True),
        ]
        yield page.table(columns)
    if results.not_listed:
        yield page.paragraph(
            f"{count(len(results.not_listed), 'run')} in this folder that grid.json does not list, of other formats or "
            "an earlier version of the grid file, left out."
        )
    if results.not_started:
        listing = page.preformatted("\n".join(results.not_started))
        yield page.folded(f"{count(len(results.not_started), 'run')} of the grid not started yet", listing)


def _provenance(results: Results) -> Iterator[str]:
    environment, runs = results.environment, results.runs
    names, values = [], []
    for name in [name for name in environment.columns if name not in ("signature", "session", *TIMES)]:
        found = environment["signature"].groupby(environment[name].map(_text_or_dash), sort=False).nunique()
        each = [f"{value} ({count(n, 'run')})" for value, n in found.items()]
        names.append(name)
        values.append("; ".join(each) if len(each) > 1 else found.index[0])
    resumed = environment.loc[environment["session"] > 0, "signature"].nunique()
    if resumed:
        names.append("resumed")
        values.append(f"{count(resumed, 'run')}, in {count(int((environment['session'] > 0).sum()), 'session')}")
    for name, line in (("started_at", _span), ("time_s", _total)):
        if name in environment and environment[name].notna().any():
            names.append(name)
            values.append(line(environment[name].dropna()))
    if names:
        yield page.table([Column("what", names), Column("value", values, wrap=True)])
    else:
        yield page.paragraph("No run recorded its environment.")
    factors, derived = tables.factors(runs), tables.derived(runs)
    if derived:
        followed = [_follows(runs, name, factors) for name in derived]
        content = page.table([Column("setting", derived), Column("value", followed, wrap=True)])
        yield page.folded("Settings that follow from the factors", content)
    constant = [name for name in load.config_columns(runs) if runs[name].nunique(dropna=False) == 1]
    if constant:
        same = [tables.text(runs[name].iloc[0]) for name in constant]
        content = page.table([Column("setting", constant), Column("value", same, wrap=True)])
        yield page.folded("Settings that are the same in every run", content)
    for part in results.parts or (results,):
        if part.grid:
            command = page.paragraph(f"Command: {' '.join(map(str, part.grid.get('argv') or ['not recorded']))}")
            source = page.preformatted(str(part.grid.get("source_text") or "not recorded"))
            which = f" of {part.grid.get('grid', part.folder.name)}" if results.parts else ""
            yield page.folded(f"The grid file{which}, as it was run", command + source)


def _follows(runs: pd.DataFrame, name: str, factors: list[str]) -> str:
    """`adamw: 0.006; lmd: 0.03`: the values of a derived setting by the fewest factors that decide it."""
    varying = [factor for factor in factors if runs[factor].nunique(dropna=False) > 1]
    for chosen in (some for size in range(1, len(varying) + 1) for some in combinations(varying, size)):
        groups = runs.groupby(list(chosen), dropna=False, sort=False)[name]
        if groups.nunique(dropna=False).max() == 1:
            firsts = [(", ".join(map(tables.text, key)), group.iloc[0]) for key, group in groups]
            return "; ".join(f"{key}: {tables.text(value)}" for key, value in firsts)
    return "differs within arms"


def _named(rows: pd.DataFrame) -> pd.DataFrame:
    names = summary.varying(rows)
    return rows.assign(name=[summary.arm_name(row, names) for row in rows.to_dict("records")])


def _factor_columns(rows: pd.DataFrame, names: list[str]) -> list[Column]:
    return [
        Column(_short(name), _texts(rows[name], tables.text), number=pd.api.types.is_numeric_dtype(rows[name].dtype))
        for name in names
    ]


def _new(rows: pd.DataFrame, names: list[str]) -> list[bool]:
    """True where the first factor that varies takes another value than in the row above."""
    first = next((name for name in names if rows[name].nunique(dropna=False) > 1), None)
    if first is None:
        return [False] * len(rows)
    values = _texts(rows[first], tables.text)
    return [index > 0 and values[index] != values[index - 1] for index in range(len(values))]


def _texts(values: pd.Series, write: Callable[..., str]) -> list[str]:
    return [write(value) for value in values.tolist()]


def _short(name: str) -> str:
    return name.removeprefix("optimizer.").removeprefix("recipe.")


def _text_or_dash(value: object) -> str:
    return "–" if pd.isna(value) else tables.text(value)


def _span(times: pd.Series) -> str:
    return times.iloc[0] if len(times) == 1 else f"{min(times)} to {max(times)}"


def _total(seconds: pd.Series) -> str:
    return f"{seconds.sum():.0f} s together, {seconds.min():.1f} to {seconds.max():.1f} s a run"


def _figure(drawing: figures.Drawing | None) -> Iterator[str]:
    if drawing is not None:
        yield page.figure(drawing)


def _write(path: Path, content: bytes) -> None:
    """Writes a file beside `path` and renames it there; the old file stays when that fails."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
