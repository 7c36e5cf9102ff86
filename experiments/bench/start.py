"""What a new process pays before its work begins: imports, and the first call of each kind.

Every row is measured in processes of their own, in turn, since it can be measured once in each; the figures are medians
of seconds, and ratios to importing torch. Numba's compiled kernels come from its cache on disk; the last row is the
first call of all, with that cache empty.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

import pandas as pd

BEFORE = "import torch; x = torch.zeros(64, 256); m = torch.nn.Linear(256, 256)\nfrom lpsim import *"
QUANTIZE = "Quantizer(formats.mxfp6_e3m2)(x)"
SIMULATE = "with simulate(m, Recipe.forward(formats.mxfp6_e3m2)): m(x).sum().backward()"
ARMS = {  # what comes before, and what is measured
    "import torch": ("", "import torch"),
    "import lpsim, torch being there": ("import torch", "import lpsim"),
    "first Quantizer call": (BEFORE, QUANTIZE),
    "first simulated step": (f"{BEFORE}\n{QUANTIZE}", SIMULATE),
    "second simulated step": (f"{BEFORE}\n{SIMULATE}", SIMULATE),
}
COLD = "first Quantizer call, nothing compiled"
TIMED = """{before}
import time
begun = time.perf_counter()
{measured}
print(time.perf_counter() - begun)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5, help="processes of each row (default 5)")


def run(options: argparse.Namespace) -> int:
    samples: dict[str, list[float]] = {name: [] for name in (*ARMS, COLD)}
    for name in ARMS:
        _seconds(*ARMS[name])  # fills the caches
    for _ in range(options.repeats):
        for name in ARMS:
            samples[name].append(_seconds(*ARMS[name]))
        with tempfile.TemporaryDirectory() as empty:
            samples[COLD].append(_seconds(*ARMS["first Quantizer call"], NUMBA_CACHE_DIR=empty))
    medians = {name: statistics.median(seconds) for name, seconds in samples.items()}
    rows = [(name, round(s, 3), round(s / medians["import torch"], 2)) for name, s in medians.items()]
    print(pd.DataFrame(rows, columns=["a new process", "seconds", "over import torch"]).to_string(index=False))
    return 0


def _seconds(before: str, measured: str, **environment: str) -> float:
    code = TIMED.format(before=before, measured=measured)
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, check=True, capture_output=True, text=True
    )
    return float(done.stdout)
