"""`lpsim evaluate`: its numbers are those of a loop written by hand; models of runs, transformers and files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from experiments.command import cli
from experiments.command.evaluate import load
from experiments.training.evaluate import Subject, by_site, evaluate
from experiments.training.record import RunRecord
from experiments.training.train import train, validate
from lpsim import Quantizer, Recipe, formats, simulate
from tests.experiments.experiment_jobs import tiny_config


def by_hand(module: nn.Module, batches: Any, recipe: Recipe) -> tuple[float, list[torch.Tensor]]:
    total, count, logits = 0.0, 0, []
    module.eval()
    with torch.no_grad(), simulate(module, recipe):
        for inputs, targets in batches:
            logits.append(module(inputs))
            total += F.cross_entropy(logits[-1].flatten(0, -2), targets.flatten()).item() * targets.numel()
            count += targets.numel()
    return total / count, logits


def check(subject: Subject) -> None:
    """Bit for bit: the model as it is, and all operands rounded."""
    frame = evaluate(subject, [formats.mxfp4_e2m1])
    assert list(frame["rounded"]) == ["nothing", "weights", "weights+activations"]
    plain, y = by_hand(subject.module, subject.batches, Recipe())
    loss, q = by_hand(subject.module, subject.batches, Recipe.forward(formats.mxfp4_e2m1))
    assert frame["loss"].iloc[0] == plain and frame["loss"].iloc[2] == loss
    signal = sum(a.double().square().sum().item() for a in y)
    noise = sum((b.double() - a.double()).square().sum().item() for a, b in zip(y, q, strict=True))
    assert frame["logits_sqnr_db"].iloc[2] == 10 * math.log10(signal / noise)
    assert frame["logits_sqnr_db"].iloc[1] > frame["logits_sqnr_db"].iloc[2]


def test_a_run_is_evaluated_on_its_validation_split(tmp_path: Path, capsys: Any) -> None:
    config, record = tiny_config(), RunRecord(tmp_path)
    record.begin(config.to_dict(), {})
    assert train(config, record) is not None
    record.close()
    subject = load(str(tmp_path), None)
    check(subject)
    data = config.data.load(config.model)
    assert evaluate(subject, [])["loss"].iloc[0] == validate(config, subject.module, data)["loss"]
    assert cli.main(["formats", "compare", "mxfp4_e2m1", "--run", str(tmp_path)]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert [row.split()[1] for row in rows] == list(subject.module.state_dict())
    (tmp_path / "checkpoint.pt").unlink()
    assert cli.main(["evaluate", str(tmp_path), "--formats", "mxfp4_e2m1"]) == 2


def linear() -> Subject:
    torch.manual_seed(0)
    batch = torch.randn(8, 64), torch.arange(8) % 4
    return Subject(nn.Linear(64, 4, bias=False), [batch], F.cross_entropy)


def test_weights_alone_are_rounded_as_by_hand_and_classifiers_have_an_accuracy() -> None:
    subject = linear()
    (x, targets), weight = subject.batches[0], subject.module.weight.detach()  # type: ignore[index]
    logits = F.linear(x, Quantizer(formats.mxfp4_e2m1).quantize(weight))
    frame = evaluate(subject, [formats.mxfp4_e2m1])
    assert frame["loss"].iloc[1] == F.cross_entropy(logits, targets).item()
    assert frame["accuracy"].iloc[1] == float((logits.argmax(-1) == targets).double().mean())
    assert torch.equal(subject.module.weight, weight) and subject.module.training


def test_by_site_names_every_rounded_operand() -> None:
    frame = by_site(linear(), [formats.mxfp4_e2m1])
    assert list(zip(frame["rounded"], frame["role"], strict=True)) == [
        ("weights", "fprop.rhs"),
        ("weights+activations", "fprop.lhs"),
        ("weights+activations", "fprop.rhs"),
    ]
    assert frame["sqnr_db"].iloc[0] == frame["sqnr_db"].iloc[2]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_language_model_that_save_pretrained_wrote(kind: str, tmp_path: Path, capsys: Any) -> None:
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        made = library.GPT2LMHeadModel(
            library.GPT2Config(vocab_size=256, n_positions=32, n_embd=32, n_layer=1, n_head=2)
        )
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        made = library.LlamaForCausalLM(library.LlamaConfig(vocab_size=256, max_position_embeddings=32, **sizes))
    made.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_bytes(bytes(range(256)))
    check(load(str(tmp_path / "model"), text))
    np.save(tmp_path / "tokens.npy", np.frombuffer(text.read_bytes(), np.uint8))
    assert load(str(tmp_path / "model"), tmp_path / "tokens.npy").batches[0][0].shape == (7, 32)  # type: ignore[index]
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "model"), "--formats", "mxfp4_e2m1"]) == 2
    assert "needs --data" in capsys.readouterr().err


def test_an_image_classifier_that_save_pretrained_wrote(tmp_path: Path, capsys: Any) -> None:
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = library.ViTForImageClassification(library.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=10))
    made.save_pretrained(folder := tmp_path / "model")
    np.savez(data := tmp_path / "images.npz", images=np.random.default_rng(0).random((9, 3, 16, 16)), labels=range(9))
    check(load(str(folder), data))
    assert cli.main(["evaluate", str(folder), "--data", str(data), "--formats", "mxfp4_e2m1", "--by-site"]) == 0
    assert "fprop.lhs" in capsys.readouterr().out
    np.savez(data, images=np.zeros(3))
    assert cli.main(["evaluate", str(folder), "--data", str(data), "--formats", "mxfp4_e2m1"]) == 2
    assert "images and labels" in capsys.readouterr().err
    (folder / "model.safetensors").unlink()
    assert cli.main(["evaluate", str(folder), "--data", str(data), "--formats", "mxfp4_e2m1"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "model", "names", "message"),
    [
        ("def f(): return 1, [], None", "m.py:f", ["mxfp4"], "did you mean"),
        ("import nothing_of_that_name", "m.py:f", ["nf4"], "m.py:1: ModuleNotFoundError"),
        ("def f(): return 1, [], None", "m.py:g", ["nf4"], "no attribute 'g'"),
        ("def f(): return 1, [], None", "m.py:f", ["nf4"], "tuple (module, batches, loss function)"),
        ("", "m.py", ["nf4"], "say which function"),
        ("", "absent.py:f", ["nf4"], "no such Python file"),
        ("", "nowhere", ["nf4"], "neither a run"),
    ],
)
def test_mistakes_are_told(
    source: str, model: str, names: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(source)
    assert cli.main(["evaluate", model, "--formats", *names]) == 2
    assert message in capsys.readouterr().err
