"""`lpsim attribute` on a run agrees with `lpsim evaluate` and keeps its table; the grid that leaves one out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments.command import cli
from experiments.command.attribute import keep
from experiments.command.evaluate import load
from experiments.grids import load_grid
from experiments.grids.leave_one import leave_one
from experiments.training.config import Config, all_products, forward
from experiments.training.evaluate import evaluate
from experiments.training.record import RunRecord
from experiments.training.train import train
from lpsim import formats
from tests.experiments.experiment_jobs import tiny_config

KEPT = "attribution.parquet"


def test_a_run_is_attributed_and_keeps_the_table(tmp_path: Path, capsys: Any) -> None:
    config, record = tiny_config(), RunRecord(tmp_path)
    record.begin(config.to_dict(), {})
    assert train(config, record) is not None
    record.close()
    drawing = tmp_path / "map.svg"
    words = ["attribute", str(tmp_path), "--format", "mxfp4_e2m1"]
    assert cli.main([*words, "--but-one", "--plot", str(drawing), "--output", str(tmp_path / "table.csv")]) == 0
    printed = capsys.readouterr().out
    assert "do the parts add up?" in printed and "Worst in mxfp4_e2m1: " in printed and printed.endswith(f"{KEPT}\n")
    assert drawing.read_text().startswith("<?xml")
    table = pd.read_parquet(tmp_path / KEPT)
    assert set(table["by"]) == {"-", "class", "role", "site", "site-role"} and len(table) == 2 + 2 * (2 + 2 + 7 + 12)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table.csv", keep_default_na=False), table, check_dtype=False)

    nothing, weights, everything = evaluate(load(str(tmp_path), None), [formats.mxfp4_e2m1]).to_dict("records")
    losses = table.set_index(["part", "rounded"])
    for key, row in ((("-", "nothing"), nothing), (("-", "all"), everything), (("fprop.weight", "only"), weights)):
        assert losses.loc[key, "loss"] == row["loss"]  # bit for bit
        assert losses.loc[key, "logits_sqnr_db"] == row["logits_sqnr_db"]

    assert cli.main([*words, "--by", "role"]) == 0  # replaces its rows; the others stay
    assert len(pd.read_parquet(tmp_path / KEPT)) == len(table)
    assert cli.main(["attribute", str(tmp_path), "--recipe", "nvfp4", "--by", "class", "--backward"]) == 0
    assert list(pd.read_parquet(tmp_path / KEPT)["recipe"].unique()) == ["mxfp4_e2m1", "nvfp4"]
    assert cli.main([*words, "--sites", "lm_head"]) == 0
    assert list(pd.read_parquet(tmp_path / KEPT)["recipe"].unique()) == ["mxfp4_e2m1", "nvfp4"]
    trained_on = table[table["by"] == "-"].assign(loss=table["loss"] + 1)
    keep(trained_on, tmp_path)  # another checkpoint's: nothing of the earlier one is left
    assert len(pd.read_parquet(tmp_path / KEPT)) == 2


FILE = """
import torch
from torch import nn
def model():
    return nn.Linear(32, 4), [(torch.ones(2, 32), torch.tensor([0, 1]))], nn.functional.cross_entropy
"""


@pytest.mark.parametrize(
    ("source", "words", "message"),
    [
        (FILE, ["--format", "mxfp4_e2m1", "--sites", "head"], "the site pattern 'head' matches no site of the model"),
        ("import nothing_of_that_name", ["--format", "nf4"], "m.py:1: ModuleNotFoundError"),
        (FILE, ["--format", "mxfp4"], "did you mean"),
        (FILE, ["--recipe", "nvfp"], "unknown recipe 'nvfp'; did you mean nvfp4"),
        (FILE, ["--format", "nf4", "--by", "layer"], "parts are by class, role, site, site-role; got 'layer'"),
        (FILE, ["--format", "nf4", "--by", "role", "--plot", "x.svg"], "--plot draws sites by roles"),
        (FILE, ["--format", "nf4", "--output", "x.txt"], "x.txt: a table is written as .csv or .parquet"),
        (FILE, ["--format", "nf4", "--plot", "x.abc"], "abc"),
    ],
)
def test_mistakes_are_told(
    source: str, words: list[str], message: str, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(source)
    assert cli.main(["attribute", "m.py:model", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_one_part_is_left_in_or_out() -> None:
    base = tiny_config(recipe=all_products("mxfp4_e2m1"))
    configs = list(leave_one(base, seeds=(7, 8), by=("class", "role")))
    names = [config.recipe.name for config in configs[: len(configs) // 2]]
    whole = "mxfp4_e2m1 in all products"
    roles = ("fprop.activation", "fprop.weight", "dgrad.gradient", "dgrad.weight", "wgrad.activation", "wgrad.gradient")
    parts = ("linear", "attention", *roles, "dgrad.activation")
    assert names == ["float32", whole, *(f"{whole}, {how} {part}" for part in parts for how in ("only", "all but"))]
    assert [config.seed for config in configs] == [7] * len(names) + [8] * len(names)
    assert all(replace(config, recipe=base.recipe, seed=0) == replace(base, seed=0) for config in configs)
    assert len({config.signature() for config in configs}) == len(configs)
    assert all(Config.from_dict(config.to_dict()) == config for config in configs[2:6])

    linear = dict(zip(names, configs, strict=False))[f"{whole}, only linear"].recipe.build()
    full = base.recipe.build()
    block = [f"blocks.0.{name}" for name in ("attention.qkv", "attention.proj", "mlp.fc", "mlp.proj")]
    assert list(linear.overrides) == [f"{path}/linear#0" for path in (*block, "lm_head")]
    for recipe in linear.overrides.values():
        assert (recipe.fprop, recipe.dgrad, recipe.wgrad) == (full.fprop, full.dgrad, full.wgrad)
        assert recipe.backward_operands is full.backward_operands
    with pytest.raises(ValueError, match="float32 rounds nothing in gpt2-tiny"):
        list(leave_one(tiny_config(), seeds=(0,)))
    only = leave_one(tiny_config(recipe=forward("mxfp4_e2m1")), seeds=(0,), by=("role",), all_but=False)
    roles = ("fprop.activation", "fprop.weight")
    assert [config.recipe.name for config in only][2:] == [f"mxfp4_e2m1, only {role}" for role in roles]


def test_the_shipped_grid_pairs_its_arms() -> None:
    _, configs = load_grid("attribution")
    assert isinstance(configs, list) and len(configs) == 80
    arms = {config.signature() for config in (replace(config, seed=0) for config in configs)}
    assert len(arms) == 20 and {config.optimizer.name for config in configs} == {"adamw", "lmd-for-model"}
