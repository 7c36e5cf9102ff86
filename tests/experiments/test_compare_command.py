"""`lpsim formats compare`: where its tensors come from, its drawing, and what is told about a mistake."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from experiments.command import cli, compare
from lpsim import BlockFormat, Key, Quantizer, Rounding, ScaleRule, formats
from lpsim.compare import compare as compare_formats

DEFINED = 'from lpsim import FloatFormat\nmine = FloatFormat("compared5", 2, 2)\n'


def test_a_file_s_tensors_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"a": torch.randn(4, 64), "ids": torch.arange(4)}, file := tmp_path / "w.safetensors")
    (tmp_path / "f.py").write_text(DEFINED)
    options = ["--tensors", str(file), "--define", str(tmp_path / "f.py")]
    assert cli.main(["formats", "compare", "mxfp4_e2m1", "compared5", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["mxfp4_e2m1", "a"], ["compared5", "a"]]
    save_file({"layer.w": torch.tensor([1.0, torch.nan])}, file)
    assert cli.main(["formats", "compare", "mxfp4_e2m1", "--tensors", str(file)]) == 2
    assert "layer.w holds NaN or Inf" in capsys.readouterr().err


@pytest.mark.parametrize("distribution", compare.DISTRIBUTIONS)
def test_samples_repeat(distribution: str) -> None:
    x = compare.sample(distribution)
    assert torch.equal(x, compare.sample(distribution)) and not torch.equal(x, compare.sample(distribution, seed=1))
    assert abs(float((x > 0).double().mean()) - 0.5) < 6 * 0.5 / x.numel() ** 0.5


# ------------------------------------------------------------------------------------------- published figures


def qsnr_db(distribution: str, *chosen: formats.Format) -> list[float]:
    x = compare.sample(distribution, shape=(1024, 1024))
    return list(compare_formats(chosen, {distribution: x})["qsnr_db"])


def mx4_with(**fields: int) -> BlockFormat:
    return dataclasses.replace(formats.mx4, name=f"mx4 with {fields}", **fields)


@pytest.mark.parametrize(
    ("better", "worse", "db"),
    [
        (formats.mx9, formats.msfp16, 3.6),
        (mx4_with(microexponent_bits=2), formats.mx4, 0.5),
        (formats.mx4, mx4_with(sub_block_size=8), 2.0),
        (mx4_with(sub_block_size=1), formats.mx4, 0.7),
    ],
)
def test_differences_that_the_paper_of_mx9_states(better: BlockFormat, worse: BlockFormat, db: float) -> None:
    """arXiv:2302.08007, section IV: normal numbers with variable variance. The last three are said of the design; MX4
    is the format that they fit.
    """
    high, low = qsnr_db("normal-variable-variance", better, worse)
    assert high - low == pytest.approx(db, abs=0.3)


def rows_of(element: formats.FloatFormat) -> BlockFormat:
    return BlockFormat(f"{element.name} by rows", element, formats.float32, 0, ScaleRule.ROUND)


def test_mx6_lies_between_both_fp8_and_mx9_above() -> None:
    """arXiv:2302.08007, section IV, which has MX9 "about 16 dB" above E4M3. See docs/howto/compare_formats.md."""
    fp8 = rows_of(formats.float8_e5m2), rows_of(formats.float8_e4m3fn)
    e5m2, e4m3, mx6, mx9 = qsnr_db("normal-variable-variance", *fp8, formats.mx6, formats.mx9)
    assert e5m2 < mx6 < e4m3
    assert mx9 - e4m3 == pytest.approx(16, abs=1)


def test_fp8_with_scales_of_rows_before_is_16_db_below_mx9() -> None:
    """The same, where FP8's scale is that of the 16 rows before, and errors are averaged relative to each row."""
    x = compare.sample("normal-variable-variance", shape=(4096, 1024))
    largest = x.abs().amax(1)
    delayed = torch.stack([largest[max(i - 16, 0) : max(i, 1)].max() for i in range(len(x))])[:, None] / 448
    e4m3 = Quantizer(formats.float8_e4m3fn)(x / delayed) * delayed
    errors = [((q - x) ** 2).sum(1) / (x**2).sum(1) for q in (e4m3, Quantizer(formats.mx9)(x))]
    assert 10 * math.log10(errors[0].mean() / errors[1].mean()) == pytest.approx(16, abs=0.3)


@pytest.mark.parametrize(
    ("fmt", "db"),
    [
        (formats.mxfp4_e2m1, -10 * math.log10(1.37e-2)),  # Castro et al. 2025 (Quartet), arXiv:2505.14669, table 2
        (formats.mxfp8_e4m3, 31.50),  # Chen et al. 2025, arXiv:2510.25602, figure 4: the mean over an LLM's tensors
    ],
)
def test_qsnr_of_mxfp_as_published(fmt: BlockFormat, db: float) -> None:
    """Both papers round the scale up. By the second's theorem 2, E4M3's QSNR depends little on the data."""
    rounded_up = dataclasses.replace(fmt, name="up", scale_rule=ScaleRule.RCEIL)
    assert qsnr_db("normal", rounded_up) == [pytest.approx(db, abs=0.3)]


def test_the_error_of_stochastic_mxfp4_as_published() -> None:
    """arXiv:2505.14669, table 2: 2.77e-2 on normal numbers."""
    x = compare.sample("normal", shape=(1024, 1024))
    fmt = dataclasses.replace(formats.mxfp4_e2m1, name="up", scale_rule=ScaleRule.RCEIL)
    error = ((Quantizer(fmt, Rounding.STOCHASTIC)(x, key=Key(0)) - x) ** 2).mean()
    assert 10 * math.log10(error / 2.77e-2) == pytest.approx(0, abs=0.3)


def test_it_is_drawn(tmp_path: Path) -> None:
    path = tmp_path / "front.svg"
    names = ["mxfp8_e4m3", "mxfp4_e2m1", "float32", "int8_q6"]
    assert cli.main(["formats", "compare", *names, "--plot", str(path)]) == 0
    assert path.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare"], "takes the names of formats"),
        (["compare", "mxfp4"], "did you mean"),
        (["compare", "nf4", "--exhaustive"], "goes with check"),
        (["nf4", "--distribution", "normal"], "go with compare"),
        (["compare", "nf4", "--run", "nowhere"], "holds no checkpoint.pt"),
        (["compare", "nf4", "--tensors", "nowhere.safetensors"], "nowhere.safetensors"),
        (["compare", "nf4", "--plot", "nowhere/x.png"], "nowhere"),
    ],
)
def test_mistakes_are_told(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["formats", *words]) == 2
    assert message in capsys.readouterr().err
