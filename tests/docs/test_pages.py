"""Every Python block of README.md, lmd/README.md and docs/ runs; the blocks of one page share their names.

The pages use names that a reader has of his own (`model`, `batches`, ...); `own` gives them. The working folder
is empty but for `runs/quickstart`, a grid with made-up numbers.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser
from torch import nn

from lpsim import formats
from tests.analysis import run_folders

REPOSITORY = Path(__file__).parent.parent.parent
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "lmd" / "README.md",
    REPOSITORY / "ARCHITECTURE.md",
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
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
    for example in examples:
        example.evaluate()
