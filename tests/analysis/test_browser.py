"""The report in a real browser: what one clicks does what it says, nothing is loaded from elsewhere, nothing is cut
off, and axe finds no serious fault. Skipped where there is no Chromium.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.figures import saving
from analysis.page import report
from tests.analysis import run_folders as made

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

PHONE, DESK, PAPER = 390, 1280, 718  # CSS pixels; paper is A4 between its margins
PATIENCE_MS = 120_000  # on a machine that has much else to do
LARGEST = 5_000_000  # bytes of a report of 200 runs
SITES = ("blocks.0.qkv/linear", "head/linear")
Open = Callable[..., Any]


def one_task(folder: Path) -> Path:
    """Two optimizers, two formats, three seeds; one run diverged, and those in MXFP4 have telemetry."""
    configs = [each for each in made.quickstart(3) if each["model"]["name"] == "gpt2-micro"]
    configs = [each for each in configs if each["recipe"]["format"] != "mxfp6_e3m2"]
    made.write_runs(folder, configs, lambda each: ("diverged", 150) if each is configs[4] else ("finished", None))
    for config in configs:
        observe(folder, config)
    return folder


def observe(folder: Path, config: made.Config) -> None:
    """Telemetry of a run, where its format rounds."""
    name = config["recipe"]["format"]
    if name == "float32":
        return
    shares = {"clipped": 0.01, "underflowed": 0.2, "swallowed": 0.5, "origin": ""}
    rows = [
        {"step": step, "site": site, "role": role, "format": name, "sqnr_db": 12.0 + place + step / 100} | shares
        for step in (0, 100, 200)
        for place, site in enumerate(SITES)
        for role in ("fprop.lhs", "fprop.rhs", "dgrad.lhs")
    ]
    pd.DataFrame(rows).to_parquet(folder / made.signature(config) / "telemetry.parquet")


def quickstart(folder: Path) -> Path:
    return made.write_runs(folder, made.quickstart())


def lmd_ablation(folder: Path) -> Path:
    """As many arms as the grid of that name: 29, of settings of one optimizer, on both models."""
    settings: list[dict[str, Any]] = [{"noise_scale": n, "weight_decay": d} for n in (0.05, 0.0, 0.2) for d in (0.1, 0)]
    settings += [{"prior": p, "weight_decay": d} for p in ("half-normal", "constant", "flat") for d in (0.1, 0.03, 0.3)]
    settings += [{"kappa": k, "noise_scale": n} for k in range(2, 9) for n in (0.0, 0.1)]
    configs = [
        made.config(model, "lmd", "float32", seed, **each)
        for seed in range(3)
        for model in ("gpt2-micro", "vit-micro")
        for each in settings
    ]
    return made.write_runs(folder, configs, lambda each: ("diverged", 90) if each is configs[7] else ("finished", None))


def two_hundred(folder: Path) -> Path:
    """200 runs of 2000 steps, all but those in float32 with telemetry."""
    configs = [
        made.config("gpt2-micro", "lmd", format, seed, noise_scale=noise, weight_decay=decay) | {"steps": 2000}
        for format in ("float32", *(f"format{i}" for i in range(9)))
        for noise in (0.0, 0.1)
        for decay in (0.0, 0.1, 0.2, 0.3, 0.4)
        for seed in (0, 1)
    ]
    made.write_runs(folder, configs)
    for config in configs:
        observe(folder, config)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as running:
        launched = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report whose printed figures are empty, of the usual size; rendering them takes longer than all these tests."""
    with pytest.MonkeyPatch.context() as patch:
        empty = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="1056" height="300"/>'
        patch.setattr(saving, "svg", lambda figure: empty)
        return report.write_report(one_task(tmp_path_factory.mktemp("runs") / "small"), figures=False)


@pytest.fixture
def opened(browser: Any) -> Open:
    """Opens a report; when the `with` ends, there was no error on the console and no request but for the file."""

    @contextmanager
    def open_page(path: Path, width: int = DESK, script: bool = True, **options: Any) -> Iterator[Any]:
        context = browser.new_context(viewport={"width": width, "height": 900}, java_script_enabled=script, **options)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        wrong: list[str] = []
        page.on("console", lambda message: message.type in ("error", "warning") and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith(("file:", "blob:", "data:")) or wrong.append(request.url)
        )
        page.goto(path.as_uri())
        if script:
            page.wait_for_selector("dialog.run", state="attached")
        yield page
        context.close()
        assert wrong == []

    return open_page


def drawn(page: Any, task: int = 0) -> Any:
    """The explorer of a task, when its figures are there."""
    place = page.locator(f'.explorer[data-task="{task}"]')
    place.scroll_into_view_if_needed()
    place.locator(".chart[data-rows]").nth(1).wait_for()
    return place


