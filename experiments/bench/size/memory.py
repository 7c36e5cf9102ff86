"""What a training step needs in memory and time, as a model of a transformer's sizes.

Memory is weights, gradients, the optimizer's state, what the forward pass keeps for the backward pass, and the gradient
of the outputs, all in float32 (bfloat16 autocast keeps less of it). What is kept is a sum of products of sizes
(`features`), whose coefficients, bytes, are fitted by least squares to what small models are counted to keep; larger
ones that were not fitted are the check. So is the memory of a process that trains one, of which the model leaves out
buffers inside operations and what an allocator holds back.

Time is arithmetic over a sustained rate: 6 operations a weight and position of a training step (forward and backward),
and 12 a layer, channel and pair of positions for attention, as nanoGPT counts them.
"""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from experiments.bench.step import kept_for_backward
from experiments.grids import load_grid
from experiments.training.config import RecipeConfig, all_products, forward
from experiments.training.models.gpt2 import SMALL as GPT2_124M
from experiments.training.models.gpt2 import GPT2Config
from experiments.training.models.vit import BASE as VIT_B16
from experiments.training.models.vit import ViTConfig
from experiments.training.record import forget_peak_memory, peak_memory_mb
from lpsim import Recipe, simulate
from lpsim.quantization.quantizer import ScaleClipsWarning

ModelConfig = GPT2Config | ViTConfig
GPT_1B3 = GPT2Config(name="gpt-1.3b", layers=24, heads=16, d_model=2048, context=2048, vocab_size=50257)
LARGE = ((GPT2_124M, 16), (GPT_1B3, 1), (VIT_B16, 128))  # and how many sequences or images a step takes at once
GRIDS = ("paper_gpt2", "paper_vit")
ADAMW = "AdamW, or LMD with noise"  # two vectors; or one, and the weights beside their sample
STATE = {ADAMW: (8, 8), "LMD without noise": (4, 8)}  # bytes beside weight and gradient: of hidden weights, of others


def recipes() -> dict[str, Recipe | None]:
    format = "mxfp6_e3m2"
    return {
        "plain": None,
        "MXFP6 forward": forward(format).build(),
        "MXFP6 all products": all_products(format).build(),
    }


@dataclass(frozen=True)
class Sizes:
    """What the memory and the time of a model depend on."""

    layers: int
    heads: int
    width: int
    positions: int
    outputs: int  # of one example, all its positions together
    products: int  # weights of matrix products
    parameters: int
    inputs: int  # numbers of one example

    @property
    def hidden(self) -> int:
        """Weights of the blocks' matrices, which `lmd.for_model` gives to LMD."""
        return 12 * self.width**2 * self.layers

    def operations(self) -> float:
        """Of the training step of one example."""
        return 6.0 * self.products * self.positions + 12.0 * self.layers * self.width * self.positions**2


