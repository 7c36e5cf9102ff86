"""Does GPT-2 (124M), trained from scratch on OpenWebText, lose less to MXFP6 and MXFP4 with LMD than with AdamW?

The arms are those of `paper`, 3 seeds: 78 runs of 20,000 steps of 480 x 1024 tokens, 10 billion, which is about one
pass over the text. AdamW as nanoGPT trains this model (rate 0.0006, decay 0.1, betas 0.9 and 0.95); Madam and LMD at
their defaults here, not tuned at this size. A run needs a GPU; data/openwebtext holds the tokens of GPT-2's tokenizer:

    lpsim data prepare TEXTS --tokenizer tokenizer.json --output data/openwebtext

The twin takes the same path with a model of 0.1 million parameters on 64,000 tokens a hundred steps, on CPUs:

    lpsim data sample
    lpsim run paper_gpt2 --twin --report
"""

from collections.abc import Iterator
from dataclasses import replace

from experiments.grids import paper
from experiments.grids.claims import Claim
from experiments.training.config import Config, model
from experiments.training.data import TokenFiles
from experiments.training.models.gpt2 import GPT2Config
from experiments.training.optimizers import AdamW, LMDForModel, Madam

TWIN = GPT2Config(name="gpt2-twin", layers=2, heads=4, d_model=64, context=64, vocab_size=257)


def experiment(twin: bool) -> paper.Experiment:
    adamw = AdamW(lr=0.0006, betas=(0.9, 0.95))
    base = Config(
        model=model("gpt2-124m"),
        data=TokenFiles(folder="data/openwebtext"),
        optimizer=adamw,
        steps=20_000,
        batch_size=480,
        micro_batches=30,
        warmup_steps=2000,
        log_every=10,
        validate_every=500,
        checkpoint_every=500,
        device="cuda",
    )
    if twin:
        adamw = replace(adamw, lr=0.006)
        data = TokenFiles(folder="data/twin-text")
        base = paper.twin(replace(base, model=TWIN, data=data, batch_size=10, validate_every=200, micro_batches=1))
    return paper.Experiment(base, adamw, Madam(lr=0.01), LMDForModel())


def grid(twin: bool = False) -> Iterator[Config]:
    yield from experiment(twin).runs()


def claims(twin: bool = False) -> Iterator[Claim]:
    yield from experiment(twin).claims()
