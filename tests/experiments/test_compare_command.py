"""`lpsim formats compare`: where its tensors come from, its drawing, and what is told about a mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments.command import cli, compare

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