def sizes(config: ModelConfig) -> Sizes:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in config.build().parameters())
    blocks = 12 * config.d_model**2 * config.layers
    if isinstance(config, GPT2Config):
        positions, outputs, inputs = config.context, config.context * config.vocab_size, 0
        products = blocks + config.d_model * config.vocab_size
    else:
        positions, outputs = (config.image_size // config.patch_size) ** 2 + 1, config.classes
        inputs = config.channels * config.image_size**2
        products = blocks + config.d_model * config.channels * config.patch_size**2
    return Sizes(config.layers, config.heads, config.d_model, positions, outputs, products, parameters, inputs)


def features(size: Sizes, batch: int) -> list[float]:
    """The products of sizes that kept bytes are a sum of."""
    position = batch * size.positions
    return [
        position * size.width * size.layers,  # activations of a block
        position * size.positions * size.heads * size.layers,  # the probabilities of attention
        position * size.width,
        position * size.layers,  # what norms keep
        position * size.heads * size.layers,
        position,
        batch * size.outputs,
        batch * size.inputs,
        size.products,  # rounded weights
        1.0,
    ]


@dataclass(frozen=True)
class Kept:
    """The fitted bytes of each feature."""

    bytes: Sequence[float]

    def __call__(self, size: Sizes, batch: int) -> float:
        return float(np.dot(self.bytes, features(size, batch)))


def step_of(config: ModelConfig, batch: int, recipe: Recipe | None) -> tuple[nn.Module, Callable[[], None]]:
    """A model, and a function that does a forward and a backward pass of random data."""
    model = config.build()
    if isinstance(config, GPT2Config):
        shape, classes = (batch, config.context), config.vocab_size
        inputs, targets = torch.randint(classes, shape), torch.randint(classes, shape).flatten()
    else:
        inputs = torch.randn(batch, config.channels, config.image_size, config.image_size)
        classes, targets = config.classes, torch.randint(config.classes, (batch,))

    def plain() -> None:
        model.zero_grad()
        F.cross_entropy(model(inputs).view(-1, classes), targets).backward()

    if recipe is None:
        return model, plain
    simulation = simulate(model, recipe, audit=False)

    def simulated() -> None:
        with simulation:
            plain()

    return model, simulated


def counted(config: ModelConfig, batch: int, recipe: Recipe | None) -> int:
    """The bytes that a step keeps for its backward pass."""
    model, step = step_of(config, batch, recipe)
    return kept_for_backward(step, model)


def small(family: type[ModelConfig]) -> Iterator[tuple[ModelConfig, int]]:
    """The models that are fitted, each with a batch: every size varies, and no two together."""
    for layers in (1, 3):
        for heads, width in ((2, 32), (2, 64), (4, 64), (4, 128)):
            for length, batch in ((32, 2), (64, 2), (32, 4)):
                for classes in (64, 256):
                    yield _shaped(family, layers, heads, width, length, classes), batch


def unseen(family: type[ModelConfig]) -> Iterator[tuple[ModelConfig, int]]:
    """Larger ones, to check the fit with."""
    yield _shaped(family, 4, 8, 256, 128, 512), 4
    yield _shaped(family, 6, 4, 192, 64, 300), 3


def _shaped(family: type[ModelConfig], layers: int, heads: int, width: int, length: int, classes: int) -> ModelConfig:
    if family is GPT2Config:
        return GPT2Config(name="small", layers=layers, heads=heads, d_model=width, context=length, vocab_size=classes)
    return ViTConfig(
        name="small",
        layers=layers,
        heads=heads,
        d_model=width,
        image_size=length // 4,
        patch_size=2 if classes < 100 else 4,
        channels=3,
        classes=classes,
    )


def fitted(family: type[ModelConfig], recipe: Recipe | None) -> Kept:
    """The bytes of each feature, from the small models."""
    known = list(small(family))
    rows = np.array([features(sizes(config), batch) for config, batch in known])
    scale = np.maximum(rows.max(axis=0), 1)
    bytes_kept = np.array([counted(config, batch, recipe) for config, batch in known], dtype=float)
    coefficients, *_ = np.linalg.lstsq(rows / scale, bytes_kept, rcond=1e-9)
    return Kept(tuple((coefficients / scale).tolist()))


def peak(size: Sizes, batch: int, kept: Kept, state: tuple[float, float]) -> float:
    """The bytes of a training step at the beginning of its backward pass, where it needs most."""
    hidden, others = state
    state_bytes = hidden * size.hidden + others * (size.parameters - size.hidden)
    return 8 * size.parameters + state_bytes + kept(size, batch) + 4 * batch * size.outputs


def in_a_process(config: ModelConfig, batch: int, recipe: Recipe | None) -> float:
    """The bytes by which a fresh process that trains with AdamW grows at most."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_grown, (config, batch, recipe))


def _grown(config: ModelConfig, batch: int, recipe: Recipe | None) -> float:
    warnings.simplefilter("ignore", ScaleClipsWarning)
    torch.set_num_threads(1)
    _train(_shaped(type(config), 1, 2, 32, 32, 64), 1, recipe)  # loads what a first step loads
    forget_peak_memory()
    before = peak_memory_mb()
    _train(config, batch, recipe)
    return 1e6 * (peak_memory_mb() - before)


def _train(config: ModelConfig, batch: int, recipe: Recipe | None) -> None:
    model, step = step_of(config, batch, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(2):
        step()
        optimizer.step()


def tables(tflops: float, few: bool) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each table with its title: the check of what is kept, of the whole, the large models, the grids."""
    warnings.simplefilter("ignore", ScaleClipsWarning)
    kept = {
        (family, name): fitted(family, recipe)
        for family in (GPT2Config, ViTConfig)
        for name, recipe in recipes().items()
    }
    yield "Kept for the backward pass by models that were not fitted, MB", _check_kept(kept)
    if not few:
        yield "The growth of a process that trains with AdamW, MB", _check_process(kept)
    yield "Memory of a step of models that do not fit here, GB", _large(kept)
    yield (
        f"The paper's grids: the largest run's GB, and GPU-days at {tflops:g} TFLOP/s, simulation not counted",
        _grids(kept, tflops),
    )


Fits = Mapping[tuple[type[ModelConfig], str], Kept]


def _check_kept(kept: Fits) -> pd.DataFrame:
    rows = []
    for (family, name), model in kept.items():
        for config, batch in unseen(family):
            truth, said = counted(config, batch, recipes()[name]), model(sizes(config), batch)
            rows.append(
                {"family": config.family, "layers": config.layers, "d": config.d_model, "batch": batch, "recipe": name}
                | {"counted": round(truth / 1e6, 2), "model": round(said / 1e6, 2), "ratio": round(said / truth, 4)}
            )
    return pd.DataFrame(rows)


def _check_process(kept: Fits) -> pd.DataFrame:
    rows = []
    for config, batch in (
        (GPT2Config(name="check", layers=6, heads=8, d_model=512, context=256, vocab_size=8192), 8),
        (replace(VIT_B16, name="check", layers=4, heads=8, d_model=512), 8),
    ):
        for name, recipe in recipes().items():
            truth = in_a_process(config, batch, recipe)
            said = peak(sizes(config), batch, kept[type(config), name], STATE[ADAMW])
            rows.append(
                {"family": config.family, "layers": config.layers, "d": config.d_model, "batch": batch, "recipe": name}
                | {"process": round(truth / 1e6), "model": round(said / 1e6), "ratio": round(said / truth, 3)}
            )
    return pd.DataFrame(rows)


def _large(kept: Fits) -> pd.DataFrame:
    rows = []
    for config, batch in LARGE:
        size = sizes(config)
        row: dict[str, Any] = {"model": config.name, "parameters": f"{size.parameters / 1e6:.0f}M", "batch": batch}
        for name in recipes():
            for optimizer, state in STATE.items():
                row[f"{name}, {optimizer}"] = round(peak(size, batch, kept[type(config), name], state) / 1e9, 1)
        rows.append(row)
    return pd.DataFrame(rows)


def _grids(kept: Fits, tflops: float) -> pd.DataFrame:
    rows = []
    for name in GRIDS:
        configs = load_grid(name)[1]
        assert isinstance(configs, list)
        operations, largest = 0.0, 0.0
        for config in configs:
            assert isinstance(config.model, ModelConfig) and isinstance(config.recipe, RecipeConfig)
            size, batch = sizes(config.model), config.batch_size // config.micro_batches
            operations += size.operations() * config.batch_size * config.steps
            recipe = "plain" if config.recipe.format.name == "float32" else "MXFP6 forward"
            largest = max(largest, peak(size, batch, kept[type(config.model), recipe], STATE[ADAMW]))
        days = operations / (tflops * 1e12) / 86400
        rows.append(
            {"grid": name, "runs": len(configs), "micro-batch": batch, "GB": round(largest / 1e9, 1)}
            | {"operations": f"{operations:.2e}", "GPU-days": round(days, 1), "a run": round(days / len(configs), 2)}
        )
    return pd.DataFrame(rows)
