"""What a run is: `Config`, a frozen tree of settings with a JSON round trip and a signature.

The signature hashes every resolved field, the complete definitions of the number formats included, never a difference
from defaults: editing a default or a format gives new runs new signatures and leaves old results what they were.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from experiments.training import own
from experiments.training.data import DATA, DataConfig, ModelConfig
from experiments.training.models import gpt2, huggingface, vit
from experiments.training.optimizers import OPTIMIZERS, OptimizerSettings
from experiments.training.schedules import SCHEDULES, Cosine, Schedule
from experiments.training.settings import Settings, choose, from_table, names_near
from lpsim import Gemm, Recipe, Rounding, ScaleRule, formats
from lpsim.formats import Format
from lpsim.machine import named_recipes, recipe_data
from lpsim.machine.recipes import BackwardOperands

VERSION = 1  # of the run folder and of what the training loop computes from a config; part of the signature

MODEL_FAMILIES: dict[str, type[Settings]] = {
    family.family: family
    for family in (
        gpt2.GPT2Config,
        vit.ViTConfig,
        huggingface.TransformersCausalLM,
        huggingface.TransformersImageClassifier,
    )
}
MODELS: dict[str, ModelConfig] = {
    model.name: model
    for model in (gpt2.MICRO, gpt2.SMALL, gpt2.MEDIUM, vit.MICRO, vit.MICRO_GLYPHS, vit.SMALL, vit.BASE)
}
PASSES = ("forward", "all")
AUTOCASTS = ("bfloat16",)
SHIPPED_METRICS = ("step", "split", "loss", "accuracy", "train_loss", "validation_loss", "validation_accuracy")
GIVEN = "given"  # written for passes where the recipe is given whole


def model(name: str) -> ModelConfig:
    """The shipped model of that name. Raises ValueError naming the close ones; llamas need the package transformers."""
    known: dict[str, ModelConfig | None] = {**MODELS, **dict.fromkeys(huggingface.LLAMAS)}
    return choose(known, name, "model") or huggingface.llama(name)


@dataclass(frozen=True)
class RecipeConfig(Settings):
    """A recipe of one number format: which products round their operands to it. With float32 none does."""

    format: Format = formats.float32
    passes: str = "forward"  # fprop alone, gradients in the compute dtype; or "all": fprop, dgrad and wgrad
    rounding: Rounding = Rounding.TIES_TO_EVEN
    vector: Format | None = None  # of the operations between products; None leaves them in the compute dtype

    def check(self) -> None:
        self.require(
            self.passes in PASSES, f"passes must be one of {names_near(self.passes, PASSES)}, is {self.passes!r}"
        )
        rule = getattr(self.format, "scale_rule", None)
        self.require(
            rule is None or isinstance(rule, ScaleRule),
            f"the scale rule of {self.format.name} is a function, which the config of a run, being data, cannot hold; "
            f"take one of {', '.join(f'ScaleRule.{member.name}' for member in ScaleRule)}, or train with "
            "lpsim.simulate in a script of your own",
        )
        self.build()  # what a Recipe refuses is refused here, before anything is run

    @property
    def name(self) -> str:
        return self.format.name if self.passes == "forward" else f"{self.format.name} in all products"

    def build(self) -> Recipe:
        """The recipe. With "all", dgrad and wgrad round the unrounded tensors again, each along its own axis."""
        if self.format == formats.float32 and self.vector is None:
            return Recipe()
        recipe = Recipe.forward(self.format, vector=self.vector, rounding=self.rounding)
        if self.passes == "forward":
            return recipe
        operands = Gemm(recipe.fprop.lhs, recipe.fprop.rhs)
        return replace(recipe, dgrad=operands, wgrad=operands, backward_operands=BackwardOperands.UNQUANTIZED)

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": self.format.name,
            "passes": self.passes,
            "rounding": self.rounding.value,
            "vector": None if self.vector is None else self.vector.name,
            "format_definition": formats.to_dict(self.format),
            "vector_definition": None if self.vector is None else formats.to_dict(self.vector),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Reads the definitions; the names beside them are for people and must agree."""
        known = list(cls().to_dict())
        for name in data:
            if name not in known:
                raise ValueError(f"RecipeConfig has no field {name!r}; there are: {names_near(name, known)}")
        if missing := [name for name in known if name not in data]:
            raise ValueError(f"RecipeConfig lacks {', '.join(missing)}")
        fmt = formats.from_dict(data["format_definition"])
        vector = None if data["vector_definition"] is None else formats.from_dict(data["vector_definition"])
        if (fmt.name, None if vector is None else vector.name) != (data["format"], data["vector"]):
            raise ValueError(f"the recipe names {data['format']!r}, {data['vector']!r} but defines other formats")
        rounding = choose({member.value: member for member in Rounding}, data["rounding"], "rounding")
        return cls(fmt, data["passes"], rounding, vector)


