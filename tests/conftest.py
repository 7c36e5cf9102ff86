"""Where there is no GPU, Triton runs in its interpreter; it must be told before anything imports it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
