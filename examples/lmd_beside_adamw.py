"""How much does a forward pass in MXFP4 cost LMD, and how much AdamW? One model, one seed: a look, not a result."""

import torch
from torch import nn

from lmd import LMD
from lpsim import Recipe, formats, simulate


def held_out_loss(name: str, recipe: Recipe) -> float:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    x = torch.randn(2048, 32)
    y = (x @ torch.randn(32, 4)).argmax(-1)
    x, y, held_out_x, held_out_y = x[:1024], y[:1024], x[1024:], y[1024:]
    lmd = LMD(model.parameters(), lr=0.01, noise_scale=0.05, seed=0) if name == "lmd" else None
    optimizer = lmd or torch.optim.AdamW(model.parameters(), lr=3e-3)
    with simulate(model, recipe):
        for _ in range(80):
            optimizer.zero_grad()
            if lmd is None:
                nn.functional.cross_entropy(model(x), y).backward()
            else:
                with lmd.sampled_params():  # the gradient is taken at a sample of the posterior
                    nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        with torch.no_grad():
            return nn.functional.cross_entropy(model(held_out_x), held_out_y).item()  # LMD: at the posterior's mean


for name in ("adamw", "lmd"):
    full, low = held_out_loss(name, Recipe()), held_out_loss(name, Recipe.forward(formats.mxfp4_e2m1))
    print(f"{name}: float32 {full:.4f}, MXFP4 {low:.4f}, lost to the format {low - full:+.4f}")
