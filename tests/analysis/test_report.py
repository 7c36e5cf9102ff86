"""Laws of the report: it needs nothing else, escapes everything, is the same for the same folders, says what failed."""

import base64
import errno
import json
import re
import shutil
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from analysis import load
from analysis.figures import comparisons, plots
from analysis.figures import drawings as figures
from analysis.page import provenance, report, summary
from analysis.statistics import tables
from tests.analysis import run_folders as made

VOID = {"meta", "img", "br", "source"}
WITHOUT_TEXT = ("style", "script")
WHEN = datetime(2025, 1, 2, tzinfo=UTC)
HOSTILE = "<script>alert('&\"')</script> $\\frac$"  # HTML, and what matplotlib takes for a formula


class Page(HTMLParser):
    """Reads a page as a browser would: open tags must close in order; collects texts, attributes and images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        self.pictures += [value or "" for name, value in attributes if tag == "img" and name == "src"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in WITHOUT_TEXT:
            self.texts.append(data)

    @property
    def images(self) -> list[bytes]:
        prefix = "data:image/svg+xml;base64,"
        return [base64.b64decode(link.removeprefix(prefix)) for link in self.pictures]


def written(folder: Path) -> Page:
    return Page(report.write_report(folder, figures=False).read_text())


def messy(folder: Path) -> list[made.Config]:
    """A grid where everything that can go wrong did."""
    outcomes = {
        ("gpt2-micro", "adamw", "mxfp4_e2m1"): ("diverged", 60),
        ("vit-micro", "lmd", "mxfp6_e3m2"): ("failed", 20),
        ("vit-micro", "adamw", "float32"): ("unfinished", 80),
    }

    def outcome(config: made.Config) -> tuple[str, int | None]:
        key = config["model"]["name"], config["optimizer"]["name"], config["recipe"]["format"]
        return outcomes.get(key, ("finished", None)) if config["seed"] == 1 else ("finished", None)

    configs = made.quickstart(3)
    made.write_runs(folder, configs, outcome)
    (folder / made.signature(configs[0]) / "config.json").write_text('{"torn')
    shutil.rmtree(folder / made.signature(configs[3]))
    return configs


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's folder, with its report."""
    folder = tmp_path_factory.mktemp("runs") / "quickstart"
    made.write_runs(folder, made.quickstart())
    report.write_report(folder)
    return folder


def test_the_page_needs_nothing_else(quick: Path) -> None:
    text = (quick / "report.html").read_text()
    page = Page(text)
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in page.links)
    scripts = re.findall(r"<script([^>]*)>(.*?)</script>", text, flags=re.DOTALL)
    assert [kind.split(" id=")[0].strip() for kind, _ in scripts] == ['type="text/plain"'] * 3 + ['type="module"']
    assert all(re.fullmatch(r"[\w+/=]+", packed) for _, packed in scripts[:3])  # nothing that could end an element
    assert not re.search(r"https?:|fetch|XMLHttpRequest", scripts[3][1])
    rest = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"@import|url\(", rest)
    anchors = re.findall(r'id="([^"]+)"', rest)
    assert len(anchors) == len(set(anchors))
    assert {link[1:] for link in page.links if link.startswith("#")} == set(anchors)


def test_no_figure_is_missing(quick: Path) -> None:
    page = Page((quick / "report.html").read_text())
    # what formats cost; of each model: final metric, a map, three forests, two losses, weight growth, time
    assert len(page.images) == 1 + 2 * 9
    assert all(image.startswith(b"<?xml") and b"<path" in image for image in page.images)
    assert all(b"<dc:date>" not in image for image in page.images)


def test_every_figure_lies_beside_the_report_for_a_paper(quick: Path) -> None:
    page = Page((quick / "report.html").read_text())
    files = {path.name: path.read_bytes() for path in (quick / "figures").iterdir()}
    assert sorted(page.images) == sorted(content for name, content in files.items() if name.endswith(".svg"))
    assert {name.replace(".svg", ".pdf") for name in files if name.endswith(".svg")} <= files.keys()
    assert all(content.startswith(b"%PDF") for name, content in files.items() if name.endswith(".pdf"))


