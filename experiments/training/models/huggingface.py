"""Models of Hugging Face's transformers, made from their configs with fresh weights; nothing is downloaded.

`causal_lm` and `image_classifier` take a config object, a folder that `save_pretrained` wrote (its config.json alone is
read), or the settings as a dictionary with "model_type". The resolved settings are part of a run's config, so they
survive a change of the library's defaults; what the library computes from them may differ between its versions, which
env.json records.
"""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from experiments.training.settings import Settings

# Llama's shape at the sizes of arXiv:2307.05695 (ReLoRA) and 2403.03507 (GaLore): a head of its own, contexts of 1024.
LLAMAS: dict[str, dict[str, int]] = {
    "llama-60m": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
    "llama-350m": {
        "hidden_size": 1024,
        "intermediate_size": 2736,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
}

DROPOUT = ("dropout", "pdrop", "dropout_prob", "dropout_rate", "drop_path_rate")  # ends of settings' names


@dataclass(frozen=True)
class TransformersModel(Settings):
    """A class of transformers and its settings as JSON.

    Raises: ValueError when the library is not installed, has no such class, or a dropout is above 0: its draws come
    from torch's global state, so a resumed run would draw others.
    """

    tag: ClassVar[str] = "family"
    argument: ClassVar[str]  # of the model's forward

    name: str
    architecture: str  # "LlamaForCausalLM"
    settings: str  # the config as canonical JSON

    def check(self) -> None:
        library = transformers()
        self.require(
            hasattr(library, self.architecture),
            f"transformers {library.__version__} has no class {self.architecture!r}",
        )
        for name, value in self.config.items():
            drops = name.endswith(DROPOUT) and isinstance(value, (int, float)) and value > 0
            self.require(not drops, f"{self.name}: {name} must be 0, is {value}: a resumed run would draw otherwise")

    @property
    def config(self) -> dict[str, Any]:
        return dict(json.loads(self.settings))

    def build(self) -> nn.Module:
        architecture: Any = getattr(transformers(), self.architecture)
        model = architecture(architecture.config_class.from_dict(self.config))
        return Logits(model, self.argument)


@dataclass(frozen=True)
class TransformersCausalLM(TransformersModel):
    """Predicts the next token; `context` tokens a sequence."""

    family: ClassVar[str] = "transformers-causal-lm"
    inputs: ClassVar[str] = "tokens"
    argument: ClassVar[str] = "input_ids"

    context: int

    def check(self) -> None:
        super().check()
        longest = self.config.get("max_position_embeddings", self.config.get("n_positions", self.context))
        self.require(1 <= self.context <= longest, f"context must lie in [1, {longest}], is {self.context}")

    @property
    def vocab_size(self) -> int:
        return int(self.config["vocab_size"])


@dataclass(frozen=True)
class TransformersImageClassifier(TransformersModel):
    """Classifies square images."""

    family: ClassVar[str] = "transformers-image-classifier"
    inputs: ClassVar[str] = "images"
    argument: ClassVar[str] = "pixel_values"

    @property
    def image_size(self) -> int:
        return int(self.config["image_size"])

    @property
    def channels(self) -> int:
        return int(self.config["num_channels"])

    @property
    def classes(self) -> int:
        return len(self.config["id2label"])


class Logits(nn.Module):
    """The unmodified model behind a call with one tensor, which gives the logits alone: (B, T, V) or (B, classes)."""

    def __init__(self, model: nn.Module, argument: str) -> None:
        super().__init__()
        self.model, self.argument = model, argument
        self.options = {"use_cache": False} if argument == "input_ids" else {}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(**{self.argument: inputs}, **self.options).logits


def causal_lm(name: str, config: Any, context: int) -> TransformersCausalLM:
    """A language model by its transformers config; `name` is what tables call it. See this module's docstring."""
    kind, settings = _resolved(config, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    return TransformersCausalLM(name, kind, settings, context)


def llama(name: str) -> TransformersCausalLM:
    """The model of that name in LLAMAS, for 32,000 tokens."""
    sizes = {"model_type": "llama", "vocab_size": 32000, "max_position_embeddings": 1024, **LLAMAS[name]}
    return causal_lm(name, sizes, context=1024)


def image_classifier(name: str, config: Any) -> TransformersImageClassifier:
    """An image classifier by its transformers config; `name` is what tables call it. See this module's docstring."""
    kind, settings = _resolved(config, "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES")
    return TransformersImageClassifier(name, kind, settings)


def transformers() -> Any:
    """The library. Raises ValueError saying how to get it."""
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ValueError(f"models of transformers need the package: pip install transformers ({error})") from None


def _resolved(config: Any, table: str) -> tuple[str, str]:
    """The name of the class for a config, and its settings as canonical JSON."""
    library = transformers()
    if isinstance(config, (str, Path)):
        path = Path(config) / "config.json"
        try:
            config = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as a model's config: {error}") from None
    if isinstance(config, Mapping):
        given = dict(config)
        if "model_type" not in given:
            raise ValueError('a config as a dictionary needs "model_type", such as "llama"')
        config = library.AutoConfig.for_model(given.pop("model_type"), **given)
    if not isinstance(config, library.PretrainedConfig):
        raise ValueError(f"a config of transformers, a folder or a dictionary is needed, got {type(config).__name__}")
    known = getattr(importlib.import_module("transformers.models.auto.modeling_auto"), table)
    if config.model_type not in known:
        raise ValueError(f"transformers has no such model for {config.model_type!r}")
    kind = known[config.model_type]
    settings = {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}
    return kind if isinstance(kind, str) else kind[0], json.dumps(settings, sort_keys=True)
