"""Small models with random weights, ours and others': a simulation must run every one of them unmodified.

`CASES` names them: each function makes a model and the loss that a step of it minimizes.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.training.models.gpt2 import MICRO as GPT2_MICRO
from experiments.training.models.vit import MICRO as VIT_MICRO

Case = tuple[nn.Module, Callable[[nn.Module], Tensor]]  # a model, and its loss on inputs of its own

TOKENS = torch.randint(0, 96, (2, 16), generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
SEQUENCES = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(3))


def transformers() -> Any:
    """The library; ImportError where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("transformers")


SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def causal(model: nn.Module) -> Tensor:
    """The loss of a causal language model of transformers on TOKENS."""
    return model(input_ids=TOKENS, labels=TOKENS).loss


def gpt2_micro() -> Case:
    tokens = torch.randint(0, 256, (2, 65), generator=torch.Generator().manual_seed(4))
    return GPT2_MICRO.build(), lambda m: F.cross_entropy(m(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def vit_micro() -> Case:
    c = VIT_MICRO
    images = torch.randn(4, c.channels, c.image_size, c.image_size, generator=torch.Generator().manual_seed(5))
    return c.build(), lambda m: F.cross_entropy(m(images), torch.tensor([1, 0, 3, 2]))


def hf_gpt2() -> Case:
    t = transformers()
    config = t.GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    config.loss_type = "ForCausalLM"
    return t.GPT2LMHeadModel(config), causal


def hf_llama() -> Case:
    t = transformers()
    return t.LlamaForCausalLM(t.LlamaConfig(**SIZES, num_key_value_heads=2)), causal


def hf_mixtral() -> Case:
    t = transformers()
    return t.MixtralForCausalLM(t.MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)), causal


def hf_bert() -> Case:
    t = transformers()
    model = t.BertModel(t.BertConfig(**SIZES))
    mask = torch.ones_like(TOKENS)
    mask[1, 9:] = 0
    model.eval()  # no dropout anywhere, but gradients

    def loss(m: nn.Module) -> Tensor:
        out = m(input_ids=TOKENS, attention_mask=mask)
        return (out.last_hidden_state[:, 0] * out.pooler_output).square().mean()

    return model, loss


def hf_vit() -> Case:
    t = transformers()
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    config = t.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=10)
    return t.ViTForImageClassification(config), lambda m: m(pixel_values=IMAGES, labels=torch.tensor([1, 2])).loss


def encoder() -> Case:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), lambda m: m(SEQUENCES).pow(3).mean()


def transformer() -> Case:
    mask = nn.Transformer.generate_square_subsequent_mask(12)
    model = nn.Transformer(32, 4, 1, 1, 64, dropout=0.0, batch_first=True)
    return model, lambda m: m(SEQUENCES, SEQUENCES, tgt_mask=mask, tgt_is_causal=True).pow(3).mean()


class LanguageLSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm, self.head = (
            nn.Embedding(96, 32),
            nn.LSTM(32, 32, 2, batch_first=True),
            nn.Linear(32, 96),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


def lstm() -> Case:
    return LanguageLSTM(), lambda m: F.cross_entropy(m(TOKENS).flatten(0, 1), TOKENS.flatten())


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        return F.relu(self.norm2(self.conv2(y)).add_(self.skip(x)), inplace=True)


def resnet() -> Case:
    stem, head = nn.Conv2d(3, 16, 3, 1, 1), [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    model = nn.Sequential(stem, nn.MaxPool2d(2), Residual(16, 16, 1), Residual(16, 32, 2), *head)
    return model, lambda m: F.cross_entropy(m(IMAGES), torch.tensor([1, 2]))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.norm, self.up = nn.GroupNorm(4, 16), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.down1(x))
        z = self.up(F.silu(self.norm(self.down2(y))))
        z = F.interpolate(F.max_pool2d(z, 2), scale_factor=2, mode="bilinear")
        return self.out(torch.cat([y, z], 1))


def unet() -> Case:
    return UNet(), lambda m: F.mse_loss(m(IMAGES), IMAGES)


CASES: dict[str, Callable[[], Case]] = {
    "gpt2-micro": gpt2_micro,
    "vit-micro": vit_micro,
    "transformers GPT2LMHeadModel": hf_gpt2,
    "transformers LlamaForCausalLM": hf_llama,
    "transformers MixtralForCausalLM": hf_mixtral,
    "transformers BertModel": hf_bert,
    "transformers ViTForImageClassification": hf_vit,
    "nn.TransformerEncoder": encoder,
    "nn.Transformer": transformer,
    "nn.LSTM": lstm,
    "ResNet": resnet,
    "U-Net": unet,
}