def curve_of_a_run(page: Any) -> None:
    """Scrolls to the first curve of the run that is open and waits until it is drawn."""
    page.locator("dialog .chart").first.scroll_into_view_if_needed()
    page.locator("dialog .chart[data-rows]").first.wait_for()


def rows(page: Any, task: int = 0) -> Any:
    return page.locator(f'[data-runs="{task}"] tbody tr')


def shown(place: Any, count: int) -> None:
    """Waits until both figures of an explorer show so many runs."""
    for chart in place.locator(".chart").all():
        sync_api.expect(chart).to_have_attribute("data-rows", str(count), timeout=PATIENCE_MS)


def fits(page: Any, width: int) -> None:
    """Nothing is wider than the page, and what is wider than its own box can be scrolled there."""
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wide = """[...document.querySelectorAll("main *, body *")].filter((each) => each.getBoundingClientRect().right >
      innerWidth + 1 && !each.closest(".box, pre, .legend, nav")).map((each) => each.outerHTML.slice(0, 80))"""
    assert page.evaluate(wide) == []


def serious(page: Any) -> list[str]:
    """What axe finds of serious or critical impact."""
    found = axe.Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {node['html'][:120]}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def every_figure_has_an_alternative(page: Any) -> None:
    figures = page.locator("figure")
    assert figures.count() > 0
    texts = figures.evaluate_all(
        """all => all.filter((each) => !each.closest("[hidden]")).map((each) => {
          const shown = each.querySelector("img, [role=img]");
          return shown?.getAttribute("alt") ?? shown?.getAttribute("aria-label") ?? "";
        })"""
    )
    assert all(len(text) > 20 for text in texts)


def test_a_table_sorts_filters_and_is_copied_and_its_filter_filters_the_figures(opened: Open, small: Path) -> None:
    with opened(small, permissions=["clipboard-read", "clipboard-write"]) as page:
        place, table = drawn(page), page.locator('[data-runs="0"]')
        shown(place, 12)
        heading = table.locator("th", has_text="validation loss")
        heading.click()
        sync_api.expect(heading).to_have_attribute("aria-sort", "ascending", timeout=PATIENCE_MS)
        values = [float(text) for text in rows(page).locator("td:nth-child(7)").all_inner_texts() if text != "–"]
        losses = [json.loads(path.read_text())["final"] for path in small.parent.glob("*/result.json")]
        finite = [each["validation_loss"] for each in losses if isinstance(each["validation_loss"], float)]
        assert values == [round(each, 4) for each in sorted(finite)]
        table.locator("input").fill("lmd float32")
        sync_api.expect(rows(page)).to_have_count(3, timeout=PATIENCE_MS)
        assert set(rows(page).locator("td:nth-child(2)").all_inner_texts()) == {"lmd"}
        shown(place, 3)
        table.locator("input").fill("diverged")
        shown(place, 1)
        table.get_by_role("button", name="Copy").click()
        page.locator(".dt-button-info").wait_for()
        head, line = page.evaluate("navigator.clipboard.readText()").strip().splitlines()
        assert head.split("\t")[:4] == ["run", "optimizer", "format", "seed"]
        assert line.split("\t")[1:6] == ["adamw", "mxfp4_e2m1", "1", "diverged", "150"]


def test_figures_hide_arms_switch_axes_show_bands_and_say_which_run_a_line_is(opened: Open, small: Path) -> None:
    with opened(small) as page:
        place = drawn(page)
        chart = place.locator(".chart").first
        place.get_by_role("checkbox", name="lmd, float32").uncheck()
        shown(place, 9)
        place.get_by_role("combobox", name="Colour").select_option("seed")
        shown(place, 12)
        place.get_by_role("button", name="none").click()
        shown(place, 0)
        place.get_by_role("checkbox", name="2", exact=True).check()
        shown(place, 4)
        place.get_by_role("button", name="all").click()
        place.get_by_role("combobox", name="Colour").select_option("arm")
        place.get_by_role("combobox", name="Curve").select_option("training loss")
        for kind in ("linear", "log"):
            place.get_by_role("checkbox", name="logarithmic").first.set_checked(kind == "log")
            page.wait_for_function(f"place => place.view?.scale('y').type === '{kind}'", arg=chart.element_handle())
        place.get_by_role("checkbox", name="median and range").check()
        sync_api.expect(chart.locator(".mark-area path")).to_have_count(4, timeout=PATIENCE_MS)  # an area an arm
        assert chart.locator(".mark-line path[stroke-width='1.4']").count() == 1  # the diverged run keeps its line
        place.get_by_role("checkbox", name="median and range").uncheck()
        page.locator('[data-runs="0"] input').fill("lmd mxfp4_e2m1")
        shown(place, 3)
        line = chart.locator(".mark-line path[stroke-width='11']").first
        line.scroll_into_view_if_needed()
        x, y = line.evaluate(
            """path => {
              const [point, screen] = [path.getPointAtLength(0.9 * path.getTotalLength()), path.getScreenCTM()];
              return [screen.a * point.x + screen.e, screen.d * point.y + screen.f];
            }"""
        )
        page.mouse.move(x, y)
        tip = page.locator("#vg-tooltip-element.visible")
        tip.wait_for()
        assert "lmd, mxfp4_e2m1, seed" in tip.inner_text() and "finished" in tip.inner_text()


