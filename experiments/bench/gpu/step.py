"""A training step of GPT-2 (124M), batch 8 x 1024, under bfloat16 autocast: plain, and simulated.

A step is forward pass, backward pass and AdamW's update, from the call until the device is done. Arms are interleaved;
medians, ratios to the plain step, and the most memory that tensors took in a step. `escaped`: products that ran outside
the recipe, of which there must be none.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.bench.gpu.machine import Machine, Record, Row
from experiments.bench.gpu.parts import attempt, warm_up
from experiments.training.models.gpt2 import GPT2, MICRO, SMALL, GPT2Config
from lpsim import Gemm, Quantizer, Recipe, Rounding, formats, simulate
from lpsim.machine.recipes import BackwardOperands
from lpsim.quantization.quantizer import ScaleClipsWarning

BATCH, REPEATS = 8, 5
FORMATS = ("mxfp6_e3m2", "mxfp4_e2m1")


def run(machine: Machine, record: Record) -> None:
    warnings.simplefilter("ignore", ScaleClipsWarning)
    if machine.cuda:
        warm_up([partial(_compile, recipe) for name, recipe in recipes().items() if FORMATS[0] in name], 4)
    model, tokens = _model(machine), _tokens(machine, 2 if machine.small else BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    plain = partial(_step, machine, model, optimizer, tokens)
    chosen = dict(list(recipes().items())[:1]) if machine.small else recipes()
    for name, recipe in {"plain": None, "recipe of Nones": Recipe(), **chosen}.items():
        step = plain if recipe is None else _simulated(plain, model, recipe)
        row = attempt({"arm": name}, partial(_measure, machine, plain, step))
        if recipe is not None and "error" not in row:
            row = attempt(row, partial(_escaped, plain, model, recipe))
        record(row)
        if machine.cuda:
            torch.cuda.empty_cache()


def recipes() -> dict[str, Recipe]:
    """Forward and in all products, to nearest and stochastic, for each format."""
    found = {}
    for name in FORMATS:
        for word, rounding in (("", Rounding.TIES_TO_EVEN), (", stochastic", Rounding.STOCHASTIC)):
            q = Quantizer(formats.get(name), rounding, backend="triton")
            gemm = Gemm(q, q)
            found[f"{name} forward{word}"] = Recipe(gemm)
            found[f"{name} all products{word}"] = Recipe(
                gemm, gemm, gemm, backward_operands=BackwardOperands.UNQUANTIZED
            )
    return found


def _config(machine: Machine) -> GPT2Config:
    return replace(MICRO, layers=1, d_model=32, heads=2, context=16, vocab_size=64) if machine.small else SMALL


def _model(machine: Machine) -> GPT2:
    torch.manual_seed(0)
    return _config(machine).build().to(machine.device)


def _tokens(machine: Machine, batch: int) -> Tensor:
    config = _config(machine)
    return torch.randint(0, config.vocab_size, (batch, config.context + 1)).to(machine.device)


def _step(machine: Machine, model: GPT2, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
    with torch.autocast(machine.device, torch.bfloat16):
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _simulated(step: Callable[[], None], model: GPT2, recipe: Recipe) -> Callable[[], None]:
    simulation = simulate(model, recipe, audit=False)

    def run_step() -> None:
        with simulation:
            simulation.advance()
            step()

    return run_step


def _escaped(step: Callable[[], None], model: GPT2, recipe: Recipe) -> Row:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the row says it
        with simulate(model, recipe) as simulation:
            step()
    return {"escaped": list(simulation.audit().escaped)}


def _compile(recipe: Recipe) -> None:
    """A step with one sequence: its kernels are those of eight."""
    machine = Machine("cuda", small=False)
    model = _model(machine)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    _simulated(partial(_step, machine, model, optimizer, _tokens(machine, 1)), model, recipe)()


def _measure(machine: Machine, plain: Callable[[], None], step: Callable[[], None]) -> Row:
    if not machine.small:
        for warm in (plain, step, step):
            warm()
    pairs = [[machine.time_ms(arm) for arm in (plain, step)] for _ in range(1 if machine.small else REPEATS)]
    without, ms = (statistics.median(column) for column in zip(*pairs, strict=True))
    peak = machine.peak_bytes(step)
    return {"ms": round(ms, 2), "plain_ms": round(without, 2), "over_plain": round(ms / without, 3), "peak_bytes": peak}
