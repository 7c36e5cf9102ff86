"""The model of a step's memory: its sizes are those of the models, and it knows models that it was not fitted to."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import pytest

from experiments.bench import size as bench
from experiments.bench.size import growth, memory, runs
from experiments.training.models.gpt2 import MICRO as GPT2_MICRO
from experiments.training.models.gpt2 import GPT2Config
from experiments.training.models.vit import MICRO as VIT_MICRO
from experiments.training.models.vit import ViTConfig
from lpsim import Recipe, formats


@pytest.mark.parametrize("config", [GPT2_MICRO, VIT_MICRO])
def test_sizes_are_those_of_the_built_model(config: memory.ModelConfig) -> None:
    model, size = config.build(), memory.sizes(config)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    blocks = [p for name, p in model.named_parameters() if "blocks" in name and name.endswith("weight") and p.ndim == 2]
    assert size.hidden == sum(p.numel() for p in blocks)


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        (GPT2Config, None),
        pytest.param(GPT2Config, Recipe.forward(formats.mxfp4_e2m1), marks=pytest.mark.full),
        pytest.param(ViTConfig, Recipe.forward(formats.mxfp4_e2m1), marks=pytest.mark.full),
    ],
)
def test_models_that_were_not_fitted_keep_what_the_model_says(
    family: type[memory.ModelConfig], recipe: Recipe | None
) -> None:
    kept = memory.fitted(family, recipe)
    for config, batch in memory.unseen(family):
        assert kept(memory.sizes(config), batch) == pytest.approx(memory.counted(config, batch, recipe), rel=0.01)


@pytest.mark.full
def test_a_grid_is_run_found_done_and_read() -> None:
    assert list(runs.measure(1)["runs"]) == [1]


def test_the_smallest_size_is_measured_and_drawn(tmp_path: Path) -> None:
    config = growth.sizes(small=True)[0]
    row = growth.measure_size(config, repeats=1)
    assert row["parameters"] == memory.sizes(config).parameters
    grids = pd.DataFrame({"runs": [1, 10], "run": [900.0, 90.0]})
    growth.plot(pd.DataFrame([row]), grids, tmp_path / "size.svg")
    both = (tmp_path / "size.svg").read_text()
    growth.plot(pd.DataFrame(), grids, tmp_path / "size.svg")
    one = (tmp_path / "size.svg").read_text()
    assert ["width d" in text for text in (both, one)] == [True, False]
    assert all("milliseconds a run" in text and "mathdefault" not in text for text in (both, one))


def test_a_plot_without_what_it_draws_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.run(parser.parse_args(["memory", "--plot", "size.svg"])) == 2
    assert "name one of them" in capsys.readouterr().out


def test_an_unknown_part_is_named_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    assert bench.run(parser.parse_args(["speed"])) == 2
    assert capsys.readouterr().out == "no part speed; there are: steps, runs, memory\n"
