"""Configs: strict construction, JSON round trip, signatures over every resolved field."""

import dataclasses
import json
from typing import Any

import pytest
from torch import Tensor

from analysis.run_files import flatten, with_left_out
from experiments.training.config import (
    MODELS,
    Config,
    GivenRecipe,
    RecipeConfig,
    all_products,
    forward,
    model,
    named_recipe,
)
from experiments.training.data import Digits, Glyphs, ImageFolders, StdlibText, TokenFiles
from experiments.training.models.gpt2 import GPT2Config
from experiments.training.optimizers import LMD, OPTIMIZERS, AdamW, Madam
from experiments.training.settings import Settings
from lpsim import BlockFormat, FloatFormat, Gemm, Quantizer, Recipe, Rounding, Specials, formats
from lpsim.accumulators import HOPPER_FP8, Accumulator, Order
from lpsim.machine.named_recipes import ALL_RECIPES
from lpsim.machine.recipes import BackwardOperands


def text_config(**fields: Any) -> Config:
    return Config(**{"model": model("gpt2-micro"), "data": StdlibText(), "optimizer": AdamW(lr=0.006)} | fields)


def through_json(config: Config) -> Config:
    return Config.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False)))


ACCUMULATORS = (HOPPER_FP8, Accumulator(formats.bfloat16), Accumulator(formats.float16, 4, Order.PAIRWISE))
EVERY_PART = [
    *(text_config(optimizer=OPTIMIZERS[name](lr=0.01)) for name in OPTIMIZERS),
    *(text_config(recipe=forward(name)) for name in formats.ALL_FORMATS),
    *(text_config(recipe=forward("mxfp4_e2m1", vector="bfloat16", rounding=rounding)) for rounding in Rounding),
    text_config(model=MODELS["gpt2-124m"], data=TokenFiles(folder="openwebtext")),
    text_config(model=MODELS["vit-micro"], data=Digits()),
    text_config(model=MODELS["vit-micro-glyphs"], data=Glyphs()),
    text_config(model=MODELS["vit-b/16"], data=ImageFolders(folder="imagenet")),
    text_config(recipe=all_products("mxfp4_e2m1", vector="bfloat16", rounding=Rounding.STOCHASTIC)),
    *(text_config(recipe=named_recipe(name)) for name in ALL_RECIPES),
    *(text_config(recipe=GivenRecipe("ours", Recipe(Gemm(accumulate=a)))) for a in ACCUMULATORS),
    text_config(clip_norm=None, grid="a", telemetry_every=10),
    text_config(autocast="bfloat16", micro_batches=4, recompute=True),
    text_config(compile="aot_eager"),
    text_config(data=StdlibText(half=2), begin_with="0123456789abcdef"),
]


@pytest.mark.parametrize("config", EVERY_PART, ids=lambda c: c.signature())
def test_json_round_trip(config: Config) -> None:
    again = through_json(config)
    assert again == config
    assert again.signature() == config.signature()


def test_signatures_differ() -> None:
    assert len({config.signature() for config in EVERY_PART}) == len(set(EVERY_PART))


