"""`lpsim attribute`: which rounding costs what in a trained model, as a table, a heat map, and for the report."""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.command.evaluate import add_model, is_run, load
from experiments.command.shared import UserError, add_define, define, user_errors

if TYPE_CHECKING:  # they take seconds to import
    import pandas as pd

    from lpsim import Recipe

FILE = "attribution.parquet"  # in a run's folder
KEY = ["recipe", "by", "part", "rounded"]  # which row of it is which


def add(commands: Any) -> None:
    parser = commands.add_parser("attribute", help="which rounding costs what in a trained model")
    add_model(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--format", metavar="NAME", help="round both operands of every forward product to this format")
    what.add_argument("--recipe", metavar="NAME", help="round as a published recipe does (lpsim.named_recipes)")
    parser.add_argument(
        "--by", nargs="+", metavar="KIND", help="the parts: class, role, site, site-role (default: all four)"
    )
    parser.add_argument("--but-one", action="store_true", help="also everything but one part")
    parser.add_argument(
        "--backward",
        action="store_true",
        help="also the backward pass, with --format in all its products: the error of the gradients",
    )
    parser.add_argument(
        "--sites",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="round at these sites alone; nothing is kept for reports",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw sites by roles (.png, .svg, .pdf)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table (.csv or .parquet)")
    add_define(parser)
    parser.set_defaults(function=run)


def run(options: argparse.Namespace) -> int:
    """Print the tables; keep them in a run's folder, for the report of its grid. Raises UserError."""
    if options.output is not None and options.output.suffix not in (".csv", ".parquet"):
        raise UserError(f"{options.output}: a table is written as .csv or .parquet")
    if options.plot is not None and options.by is not None and "site-role" not in options.by:
        raise UserError("--plot draws sites by roles: leave out --by, or add site-role to it")
    define(options.define)
    from lpsim.attribution import BY, attribute

    with user_errors():
        name, recipe = _recipe(options)
        subject = load(options.model, options.data)
        frame = attribute(
            subject.module,
            subject.batches,
            subject.loss,
            recipe,
            by=options.by or BY,
            but_one=options.but_one,
            backward=options.backward,
            sites=options.sites,
        )
    frame.insert(0, "recipe", name)
    print(text(frame))
    folder = Path(options.model)
    try:
        if options.plot is not None:
            from analysis.figures.attribution import save

            print(save(frame, options.plot), options.plot, sep="\n")
        if options.output is not None:
            options.output.write_bytes(_bytes(frame, options.output.suffix))
            print(options.output)
    except (OSError, ValueError) as error:  # matplotlib raises ValueError for an unknown kind of file
        raise UserError(str(error)) from error
    if not options.sites and is_run(folder):
        with user_errors():
            print(keep(frame, folder))
    return 0


def _recipe(options: argparse.Namespace) -> tuple[str, Recipe]:
    """The machine and its name. Raises ValueError."""
    from experiments.training.config import all_products, forward
    from lpsim import named_recipes

    if options.recipe is not None:
        return options.recipe, named_recipes.get(options.recipe).recipe
    config = (all_products if options.backward else forward)(options.format)
    return config.name, config.build()


def text(frame: pd.DataFrame) -> str:
    """The rows of each kind of part, the costliest first, and how far they are from adding up."""
    import pandas as pd

    from lpsim.attribution import interactions

    ends = frame[frame["by"] == "-"].set_index("rounded")
    head = (
        f"loss {ends.loc['nothing', 'loss']:.5g} as it is, {ends.loc['all', 'loss']:.5g} in {frame['recipe'].iloc[0]}"
    )
    blocks = [f"{head}: {ends.loc['all', 'change']:+.5g}; logits' SQNR {ends.loc['all', 'logits_sqnr_db']:.2f} dB"]
    gradients = [name for name in ("gradient_sqnr_db", "gradient_cosine") if name in frame]
    for by, group in frame[frame["by"] != "-"].groupby("by", sort=False):
        only = group[group["rounded"] == "only"].set_index("part")
        columns = {"roundings": only["roundings"], "change": only["change"].map("{:+.5f}".format)}
        for name in ("logits_sqnr_db", *gradients):
            columns[name] = only[name].map(("{:.5f}" if name == "gradient_cosine" else "{:.2f}").format)
        absent = group[group["rounded"] == "all but"].set_index("part")
        if len(absent):
            columns["less in its absence"] = absent["change"].map("{:+.5f}".format)
        order = only["change"].sort_values(ascending=False, kind="stable").index
        blocks.append(pd.DataFrame(columns).loc[order].rename_axis(by).reset_index().to_string(index=False))
    together = interactions(frame)
    if len(together):
        blocks.append(
            "do the parts add up?\n" + together.to_string(index=False, float_format="{:.4g}".format, na_rep="-")
        )
    return "\n\n".join(blocks)


def keep(frame: pd.DataFrame, folder: Path) -> Path:
    """Put the rows into the run's table, in place of the same parts' earlier ones; returns its path.

    Earlier rows of another checkpoint, which show by the loss of "nothing", and of a recipe whose definition has
    changed, which shows by that of "all", are dropped. Raises RunFolderError, and ValueError for a damaged table.
    """
    import pandas as pd

    from experiments.training.record import write_atomically

    path = folder / FILE
    if path.exists():
        try:
            before = pd.read_parquet(path)
            losses = before[before["by"] == "-"].set_index(["recipe", "rounded"])["loss"]
            now = frame[frame["by"] == "-"].set_index("rounded")["loss"]
            name = frame["recipe"].iloc[0]
            kept = [
                each
                for each in before["recipe"].unique()
                if losses[each, "nothing"] == now["nothing"] and (each != name or losses[each, "all"] == now["all"])
            ]
        except (OSError, ValueError, KeyError) as error:  # pyarrow's are ValueErrors
            raise ValueError(f"{path} cannot be read ({error}); delete it to write a new one") from None
        old = before[before["recipe"].isin(kept)]
        frame = pd.concat([old, frame]).drop_duplicates(KEY, keep="last") if len(old) else frame
    write_atomically(path, _bytes(frame, ".parquet"))
    return path


def _bytes(frame: pd.DataFrame, suffix: str) -> bytes:
    if suffix == ".csv":
        return frame.to_csv(index=False, lineterminator="\n").encode()
    frame.to_parquet(buffer := io.BytesIO(), index=False)
    return buffer.getvalue()
