"""Time and memory of a step of LMD beside torch's AdamW, and its share of a training step of gpt2-micro.

A step of LMD is `sampled_params` and `step` together; a training step is that of experiments/training/train.py. The
arms are interleaved, so that a slow phase of the machine is a slow phase of every arm, and step the same parameters,
shaped as those of a GPT-2 of width 768. Wall time is the shortest of the repeats; CPU time, of all threads, their
median. Bytes are those of the optimizer's state, counted from its tensors, beside the parameters and their gradients.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from experiments.training import optimizers
from experiments.training.config import Config
from experiments.training.data import StdlibText
from experiments.training.models.gpt2 import MICRO
from experiments.training.train import build, gradients
from lmd import LMD
from lpsim import Recipe, simulate

WIDTH = 768
MICRO_BATCH = 16
MICRO_RUN = 5  # steps of an arm before the next arm's turn

ARMS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "AdamW fused": lambda params: AdamW(params, lr=1e-6, fused=True),
    "AdamW foreach": lambda params: AdamW(params, lr=1e-6, foreach=True),
    "LMD": lambda params: LMD(params, lr=1e-6),
    "LMD, no noise": lambda params: LMD(params, lr=1e-6, noise_scale=0.0),
    "LMD, sign": lambda params: LMD(params, lr=1e-6, saturation=0.0),
    "LMD split": lambda params: LMD(params, lr=1e-6, parameterization="split"),
}
READABLE = {"LMD, readable": lambda params: LMD(params, lr=1e-6, fused=False)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parameters", type=int, default=50_000_000, help="at least so many (default 50 million)")
    parser.add_argument("--repeats", type=int, default=7, help="steps of each arm (default 7)")
    parser.add_argument("--threads", type=int, default=1, help="torch's threads (default 1)")
    parser.add_argument("--readable", action="store_true", help="also the unfused LMD, some hundred times slower")


def run(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    arms = ARMS | (READABLE if options.readable else {})
    params = gpt2_like(options.parameters)
    total = sum(p.numel() for p in params)
    print(f"torch {torch.__version__}, threads {options.threads}, {total / 1e6:.1f} million float32 parameters")
    print(measure(arms, params, options.repeats).to_string(float_format="{:.2f}".format))
    print(f"\ngpt2-micro, batch {MICRO_BATCH} x {MICRO.context}")
    print(measure_micro(arms, options.repeats).to_string(float_format="{:.2f}".format))
    return 0


def gpt2_like(at_least: int) -> list[nn.Parameter]:
    """The tensors of as many layers as are needed, each with a gradient."""
    d = WIDTH
    layer = [(3 * d, d), (3 * d,), (d, d), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,), (d,), (d,), (d,), (d,)]
    params: list[nn.Parameter] = []
    while sum(p.numel() for p in params) < at_least:
        params += [nn.Parameter(0.02 * torch.randn(shape)) for shape in layer]
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    return params


def step(optimizer: Optimizer) -> None:
    with optimizer.sampled_params() if isinstance(optimizer, LMD) else nullcontext():
        pass
    optimizer.step()


def timed(function: Callable[[], Any]) -> tuple[float, float]:
    """(wall, CPU) seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(arms: dict[str, Any], params: list[nn.Parameter], repeats: int) -> pd.DataFrame:
    """One row an arm, in ns and bytes per parameter."""
    made = {name: make(params) for name, make in arms.items()}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for optimizer in made.values():
        step(optimizer)  # state, and compilation
    for _ in range(repeats):
        for name, optimizer in made.items():
            times[name].append(timed(partial(step, optimizer)))
    count = sum(p.numel() for p in params)
    rows = {
        name: {
            "wall_ns": min(wall for wall, _ in times[name]) / count * 1e9,
            "cpu_ns": statistics.median(cpu for _, cpu in times[name]) / count * 1e9,
            "state_bytes": state_bytes(optimizer) / count,
            "with_sample_bytes": with_sample_bytes(optimizer) / count,
        }
        for name, optimizer in made.items()
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    for unit in ("wall", "cpu"):
        table.insert(2, f"{unit}_over_fused", table[f"{unit}_ns"] / table[f"{unit}_ns"]["AdamW fused"])
    return table


class Timed:
    """An optimizer for the training loop that adds up its own CPU time: `sampled_params` and `step`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.seconds = 0.0

    @contextmanager
    def sampled_params(self) -> Iterator[None]:
        self.seconds -= time.process_time()
        with self.optimizer.sampled_params() if isinstance(self.optimizer, LMD) else nullcontext():
            self.seconds += time.process_time()
            yield
            self.seconds -= time.process_time()
        self.seconds += time.process_time()

    def step(self) -> None:
        self.seconds += timed(self.optimizer.step)[1]


def measure_micro(arms: dict[str, Any], repeats: int) -> pd.DataFrame:
    """One row an arm: its CPU time in a step of experiments/training/train.py's loop, and its share of that step.

    The step is the loop's, under a simulation that leaves everything as it is: batch, forward and backward pass,
    clipping, optimizer, and clearing the gradients.
    """
    config = Config(model=MICRO, data=StdlibText(), optimizer=optimizers.AdamW(lr=1e-6), batch_size=MICRO_BATCH)
    data, (model, _) = config.data.load(MICRO), build(config)
    own: dict[str, list[float]] = {name: [] for name in arms}
    whole: dict[str, list[float]] = {name: [] for name in arms}
    made = {name: make(list(model.parameters())) for name, make in arms.items()}
    with simulate(model, Recipe()) as simulation:
        for _ in range(repeats):
            for name, optimizer in made.items():
                for i in range(MICRO_RUN):
                    started, arm = time.process_time(), Timed(optimizer)
                    batch = data.train_batch(0, simulation.step, MICRO_BATCH)
                    gradients(config, model, arm, batch)  # type: ignore[arg-type]
                    arm.step()
                    optimizer.zero_grad()
                    if i > 0:  # the first compiles, or finds another arm's tensors in the caches
                        own[name].append(arm.seconds)
                        whole[name].append(time.process_time() - started)
                    simulation.step += 1
    rows = {}
    for name in arms:
        optimizer_s, step_s = statistics.median(own[name]), statistics.median(whole[name])
        rows[name] = {"cpu_us": 1e6 * optimizer_s, "step_us": 1e6 * step_s, "share_percent": 100 * optimizer_s / step_s}
    return pd.DataFrame.from_dict(rows, orient="index")


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    values = [x for state in optimizer.state.values() for x in state.values()]
    return [x for x in values if isinstance(x, Tensor) and x.dim()]  # AdamW keeps its step count in a 0-d tensor


def state_bytes(optimizer: Optimizer) -> int:
    return sum(x.untyped_storage().nbytes() for x in state_tensors(optimizer))


def with_sample_bytes(optimizer: Optimizer) -> int:
    """The state and, within `sampled_params`, the samples that stand beside the parameters."""
    if not isinstance(optimizer, LMD):
        return state_bytes(optimizer)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    memory = [p.data_ptr() for p in params]
    with optimizer.sampled_params():
        samples = [p for p, before in zip(params, memory, strict=True) if p.data_ptr() != before]
        return state_bytes(optimizer) + sum(p.untyped_storage().nbytes() for p in samples)
