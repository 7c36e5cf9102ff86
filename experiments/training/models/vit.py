"""Vision Transformer (Dosovitskiy et al. 2021): patches by a strided convolution, class token, learned positions,
pre-norm blocks.

Initialization: truncated normal with standard deviation 0.02 (class token and positions too), biases zero, LayerNorm
gains one. No dropout.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from experiments.training.settings import Settings


@dataclass(frozen=True)
class ViTConfig(Settings):
    """Sizes of a ViT; `image_size` and `patch_size` in pixels."""

    tag: ClassVar[str] = "family"
    family: ClassVar[str] = "vit"
    inputs: ClassVar[str] = "images"

    name: str
    layers: int
    heads: int
    d_model: int
    image_size: int
    patch_size: int
    channels: int
    classes: int

    def check(self) -> None:
        sizes = (self.layers, self.heads, self.d_model, self.image_size, self.patch_size, self.channels, self.classes)
        self.require(min(sizes) >= 1, "every size must be at least 1")
        self.require(self.d_model % self.heads == 0, f"d_model {self.d_model} must be a multiple of heads {self.heads}")
        self.require(
            self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} must be a multiple of patch_size {self.patch_size}",
        )

    def build(self) -> "ViT":
        """The model with fresh weights, from torch's global random state."""
        return ViT(self)


MICRO = ViTConfig(name="vit-micro", layers=2, heads=4, d_model=64, image_size=8, patch_size=2, channels=1, classes=10)
# As MICRO, with as many patches, for the images and classes of the data set glyphs.
MICRO_GLYPHS = replace(MICRO, name="vit-micro-glyphs", image_size=16, patch_size=4, classes=36)
BASE = ViTConfig(
    name="vit-b/16", layers=12, heads=12, d_model=768, image_size=224, patch_size=16, channels=3, classes=1000
)
SMALL = replace(BASE, name="vit-s/16", heads=6, d_model=384)


class Attention(nn.Module):
    """Self-attention among all patches: (B, P, D) to (B, P, D)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        batch, patches, d_model = x.shape
        qkv = self.qkv(x).view(batch, patches, 3, self.heads, d_model // self.heads)  # (B, P, 3, H, D/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, H, P, D/H)
        y = F.scaled_dot_product_attention(q, k, v)  # (B, H, P, D/H)
        return self.proj(y.transpose(1, 2).reshape(batch, patches, d_model))  # (B, P, D)


class Block(nn.Module):
    """Attention, then two linear layers, each after a LayerNorm and added to its input: (B, P, D) to (B, P, D)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.d_model)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.mlp = nn.Sequential(
            nn.Linear(config.d_model, 4 * config.d_model), nn.GELU(), nn.Linear(4 * config.d_model, config.d_model)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Images (B, channels, image_size, image_size) to logits (B, classes)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        patches = (config.image_size // config.patch_size) ** 2
        self.patches = nn.Conv2d(config.channels, config.d_model, config.patch_size, stride=config.patch_size)
        self.class_token = nn.Parameter(torch.empty(1, 1, config.d_model))
        self.positions = nn.Parameter(torch.empty(1, patches + 1, config.d_model))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.head = nn.Linear(config.d_model, config.classes)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim >= 2:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)  # (B, P, D)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, P + 1, D)
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))  # (B, classes)
