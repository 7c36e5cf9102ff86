"""The time of a training step (forward and backward) under the simulation, over the plain float32 step.

All arms of a model are interleaved, step by step, so that a slow phase of the machine is a slow phase of every arm. The
table gives the ratio of the medians of the process's CPU time and of the shortest wall times, at one thread, and what a
step keeps for its backward pass, parameters apart. microxcaling's layers are measured beside where it is importable.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.training.models.gpt2 import MICRO, Attention, GPT2Config
from lpsim import Gemm, Quantizer, Recipe, Rounding, available_backends, formats, simulate
from lpsim.adapters import microxcaling
from lpsim.machine.arguments import lies_in
from lpsim.machine.ops import exact
from lpsim.machine.recipes import BackwardOperands
from lpsim.machine.telemetry import Telemetry
from lpsim.quantization.quantizer import ScaleClipsWarning

BASE = GPT2Config(name="gpt2-4x256", layers=4, heads=8, d_model=256, context=128, vocab_size=256)
MODELS = {"gpt2-micro": (MICRO, 32), "gpt2-4x256": (BASE, 8)}  # configuration, batch size
TELEMETRY_EVERY = 100

Step = Callable[[], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=15, help="steps of each arm (default 15)")
    parser.add_argument("--model", choices=[*MODELS], help="only this model")
    parser.add_argument("--no-unit", action="store_true", help="as on a CPU without bfloat16 products")
    parser.add_argument(
        "--keep-memory", action="store_true", help="forbid glibc to return freed memory, for all arms (mallopt)"
    )


def run(options: argparse.Namespace) -> int:
    warnings.simplefilter("ignore", ScaleClipsWarning)  # the time is measured, not the bias
    torch.set_num_threads(1)
    kept = keep_memory() if options.keep_memory else False
    if options.no_unit:
        exact.unit_available = lambda: False  # type: ignore[assignment]
    unit = "bfloat16 unit" if exact.unit_available() else "no bfloat16 unit"
    print(f"torch {torch.__version__}, 1 thread, {unit}, glibc {'keeps freed memory' if kept else 'as it is'}")
    for name, (config, batch) in MODELS.items():
        if options.model not in (None, name):
            continue
        torch.manual_seed(0)
        model = config.build()
        tokens = torch.randint(0, config.vocab_size, (batch, config.context + 1))
        print(f"\n{name}, batch {batch} x {config.context}")
        steps = arms(model, tokens)
        report(measure(steps, options.repeats), {name: kept_for_backward(step, model) for name, step in steps.items()})
    return 0


def keep_memory() -> bool:
    """Tell glibc to serve every block from the heap and never to shrink it. False where there is no glibc."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except OSError:
        return False
    trim_threshold, mmap_threshold = -1, -3
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, 1 << 30))


def arms(model: nn.Module, tokens: Tensor) -> dict[str, Step]:
    """Every arm as a function that does one step; the first is the baseline."""
    mx, bfloat16 = formats.mxfp6_e3m2, formats.bfloat16
    q = Quantizer(mx)
    products = Gemm(q, q)
    three = Recipe(products, products, products, backward_operands=BackwardOperands.UNQUANTIZED)
    recipes = {
        "recipe of Nones": Recipe(),
        "MXFP6 forward": Recipe.forward(mx),
        "MXFP6 forward, stochastic": Recipe.forward(mx, rounding=Rounding.STOCHASTIC),
        "MXFP6 forward, bfloat16 vector ops": Recipe.forward(mx, vector=bfloat16),
        "MXFP6 all three GEMMs": three,
    }

    def step(model: nn.Module = model) -> None:
        model.zero_grad()
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()

    def simulated(recipe: Recipe, telemetry: bool = False) -> Step:
        sim = simulate(model, recipe, audit=False)
        if telemetry:
            Telemetry(sim, every=2)  # so that every other step is a sampled one

        def run_step() -> None:
            with sim:
                sim.advance()
                step()

        return run_step

    return {
        "plain float32": step,
        **{name: simulated(recipe) for name, recipe in recipes.items()},
        "MXFP6 forward, telemetry": simulated(Recipe.forward(mx), telemetry=True),
        **{name: partial(step, peer) for name, peer in in_microxcaling(model, q).items()},
    }


def in_microxcaling(model: nn.Module, quantizer: Quantizer) -> dict[str, nn.Module]:
    """The model with microxcaling's linear layers and products of attention, forward only and all three GEMMs."""
    specs = microxcaling.settings(quantizer)
    if specs is None or "microxcaling" not in available_backends():
        return {}
    from mx.linear import Linear
    from mx.matmul import matmul

    class PeerAttention(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            scores = matmul(q * q.shape[-1] ** -0.5, k.mT, mx_specs=self.specs)
            masked = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            y = matmul(scores.masked_fill(masked, -torch.inf).softmax(-1), v, mx_specs=self.specs)
            return self.proj(y.transpose(1, 2).reshape(x.shape))

    peers: dict[str, nn.Module] = {}
    for name, backward in (("microxcaling, forward", False), ("microxcaling, all three GEMMs", True)):
        peers[name] = twin = copy.deepcopy(model)
        for module in [*twin.modules()]:
            if isinstance(module, Attention):
                module.__class__ = PeerAttention
                module.specs = {**specs, "quantize_backprop": backward}  # type: ignore[assignment]
            for child, linear in [*module.named_children()]:
                if isinstance(linear, nn.Linear):
                    theirs: Any = Linear(
                        linear.in_features,
                        linear.out_features,
                        linear.bias is not None,
                        mx_specs={**specs, "quantize_backprop": backward},
                    )
                    theirs.weight, theirs.bias = linear.weight, linear.bias
                    setattr(module, child, theirs)
    return peers


def kept_for_backward(step: Step, model: nn.Module) -> int:
    """The bytes of the tensors that one step keeps for its backward pass, without the parameters."""
    parameters = list(model.parameters())
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # alive, so that no other tensor gets its memory
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    storages = (t.untyped_storage() for t in kept if not lies_in(t, parameters))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure(steps: dict[str, Step], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds of every step of every arm, after two steps to warm up."""
    for step in steps.values():
        step()
        step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(repeats + repeats % 2):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def report(times: dict[str, list[tuple[float, float]]], kept: dict[str, int]) -> None:
    baseline = next(iter(times.values()))
    wall = min(w for w, _ in baseline)
    cpu = statistics.median(c for _, c in baseline)
    print(f"{'arm':<38} {'CPU ms':>8} {'ratio':>6} {'wall ms':>8} {'ratio':>6} {'kept MB':>8}")
    for name, pairs in times.items():
        if name.endswith("telemetry"):  # steps alternate: sampled (even), not sampled (odd)
            halves = [statistics.median(c for _, c in pairs[i::2]) for i in (0, 1)]
            quiet, sampled = sorted(halves)
            share = (sampled + (TELEMETRY_EVERY - 1) * quiet) / (TELEMETRY_EVERY * quiet)
            print(f"{name + f' every {TELEMETRY_EVERY}':<38} {share:>15.3f} over the same without")
            continue
        own_wall, own_cpu = min(w for w, _ in pairs), statistics.median(c for _, c in pairs)
        print(
            f"{name:<38} {1e3 * own_cpu:>8.2f} {own_cpu / cpu:>6.3f} {1e3 * own_wall:>8.2f} {own_wall / wall:>6.3f} "
            f"{kept[name] / 1e6:>8.1f}"
        )
