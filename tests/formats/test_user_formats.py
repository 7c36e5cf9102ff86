"""A format nobody has: defined in two lines at most, proved, drawn, and trained by name in the quickstart grid."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis import load
from experiments.command import cli
from experiments.grids import load_grid
from experiments.grids.source_files import define_formats
from lpsim import BlockFormat, FloatFormat, Specials, formats
from lpsim.formats import codebooks

IMPORTS = """from lpsim import BlockFormat, FloatFormat, Specials, formats
from lpsim.formats.codebooks import logarithmic, posit
"""
DEFINITIONS = {  # at most three lines each
    "mxmy5": 'my5 = FloatFormat("my5", exponent_bits=2, mantissa_bits=2, bias=3, specials=Specials.NONE)\n'
    'mxmy5 = BlockFormat("mxmy5", my5, formats.float8_e8m0fnu)\n',
    "posit6_1": 'posit6_1 = posit(6, es=1, name="posit6_1")\n',
    "log6": 'log6 = logarithmic("log6", bits=6, base=2**0.5, largest=8.0)\n',
}
MY5 = FloatFormat("my5", exponent_bits=2, mantissa_bits=2, bias=3, specials=Specials.NONE)
MINE = {
    "mxmy5": BlockFormat("mxmy5", MY5, formats.float8_e8m0fnu),
    "posit6_1": codebooks.posit(6, es=1, name="posit6_1"),
    "log6": codebooks.logarithmic("log6", bits=6, base=2**0.5, largest=8.0),
}
SHRUNKEN = """
from dataclasses import replace
from experiments.grids import quickstart
def grid(formats):
    for config in quickstart.grid(formats):
        if config.model.name == "vit-micro" and config.seed == 0:
            yield replace(config, steps=4, batch_size=16, warmup_steps=1, validate_every=4)
"""


@pytest.fixture(autouse=True)
def a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of formats as it was, before and after."""
    monkeypatch.setattr(formats, "ALL_FORMATS", dict(formats.ALL_FORMATS))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[str]:
    path = tmp_path / "myformats.py"
    path.write_text(IMPORTS + "".join(DEFINITIONS.values()))
    assert all(text.count("\n") <= 3 for text in DEFINITIONS.values())
    yield str(path)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_it_is_proved(name: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["formats", "check", name, "--define", file]) == 0
    assert capsys.readouterr().out.startswith(f"{name} conforms")


def test_a_family_may_be_a_list(tmp_path: Path) -> None:
    (tmp_path / "family.py").write_text(IMPORTS + "family = [posit(bits, es=0) for bits in range(5, 8)]\n")
    assert [fmt.name for fmt in define_formats(tmp_path / "family.py")] == ["posit5_es0", "posit6_es0", "posit7_es0"]
    assert formats.get("posit6_es0") == codebooks.posit(6, es=0)


def test_it_stands_in_the_table_and_is_drawn(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["formats", *DEFINITIONS, "--define", file]) == 0
    _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[:2] for row in rows] == [["mxmy5", "5.25"], ["posit6_1", "6"], ["log6", "6"]]
    assert cli.main(["formats", "--define", file, "--plot", str(tmp_path / "mine.svg"), *DEFINITIONS]) == 0
    assert (tmp_path / "mine.svg").stat().st_size > 0


def test_the_quickstart_takes_it_by_name(file: str) -> None:
    define_formats(Path(file))
    configs = load_grid("quickstart", [formats.get(name) for name in DEFINITIONS])[1]
    arms = {(c.model.name, c.optimizer.name, c.recipe.format.name, c.seed) for c in configs}
    assert len(arms) == len(configs) == 2 * 2 * 4 * 3
    assert {arm[2] for arm in arms} == {"float32", *DEFINITIONS}
    first = {c.signature() for c in configs if c.recipe.format is formats.float32}
    assert first < {c.signature() for c in load_grid("quickstart")[1]}  # the baseline is the same runs


