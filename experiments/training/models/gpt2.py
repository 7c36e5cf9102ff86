"""GPT-2 (Radford et al. 2019): pre-norm blocks, learned positions, tanh GELU, output head tied to the token embedding.

Initialization as published: normal with standard deviation 0.02, projections into the residual stream divided by sqrt(2
layers), biases zero, LayerNorm gains one. No dropout.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from experiments.training.settings import Settings


@dataclass(frozen=True)
class GPT2Config(Settings):
    """Sizes of a GPT-2; `context` in tokens."""

    tag: ClassVar[str] = "family"
    family: ClassVar[str] = "gpt2"
    inputs: ClassVar[str] = "tokens"

    name: str
    layers: int
    heads: int
    d_model: int
    context: int
    vocab_size: int

    def check(self) -> None:
        sizes = (self.layers, self.heads, self.d_model, self.context, self.vocab_size)
        self.require(min(sizes) >= 1, "every size must be at least 1")
        self.require(self.d_model % self.heads == 0, f"d_model {self.d_model} must be a multiple of heads {self.heads}")

    def build(self) -> "GPT2":
        """The model with fresh weights, from torch's global random state."""
        return GPT2(self)


MICRO = GPT2Config(name="gpt2-micro", layers=2, heads=4, d_model=64, context=64, vocab_size=256)
SMALL = GPT2Config(name="gpt2-124m", layers=12, heads=12, d_model=768, context=1024, vocab_size=50257)
MEDIUM = GPT2Config(name="gpt2-medium", layers=24, heads=16, d_model=1024, context=1024, vocab_size=50257)


class Attention(nn.Module):
    """Causal self-attention: (B, T, D) to (B, T, D)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, d_model = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, d_model // self.heads)  # (B, T, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, T, D/H)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D/H)
        return self.proj(y.transpose(1, 2).reshape(batch, time, d_model))  # (B, T, D)


class MLP(nn.Module):
    """Two linear layers with a GELU between them: (B, T, D) to (B, T, D)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.fc = nn.Linear(config.d_model, 4 * config.d_model)
        self.proj = nn.Linear(4 * config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.gelu(self.fc(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, then MLP, each after a LayerNorm and added to its input: (B, T, D) to (B, T, D)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.d_model)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT2(nn.Module):
    """Tokens (B, T) int64 to logits (B, T, vocab_size)."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.positions = nn.Embedding(config.context, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.lm_head.weight = self.tokens.weight
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                residual = name.endswith("proj.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.layers) if residual else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1]
        x = self.tokens(tokens) + self.positions(torch.arange(time, device=tokens.device))  # (B, T, D)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))  # (B, T, V)
