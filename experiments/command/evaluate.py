"""`lpsim evaluate`: a trained model's loss under each format, without training it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.command.shared import add_define, chosen_formats, user_errors

if TYPE_CHECKING:
    from experiments.training.evaluate import Subject


def add(commands: Any) -> None:
    parser = commands.add_parser("evaluate", help="a trained model's loss and accuracy under each format")
    parser.add_argument(
        "model", metavar="MODEL", help="a run's folder, a folder of transformers' save_pretrained, or FILE.py:NAME"
    )
    parser.add_argument("--formats", nargs="+", required=True, metavar="NAME")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="of a save_pretrained folder: text, tokens (.npy) or images (.npz)"
    )
    parser.add_argument("--by-site", action="store_true", help="also the SQNR of every operand at every site")
    add_define(parser)
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> int:
    from experiments.training import evaluate

    with user_errors():
        formats = chosen_formats(options) or []
        subject = load(options.model, options.data)
        print(evaluate.evaluate(subject, formats).to_string(index=False, float_format=lambda value: f"{value:.5g}"))
        if options.by_site:
            print(evaluate.by_site(subject, formats).to_string(index=False, float_format=lambda value: f"{value:.2f}"))
    return 0


def load(model: str, data: Path | None) -> Subject:
    """What MODEL names. Raises ValueError, SourceError or RunFolderError."""
    from experiments.grids.source_files import SourceError, blamed, execute
    from experiments.training import evaluate

    file, _, name = model.rpartition(":")
    if file.endswith(".py") or model.endswith(".py"):
        path = Path(file or model)
        if not (file and name):
            raise SourceError(f"{model}: say which function: {model}:NAME")
        if not path.is_file():
            raise SourceError(f"{path}: no such Python file")
        with blamed(path):
            return evaluate.Subject(*getattr(execute(path, f"evaluate_{path.stem}"), name)())
    folder = Path(model)
    if (folder / "checkpoint.pt").exists() or (folder / "env.json").exists():
        return evaluate.from_run(folder)
    if (folder / "config.json").exists():
        return evaluate.from_pretrained(folder, data)
    raise ValueError(
        f"{model}: neither a run (no checkpoint.pt) nor a model of transformers (no config.json) nor FILE.py:NAME"
    )
