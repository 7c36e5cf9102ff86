"""`lpsim formats`: the table's numbers, the drawing, a format proved from the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from experiments.command import cli, formats_plot, formats_table
from lpsim import conformance, formats


def test_the_table_holds_every_format_s_numbers() -> None:
    table = formats_table.table()
    assert list(table.index) == list(formats.ALL_FORMATS)
    row = table.loc["float8_e5m2"]
    assert (row["max"], row["min normal"], row["min subnormal"]) == (57344.0, 2.0**-14, 2.0**-16)
    assert (row["bits"], row["codes"], row["specials"]) == (8, 256, "Inf, NaN")
    assert table.loc["nvfp4", "min normal"] == 2.0**-6 * 2.0**-126
    assert table.loc["mxfp6_e3m2", "max"] == 28 * 2.0**127
    assert formats_table.table(["nf4", "bfloat16"]).index.tolist() == ["nf4", "bfloat16"]


@pytest.mark.parametrize("names", [[], ["bfloat16", "mxfp4_e2m1", "float8_e8m0fnu"], ["nf4_block64"]])
def test_the_plot_draws_every_format(names: list[str], tmp_path: Path) -> None:
    path = tmp_path / "formats.png"
    assert cli.main(["formats", "--plot", str(path), *names]) == 0
    pixels = image.imread(path)[..., :3].reshape(-1, 3)
    drawn = formats_plot.colours(names or list(formats_plot.DRAWN)).values()
    for colour in drawn:
        wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert (np.abs(pixels - wanted).max(1) < 0.02).sum() > 100


def test_check_prints_a_certificate(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["formats", "check", "float4_e2m1fn"]) == 0
    assert capsys.readouterr().out.startswith("float4_e2m1fn conforms")


def test_check_shows_the_counterexample(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(*_: object, **__: object) -> None:
        raise conformance.ConformanceError("1.0 becomes 2.0")

    monkeypatch.setattr(conformance, "check", fails)
    assert cli.main(["formats", "check", "float4_e2m1fn"]) == 1
    assert capsys.readouterr().err == "lpsim: 1.0 becomes 2.0\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["float8_e4m"], "did you mean"),
        (["check"], "one format"),
        (["check", "nf4", "posit8"], "one format"),
        (["nf4", "--exhaustive"], "goes with check"),
        (["check", "mxfp6_e3m2", "--exhaustive"], "walk its element"),
        (["--plot", "formats.txt"], "txt"),
        (["--plot", "nowhere/formats.png"], "nowhere"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["formats", *words]) == 2
    assert message in capsys.readouterr().err
