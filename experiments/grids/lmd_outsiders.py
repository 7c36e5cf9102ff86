"""Does LMD, at its defaults, train models that it was not made with as well as a tuned AdamW does?

A Llama and a ViT of transformers, unmodified, at micro size, in float32 and MXFP4. `lmd.for_model` takes its defaults,
AdamW the learning rate that `lmd_outsiders_tuning` found for each model and format. 1200 steps, 4 seeds: 32 runs, 13
minutes on two cores. Wanted: to end within 0.05 nats of AdamW. The rate and the decay of for_model's AdamW have since
been chosen on these models, at other seeds (`lmd_for_model_rates`, `lmd_for_model_decays`): they are outsiders no more.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from experiments.grids.claims import Claim, Contrast
from experiments.grids.lmd_claims_arms import Task
from experiments.grids.tuning import tuned
from experiments.training.config import Config, forward
from experiments.training.data import Glyphs, StdlibText
from experiments.training.models.huggingface import causal_lm, image_classifier
from experiments.training.optimizers import AdamW, LMDForModel

STEPS = 1200
SEEDS = range(5000, 5004)
MARGIN = 0.05  # nats
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {"model_type": "llama", **SIZES, "intermediate_size": 176, "num_key_value_heads": 2, "vocab_size": 256}
VIT = {"model_type": "vit", **SIZES, "intermediate_size": 256, "image_size": 16, "patch_size": 4, "num_channels": 1}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TASKS = (
    (causal_lm("llama-micro", {**LLAMA, "max_position_embeddings": 64}, context=64), StdlibText(), 16),
    (image_classifier("hf-vit-micro", {**VIT, **NO_DROPOUT, "num_labels": 36}), Glyphs(), 64),
)


def at_defaults(tasks: Iterable[Task], seed: int) -> Iterator[Config]:
    """Each task in each format, with LMD at its defaults."""
    for network, data, batch_size in tasks:
        for format in ("float32", "mxfp4_e2m1"):
            yield Config(
                model=network,
                data=data,
                optimizer=LMDForModel(),
                recipe=forward(format),
                seed=seed,
                steps=STEPS,
                batch_size=batch_size,
                warmup_steps=100,
                validate_every=300,
                checkpoint_every=600,
            )


def pairs(seed: int) -> Iterator[tuple[Config, Config]]:
    """LMD and AdamW."""
    chosen = tuned("lmd_outsiders_tuning")
    for config in at_defaults(TASKS, seed):
        yield config, chosen.config(replace(config, optimizer=AdamW(lr=0.003)))


def grid() -> Iterator[Config]:
    for seed in SEEDS:
        for both in pairs(seed):
            yield from both


def claims() -> Iterator[Claim]:
    for lmd, adamw in pairs(SEEDS[0]):
        where = f"{lmd.model.name}, {lmd.recipe.name}"
        statement = f"LMD at its defaults ends within {MARGIN} nats of a tuned AdamW."
        yield Claim(where, statement, [Contrast("for_model − AdamW", [lmd], [adamw], below=MARGIN)], [lmd])
