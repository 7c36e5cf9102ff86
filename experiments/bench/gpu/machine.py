"""The device that is examined: what it is, and how calls are timed on it."""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]  # a result, in JSON values; "error" holds a traceback
Record = Callable[[Row], None]

PACKAGES = (
    "torch",
    "triton",
    "pytorch-triton",
    "triton-rocm",
    "pytorch-triton-rocm",
    "numpy",
    "numba",
    "pytest",
    "pytest-xdist",
)
REPOSITORY = Path(__file__).parents[3]


@dataclass(frozen=True)
class Machine:
    """device: "cuda", or "cpu" for the twin in Triton's interpreter. small: tiny sizes."""

    device: str
    small: bool

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"

    @property
    def processes(self) -> int:
        """How many processes may compile at once."""
        return min(len(os.sched_getaffinity(0)), 24) if self.cuda else 1

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def time_ms(self, call: Callable[[], object], calls: int = 1) -> float:
        """The time of one of `calls` calls, queued one after another, until the device has done them."""
        self.synchronize()
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        self.synchronize()
        return (time.perf_counter() - begun) * 1e3 / calls

    def on_device(self, call: Callable[[], object], calls: int) -> Callable[[], object]:
        """A function that launches `calls` calls as one CUDA graph, so that what the host needs for a call is not seen.

        On the CPU there is no graph: the function calls them.
        """
        call()
        if not self.cuda:
            return lambda: [call() for _ in range(calls)]
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
        return graph.replay

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """The most memory that tensors took on the device during a call; None on the CPU, where it is not made."""
        if not self.cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()


def describe(machine: Machine, record: Record) -> None:
    """One row: the device, its driver, versions and commit."""
    row: Row = {
        "device": machine.device,
        "available": not machine.cuda or torch.cuda.is_available(),
        "name": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "triton": importlib.util.find_spec("triton") is not None,  # its package has many names, one of them for AMD
        "versions": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "commit": _said("git", "-C", str(REPOSITORY), "rev-parse", "HEAD"),
        "changed_files": (_said("git", "-C", str(REPOSITORY), "status", "--porcelain") or "").splitlines(),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if machine.cuda and row["available"]:
        found = torch.cuda.get_device_properties(0)
        row |= {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "memory_bytes": found.total_memory,
            "multiprocessors": found.multi_processor_count,
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks": _said("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm", "--format=csv,noheader"),
        }
    if row["available"] and row["triton"]:
        row["kernel_error"] = _kernel_error(machine)
    record(row)


def _kernel_error(machine: Machine) -> str | None:
    """Why Triton cannot compile and launch a kernel, in one line; None where it can."""
    try:
        from lpsim import Quantizer, formats

        x = torch.full((3,), 1.1, device=machine.device)
        rounded = Quantizer(formats.float8_e4m3fn, backend="triton").quantize(x).tolist()
        return None if rounded == [1.125] * 3 else f"it rounds 1.1 to {rounded[0]} and not to 1.125"
    except Exception as error:
        traceback.print_exc()  # into the log, where a compiler has said more
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def missing(described: Sequence[Row], otherwise: str) -> str | None:
    """In one line what the command needs and does not have; None where it can go on.

    described: what `describe` recorded; otherwise: why it recorded nothing.
    """
    if not described:
        return f"the device could not be asked: {otherwise.strip().splitlines()[-1]}"
    row = described[0]
    if not row["available"]:
        return (
            f"needs a GPU that torch can use, and torch {row['torch']} finds none; "
            "`--device cpu --small` takes the same path in Triton's interpreter"
        )
    if not row["triton"]:
        return "needs Triton, which comes with torch for CUDA: pip install triton"
    if row["kernel_error"] is not None:
        needs = "it needs a C compiler and Python's headers"
        return f"Triton cannot run a kernel here ({needs}): {row['kernel_error']}; the log says more"
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
