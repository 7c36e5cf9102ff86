"""The `lpsim` command: what it prints, and that a mistake is one message and an exit code."""

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.command import bench, cli
from lpsim import formats
from tests.experiments import experiment_jobs

GRID = """
from tests.experiments.experiment_jobs import tiny_config
def grid():
    yield tiny_config(steps=4, warmup_steps=1)
    yield tiny_config(steps=4, warmup_steps=1, seed=1, device={device!r})
"""


def command(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "experiments.command.cli", *arguments],
        env=experiment_jobs.environment() | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_formats_lists_every_format_with_its_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["formats"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert " ".join(header.split()) == "name bits max min normal min subnormal decades codes specials"
    assert [row.split()[0] for row in rows] == list(formats.ALL_FORMATS)
    cells = {row.split()[0]: row.split()[1:] for row in rows}
    assert cells["float8_e4m3fn"] == ["8", "448", "0.01562", "0.001953", "5.4", "256", "NaN"]
    assert cells["float8_e5m2"][-2:] == ["Inf,", "NaN"]
    assert cells["mxfp6_e3m2"][0] == "6.25" and cells["mxfp6_e3m2"][5] == "64"
    assert float(cells["mxfp4_e2m1"][4]) == pytest.approx(math.log10(6 * 2**127 / (0.5 * 2**-127)), abs=0.05)


def test_run_then_report_then_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "small.py").write_text(GRID.format(device="abacus"))
    run = ["run", str(tmp_path / "small.py"), "--runs", str(tmp_path / "runs"), "--jobs", "1"]
    first = command(*run)
    assert first.returncode == 1  # one run failed, the other did not
    assert "2 runs: 1 finished, 1 failed (2 of them run now)" in first.stdout
    assert "failed: adamw lr 0.01, float32, gpt2-tiny, seed 1" in first.stdout and "abacus" in first.stdout
    assert "Traceback" not in first.stdout + first.stderr
    text = (tmp_path / "small.py").read_text()
    described = json.loads((tmp_path / "runs" / "small" / "grid.json").read_text())
    assert described["source_text"] == text and described["argv"] == ["lpsim", *run]
    (tmp_path / "small.py").write_text(text.replace("yield tiny_config(steps=4, warmup_steps=1, seed=1", "#"))
    assert cli.main([*run, "--report"]) == 0
    output = capsys.readouterr().out
    assert "1 runs: 1 finished (0 of them run now)" in output
    report = Path(output.splitlines()[-1])
    assert report.suffix == ".html" and report.read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "no_such_grid"], "no grid file 'no_such_grid'; shipped grids: "),
        (["run", "quickstart", "--jobs", "0"], "jobs must be at least 1, is 0"),
        (["run", "quickstart", "--executor", "slurm"], "not on PATH: the slurm executor must run where jobs can be"),
        (
            ["run", "quickstart", "--executor", "dask", "--gpus", "0"],
            "--gpus goes with --executor local",
        ),
        (["run", "quickstart", "--runs-per-job", "9"], "--runs-per-job goes with --executor slurm, not with local"),
        (
            ["run", "quickstart", "--gpus", "0", "--processes-per-run", "2"],
            "--gpus 0: there are not 2",
        ),
        (["run", "quickstart", "--twin"], "quickstart.py: grid() has no small twin"),
        (["report", "nowhere/grid"], "nowhere/grid holds no grid (no grid.json); there are: none near it"),
        (["bench", "quantise"], "no benchmark 'quantise'; there are: "),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1
    assert output.err.startswith("lpsim: ") and message in output.err


def test_a_syntax_error_in_a_grid_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "g.py").write_text("def grid():\n    yield Config(\n")
    assert cli.main(["run", str(tmp_path / "g.py")]) == 2
    assert capsys.readouterr().err.startswith(f"lpsim: {tmp_path}/g.py:2: SyntaxError: ")


def test_an_unwritable_runs_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "g.py").write_text(GRID.format(device="cpu"))
    assert cli.main(["run", str(tmp_path / "g.py"), "--runs", str(tmp_path / "file")]) == 2
    assert f"cannot write {tmp_path}/file/g/.lock: " in capsys.readouterr().err


def test_a_wrong_command_shows_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["fly"])
    assert caught.value.code == 2
    assert "usage: lpsim" in capsys.readouterr().err


def test_a_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as output:
        done = subprocess.run(
            [sys.executable, "-m", "experiments.command.cli", "formats"],
            env=experiment_jobs.environment(),
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.stderr == "" and done.returncode == 0


def test_help_imports_no_torch() -> None:
    code = (
        "import sys, experiments.command.cli as c\ntry: c.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=experiment_jobs.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "formats" in done.stdout and "report" in done.stdout


def test_dask_missing_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "dask.distributed", None)
    assert cli.main(["run", "quickstart", "--executor", "dask", "--runs", str(tmp_path)]) == 2
    assert "pip install distributed" in capsys.readouterr().err


def test_bench_without_a_name_runs_every_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    for name in bench.benchmarks():
        module = importlib.import_module(f"experiments.bench.{name}")
        monkeypatch.setattr(module, "run", lambda options, name=name: ran.append(name))
    assert cli.main(["bench"]) == 0
    assert ran == ["accumulator", "audit", "optimizer", "quantize", "start", "step"]


@pytest.mark.parametrize("arguments", [["bench", "--help"], ["bench", "step", "--help"]])
def test_bench_has_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    assert "usage: lpsim bench" in capsys.readouterr().out
