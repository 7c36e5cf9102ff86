"""`lpsim bench`: the benchmarks of experiments/bench."""

import argparse
import importlib
import pkgutil
from typing import Any

from experiments.command.shared import UserError

ONLY_BY_NAME = ("gpu", "size")  # the one needs a GPU, the other many minutes


def add(commands: Any) -> None:
    names = ", ".join(benchmarks())
    parser = commands.add_parser(
        "bench",
        help="a benchmark of experiments/bench; without a name, all of them but gpu and size",
        epilog=f"Benchmarks: {names}. `lpsim bench NAME --help` tells what one measures, and its options.",
    )
    parser.add_argument("name", metavar="NAME", nargs="?")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    parser.set_defaults(function=run)


def benchmarks() -> list[str]:
    """The names of the modules of experiments/bench."""
    from experiments import bench

    return [module.name for module in pkgutil.iter_modules(bench.__path__) if module.name[0] != "_"]


def run(options: argparse.Namespace) -> int:
    from experiments.training.settings import names_near

    names = benchmarks()
    if options.name is not None and options.name not in names:
        raise UserError(f"no benchmark {options.name!r}; there are: {names_near(options.name, names)}")
    failed = 0
    every = [name for name in names if name not in ONLY_BY_NAME]
    for name in every if options.name is None else [options.name]:
        module = importlib.import_module(f"experiments.bench.{name}")
        parser = argparse.ArgumentParser(prog=f"lpsim bench {name}", description=module.__doc__)
        module.add_arguments(parser)
        failed |= int(module.run(parser.parse_args(options.rest)) or 0)
    return failed
