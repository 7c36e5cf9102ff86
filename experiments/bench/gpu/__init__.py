"""What a GPU shows: our claims proved on it, then speed, memory, and whether its tensor cores are the simulated ones.

`make gpu` or `lpsim bench gpu`, at most eight minutes on one H100 with an empty cache. It needs a checkout and a Python
with torch for CUDA and its Triton; the claims need pytest and numba too. Each part runs in a process of its own, has a
time budget, and is recorded as it ends: one that fails or runs out of time does not stop the rest. The results are one
JSON file, written anew after each part, a log beside it, and printed tables. docs/howto/gpu.md explains them. The
claims come last: they compile some thousand kernels, which takes long on few cores, and have the time the others left.

Exit code: 0 where everything ran and held, 1 where something did not, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from experiments.bench.gpu import claims, machine, optimizer, quantize, report, step
from experiments.bench.gpu.machine import Machine, Record
from experiments.bench.gpu.parts import Outcome, Part, run_part


def _silicon(machine: Machine, record: Record) -> None:
    from experiments.bench.gpu import silicon  # imports Triton, which must first be told of its interpreter

    silicon.run(machine, record)


PARTS = (
    Part("silicon", "accumulator presets and tensor cores", _silicon, 60),
    Part("quantize", "quantize over copy", quantize.run, 80),
    Part("step", "a training step", step.run, 90),
    Part("optimizer", "LMD over fused AdamW", optimizer.run, 25),
    Part("claims", "tests marked gpu", claims.run, 175),  # and what the others left
)
DEVICE = Part("device", "the device", machine.describe, 45)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [part.name for part in PARTS]
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(names)} (default: all)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/gpu.json"), help="the results (default runs/gpu.json)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to see that every part runs")


def run(options: argparse.Namespace) -> int:
    unknown = [name for name in options.parts if name not in {part.name for part in PARTS}]
    if unknown:
        return _refused(f"no part {', '.join(unknown)}; there are: {', '.join(part.name for part in PARTS)}")
    if options.device == "cpu":
        if not options.small:
            return _refused("--device cpu goes with --small: Triton's interpreter is too slow for real sizes")
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    log = options.output.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    found = run_part(DEVICE, options.device, options.small, log)
    if missing := machine.missing(found.rows, found.error or found.status):
        if not (found.rows and found.rows[0].get("kernel_error")):
            log.unlink()
        return _refused(missing)
    outcomes = [found]
    for part in PARTS:
        if options.parts and part.name not in options.parts:
            continue
        if part is PARTS[-1]:
            left = sum(part.budget_s for part in PARTS[:-1]) - sum(outcome.time_s for outcome in outcomes[1:])
            part = replace(part, budget_s=part.budget_s + max(left, 0) // 1)
        print(f"{part.name}: {part.what}, at most {part.budget_s:g} s ...", file=sys.stderr, flush=True)
        outcomes.append(run_part(part, options.device, options.small, log))
        report.write(options.output, outcomes, small=options.small)
    print(report.text(outcomes, small=options.small))
    print(f"\n{options.output}, {log}")
    return 0 if all(map(_good, outcomes)) else 1


def _good(outcome: Outcome) -> bool:
    """Whether a part ended, and nothing in it failed."""
    return outcome.status == "done" and not any("error" in row for row in outcome.rows)


def _refused(why: str) -> int:
    print(f"lpsim bench gpu: {why}", file=sys.stderr)
    return 2
