"""The models: sizes as published, initialization as documented, causality, a tied head."""

import json
import math
from pathlib import Path

import pytest
import torch

from experiments.training.config import Config
from experiments.training.config import model as shipped
from experiments.training.data import Digits, ModelConfig, StdlibText
from experiments.training.models import gpt2, huggingface, vit
from experiments.training.optimizers import AdamW


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2-124m", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("vit-s/16", 22_050_664),
        ("vit-b/16", 86_567_656),
        ("llama-60m", 58_073_600),
        ("llama-350m", 367_969_280),
    ],
)
def test_real_sizes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    if name.startswith("llama"):
        pytest.importorskip("transformers")
    with torch.device("meta"):
        model = shipped(name).build()
    assert sum(p.numel() for p in model.parameters()) == parameters


def micro(config: ModelConfig) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return config.build()


def test_the_first_guess_is_nearly_uniform() -> None:
    tokens, targets = torch.randint(256, (2, 4, 64), generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(micro(gpt2.MICRO)(tokens).flatten(0, 1), targets.flatten())
    assert abs(loss.item() - math.log(256)) < 0.1
    images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    probabilities = micro(vit.MICRO)(images).softmax(-1)
    assert probabilities.shape == (32, 10) and (probabilities - 0.1).abs().max() < 0.05


def test_initialization() -> None:
    for name, parameter in micro(gpt2.MICRO).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.ndim == 1:
            assert (parameter == 1).all()
        else:
            expected = 0.02 / math.sqrt(2 * gpt2.MICRO.layers) if name.endswith("proj.weight") else 0.02
            band = 5 * expected / math.sqrt(2 * parameter.numel())  # five standard errors of a standard deviation
            assert abs(parameter.std().item() - expected) < band


def test_the_head_is_the_token_embedding() -> None:
    model = micro(gpt2.MICRO)
    assert model.lm_head.weight is model.tokens.weight
    assert sum("lm_head" in name for name, _ in model.named_parameters()) == 0


def test_a_prediction_does_not_see_later_tokens() -> None:
    model = micro(gpt2.MICRO)
    tokens = torch.randint(256, (1, 64), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, 40:] = (other[:, 40:] + 1) % 256
    before, after = model(tokens), model(other)
    assert torch.allclose(before[:, :40], after[:, :40], atol=1e-6)
    assert not torch.allclose(before[:, 40], after[:, 40], atol=1e-3)


def test_a_shorter_context_is_a_prefix() -> None:
    model = micro(gpt2.MICRO)
    tokens = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(tokens)[:, :10], model(tokens[:, :10]), atol=1e-5)


# --- models of transformers ---

LLAMA = {
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
}
VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "num_labels": 10,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def test_a_dictionary_a_config_and_a_saved_folder_are_the_same_model(tmp_path: Path) -> None:
    library = pytest.importorskip("transformers")
    config = library.LlamaConfig(**{name: value for name, value in LLAMA.items() if name != "model_type"})
    config.save_pretrained(tmp_path)
    models = [huggingface.causal_lm("llama", source, 8) for source in (LLAMA, config, tmp_path, str(tmp_path))]
    first = micro(models[0]).state_dict()
    for model in models[1:]:
        other = micro(model).state_dict()
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_a_model_of_transformers_gives_what_the_library_gives() -> None:
    library = pytest.importorskip("transformers")
    tokens = torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = library.LlamaForCausalLM(library.AutoConfig.for_model(**LLAMA))
    assert torch.equal(micro(huggingface.causal_lm("llama", LLAMA, 8))(tokens), plain(input_ids=tokens).logits)
    assert micro(huggingface.image_classifier("vit", VIT))(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


def test_a_run_of_a_model_of_transformers_has_a_round_trip_and_fits_its_data() -> None:
    pytest.importorskip("transformers")
    config = Config(huggingface.image_classifier("vit", VIT), Digits(), AdamW(lr=0.001))
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))).signature() == config.signature()
    language = Config(huggingface.causal_lm("llama", LLAMA, 8), StdlibText(), AdamW(lr=0.001))
    inputs, targets = language.data.load(language.model).train_batch(0, 0, 2)
    assert inputs.shape == targets.shape == (2, 8)


def test_what_is_no_model_of_transformers_is_told_what_would_be(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r'needs "model_type", such as "llama"'):
        huggingface.causal_lm("x", {"vocab_size": 3}, 8)
    with pytest.raises(ValueError, match=r"config\.json cannot be read as a model's config"):
        huggingface.causal_lm("x", tmp_path, 8)
    with pytest.raises(ValueError, match="a config of transformers, a folder or a dictionary is needed, got int"):
        huggingface.causal_lm("x", 3, 8)
    with pytest.raises(ValueError, match="transformers has no such model for 'vit'"):
        huggingface.causal_lm("x", VIT, 8)
    with pytest.raises(ValueError, match=r"hidden_dropout_prob must be 0, is 0\.1: a resumed run would draw otherwise"):
        huggingface.image_classifier("x", {**VIT, "hidden_dropout_prob": 0.1})
    with pytest.raises(ValueError, match=r"context must lie in \[1, 8\], is 9"):
        huggingface.causal_lm("x", LLAMA, 9)
    with pytest.raises(ValueError, match="stdlib-text gives tokens, vit takes images"):
        Config(huggingface.image_classifier("vit", VIT), StdlibText(), AdamW(lr=0.001))
    with pytest.raises(ValueError, match="has no class 'NoSuchModel'"):
        huggingface.TransformersCausalLM("x", "NoSuchModel", "{}", 8)
