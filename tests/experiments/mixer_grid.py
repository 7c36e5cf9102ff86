"""An MLP-Mixer, images of stripes, and torch's Adagrad: nothing of it is shipped."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from experiments.config import Config, forward
from experiments.grids.product import product
from experiments.training.data import ImageArrays
from experiments.training.optimizers import OptimizerSettings
from experiments.training.own import DataSet, Model


class Block(nn.Module):
    def __init__(self, *sizes):  # the numbers of patches and of channels
        super().__init__()
        self.patches, self.channels = (nn.Sequential(nn.LayerNorm(n), nn.Linear(n, n), nn.ReLU()) for n in sizes)

    def forward(self, x):
        x = x + self.patches(x)  # (B, channels, patches)
        return x + self.channels(x.transpose(1, 2)).transpose(1, 2)


@dataclass(frozen=True)
class Mixer(Model):
    name: str = "mixer"
    width: int = 16
    inputs: ClassVar[str] = "images"

    def build(self):
        patches = nn.Conv2d(1, self.width, 2, stride=2)
        return nn.Sequential(patches, nn.Flatten(2), Block(4, self.width), nn.Flatten(), nn.Linear(4 * self.width, 2))


@dataclass(frozen=True)
class Stripes(DataSet):  # images of 4x4 pixels, striped across or down, with noise
    name: ClassVar[str] = "stripes"
    inputs: ClassVar[str] = "images"

    def load(self, model):
        labels, stripes = torch.arange(256) % 2, torch.tensor([1.0, -1.0, 1.0, -1.0]).expand(4, 4)
        images = torch.where(labels.view(-1, 1, 1) == 0, stripes, stripes.T)
        noisy = (images + torch.randn(256, 4, 4, generator=torch.Generator().manual_seed(0))).unsqueeze(1)
        return ImageArrays((noisy[:192], labels[:192]), (noisy[192:], labels[192:]), classes=2)


@dataclass(frozen=True)
class Adagrad(OptimizerSettings):
    name: ClassVar[str] = "adagrad"
    weight_decay: float = 0.0  # torch's Adagrad would add it to the gradient

    def make(self, groups, seed):
        return torch.optim.Adagrad(groups, lr=self.lr)


def grid():
    base = Config(Mixer(), Stripes(), Adagrad(lr=0.05), steps=40, warmup_steps=4, validate_every=20, checkpoint_every=5)
    return product(base, seed=range(2), recipe=[forward("float32"), forward("mxfp4_e2m1")])
