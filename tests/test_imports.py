"""Who imports whom, asked of fresh interpreters."""

import subprocess
import sys

import pytest

LAWS = {
    "lpsim": {"numba", "triton", "mx", "qtorch", "torchao", "gfloat", "ml_dtypes", "lmd", "experiments", "analysis"},
    "lmd": {"numba", "triton", "lpsim", "experiments", "analysis"},
    "analysis": {"torch", "numba", "triton", "lpsim", "lmd", "experiments"},
}


def loaded_by(statement: str, names: set[str]) -> set[str]:
    """Which of the packages a statement loads in a fresh interpreter."""
    code = f"import sys\n{statement}\nprint(*[n for n in {sorted(names)!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("package", LAWS)
def test_a_package_loads_nothing_it_must_not(package: str) -> None:
    modules = f"import pkgutil, importlib, {package}\n"
    if package == "analysis":  # all of it must do without torch
        modules += f"[importlib.import_module('{package}.' + m.name) for m in pkgutil.iter_modules({package}.__path__)]"
    assert loaded_by(modules, LAWS[package]) == set()


@pytest.mark.parametrize("package", LAWS)
def test_the_test_sees_a_forbidden_import(package: str) -> None:
    forbidden = sorted(LAWS[package] & {"numba", "torch"})[0]
    assert loaded_by(f"import {package}, {forbidden}", LAWS[package]) >= {forbidden}


def test_no_module_of_lpsim_or_lmd_names_the_other() -> None:
    every = """
import importlib, pkgutil, {0}
for module in pkgutil.walk_packages({0}.__path__, "{0}."):
    if not module.name.startswith(("lpsim.adapters.", "lpsim.gpu")):  # their libraries are optional
        importlib.import_module(module.name)
"""
    assert loaded_by(every.format("lpsim"), {"lmd", "experiments", "analysis"}) == set()
    assert loaded_by(every.format("lmd"), {"lpsim", "experiments", "analysis"}) == set()
