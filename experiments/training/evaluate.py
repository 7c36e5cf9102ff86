"""A trained model under number formats, without training: loss, perplexity or accuracy, and the error of its logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.training import own
from experiments.training.config import Config
from experiments.training.models.huggingface import Logits, transformers
from experiments.training.record import RunRecord, read_json
from experiments.training.train import build, cross_entropy
from lpsim import Gemm, Quantizer, Recipe
from lpsim.formats import Format
from lpsim.machine import measured
from lpsim.machine.ops import Observer
from lpsim.machine.telemetry import rounding_sums

if TYPE_CHECKING:
    import pandas

BATCH_SIZE = 8
CONTEXT = 128
WEIGHT_OPS = ("linear", "addmm", "conv1d", "conv2d", "conv3d")  # whose second operand is a weight


@dataclass(frozen=True)
class Subject:
    """What is evaluated. module(inputs) gives logits; loss(logits, targets) is a mean over the targets.

    batches: pairs of inputs and targets, of integer classes; gone through once for every format.
    """

    module: nn.Module
    batches: Iterable[tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy

    def __post_init__(self) -> None:
        if not isinstance(self.module, nn.Module) or not callable(self.loss):
            raise ValueError("what is evaluated is a tuple (module, batches, loss function)")
        object.__setattr__(self, "batches", batches := list(self.batches))
        if not batches:
            raise ValueError("there is no batch to evaluate on")


def recipes(fmt: Format) -> dict[str, Recipe]:
    """What is rounded, and its recipe: the weights of linear and convolution ops alone, or both operands everywhere."""
    weights = Recipe(fprop=Gemm(rhs=Quantizer(fmt)))
    return {
        "weights": Recipe(overrides={f"*/{op}": weights for op in WEIGHT_OPS}),
        "weights+activations": Recipe.forward(fmt),
    }


def evaluate(subject: Subject, formats: Sequence[Format]) -> pandas.DataFrame:
    """One row for the model as it is (format "-"), then two for each format: format, rounded, loss, perplexity or
    accuracy, logits_sqnr_db.

    perplexity: e^loss, where a target is one of a sequence; accuracy, in [0, 1], where an example has one target.
    logits_sqnr_db: 10·log10(Σy² / Σ(y' − y)²) over all logits, y those of the model as it is; infinite without a
    difference, NaN where a logit is not finite.
    """
    import pandas

    plain = measured.run(subject.module, subject.batches, subject.loss, Recipe())
    rows = [_row("-", "nothing", subject, plain, math.inf)]
    for fmt in formats:
        for name, recipe in recipes(fmt).items():
            outcome = measured.run(subject.module, subject.batches, subject.loss, recipe)
            rows.append(_row(fmt.name, name, subject, outcome, measured.sqnr_db(plain.logits, outcome.logits)))
    return pandas.DataFrame(rows)


def by_site(subject: Subject, formats: Sequence[Format]) -> pandas.DataFrame:
    """SQNR of every rounded operand at every site, over all batches: format, rounded, site, role, sqnr_db."""
    import pandas

    rows = []
    for fmt in formats:
        for name, recipe in recipes(fmt).items():
            sums: dict[tuple[str, str], list[float]] = {}
            measured.run(subject.module, subject.batches, subject.loss, recipe, _summing(sums))
            rows += [
                {"format": fmt.name, "rounded": name, "site": site, "role": role, "sqnr_db": measured.decibel(*total)}
                for (site, role), total in sums.items()
            ]
    return pandas.DataFrame(rows, columns=["format", "rounded", "site", "role", "sqnr_db"])


def _summing(sums: dict[tuple[str, str], list[float]]) -> Observer:
    """An observer that adds signal and noise of every rounded operand to `sums`, by site and role."""

    def observe(call: Any, role: Any, quantizer: Any, axis: int, x: Tensor, result: Tensor) -> None:
        if quantizer is not None:
            signal, noise, *_ = rounding_sums(x, result)
            total = sums.setdefault((call.site.name, role.label), [0.0, 0.0])
            total[0] += signal
            total[1] += noise

    return observe


def _row(fmt: str, rounded: str, subject: Subject, outcome: measured.Outcome, sqnr_db: float) -> dict[str, Any]:
    loss, targets = outcome.loss, [targets for _, targets in subject.batches]
    if targets[0].ndim > 1:
        score = {"perplexity": math.exp(loss) if loss < 700 else math.inf}
    else:
        right = sum(int((y.argmax(-1) == t).sum()) for y, t in zip(outcome.logits, targets, strict=True))
        score = {"accuracy": right / sum(t.numel() for t in targets)}
    return {"format": fmt, "rounded": rounded, "loss": loss, **score, "logits_sqnr_db": sqnr_db}


def from_run(folder: Path) -> Subject:
    """A run's last checkpoint on its own validation split. Raises ValueError, RunFolderError."""
    document = read_json(folder / "config.json")
    saved = RunRecord(folder).load_checkpoint("cpu")
    if document is None or saved is None:
        raise ValueError(f"{folder} holds no {'config.json' if document is None else 'checkpoint.pt'}: not a run's end")
    made_in = read_json(folder / "env.json") or {}
    sources = folder.parent / own.FOLDER / made_in["sources"] if made_in.get("sources") else None
    config = Config.from_dict(document, sources)
    model, _ = build(config)
    model.load_state_dict(saved["model"])
    data = config.data.load(config.model)
    return Subject(model.cpu(), list(data.validation_batches(config.batch_size)))


def from_pretrained(folder: Path, data: Path | None) -> Subject:
    """A causal language model or image classifier that save_pretrained wrote, on the file `data`.

    data: a .npy of token numbers; a .npz with `images` [n, channels, height, width] and `labels` [n]; or text, read by
    the folder's tokenizer, or byte by byte where it has none. Sequences are as long as the model takes, at most 128.
    Raises ValueError. Nothing is downloaded, and no code of the folder is run.
    """
    library = transformers()
    document = read_json(folder / "config.json") or {}
    names = document.get("architectures") or [""]
    architecture = getattr(library, str(names[0]), None)
    causal = str(names[0]).endswith(("ForCausalLM", "LMHeadModel"))
    if architecture is None or not (causal or str(names[0]).endswith("ForImageClassification")):
        raise ValueError(f"{folder}: no causal language model or image classifier of transformers, but {names[0]!r}")
    if data is None or not data.is_file():
        raise ValueError(f"evaluating {folder} needs --data FILE, {'text or .npy' if causal else '.npz'}; got {data}")
    try:
        module = architecture.from_pretrained(folder, local_files_only=True, torch_dtype=torch.float32)
    except Exception as error:  # the library raises many kinds
        raise ValueError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from None
    if not causal:
        return Subject(Logits(module, "pixel_values"), _images(data))
    longest = document.get("max_position_embeddings", document.get("n_positions", CONTEXT))
    tokens = _tokens(folder, data, int(document["vocab_size"]))
    return Subject(Logits(module, "input_ids"), _windows(tokens, min(longest, CONTEXT), data))


def _tokens(folder: Path, data: Path, vocabulary: int) -> Tensor:
    if data.suffix == ".npy":
        tokens = torch.from_numpy(_numpy(data).astype(np.int64)).flatten()
    elif (folder / "tokenizer_config.json").exists():
        tokenizer = transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
        tokens = torch.tensor(tokenizer(data.read_text("utf-8"))["input_ids"])
    else:
        tokens = torch.tensor(list(data.read_bytes()), dtype=torch.int64)
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise ValueError(f"{data}: tokens must lie in [0, {vocabulary}), go to {int(tokens.max())}")
    return tokens


def _windows(tokens: Tensor, context: int, data: Path) -> list[tuple[Tensor, Tensor]]:
    """Sequences one after the other, the last short one left out."""
    count = (len(tokens) - 1) // context
    if count < 1:
        raise ValueError(f"{data}: too short; one sequence needs {context + 1} tokens, there are {len(tokens)}")
    inputs = tokens[: count * context].view(count, context)
    targets = tokens[1 : count * context + 1].view(count, context)
    return list(zip(inputs.split(BATCH_SIZE), targets.split(BATCH_SIZE), strict=True))


def _images(data: Path) -> list[tuple[Tensor, Tensor]]:
    arrays = _numpy(data)
    try:
        images, labels = torch.from_numpy(arrays["images"]).float(), torch.from_numpy(arrays["labels"]).long()
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{data}: a .npz with images and labels is needed ({error})") from None
    return list(zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True))


def _numpy(data: Path) -> Any:
    try:
        return np.load(data, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{data} cannot be read as numpy's arrays: {error}") from None
