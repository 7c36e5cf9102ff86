"""Every Python block of README.md, lmd/README.md and docs/ runs; the blocks of one page share their names.

The pages use names that a reader has of his own (`model`, `batches`, ...); `own` gives them. The working folder
is empty but for `runs/quickstart`, a grid with made-up numbers. A block that begins with the name of a file runs as
that file, with no other names; a grid trains its first run for two steps.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from torch import nn

from experiments.grids import load_claims, load_grid
from experiments.grids.source_files import execute
from experiments.training.record import RunRecord
from experiments.training.train import train
from lpsim import formats
from tests.analysis import run_folders
from tests.experiments.experiment_jobs import one_thread

REPOSITORY = Path(__file__).parent.parent.parent
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "lmd" / "README.md",
    REPOSITORY / "ARCHITECTURE.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
FILE = re.compile(r"^```python\n(# (\w+\.py).*?)^```$", re.M | re.S)
NEED_RESULTS = ("compare.py",)  # what it reads, `lpsim tune` writes
SYBIL = Sybil(parsers=[PythonCodeBlockParser(), SkipParser()])


class Model(nn.Module):
    """model(x) gives predictions, model(x, y) the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(1024, 64)
        self.head = nn.Linear(64, 1024)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        predictions = self.head(self.hidden(x).relu())
        return predictions if y is None else nn.functional.mse_loss(predictions, y)


def own() -> dict[str, Any]:
    """What a page takes for granted: a model, its optimizer and its data, of the shape that README.md gives its x."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(256, 1024, generator=generator), torch.randn(256, 1024, generator=generator)
    model = Model()
    return {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "criterion": nn.functional.mse_loss,
        "x": x,
        "y": y,
        "batches": [(x, y)] * 3,
        "formats": formats,
    }


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.exists()], ids=lambda page: str(page.relative_to(REPOSITORY))
)
def test_its_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "ALL_FORMATS", dict(formats.ALL_FORMATS))
    monkeypatch.chdir(tmp_path)
    document = SYBIL.parse(page)
    document.namespace.update(own())
    examples = list(document.examples())
    if "runs/quickstart" in page.read_text():
        configs = run_folders.quickstart()
        folder = run_folders.write_grid(tmp_path / "runs" / "quickstart", configs)
        for config in configs:
            run_folders.write_run(folder, config)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])  # a block may import a file of its page
    for file, text in files(page):
        (tmp_path / file).write_text(text)
        monkeypatch.delitem(sys.modules, Path(file).stem, raising=False)  # of another test
    try:
        for example in examples:
            example.evaluate()
    finally:
        for file, _ in files(page):
            sys.modules.pop(Path(file).stem, None)


def files(page: Path) -> list[tuple[str, str]]:
    """The blocks of a page that begin with the name of a file: (name, text)."""
    return [(name, text) for text, name in FILE.findall(page.read_text())]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if files(page)], ids=lambda page: str(page.relative_to(REPOSITORY))
)
def test_its_files_run_alone(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for file, text in files(page):
        (tmp_path / file).write_text(text)
    for file, _ in files(page):
        held = vars(execute(tmp_path / file, f"page_{Path(file).stem}"))
        for name in held.keys() & {"tune", "frontier"}:
            held[name]()
        if "claims" in held:
            assert load_claims(str(tmp_path / file))
        if "grid" in held and file not in NEED_RESULTS:
            configs = load_grid(str(tmp_path / file))[1]
            first = configs[0] if isinstance(configs, list) else next(configs.rounds())[0]
            short = replace(first, steps=2, warmup_steps=1, batch_size=16)
            run = RunRecord(tmp_path / "runs" / Path(file).stem)
            run.folder.mkdir(parents=True)
            with one_thread():
                result = train(short, run)
            run.close()
            assert result is not None and result["status"] == "finished", result