def test_same_folders_same_bytes_and_nothing_global_is_left_behind(quick: Path) -> None:
    before = dict(matplotlib.rcParams)
    later = report.render(load.read(quick), report.all_tables(load.read(quick)), WHEN)
    stamp = re.compile(r"report written at [\d: -]+ UTC")
    assert len(stamp.findall(later)) == 1
    assert stamp.sub("", later) == stamp.sub("", (quick / "report.html").read_text())
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []


def test_the_model_of_all_runs_is_folded_and_has_every_effect(quick: Path) -> None:
    text = (quick / "report.html").read_text()
    assert text.count("<details><summary>All runs of this task in one model") == 2
    texts = Page(text).texts
    for effect in ("optimizer lmd against adamw, in float32", "format mxfp4_e2m1 against float32, in adamw"):
        assert texts.count(effect) == 2
    table = pd.read_csv(quick / "tables" / "mixed.csv", keep_default_na=False)
    assert list(table["not_fitted"]) == [""] * (2 * 5)


def test_every_signature_and_version_is_on_the_page(quick: Path) -> None:
    texts = set(Page((quick / "report.html").read_text()).texts)
    assert {made.signature(config) for config in made.quickstart()} <= texts
    assert {"2.13.0", "Made-up CPU @ 2.0 GHz", "0123abcd", made.SOURCE} <= texts


@pytest.mark.usefixtures("undrawn")
def test_what_went_wrong_is_on_the_page(tmp_path: Path) -> None:
    configs = messy(tmp_path)
    page = written(tmp_path)
    whole = " ".join(page.texts)
    assert "34 runs (2 models, 2 optimizers, 3 formats, 3 seeds): 31 finished, 1 diverged, 1 failed, 1 unf" in whole
    assert "1 folder could not be used (listed below); 1 run not started." in whole
    for config in configs:
        assert made.signature(config) in whole
    for text in ("train loss is NaN", "ValueError: no <such> block", "config.json is torn or not JSON"):
        assert text in page.texts
    assert any(text.startswith("Traceback (most recent call last)") for text in page.texts)


def test_the_cause_of_a_lost_run_is_told_in_full(tmp_path: Path) -> None:
    configs = made.quickstart(1)[:2]
    made.write_runs(tmp_path, configs, lambda _: ("failed", 20))
    cause = "RuntimeError: the magic smoke came out of seed 1, as it did of all seeds before"
    path = tmp_path / made.signature(configs[0]) / "result.json"
    made.write_json(path, json.loads(path.read_text()) | {"cause": cause})
    assert f'<td class="wrap">{cause}</td>' in "".join(provenance.left_out(load.read(tmp_path)))


def test_a_resumed_run_tells_of_its_environment_no_more_than_the_others(tmp_path: Path) -> None:
    configs = made.quickstart(1)[:2]
    made.write_runs(tmp_path, configs)
    path = tmp_path / made.signature(configs[0]) / "env.json"
    environment = json.loads(path.read_text())
    made.write_json(path, environment | {"resumed": [environment]})
    results = load.read(tmp_path)
    assert "version" not in results.environment
    page = "".join(provenance.provenance(results))
    assert "<td>version</td>" not in page and "– (" not in page and "1 run, in 1 session" in page


@pytest.mark.usefixtures("undrawn")
def test_all_text_of_a_run_folder_is_escaped(tmp_path: Path) -> None:
    pairs = [(format, prior) for format in ("float32", HOSTILE) for prior in (HOSTILE, "b")]
    configs = [made.config("gpt2-micro", "lmd", format, 0, prior=prior) for format, prior in pairs]
    for config in configs:
        config["model"]["name"] = HOSTILE
        config["data"]["name"] = HOSTILE
    made.write_grid(tmp_path, configs, source=HOSTILE)
    for config in configs:
        path = made.write_run(tmp_path, config, "failed", 20, commit=HOSTILE) / "result.json"
        made.write_json(path, json.loads(path.read_text()) | {"cause": HOSTILE, "traceback": HOSTILE})
    page = written(tmp_path)
    assert page.tags.count("script") == 4  # the page's own
    assert page.texts.count(HOSTILE) > 10


