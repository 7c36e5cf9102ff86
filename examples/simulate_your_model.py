"""Train any PyTorch model on a machine that multiplies in MXFP4, and list everything the machine did."""

import torch
from torch import nn

from lpsim import Recipe, formats, simulate
from lpsim.telemetry import Telemetry

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.LayerNorm(128), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
x = torch.randn(512, 64)
y = (x @ torch.randn(64, 10)).argmax(-1)  # a task that a linear layer can learn

# both operands of every forward product in MXFP4; what lies between the products in bfloat16
recipe = Recipe.forward(formats.mxfp4_e2m1, vector=formats.bfloat16)
with simulate(model, recipe, seed=0) as sim:
    telemetry = Telemetry(sim, every=20)
    for step in range(100):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

print(sim.audit())  # what was quantized, what was exempt and why, and that no product escaped
print(telemetry.table().groupby(["site", "role"])["sqnr_db"].mean().round(1))