def test_a_run_opens_from_table_figure_and_address(opened: Open, small: Path) -> None:
    configs = [json.loads(path.read_text()) for path in small.parent.glob("*/config.json")]
    (config,) = [
        each
        for each in configs
        if (each["optimizer"]["name"], each["recipe"]["format"], each["seed"]) == ("lmd", "mxfp4_e2m1", 2)
    ]
    signature = made.signature(config)
    with opened(small) as page:
        rows(page).filter(has_text=signature).locator("td").nth(3).click()
        dialog = page.get_by_role("dialog", name="lmd, mxfp4_e2m1, seed 2")
        text = dialog.inner_text()
        loss = json.loads((small.parent / signature / "result.json").read_text())["final"]["validation_loss"]
        assert "finished" in text and f"{loss:.4f}" in text
        tables = [
            [cell.split("\t") for cell in table.splitlines()] for table in dialog.locator("table").all_inner_texts()
        ]
        assert ["seed", "2", "0, 1"] in tables[1]
        assert ["optimizer", "lmd", "adamw"] in tables[2] and ["format", "mxfp4_e2m1", "float32"] in tables[2]
        assert ["head/linear fprop.rhs → mxfp4_e2m1", "14", "1.00%", "20.00%", "50.00%"] in tables[-1]
        folder = small.parent
        command = f"mv {folder}/{signature} {folder}.{signature} && lpsim run grids/made_up.py"
        assert dialog.locator("pre").inner_text() == command
        assert serious(page) == []
        page.keyboard.press("Escape")
        dialog.wait_for(state="hidden")
        assert "#" not in page.url
        point = drawn(page).locator(".chart").nth(1).locator(".mark-symbol path").first
        point.click()
        page.get_by_role("dialog").wait_for()
        assert "#run-" in page.url
        page.go_back()
        page.get_by_role("dialog").wait_for(state="hidden")
        page.goto(f"{small.as_uri()}#run-{signature}")
        page.reload()
        dialog.wait_for()


def test_nothing_is_cut_off_on_a_phone_and_axe_finds_no_serious_fault(opened: Open, small: Path) -> None:
    with opened(small, PHONE) as page:
        drawn(page)
        every_figure_has_an_alternative(page)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            fits(page, PHONE)
            assert serious(page) == []
        rows(page).first.locator("a").click()
        curve_of_a_run(page)
        assert page.evaluate("document.querySelector('dialog').scrollWidth") <= PHONE


@pytest.mark.full
@pytest.mark.parametrize("write", [quickstart, lmd_ablation, two_hundred])
def test_reports_of_real_shapes(opened: Open, tmp_path: Path, write: Callable[[Path], Path]) -> None:
    """All of the above at once, on desk, phone and paper, in the dark, and without JavaScript."""
    path = report.write_report(write(tmp_path / write.__name__), figures=False)
    assert path.stat().st_size <= LARGEST
    count = len(list(path.parent.glob("*/config.json")))
    for width, scheme in ((DESK, "light"), (DESK, "dark"), (PHONE, "light")):
        with opened(path, width, color_scheme=scheme) as page:
            tasks = page.locator(".explorer").count()
            for task in range(tasks):
                shown(drawn(page, task), rows(page, task).count())
            assert sum(rows(page, task).count() for task in range(tasks)) == count
            fits(page, width)
            every_figure_has_an_alternative(page)
            assert serious(page) == []
            ticks = drawn(page).locator("fieldset input")
            ticks.first.uncheck()
            filtered = page.locator('[data-runs="0"] input')
            filtered.fill("nothing like this")
            shown(drawn(page), 0)
            filtered.fill("")
            rows(page).last.locator("a").click()
            curve_of_a_run(page)
    with opened(path, PAPER) as page:
        page.emulate_media(media="print")
        fits(page, PAPER)
        assert page.pdf(format="A4").startswith(b"%PDF")
    with opened(path, script=False) as page:
        assert page.locator(".explorer").first.is_hidden()
        assert page.locator("[data-runs] tbody tr").count() == count