def without_times(folder: Path) -> dict[str, bytes]:
    skipped = ("environment", "metrics")  # the two that hold times
    return {path.name: path.read_bytes() for path in (folder / "tables").iterdir() if path.stem not in skipped}


@pytest.mark.usefixtures("undrawn")
def test_tables_of_a_resumed_grid_equal_those_of_an_uninterrupted_one(quick: Path, tmp_path: Path) -> None:
    again = tmp_path / "quickstart"
    shutil.copytree(quick, again, ignore=shutil.ignore_patterns("tables", "figures", "report.html"))
    for config in made.quickstart():
        run = again / made.signature(config)
        environment = json.loads((run / "env.json").read_text())
        made.write_json(run / "env.json", environment | {"started_at": "2025-02-02", "resumed": [environment]})
        made.write_json(run / "result.json", json.loads((run / "result.json").read_text()) | {"time_s": 77.0})
    report.write_report(again, figures=False)
    assert without_times(again) == without_times(quick)
    assert len(without_times(again)) == 2 * 14


def test_the_files_hold_the_frames(quick: Path) -> None:
    frames = report.all_tables(load.read(quick))
    for name, frame in frames.items():
        pd.testing.assert_frame_equal(pd.read_parquet(quick / "tables" / f"{name}.parquet"), frame)
    back = pd.read_csv(quick / "tables" / "arms.csv")
    pd.testing.assert_frame_equal(back, frames["arms"], check_exact=True)