def changed(value: Any) -> Any:
    """Another valid value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + (value % 2 == 0) + 1 if value < 10 else value + 10
    if isinstance(value, float):
        return value * 0.5 if value else 0.25
    if isinstance(value, tuple):
        return (*value[:-1], value[-1] * 0.5)
    if isinstance(value, str):
        return value + "x"
    raise AssertionError(value)


def leaves(part: Settings) -> list[tuple[str, Any]]:
    return [
        (f.name, getattr(part, f.name))
        for f in dataclasses.fields(part)
        if not isinstance(getattr(part, f.name), Settings)
    ]


def test_every_field_enters_the_signature() -> None:
    base = text_config(optimizer=LMD(lr=0.03, prior="log-normal"))
    seen = {base.signature()}

    def add(config: Config) -> None:
        assert config.signature() not in seen
        seen.add(config.signature())

    for name, value in leaves(base):
        if name == "metrics":  # classes of one's own: test_own_metric.py
            continue
        value = {"divergence_factor": 8.0, "telemetry_every": 3, "begin_with": "0123456789abcdef"}.get(name, value)
        other = {"checkpoint_every": 7, "autocast": "bfloat16", "compile": "inductor"}.get(name) or changed(value)
        add(dataclasses.replace(base, **{name: other}))
    for name, value in leaves(base.optimizer):
        other = "flat" if name == "prior" else changed(value)
        add(dataclasses.replace(base, optimizer=dataclasses.replace(base.optimizer, **{name: other})))
    for name, value in leaves(base.model):
        other = {"heads": 8, "d_model": 128, "vocab_size": 512}.get(name) or changed(value)
        add(dataclasses.replace(base, model=dataclasses.replace(base.model, **{name: other})))
    for data in (StdlibText(validation_windows=7), StdlibText(half=1), StdlibText(half=2)):
        add(dataclasses.replace(base, data=data))


def test_the_order_of_overrides_enters_the_signature_as_it_decides() -> None:
    first, second = {"lm_head": Recipe()}, {"*/linear": forward("mxfp4_e2m1").build()}
    configs = [text_config(recipe=GivenRecipe("ours", Recipe(overrides=o))) for o in (first | second, second | first)]
    assert configs[0].signature() != configs[1].signature()
    assert list(through_json(configs[1]).recipe.build().overrides) == ["*/linear", "lm_head"]


def test_a_recipe_that_is_given_runs_as_it_is() -> None:
    given = named_recipe("nvfp4")
    assert given.build() == ALL_RECIPES["nvfp4"].recipe == through_json(text_config(recipe=given)).recipe.build()
    with pytest.raises(ValueError, match="did you mean nvfp4"):
        named_recipe("nvfp")


def test_what_data_cannot_hold_is_refused_in_a_recipe() -> None:
    class Exact:
        def matmul(self, lhs: Tensor, rhs: Tensor) -> Tensor:
            return lhs @ rhs

    with pytest.raises(ValueError, match=r"data cannot hold <.*Exact object.*an lpsim\.Accumulator"):
        GivenRecipe("ours", Recipe(Gemm(accumulate=Exact())))
    own = BlockFormat("own", formats.float4_e2m1fn, formats.float8_e4m3fn, scale_rule=lambda amax, element: amax / 3)
    with pytest.raises(ValueError, match=r"own: the scale rule .*lambda.* is a function; files cannot hold it"):
        GivenRecipe("ours", Recipe(Gemm(Quantizer(own))))
    with pytest.raises(ValueError, match=r"the scale rule of own is a function, which .* take one of ScaleRule\.FLOOR"):
        forward(own)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("recipe_definition", "fprop", "lhz"), None, "a Gemm has the fields lhs, rhs, accumulate, out, got"),
        (("recipe_definition", "backward_operands"), "rounded", "'rounded' is not a valid BackwardOperands"),
        (("recipe_definition", "overrides"), [1], "not the data of a recipe: cannot unpack"),
        (("recipe_definition", "overrides"), None, "not the data of a recipe: "),
        (("recipe_definition", "overrides"), [["lm_head", None]], "overrides maps site patterns to recipes"),
        (("recipe_definition", "fprop"), None, "Recipe.fprop must be a Gemm"),
        (("format",), "", "name must not be empty"),
        (("colour",), "red", r"given whole has format, passes, recipe_definition; got \['colour', "),
    ],
)
def test_a_given_recipe_is_read_as_strictly(path: tuple[str, ...], value: Any, message: str) -> None:
    data = text_config(recipe=named_recipe("nvfp4")).to_dict()
    with pytest.raises(ValueError, match=message):
        Config.from_dict(with_value(data, value, "recipe", *path))


def test_the_definition_of_a_format_enters_the_signature_not_only_its_name() -> None:
    ours = [FloatFormat("mine", 3, 2, bias=bias, specials=Specials.NONE) for bias in (3, 4)]
    first, second = (text_config(recipe=forward(fmt)) for fmt in ours)
    assert first.signature() != second.signature()
    assert through_json(first).recipe.format == ours[0]  # read back without being registered


def test_golden_signature() -> None:
    """Changes with the fields of a config; where what they mean changes, config.VERSION changes, and so does this."""
    config = Config(
        model=GPT2Config(name="g", layers=1, heads=2, d_model=32, context=16, vocab_size=256),
        data=StdlibText(validation_windows=8),
        optimizer=AdamW(lr=0.01, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8),
        recipe=forward("mxfp6_e3m2", vector="bfloat16"),
        seed=1,
        steps=10,
        batch_size=4,
        warmup_steps=2,
        final_lr_fraction=0.1,
        clip_norm=1.0,
        log_every=1,
        validate_every=5,
        checkpoint_every=5,
        divergence_factor=3.0,
        device="cpu",
        grid="golden",
    )
    assert config.signature() == "c55c999a693db495"


def test_numbers_of_equal_value_are_equal_settings() -> None:
    assert text_config(optimizer=AdamW(lr=1)).signature() == text_config(optimizer=AdamW(lr=1.0)).signature()


def test_settings_that_came_later_are_written_only_where_they_are_used() -> None:
    """So a run from before has the signature it had, and its config is read."""
    base = text_config()
    assert not set(Config.later) & set(base.to_dict())
    assert through_json(base) == base
    used = text_config(autocast="bfloat16", micro_batches=2)
    assert {"autocast", "micro_batches"} == set(Config.later) & set(used.to_dict())


def without(data: dict[str, Any], *path: str) -> dict[str, Any]:
    name, *rest = path
    return {k: without(v, *rest) if k == name else v for k, v in data.items() if rest or k != name}


def with_value(data: dict[str, Any], value: Any, *path: str) -> dict[str, Any]:
    name, *rest = path
    return data | {name: with_value(data[name], value, *rest) if rest else value}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("optimizer", "name"), "adamv", r"unknown optimizer name 'adamv'; there are: madam, adamw, "),
        (("model", "family"), "gpt3", r"unknown model family 'gpt3'; there are: gpt2, "),
        (("data", "name"), "stdlibtext", r"unknown data set name 'stdlibtext'; there are: stdlib-text, "),
        (("optimizer", "weight_decy"), 0.1, r"AdamW has no field 'weight_decy'; there are: weight_decay, "),
        (("step",), 3, r"Config has no field 'step'; there are: steps, "),
        (("recipe", "roundng"), "x", r"RecipeConfig has no field 'roundng'; there are: rounding, "),
        (("recipe", "rounding"), "even", r"unknown rounding 'even'; there are: .*ties_to_even"),
        (("recipe", "passes"), "backward", r"passes must be one of forward"),
        (("recipe", "format"), "mxfp4_e2m1", r"names 'mxfp4_e2m1', None but defines other formats"),
        (("version",), 0, r"config of version 0; this is version 1"),
        (("steps",), "10", r"Config.steps must be int, is '10'"),
        (("steps",), True, r"Config.steps must be int, is True"),
        (("steps",), 0, r"steps must be at least 1"),
        (("optimizer", "lr"), "NaN", r"AdamW.lr must be float, is 'NaN'"),
        (("optimizer", "betas"), [0.9], r"AdamW.betas must be .*, is \(0.9,\)"),
        (("optimizer", "betas"), [0.9, 1.0], r"betas and momentum must lie in \[0, 1\), got 1.0"),
        (("seed",), -1, r"seed must lie in"),
        (("autocast",), "float16", r"autocast must be one of bfloat16, or None, is 'float16'"),
        (("micro_batches",), 3, r"micro_batches must divide batch_size; 3 does not divide 16"),
        (("data",), None, r"data set must be an object, is None"),
        (("recipe",), None, r"recipe must be an object, is None"),
    ],
)
def test_what_is_wrong_in_a_config_is_said(path: tuple[str, ...], value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_dict(with_value(text_config().to_dict(), value, *path))


@pytest.mark.parametrize("path", [("steps",), ("optimizer", "eps"), ("recipe", "vector"), ("model", "heads")])
def test_a_missing_field_is_named(path: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"lacks {path[-1]}"):
        Config.from_dict(without(text_config().to_dict(), *path))


def test_construction_is_as_strict_as_reading() -> None:
    with pytest.raises(ValueError, match=r"there are: mxfp4_e2m1|did you mean mxfp4_e2m1"):
        forward("mxfp4_e2m")
    with pytest.raises(ValueError, match="unknown model 'gpt2micro'; there are: gpt2-micro"):
        model("gpt2micro")
    with pytest.raises(ValueError, match="stdlib-text gives tokens, vit-micro takes images"):
        text_config(model=model("vit-micro"))
    with pytest.raises(ValueError, match="digits need image_size, channels, classes"):
        text_config(model=model("vit-b/16"), data=Digits())
    with pytest.raises(ValueError, match=r"AdamW\.lr must be a finite number"):
        AdamW(lr=float("inf"))
    with pytest.raises(ValueError, match="Madam has no weight decay"):
        Madam(lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="prior"):
        LMD(lr=0.1, prior="lognormal")
    with pytest.raises(ValueError, match="heads"):
        GPT2Config(name="g", layers=1, heads=3, d_model=32, context=16, vocab_size=256)


def test_the_recipe_of_float32_is_the_empty_one() -> None:
    recipe = RecipeConfig().build()
    assert recipe == forward("float32").build()
    assert all(gemm.lhs is None and gemm.rhs is None for gemm in (recipe.fprop, recipe.dgrad, recipe.wgrad))


def test_all_products_round_the_unrounded_operands_along_each_product_s_own_axis() -> None:
    recipe = all_products("mxfp4_e2m1", vector="bfloat16").build()
    operand = Quantizer(formats.mxfp4_e2m1)
    assert recipe.dgrad == recipe.wgrad == Gemm(operand, operand)
    assert recipe.fprop == Gemm(operand, operand, out=Quantizer(formats.bfloat16))
    assert recipe.backward_operands is BackwardOperands.UNQUANTIZED
    assert all_products("float32").build() == Recipe()


@pytest.mark.parametrize("config", EVERY_PART, ids=lambda config: config.signature())
def test_reports_know_what_a_config_means_by_leaving_a_setting_out(config: Config) -> None:
    """Otherwise runs that leave it out and runs that name it would not be compared. None and a missing cell are one."""
    known = with_left_out({"optimizer": config.optimizer.name})
    parts: list[tuple[Settings, str]] = [
        (config, ""),
        (config.model, "model."),
        (config.data, "data."),
        (config.optimizer, "optimizer."),
    ]
    for part, prefix in parts:
        for name, value in flatten(dict(part.later)).items():
            assert known.get(prefix + name) == value
