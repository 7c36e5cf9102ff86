"""The tests marked gpu, a row each: bits equal to the oracle, LMD, accumulators, storage, conformance."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from experiments.bench.gpu.machine import REPOSITORY, Machine, Record

FEW = (  # what the twin runs, a second
    "tests/quantization/test_gpu.py::test_out_and_in_place",
    "tests/lmd/test_gpu.py::test_words_are_those_of_the_other_backends",
)
NEEDED = ("pytest", "numba")


class _Reporter:
    """A pytest plugin that records every result."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self._put(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.outcome == "failed":
            self._put(report)

    def _put(self, report: Any) -> None:
        row = {"test": report.nodeid, "outcome": report.outcome, "time_s": round(getattr(report, "duration", 0.0), 2)}
        self._record(row | ({"error": str(report.longrepr)[-4000:]} if report.outcome == "failed" else {}))


def run(machine: Machine, record: Record) -> None:
    """Raises ImportError where pytest or numba is not installed, FileNotFoundError where the tests are not there."""
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        raise ImportError(f"the claims are tests, which need {' and '.join(absent)}: pip install {' '.join(absent)}")
    if not (REPOSITORY / "tests").is_dir():
        raise FileNotFoundError(f"no tests in {REPOSITORY}: run it from a checkout")
    import pytest

    os.chdir(REPOSITORY)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # what else is installed there would only warn
    code = int(pytest.main(_arguments(machine), plugins=[_Reporter(record)]))
    if code not in (0, 1):  # 1: tests failed, which their rows say
        raise RuntimeError(f"pytest ended with code {code}; the log says why")


def _arguments(machine: Machine) -> list[str]:
    arguments = ["-m", "gpu", "-p", "no:cacheprovider", "-q", "--tb=short", "--rootdir", str(REPOSITORY)]
    arguments += ["--continue-on-collection-errors", "-W", "default"]  # other versions warn of other things
    if machine.small:
        return [*arguments, *FEW]
    if importlib.util.find_spec("xdist") is not None:
        arguments += ["-p", "xdist.plugin", "--numprocesses", str(machine.processes), "--dist", "worksteal"]
    return [*arguments, *files()]


def files() -> list[str]:
    """Those that have such tests, from the repository on; others need packages that a GPU's machine may not have."""
    found = sorted((REPOSITORY / "tests").rglob("test_*.py"))
    return [str(file.relative_to(REPOSITORY)) for file in found if "pytest.mark.gpu" in file.read_text()]
