"""Does ViT-B/16, trained from scratch on ImageNet-1k, lose less to MXFP6 and MXFP4 with LMD than with AdamW?

The arms are those of `paper`, 3 seeds: 78 runs of 90 passes in batches of 1024, 10,000 steps of warm-up, as
arXiv:2205.01580 trains plain ViTs; crops and mirror images alone augment. AdamW's rate 0.001 is theirs, its decay 0.1
stands for their 0.0001, which is not multiplied by the rate; Madam and LMD at their defaults here, not tuned at this
size. A run needs a GPU; data/imagenet holds shards in the layout of WebDataset, train-*.tar and val-*.tar.

The twin takes the same path with a model of 0.1 million parameters on drawn characters, on CPUs:

    lpsim data sample
    lpsim run paper_vit --twin --report
"""

from collections.abc import Iterator
from dataclasses import replace

from experiments.grids import paper
from experiments.grids.claims import Claim
from experiments.training.config import Config, model
from experiments.training.data import ImageShards
from experiments.training.models.vit import ViTConfig
from experiments.training.optimizers import AdamW, LMDForModel, Madam

TWIN = ViTConfig(name="vit-twin", layers=2, heads=4, d_model=64, image_size=32, patch_size=8, channels=3, classes=36)
IMAGES, BATCH, PASSES = 1_281_167, 1024, 90


def experiment(twin: bool) -> paper.Experiment:
    adamw = AdamW(lr=0.001, betas=(0.9, 0.999))
    base = Config(
        model=model("vit-b/16"),
        data=ImageShards(folder="data/imagenet"),
        optimizer=adamw,
        steps=PASSES * IMAGES // BATCH,
        batch_size=BATCH,
        micro_batches=8,
        warmup_steps=10_000,
        log_every=10,
        validate_every=5000,
        checkpoint_every=1000,
        device="cuda",
    )
    if twin:
        data = ImageShards(folder="data/twin-images")
        base = paper.twin(replace(base, model=TWIN, data=data, batch_size=32, validate_every=400, micro_batches=1))
    return paper.Experiment(base, adamw, Madam(lr=0.01), LMDForModel(others_lr=0.001))


def grid(twin: bool = False) -> Iterator[Config]:
    yield from experiment(twin).runs()


def claims(twin: bool = False) -> Iterator[Claim]:
    yield from experiment(twin).claims()
