"""`lpsim bench gpu`: its twin on a CPU takes the same path; what fails, dies or hangs in one part stays there."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from experiments.bench.gpu import PARTS, claims, machine, operands, report
from experiments.bench.gpu.machine import Machine, Record
from experiments.bench.gpu.parts import Outcome, Part, run_part
from experiments.command import cli
from tests.experiments.experiment_jobs import REPOSITORY, environment


def test_every_part_runs_in_the_twin(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    file = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "experiments.command.cli", "bench", "gpu"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--small", "--output", str(file)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment(),
    )
    found = json.loads(file.read_text())
    log = file.with_suffix(".log").read_text()
    assert found["device"]["torch"] == torch.__version__ and found["small"]
    assert [(part["name"], part["status"]) for part in found["parts"]] == [(part.name, "done") for part in PARTS], log
    assert all(part["rows"] for part in found["parts"])
    broken = [row for part in found["parts"] for row in part["rows"] if "error" in row]
    assert {row["by"] for row in broken} == {"torch.mm, float32 out"}, "which CPUs have not"
    rows = {part["name"]: part["rows"] for part in found["parts"]}
    assert all(row["outcome"] == "passed" for row in rows["claims"])
    assert all(row["escaped"] == [] for row in rows["step"][1:])
    assert done.returncode == 1 and "step: done" in done.stdout, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_in_one_line_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        ([], "needs a GPU that torch can use, and torch .* finds none"),
        (["--device", "cpu"], "goes with --small"),
        (["quantise"], "no part quantise; there are: silicon, quantize"),
    ):
        assert cli.main(["bench", "gpu", *arguments, "--output", str(tmp_path / "gpu.json")]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and re.search(message, said), said
    assert list(tmp_path.iterdir()) == []


def test_the_claims_need_no_package_beside_torch_triton_numba_and_pytest() -> None:
    """All that the project installs otherwise is hidden from the import system, and every claim is still found."""
    pytest.importorskip("triton")
    code = """
import os, sys
from importlib.machinery import PathFinder
import re, pytest
names = {re.split(r"[^A-Za-z0-9_-]", line)[0].lower().replace("-", "_") for line in sys.argv[1:]}
names |= {"sklearn", "vl_convert", "axe_playwright_python"}
names -= {"torch", "numpy", "numba", "pytest", "triton"}
find = PathFinder.find_spec.__func__
hidden = lambda cls, name, *rest: None if name.partition(".")[0] in names else find(cls, name, *rest)
PathFinder.find_spec = classmethod(hidden)
from experiments.bench.gpu import claims
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
arguments = ["-m", "gpu", "-p", "no:cacheprovider", "--collect-only", "-q", "-q", "-W", "default"]
sys.exit(pytest.main([*arguments, *claims.files()]))
"""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    packages = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    done = subprocess.run(
        [sys.executable, "-c", code, *packages], capture_output=True, text=True, cwd=REPOSITORY, env=environment()
    )
    found = {line.partition(":")[0] for line in done.stdout.splitlines() if line.startswith("tests/")}
    assert done.returncode == 0 and found == set(claims.files()), done.stdout[-3000:]


def test_what_is_missing_is_told_in_one_line() -> None:
    row = {"available": True, "torch": "2.11", "triton": True, "versions": {}, "kernel_error": None}
    assert machine.missing([row], "") is None, "a Triton for AMD has another package's name"
    for change, message in (
        ({"available": False}, "needs a GPU"),
        ({"triton": False}, "needs Triton"),
        ({"kernel_error": "RuntimeError: no gcc"}, "Triton cannot run a kernel here .*: RuntimeError: no gcc"),
    ):
        assert re.match(message, machine.missing([row | change], "") or "")
    assert (
        machine.missing([], "Traceback\nRuntimeError: no driver")
        == "the device could not be asked: RuntimeError: no driver"
    )


def test_the_claims_have_the_time_that_the_other_parts_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = {"available": True, "torch": "2.11", "triton": True, "kernel_error": None}
    given = {}

    def run_part(part: Part, *_: object) -> Outcome:
        given[part.name] = part.budget_s
        rows = [described] if part.name == "device" else []
        return Outcome(part.name, part.budget_s, "done", {"step": 50.5, "quantize": 100.0}.get(part.name, 0.0), rows)

    monkeypatch.setattr("experiments.bench.gpu.run_part", run_part)
    output = ["--output", str(tmp_path / "gpu.json")]
    assert cli.main(["bench", "gpu", *output]) == 0
    others = sum(part.budget_s for part in PARTS[:-1])
    assert list(given)[-1] == "claims" and given["claims"] == PARTS[-1].budget_s + (others - 150.5) // 1
    assert cli.main(["bench", "gpu", "claims", *output]) == 0 and given["claims"] == PARTS[-1].budget_s + others


def raises(machine: Machine, record: Record) -> None:
    record({"arm": "before"})
    raise MemoryError("no memory left on the device")


def dies(machine: Machine, record: Record) -> None:
    record({"arm": "before"})
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(machine: Machine, record: Record) -> None:
    record({"arm": "before"})
    signal.pause()


@pytest.mark.parametrize(
    ("function", "status", "error"),
    [
        (raises, "failed", "MemoryError: no memory left on the device"),
        (dies, "failed", "the process ended with code -9; a negative one is a signal"),
        (hangs, "out of time", None),
    ],
)
def test_what_becomes_of_a_part_that_does_not_end(function, status, error, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Its rows are kept, and its end is told."""
    outcome = run_part(Part("part", "a part", function, 0.5), "cpu", False, tmp_path / "log")
    assert outcome.status == status and outcome.rows == [{"arm": "before"}]
    assert outcome.error is None if error is None else str(outcome.error).strip().endswith(error)


