"""The models: sizes as published, initialization as documented, causality, a tied head."""

import math

import pytest
import torch

from experiments.training.config import MODELS
from experiments.training.data import ModelConfig
from experiments.training.models import gpt2, vit


@pytest.mark.parametrize(("name", "parameters"), [("gpt2-124m", 124_439_808), ("vit-b/16", 86_567_656)])
def test_real_sizes_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = MODELS[name].build()
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
