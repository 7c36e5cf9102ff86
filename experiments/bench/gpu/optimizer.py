"""A step of LMD over one of torch's fused AdamW, on the parameters of GPT-2 (124M): `sampled_params`, then `step`.

ns a parameter, from the call until the device is done; bytes of state a parameter; the most memory in a step. Arms are
interleaved; medians.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from experiments.bench.gpu.machine import Machine, Record, Row
from experiments.bench.gpu.parts import attempt
from experiments.training.models.gpt2 import MICRO, SMALL
from lmd import LMD

REPEATS = 15


def arms(fused: bool) -> dict[str, Callable[[list[nn.Parameter]], Optimizer]]:
    """By name, the first being the baseline. fused: LMD's kernels."""
    return {
        "AdamW fused": lambda params: AdamW(params, lr=1e-6, fused=True),
        "AdamW foreach": lambda params: AdamW(params, lr=1e-6, foreach=True),
        "LMD": lambda params: LMD(params, lr=1e-6, fused=fused),
        "LMD, no noise": lambda params: LMD(params, lr=1e-6, noise_scale=0.0, fused=fused),
        "LMD, split": lambda params: LMD(params, lr=1e-6, parameterization="split", fused=fused),
    }


def run(machine: Machine, record: Record) -> None:
    tiny = replace(MICRO, layers=1, d_model=16, heads=2, vocab_size=16)
    model = (tiny if machine.small else SMALL).build().to(machine.device)
    params = list(model.parameters())
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    count = sum(p.numel() for p in params)
    made = arms(fused=machine.cuda)
    baseline = made["AdamW fused"](params)
    for name, make in made.items():
        what: Row = {"arm": name, "parameters": count}
        record(attempt(what, partial(_measure, machine, baseline, make, params, count)))


def _measure(
    machine: Machine,
    baseline: Optimizer,
    make: Callable[[list[nn.Parameter]], Optimizer],
    params: list[nn.Parameter],
    count: int,
) -> Row:
    optimizer = make(params)
    for warm in (baseline, optimizer, optimizer):
        _step(warm)
    repeats = 1 if machine.small else REPEATS
    pairs = [[machine.time_ms(partial(_step, each)) for each in (baseline, optimizer)] for _ in range(repeats)]
    fused, ms = (statistics.median(column) for column in zip(*pairs, strict=True))
    tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor) and x.dim()]
    return {
        "ms": round(ms, 3),
        "ns_a_parameter": round(1e6 * ms / count, 4),
        "over_fused_adamw": round(ms / fused, 3),
        "state_bytes_a_parameter": round(sum(x.untyped_storage().nbytes() for x in tensors) / count, 2),
        "peak_bytes": machine.peak_bytes(partial(_step, optimizer)),
    }


def _step(optimizer: Optimizer) -> None:
    with optimizer.sampled_params() if isinstance(optimizer, LMD) else nullcontext():
        pass
    optimizer.step()