def test_where_two_results_differ_bit_by_bit() -> None:
    silicon = pytest.importorskip("experiments.bench.gpu.silicon", exc_type=ImportError)
    expected = torch.tensor([[1.0, math.nan, 0.0, -1.0, math.inf, 2.0]])
    result = torch.tensor([[1.0, -math.nan, -0.0, -1.0 - 2.0**-22, 3.0, 2.0]])
    found = silicon.difference(expected, result)
    assert (found["of"], found["differ"], found["only_in_sign_of_zero"], found["largest_steps"]) == (6, 3, 1, 2)
    assert found["first"][1] == {"at": [0, 3], "preset": (-1.0).hex(), "silicon": (-1.0 - 2.0**-22).hex()}
    narrow = silicon.difference(expected.half(), torch.nextafter(expected.half(), torch.tensor(9.0).half()))
    assert narrow["result"] == "float16" and narrow["largest_steps"] == 1


def test_silicon_is_asked_for_what_the_device_and_torch_multiply() -> None:
    """torch refuses two float8_e5m2 (ScaledBlas.cpp), and before capability 8.9 there is no float8."""
    silicon = pytest.importorskip("experiments.bench.gpu.silicon", exc_type=ImportError)
    halves, eighths = (torch.float16,) * 2, (torch.float8_e4m3fn, torch.float8_e5m2)
    for maker, capability, has in (("nvidia", (8, 0), False), ("nvidia", (9, 0), True), ("amd", (9, 4), False)):
        device = silicon.Silicon(maker, capability)
        assert device.lacks(halves) is None and (device.lacks(eighths) is None) == has
    assert {name.split(",")[0] for name in silicon.ways(eighths)} == {"torch._scaled_mm", "tl.dot"}
    assert list(silicon.ways((torch.float8_e5m2,) * 2)) == ["tl.dot, 64 rows"]
    why = {"operands": "float8_e5m2", "not_asked": "no float8"}
    outcomes = [Outcome("device", 1.0, "done", 0.1, [{"name": "one", "torch": "2"}]), Outcome("silicon", 1, rows=[why])]
    assert "not asked" in report.text(outcomes, small=False) and "no float8" in report.text(outcomes, small=False)


def test_operands_are_what_they_are_called() -> None:
    types = torch.float8_e4m3fn, torch.float8_e5m2
    made = {name: (a.double(), b.double()) for name, a, b in operands.cases(types, 16, 32)}
    for name, (a, b) in made.items():
        assert a.shape == (16, 32) and b.shape == (32, 16)
        assert bool(a.isfinite().all() and b.isfinite().all()) == (name != "with Inf and NaN")
    a, b = made["one and small"]
    products = a[5, :, None] * b[:, :]
    assert products[0].eq(1).all() and products[1:].eq(2.0**-5 * b[1]).all()
    a, b = made["cancelling"]
    assert ((a[:, :-2:2] * b[:-2:2, 0]) + (a[:, 1:-2:2] * b[1:-2:2, 0])).eq(0).all()
    a, _ = made["subnormal"]
    assert a.abs().lt(2.0**-6).double().mean() > 0.9


def test_the_report_says_whether_what_was_wanted_is_reached() -> None:
    step = Outcome("step", 1.0, "done", 0.5, [{"arm": "mxfp6_e3m2 forward", "over_plain": 1.3}])
    optimizer = Outcome("optimizer", 1.0, "done", 0.5, [{"arm": "LMD", "over_fused_adamw": 1.5}])
    assert [(row["largest"], row["reached"]) for row in report.wanted([step, optimizer])] == [(1.3, False), (1.5, True)]
    device = Outcome("device", 1.0, "done", 0.1, [{"name": "one", "torch": "2"}])
    lines = report.text([device, step, optimizer], small=False).splitlines()
    assert lines[0] == "name one, torch 2" and lines[-1].split()[-1] == "yes" and lines[-2].split()[-1] == "NO"


@pytest.mark.full
def test_the_product_that_silicon_is_asked_by_is_the_instruction_that_the_presets_are_of() -> None:
    """Compiled for an H100 in a fresh interpreter without TRITON_INTERPRET."""
    pytest.importorskip("triton")
    code = """
import torch, triton
from triton.runtime import driver
from experiments.bench.gpu import silicon
from tests.quantization.compile_kernels import TARGETS, Nowhere
driver.set_active(Nowhere(TARGETS["sm_90"]))
launch, compiled = triton.JITFunction.run, []
def compile_only(kernel, *arguments, grid, warmup, **options):
    compiled.append(launch(kernel, *arguments, grid=grid, warmup=True, **options))
triton.JITFunction.run = compile_only
for types in silicon.PRESETS:
    a, b = (torch.zeros(128, 64).to(dtype) for dtype in types)
    for name, product in silicon.ways(types).items():
        if name.startswith("tl.dot"):
            product(a, b.T)
            lines = compiled[-1].asm["ptx"].splitlines()
            print(name, next(line.split()[0] for line in lines if "mma" in line and "f32" in line))
"""
    clean = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, env=clean)
    found = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    assert [where for where, _ in found].count("tl.dot, 64 rows") == 6, done.stderr
    for where, instruction in found:
        assert instruction.startswith("wgmma.mma_async" if where == "tl.dot, 64 rows" else "mma.sync.aligned.m16n8k16")
