"""What becomes of every op of whole models, unmodified, in one training step of a simulated machine.

MXFP4 in all three products of every linear op, gradients rounded stochastically, bfloat16 vector ops. The models are
small, with random weights; those of transformers are left out where it is not installed. Printed as a Markdown table:
calls of torch functions by what the simulation did with them, matrix products in the aten ops underneath, those of
them that escaped it, and whether a recipe of Nones gives torch's loss and gradients bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from experiments.training.models.zoo import CASES, Case
from lmd import LMD
from lpsim import Gemm, Quantizer, Recipe, Rounding, ScaleRule, formats, simulate
from lpsim.machine.audit import Audit
from lpsim.machine.ops import Kind
from lpsim.machine.recipes import BackwardOperands

_FP4 = Quantizer(formats.mxfp4_e2m1)
_GRADIENTS = Quantizer(
    dataclasses.replace(formats.mxfp4_e2m1, name="mxfp4_e2m1_rceil", scale_rule=ScaleRule.RCEIL), Rounding.STOCHASTIC
)
RECIPE = Recipe(
    Gemm(_FP4, _FP4),
    Gemm(_GRADIENTS, _FP4),
    Gemm(_FP4, _GRADIENTS),
    vector=Quantizer(formats.bfloat16),
    backward_operands=BackwardOperands.UNQUANTIZED,
)

COLUMNS = ("model", "products", "vector", "moved", "exempt by rule", "aten products", "escaped", "all None = torch")


@dataclasses.dataclass(frozen=True)
class Result:
    """One model: the audits of a step with LMD and of one with AdamW, and whether a recipe of Nones changed nothing."""

    lmd: Audit
    adamw: Audit
    unchanged: bool

    @property
    def escaped(self) -> list[str]:
        return [*self.lmd.escaped, *self.adamw.escaped]

    def row(self, name: str) -> tuple[str, ...]:
        """By COLUMNS; the counts are of the step with LMD: forward, backward and update."""
        quantized, left = Counter[Kind](), 0
        for r in self.lmd.rows:
            if r.formats == "-" and r.kind is not Kind.MOVEMENT:
                left += r.count
            else:
                quantized[r.kind] += r.count
        vector = quantized[Kind.VECTOR] + quantized[Kind.REDUCTION]
        counts = quantized[Kind.PRODUCT], vector, quantized[Kind.MOVEMENT], left, sum(self.lmd.products.values())
        escaped = ", ".join(self.escaped) or "none"
        return (name, *map(str, counts), escaped, "yes" if self.unchanged else "NO")


def audit(case: Case, recipe: Recipe = RECIPE) -> Result:
    """One step with each optimizer under `recipe`, after a comparison of a recipe of Nones with plain torch."""
    model, loss = case
    plain = gradients(model, loss)
    with simulate(model, Recipe()) as sim:
        simulated = gradients(model, loss)
    unchanged = len(plain) == len(simulated) and all(map(torch.equal, plain, simulated))
    lmd = LMD(model.parameters(), lr=0.01, noise_scale=0.05, seed=0)
    with simulate(model, recipe) as sim:
        with lmd.sampled_params():
            gradients(model, loss)
        lmd.step()
    with simulate(model, recipe) as second:
        gradients(model, loss)
        torch.optim.AdamW(model.parameters(), 1e-3).step()
    return Result(sim.audit(), second.audit(), unchanged)


def gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> list[Tensor]:
    """The loss and every parameter's gradient, which is left in .grad."""
    model.zero_grad()
    value = loss(model)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def results(names: list[str]) -> Iterator[tuple[str, Result | str]]:
    """Each model's result, or why there is none."""
    for name in names:
        torch.manual_seed(0)
        try:
            case = CASES[name]()
        except ImportError as error:
            yield name, f"not run: {error}"
            continue
        yield name, audit(case)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--ops", action="store_true", help="every op of each model: class, count, formats, reason")


def run(options: argparse.Namespace) -> int:
    unknown = [name for name in options.models if name not in CASES]
    if unknown:
        raise SystemExit(f"no model {', '.join(unknown)}; there are: {', '.join(CASES)}")
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
    failed = False
    reports = []
    for name, result in results(options.models or [*CASES]):
        if isinstance(result, str):
            print(f"| {name} | {result}{' |' * (len(COLUMNS) - 1)}")
            continue
        failed |= bool(result.escaped) or not result.unchanged
        print(f"| {' | '.join(result.row(name))} |", flush=True)
        reports.append(f"\n{name}, one step with LMD\n{result.lmd}")
    if options.ops:
        print("\n".join(reports))
    return int(failed)