def test_it_trains_by_name_from_the_command_line(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In worker processes, which know of it only what the config holds."""
    (tmp_path / "quickstart.py").write_text(SHRUNKEN)
    run = ["run", str(tmp_path / "quickstart.py"), "--runs", str(tmp_path), "--jobs", "1", "--define", file]
    assert cli.main([*run, "--formats", *DEFINITIONS]) == 0
    assert "8 runs: 8 finished (8 of them run now)" in capsys.readouterr().out
    runs = load.runs(tmp_path / "quickstart")
    assert set(runs["format"]) == {"float32", *DEFINITIONS} and set(runs["status"]) == {"finished"}
    for row in runs.itertuples():
        if row.format in MINE:
            config = json.loads((tmp_path / "quickstart" / row.signature / "config.json").read_text())
            assert formats.from_dict(config["recipe"]["format_definition"]) == MINE[row.format]
    losses = runs.groupby("optimizer")["final.train_loss"].nunique()
    assert (losses == 4).all()

    assert cli.main([*run, "--formats", "log6", "--report"]) == 0
    assert "4 runs: 4 finished (0 of them run now)" in capsys.readouterr().out
    assert set(load.runs(tmp_path / "quickstart")["format"]) == {"float32", "log6"}  # the arms of this call
    report = (tmp_path / "quickstart" / "report.html").read_text()
    assert "log6" in report and "mxmy5" not in report


def test_mistakes_are_told(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(*arguments: str) -> str:
        assert cli.main([*arguments, "--runs", str(tmp_path)] if arguments[0] == "run" else arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    def written(name: str, text: str) -> str:
        (tmp_path / name).write_text(IMPORTS + text)
        return str(tmp_path / name)

    assert "unknown format 'log7'; did you mean log6" in message(
        "run", "quickstart", "--formats", "log7", "--define", file
    )
    assert "no such Python file" in message("formats", "--define", str(tmp_path / "absent.py"))
    assert "none.py: defines no number format" in message("formats", "--define", written("none.py", ""))
    wrong = 'x = FloatFormat("x", exponent_bits=0, mantissa_bits=99)\n'
    assert "wrong.py:3: ValueError: x: " in message("formats", "--define", written("wrong.py", wrong))
    taken = written("taken.py", 'a = FloatFormat("bfloat16", 8, 6)\n')
    assert "taken.py: ValueError: a different format is already named 'bfloat16'" in message(
        "formats", "--define", taken
    )
    fixed = written("fixed.py", "def grid():\n    yield\n")
    assert "fixed.py: grid() takes no formats to choose; it must be: def grid(formats=(...))" in message(
        "run", fixed, "--formats", "bfloat16"
    )
    rule = 'def third(amax, element):\n    return amax / 3\nmine = BlockFormat("mine", formats.float4_e2m1fn, '
    rule += "formats.float8_e4m3fn, scale_rule=third)\n"
    own_rule = message("run", "quickstart", "--formats", "mine", "--define", written("rule.py", rule))
    assert "the scale rule of mine is a function" in own_rule and "take one of ScaleRule.FLOOR, " in own_rule
    assert "telemetry_every must be at least 1" in message("run", "quickstart", "--telemetry-every", "0")
    block = written(
        "vector.py",
        'from experiments.training.config import forward\ndef grid():\n    yield forward("nf4", "mxint8")\n',
    )
    assert "vector.py:5: ValueError: Recipe.vector rounds every element by itself" in message("run", block)


def test_telemetry_is_turned_on_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `run_grid` makes of it: tests/experiments/test_adaptive.py."""
    seen = []

    def run_grid(configs: list[object], *others: object, **options: object) -> list[object]:
        seen.append((len(configs), others[-1]))
        return []

    monkeypatch.setattr("experiments.running.grid.run_grid", run_grid)
    assert cli.main(["run", "quickstart", "--telemetry-every", "50", "--runs", str(tmp_path)]) == 0
    assert seen == [(36, 50)]
