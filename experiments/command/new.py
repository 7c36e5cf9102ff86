"""`lpsim new NAME`: a grid file to start from."""

import argparse
from pathlib import Path
from typing import Any

from experiments.command.shared import UserError

TEMPLATE = '''"""Write here, in a sentence, what this grid asks: the report begins with it.

Run it: lpsim run {file} --report. The same command again resumes it; --dry-run says what there is to do.
"""

from experiments.config import Config, forward, model
from experiments.grids.product import product
from experiments.training.data import StdlibText
from experiments.training.optimizers import AdamW, LMDForModel


def grid() -> list[Config]:
    base = Config(
        model("gpt2-micro"),
        StdlibText(),
        LMDForModel(),
        steps=400,  # a minute of gpt2-micro is some 1500 of them, on one core
        warmup_steps=40,
        batch_size=16,
    )
    # The first axis is the outermost loop: a grid that is stopped early has whole seeds. Every arm has the same seeds,
    # so that the report can pair them; three or more give useful intervals.
    return product(
        base,
        seed=range(3),
        # AdamW's rate is to be tuned in each format before results are believed: lpsim tune
        optimizer=[AdamW(lr=0.006), LMDForModel()],
        # float32 is what the report compares the other formats with
        recipe=[forward("float32"), forward("mxfp6_e3m2"), forward("mxfp4_e2m1")],
    )
'''


def write(name: str) -> Path:
    """Write NAME.py into the working directory, or where NAME's path says.

    Raises: FileExistsError where there is one; ValueError for a name that a grid cannot have.
    """
    file = Path(name if name.endswith(".py") else f"{name}.py")
    if not file.stem.isidentifier():
        raise ValueError(f"{file.stem!r} is no name for a grid file; take letters, digits and underscores: my_grid")
    with file.open("x") as out:
        out.write(TEMPLATE.format(file=file))
    return file


def add(commands: Any) -> None:
    parser = commands.add_parser("new", help="write a grid file to start from")
    parser.add_argument("name", metavar="NAME", help="of the grid: NAME.py is written, never over another file")
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> int:
    try:
        file = write(options.name)
    except FileExistsError as error:
        raise UserError(f"{error.filename} exists; give the grid another name") from error
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    print(f"{file}: lpsim run {file} --report")
    return 0