def forward(
    format: str | Format, vector: str | Format | None = None, rounding: Rounding = Rounding.TIES_TO_EVEN
) -> RecipeConfig:
    """The recipe that rounds both operands of every product of the forward pass.

    format, vector: a format or its name; vector is that of the operations between products, None to leave them alone.
    Raises: ValueError for an unknown format, naming the close ones.
    """
    return RecipeConfig(_format(format), "forward", rounding, None if vector is None else _format(vector))


def all_products(
    format: str | Format, vector: str | Format | None = None, rounding: Rounding = Rounding.TIES_TO_EVEN
) -> RecipeConfig:
    """As `forward`, with both operands of the two products of the backward pass rounded too."""
    return replace(forward(format, vector, rounding), passes="all")


def _format(format: str | Format) -> Format:
    return formats.get(format) if isinstance(format, str) else format


@dataclass(frozen=True)
class GivenRecipe(Settings):
    """Any Recipe under a name: other formats for gradients, overrides by site, accumulators."""

    name: str  # stands where the format's name stands otherwise, in tables and figures
    recipe: Recipe

    def check(self) -> None:
        self.require(self.name != "", "name must not be empty")
        recipe_data.to_dict(self.recipe)  # refuses what the config, being data, cannot hold

    def build(self) -> Recipe:
        return self.recipe

    def to_dict(self) -> dict[str, Any]:
        return {"format": self.name, "passes": GIVEN, "recipe_definition": recipe_data.to_dict(self.recipe)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        if sorted(data) != ["format", "passes", "recipe_definition"]:
            raise ValueError(f"a recipe that is given whole has format, passes, recipe_definition; got {sorted(data)}")
        return cls(data["format"], recipe_data.from_dict(data["recipe_definition"]))


def named_recipe(name: str) -> GivenRecipe:
    """The recipe of that name in lpsim.machine.named_recipes. Raises ValueError naming the close ones."""
    return GivenRecipe(name, named_recipes.get(name).recipe)


@dataclass(frozen=True)
class Config(Settings):
    """One training run. Steps are optimizer updates; a step number counts completed updates.

    A batch has `batch_size` examples: sequences of tokens, or images. Fields named *_every are in steps.
    """

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerSettings
    recipe: RecipeConfig | GivenRecipe = field(default_factory=RecipeConfig)
    seed: int = 0  # of the initialization, the batches, the optimizer's noise and stochastic rounding
    steps: int = 1000
    batch_size: int = 16
    warmup_steps: int = 50  # the learning rate rises linearly to the optimizer's lr ...
    final_lr_fraction: float = 0.1  # ... then goes as the schedule says, to this fraction of it at the last step
    clip_norm: float | None = 1.0  # of the whole gradient's 2-norm, before the optimizer sees it
    log_every: int = 1
    validate_every: int = 100
    checkpoint_every: int = 100
    # diverged: a training loss above this times ln(classes), the loss of a uniform guess
    divergence_factor: float = 3.0
    # what rounding did, at every site, in every so many steps (lpsim.telemetry)
    telemetry_every: int | None = None
    device: str = "cpu"
    grid: str = ""  # the grid's name; run_grid fills it in
    schedule: Schedule = field(default_factory=Cosine)  # experiments.training.schedules
    metrics: tuple[own.Metric, ...] = ()  # of one's own, measured at every validation
    # the signature of a run of the same grid, of the same model, whose last weights this one begins with (fine-tuning);
    # an adaptive grid knows it from that run's Outcome
    begin_with: str | None = None
    # "bfloat16": under torch.autocast, which casts the operands of products to it; what is simulated rounds the results
    # of that cast, so a float32 weight is rounded twice
    autocast: str | None = None
    micro_batches: int = 1  # so many equal parts of the batch, one after another, whose gradients add up to the batch's
    recompute: bool = False  # blocks keep no activations: the backward pass computes them again, with the same bits
    # the training step's forward and backward pass compiled by torch.compile with this backend ("inductor"), as a
    # baseline for time and memory; only where nothing is rounded, since compiled code cannot be simulated
    compile: str | None = None

    later: ClassVar[Mapping[str, Any]] = {
        "schedule": Cosine().to_dict(),
        "metrics": {},
        "begin_with": None,
        "autocast": None,
        "micro_batches": 1,
        "recompute": False,
        "compile": None,
    }

    sections: ClassVar[dict[str, tuple[dict[str, type[Settings]], str]]] = {
        "model": (MODEL_FAMILIES, "model"),
        "data": (DATA, "data set"),
        "optimizer": (OPTIMIZERS, "optimizer"),
        "schedule": (SCHEDULES, "schedule"),
    }

    def check(self) -> None:
        for name in ("steps", "batch_size", "log_every", "validate_every", "checkpoint_every", "micro_batches"):
            self.require(getattr(self, name) >= 1, f"{name} must be at least 1")
        self.require(
            self.telemetry_every is None or self.telemetry_every >= 1, "telemetry_every must be at least 1, or None"
        )
        self.require(
            0 <= self.warmup_steps < self.steps,
            f"warmup_steps must lie in [0, steps), is {self.warmup_steps} and steps {self.steps} "
            f"(its default is {Config.warmup_steps})",
        )
        self.require(0 <= self.final_lr_fraction <= 1, "final_lr_fraction must lie in [0, 1]")
        self.require(self.clip_norm is None or self.clip_norm > 0, "clip_norm must be positive, or None")
        self.require(self.divergence_factor > 1, "divergence_factor must be above 1")
        self.require(
            self.autocast in (None, *AUTOCASTS),
            f"autocast must be one of {', '.join(AUTOCASTS)}, or None, is {self.autocast!r}",
        )
        self.require(
            self.batch_size % self.micro_batches == 0,
            f"micro_batches must divide batch_size; {self.micro_batches} does not divide {self.batch_size}",
        )
        if self.compile is not None:
            known = torch.compiler.list_backends(exclude_tags=())
            self.require(self.compile in known, f"compile must be {', '.join(known)}, or None, is {self.compile!r}")
            self.require(
                self.recipe.build().plain and self.telemetry_every is None,
                "compile needs a recipe that rounds nothing, such as float32, and no telemetry: compiled code cannot "
                "be simulated",
            )
        self.require(0 <= self.seed < 2**32, f"seed must lie in [0, 2**32), is {self.seed}")
        for section, part in self._own_sections().items():
            table, what = self.sections[section]
            own.check(part, what, () if section == "model" else table)
        for metric in self.metrics:
            own.check(metric, "metric", SHIPPED_METRICS)
            self.require(metric.name.isidentifier(), f"a metric's name is a word, is {metric.name!r}")
        names = [metric.name for metric in self.metrics]
        self.require(len(set(names)) == len(names), f"two metrics have one name: {', '.join(names)}")
        self.require(
            self.data.inputs == self.model.inputs,
            f"{self.data.name} gives {self.data.inputs}, {self.model.name} takes {self.model.inputs}",
        )
        self.data.check_model(self.model)

    def own_parts(self) -> list[Settings]:
        """The parts whose classes are not shipped."""
        return [*self._own_sections().values(), *self.metrics]

    def _own_sections(self) -> dict[str, Settings]:
        parts = {section: getattr(self, section) for section in self.sections}
        return {name: part for name, part in parts.items() if type(part) not in self.sections[name][0].values()}

    def to_dict(self) -> dict[str, Any]:
        data = {"version": VERSION, **super().to_dict()}
        own_data = {section: own.to_dict(part) for section, part in self._own_sections().items()}
        return self.written({**data, **own_data, "metrics": {m.name: own.to_dict(m) for m in self.metrics}})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], sources: Path | None = None) -> Self:
        """The config that `to_dict` wrote. Raises ValueError for another version, an unknown name, a wrong type.

        sources: where classes that are not shipped are imported from, a folder that `own.keep` made.
        """
        if data.get("version") != VERSION:
            raise ValueError(f"config of version {data.get('version')!r}; this is version {VERSION}")
        parts = {**cls.later, **{name: value for name, value in data.items() if name != "version"}}
        metrics = parts["metrics"]
        if not isinstance(metrics, Mapping) or not all(own.DEFINITION in metric for metric in metrics.values()):
            raise ValueError(f"metrics must be an object of metrics with a definition each, is {metrics!r}")
        parts["metrics"] = tuple(own.from_dict(metric, sources, "metric") for metric in metrics.values())
        for name, (table, what) in cls.sections.items():
            if name in parts:
                mine = isinstance(parts[name], Mapping) and own.DEFINITION in parts[name]
                read = own.from_dict(parts[name], sources, what) if mine else from_table(table, parts[name], what)
                parts[name] = read
        if "recipe" in parts:
            if not isinstance(parts["recipe"], Mapping):
                raise ValueError(f"recipe must be an object, is {parts['recipe']!r}")
            given = parts["recipe"].get("passes") == GIVEN
            parts["recipe"] = (GivenRecipe if given else RecipeConfig).from_dict(parts["recipe"])
        return super().from_dict(parts)

    def signature(self) -> str:
        """16 hex digits of the SHA-256 of every resolved field, in canonical JSON."""
        canonical = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