@pytest.mark.usefixtures("undrawn")
def test_another_place_for_the_report(quick: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "page.html"
    assert report.write_report(quick, target, figures=False) == target
    assert target.is_file()
    assert (tmp_path / "elsewhere" / "tables" / "arms.csv").is_file()


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("full", ["report.html", "arms.csv", "runs.parquet"])
def test_a_full_disk_leaves_the_previous_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str) -> None:
    made.write_runs(tmp_path, made.quickstart(1)[:2])
    report.write_report(tmp_path, figures=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / made.signature(made.quickstart(1)[0]) / "result.json").unlink()
    write = Path.write_bytes

    def limited(path: Path, content: bytes) -> int:
        if full in path.name:
            write(path, content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", limited)
    with pytest.raises(OSError, match=r"^cannot write the report to .*report\.html: No space left on device$"):
        report.write_report(tmp_path, figures=False)
    after = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert after | {tmp_path / made.signature(made.quickstart(1)[0]) / "result.json"} == set(before)
    kept = [path for path in after if path.name in (full, "report.html")]
    assert [path.read_bytes() for path in kept] == [before[path] for path in kept]


@pytest.mark.usefixtures("undrawn")
def test_bad_places_are_one_clear_error(quick: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no grid folder"):
        report.write_report(tmp_path)
    with pytest.raises(ValueError, match="is a folder; say the name of the HTML file"):
        report.write_report(quick, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^cannot write the report to .*page\.html: "):
        report.write_report(quick, tmp_path / "file" / "page.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.usefixtures("undrawn")
def test_a_grid_without_a_result_has_a_report(tmp_path: Path) -> None:
    made.write_grid(tmp_path / "none", made.quickstart())
    assert "No run can be read yet. 24 runs not started." in written(tmp_path / "none").texts
    for status in ("diverged", "failed", "unfinished"):
        made.write_runs(tmp_path / status, made.quickstart(1), lambda _, status=status: (status, 30))
        page = written(tmp_path / status)
        assert any(f"all {status}." in text for text in page.texts)
        assert "No run has finished with a finite value." in page.texts


@pytest.mark.usefixtures("undrawn")
def test_one_seed_prints_no_interval(tmp_path: Path) -> None:
    made.write_runs(tmp_path, [config for config in made.quickstart(1) if config["model"]["name"] == "gpt2-micro"])
    page = written(tmp_path)
    assert not any(re.search(r"\[[+−]", text) for text in page.texts)
    assert page.texts.count("n = 1") == 4 + 2 + 3  # differences, contrasts, optimizers


@pytest.mark.full
def test_a_large_grid_keeps_the_size_of_the_page(tmp_path: Path) -> None:
    """200 runs, four factors: as many figures as for a small grid, within their limits; long tables in a box."""
    formats = [f"format{i}" for i in range(9)]
    configs = [
        made.config("gpt2-micro", "lmd", format, seed, noise_scale=noise, weight_decay=decay) | {"steps": 40}
        for format in ("float32", *formats)
        for noise in (0.0, 0.1)
        for decay in (0.0, 0.1, 0.2, 0.3, 0.4)
        for seed in (0, 1)
    ]
    made.write_runs(tmp_path, configs)
    page = written(tmp_path)
    assert len(page.images) == 1 + 8  # as for the quickstart, the settings' forest in place of the optimizers'
    heights = [float(re.search(rb'<svg [^>]*height="([\d.]+)pt"', image).group(1)) for image in page.images]  # type: ignore[union-attr]
    assert max(heights) < 72 * 10
    assert any(f"The {comparisons.ROWS} largest of 90 differences are drawn" in text for text in page.texts)
    text = (tmp_path / "report.html").read_text()
    assert 'class="box long"' in text and len(text) <= 5_000_000


def test_a_level_has_one_colour_in_every_task(tmp_path: Path) -> None:
    configs = made.quickstart(1)
    configs = [c for c in configs if (c["model"]["name"], c["recipe"]["format"]) != ("vit-micro", "mxfp6_e3m2")]
    made.write_runs(tmp_path, configs)
    runs = load.runs(tmp_path)
    both = [figures.roles(part, tables.factors(runs), runs) for _, part in runs.groupby("model", sort=False)]
    assert both[0].colours == both[1].colours
    assert both[0].hue == "format"
    assert both[0].facet == "optimizer"


@pytest.mark.parametrize("n", [2, 7, 8, 30])
def test_colours_are_distinct(n: int) -> None:
    chosen = plots.colours([tables.BASELINE, *(f"f{i}" for i in range(n))])
    assert len({to_rgb(colour) for colour in chosen.values()}) == n + 1


def test_a_missing_setting_is_a_level_and_stays_on_the_figures(tmp_path: Path) -> None:
    """AdamW has no noise_scale: its runs must not vanish from a figure that is coloured by it."""
    configs = [made.config("gpt2-micro", "adamw", "float32", 0)]
    configs += [made.config("gpt2-micro", "lmd", "float32", 0, noise_scale=noise) for noise in (0.0, 0.1)]
    made.write_runs(tmp_path, configs)
    runs = load.runs(tmp_path)
    assert figures.levels(runs["optimizer.noise_scale"]) == ["0", "0.1", "–"]
    roles = figures.roles(runs, tables.factors(runs), runs)
    assert (roles.hue, roles.facet) == ("optimizer", "optimizer.noise_scale")
    assert set(roles.label(runs)["optimizer.noise_scale"]) == {"0", "0.1", "–"}


@pytest.mark.usefixtures("undrawn")
def test_a_grid_of_variations_is_compared_with_its_first_arm(tmp_path: Path) -> None:
    """Names say what differs from it; a difference far from the others makes the axis logarithmic."""
    configs = [
        made.config("gpt2-micro", optimizer, "float32", seed, **settings)
        for seed in range(2)
        for optimizer in ("lmd", "adamw")
        for settings in ({}, {"weight_decay": 0.0}, {"weight_decay": 0.3})
    ]
    folder = made.write_runs(tmp_path / "runs", configs)
    report.write_report(folder, figures=False)
    page = (folder / "report.html").read_text()
    assert "Against the first arm" in page and "is logarithmic" not in page
    assert "of lmd, weight_decay 0.1" in page and ">float32<" not in page.split("What ran where")[0]
    far = next(folder.glob(f"{made.signature(configs[2])}/result.json"))
    result = json.loads(far.read_text())
    result["final"]["validation_loss"] = 900.0
    made.write_json(far, result)
    report.write_report(folder, figures=False)
    assert "is logarithmic" in (folder / "report.html").read_text()


def test_plots_draw_every_run_on_the_axes_they_are_given(quick: Path) -> None:
    results = load.read(quick)
    runs = results.runs[results.runs["model"] == "gpt2-micro"]
    colours = plots.colours(list(made.FORMATS))
    losses = results.metrics.query("split == 'validation' and metric == 'loss'")
    losses = losses.merge(runs, on="signature", suffixes=("", "_of_run"))
    ax = Figure().subplots()
    alone = losses[losses["optimizer"] == "lmd"]
    assert plots.curves(plots.lines(alone, "format"), ax, colours=colours, label="loss") is ax
    assert len(ax.get_lines()) == alone["signature"].nunique() == 6
    ax = Figure().subplots()
    plots.curves(plots.lines(losses, "format"), ax, colours=colours, label="loss")
    for level, band in zip(made.FORMATS, ax.collections, strict=True):  # four runs of a colour: a band over all of them
        (box,) = band.get_paths()
        values = losses.loc[losses["format"] == level, "value"]
        assert (box.vertices[:, 1].min(), box.vertices[:, 1].max()) == (values.min(), values.max())
    ax = Figure().subplots()
    assert plots.final_metric(runs, ax, hue="format", levels=made.FORMATS, colours=colours, intervals=False) is ax
    assert sum(len(points.get_offsets()) for points in ax.collections) == len(runs)
    ax = Figure().subplots()
    rows = tables.differences(runs).assign(name="row")
    assert plots.forest(rows, ax, hue="format", colours=colours, label="change") is ax
    assert len(ax.get_yticks()) == len(rows)


def test_every_point_of_the_final_metric_stands_over_its_own_format(tmp_path: Path) -> None:
    """Panels share the axis, though each optimizer has formats that the other lacks."""
    formats = {"adamw": ("float32", "mxfp4_e2m1"), "lmd": ("float32", "mxfp6_e3m2", "own")}
    configs = [made.config("gpt2-micro", o, f, seed) for o, names in formats.items() for f in names for seed in (0, 1)]
    runs = load.runs(made.write_runs(tmp_path, configs))
    drawing = figures.final_metric(runs, figures.roles(runs, tables.factors(runs), runs))
    assert drawing is not None
    for figure in (drawing.figure, drawing.slim):
        assert [ax.get_title("left") for ax in figure.axes] == ["optimizer = adamw", "optimizer = lmd"]
        labels = [label.get_text() for label in figure.axes[-1].get_xticklabels()]
        assert labels == ["float32", "mxfp4_e2m1", "mxfp6_e3m2", "own"]
        for ax, optimizer in zip(figure.axes, formats, strict=True):
            drawn = [(labels[round(x)], y) for points in ax.collections for x, y in points.get_offsets().tolist()]
            mine = runs[runs["optimizer"] == optimizer]
            assert sorted(drawn) == sorted(zip(mine["format"], mine["primary_metric"], strict=True))
            assert ax.get_xticks().tolist() == [0, 1, 2, 3] and ax.get_xlim()[0] < 0 < 3 < ax.get_xlim()[1]


def test_verdicts() -> None:
    row = {"n": 3, "difference": 0.1, "low": 0.05, "high": 0.15, "metric": "validation_loss"}
    assert summary.verdict(row) == "worse"
    assert summary.verdict(row | {"metric": "validation_accuracy"}) == "better"
    assert summary.verdict(row | {"low": -0.05}) == "undecided"
    assert summary.verdict(row | {"low": 0.1, "high": 0.1}) == "undecided"
    assert summary.verdict(row | {"n": 1}) == "n = 1"
    assert summary.verdict(row | {"n": 0}) == "no pair"
