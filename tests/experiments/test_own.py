"""Classes that are not shipped: what changes a run's signature, where workers find them, what is refused."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from experiments.command import cli
from experiments.grids import load_grid
from experiments.grids.product import product
from experiments.grids.source_files import SourceError
from experiments.training import evaluate
from experiments.training.config import Config, forward
from experiments.training.data import Digits, Glyphs, StdlibText
from experiments.training.image_files import ImageFolders, ImageShards
from experiments.training.optimizers import AdamW, OptimizerSettings
from experiments.training.own import Model
from experiments.training.schedules import SCHEDULES, WSD, Constant, Cosine, Linear
from experiments.training.text import HuggingFaceText, TextFile
from experiments.training.token_files import TokenFiles
from tests.experiments import experiment_jobs
from tests.experiments.experiment_jobs import tiny_config, wait_until

MIXER = (Path(__file__).parent / "mixer_grid.py").read_text()


def signatures(folder: Path, text: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    (folder / "mixer_grid.py").write_text(text)
    configs = load_grid(str(folder / "mixer_grid.py"))[1]
    assert isinstance(configs, list)
    return [config.signature() for config in configs]


def numbers(run: Path) -> list[dict[str, Any]]:
    """What a run logged, times left out."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "time_ms"} for line in lines]


def test_the_source_that_a_class_uses_enters_the_signature_and_comments_do_not(tmp_path: Path) -> None:
    before = signatures(tmp_path, MIXER)
    for old, new in (
        ("# (B, channels, patches)", "# mixes the patches"),
        ("class Mixer(Model):\n", 'class Mixer(Model):\n    """After Tolstikhin et al., 2021."""\n\n'),
    ):
        assert old in MIXER and signatures(tmp_path, MIXER.replace(old, new)) == before
    assert signatures(tmp_path, "# a line above\n\nUNUSED = 1\n" + MIXER) == before
    for old, new in (
        ("nn.ReLU()", "nn.Tanh()"),
        ("4 * self.width, 2)", "4 * self.width, 2, bias=False)"),
        ("randn", "rand"),
        ("Adagrad(groups", "RMSprop(groups"),
    ):
        assert old in MIXER and not set(signatures(tmp_path, MIXER.replace(old, new))) & set(before)


def test_modules_beside_the_grid_count_too(tmp_path: Path) -> None:
    block = MIXER[MIXER.index("class Block") : MIXER.index("@dataclass")]
    grid = MIXER.replace(block, "").replace(
        "from torch import nn\n", "from torch import nn\nfrom blocks import Block\n"
    )
    beside = tmp_path / "blocks.py"
    beside.write_text("from torch import nn\n\n" + block)
    before = signatures(tmp_path, grid)
    beside.write_text("from torch import nn\n# again\n" + block)
    assert signatures(tmp_path, grid) == before
    beside.write_text("from torch import nn\n\n" + block.replace("ReLU", "Tanh"))
    assert signatures(tmp_path, grid) != before


def test_a_killed_run_of_own_classes_resumes_and_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signatures(tmp_path, MIXER.replace("steps=40", "steps=400").replace("range(2)", "range(1)"))
    arguments = ["run", str(tmp_path / "mixer_grid.py"), "--runs", str(tmp_path / "runs"), "--jobs", "1"]
    command = [sys.executable, "-m", "experiments.command.cli", *arguments]
    first = subprocess.Popen(
        command, env=experiment_jobs.environment(), start_new_session=True, stderr=subprocess.DEVNULL
    )
    folder = tmp_path / "runs" / "mixer_grid"
    wait_until(lambda: list(folder.glob("*/checkpoint.pt")), timeout_s=120)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert cli.main([*arguments, "--report"]) == 0
    assert "2 runs: 2 finished" in capsys.readouterr().out
    environments = [json.loads(path.read_text()) for path in folder.glob("*/env.json")]
    assert any("resumed" in each for each in environments)
    assert cli.main([*arguments[:3], str(tmp_path / "undisturbed"), "--jobs", "1"]) == 0
    undisturbed = tmp_path / "undisturbed" / "mixer_grid"
    configs = list(folder.glob("*/config.json"))
    assert len(configs) == 2
    for path in configs:
        assert numbers(path.parent) == numbers(undisturbed / path.parent.name)
    kept = folder / "sources" / environments[0]["sources"]
    assert (kept / "mixer_grid.py").read_text() == (tmp_path / "mixer_grid.py").read_text()
    assert "mixer" in (folder / "report.html").read_text()
    (kept / "mixer_grid.py").write_text("raise SystemExit  # not what the name of the folder says")
    config = json.loads(next(folder.glob("*/config.json")).read_text())
    with pytest.raises(ValueError, match="does not hold what was written there"):
        Config.from_dict(config, kept)
    with pytest.raises(ValueError, match=r"the class Mixer of mixer_grid\.py, not a shipped one"):
        Config.from_dict(config)
    for path in undisturbed.glob("*/config.json"):
        if json.loads(path.read_text())["recipe"]["format"] == "float32":
            ended = json.loads((path.parent / "result.json").read_text())["final"]["validation_loss"]
            assert evaluate.evaluate(evaluate.from_run(path.parent), []).loc[0, "loss"] == pytest.approx(
                ended, rel=1e-6
            )


@dataclass(frozen=True)
class Renamed(AdamW):
    pass


class Undecorated(OptimizerSettings):
    name: ClassVar[str] = "undecorated"


def test_a_class_without_an_identity_is_refused(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Local(AdamW):
        name: ClassVar[str] = "local"

    for optimizer, message in (
        (Local(lr=0.1), "inside a function .* define it at the top level of the grid's file"),
        (Undecorated(lr=0.1), r"Undecorated: write @dataclass\(frozen=True\)"),
        (Renamed(lr=0.1), "'adamw' is the name of a shipped one"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_config(optimizer=optimizer)
    with pytest.raises(SourceError, match=r"mixer_grid.py:\d+: ValueError: data set Stripes: it needs a name"):
        signatures(tmp_path, MIXER.replace('    name: ClassVar[str] = "stripes"\n', ""))


@dataclass(frozen=True)
class Bare(Model):
    """A model without what the shipped data sets ask for."""

    name: ClassVar[str] = "bare"
    inputs: str = "images"


def test_a_data_set_says_what_a_model_of_ones_own_lacks(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    text, tokenizer = str(tmp_path / "text.txt"), str(tmp_path / "tokenizer.json")
    for data, message in (
        (Digits(), r"image_size, channels, classes \(8, 1, 10\), bare has \(None, None, None\)"),
        (Glyphs(), r"image_size, channels, classes \(16, 1, 36\), bare has \(None, None, None\)"),
        (ImageFolders("images"), "bare lacks image_size, channels, classes"),
        (ImageShards("images"), "bare lacks image_size, channels, classes"),
        (StdlibText(), "bare lacks context, vocab_size"),
        (TokenFiles("tokens"), "bare lacks context, vocab_size"),
        (TextFile(text, tokenizer), "bare lacks context, vocab_size"),
        (HuggingFaceText(text, tokenizer), "bare lacks context, vocab_size"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_config(model=Bare(inputs=data.inputs), data=data)


def test_schedules_begin_at_the_peak_and_end_where_they_say() -> None:
    for cls in SCHEDULES.values():
        schedule = cls()
        factors = [schedule.factor((i + 1) / 1000, 0.1) for i in range(1000)]  # type: ignore[attr-defined]
        assert factors == sorted(factors, reverse=True) and factors[0] == pytest.approx(1, abs=1e-2)
        assert factors[-1] == pytest.approx(1.0 if cls is Constant else 0.1)
        config = tiny_config(schedule=schedule)
        assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert WSD(0.25).factor(0.75, 0.0) == 1 and WSD(0.25).factor(0.875, 0.0) == pytest.approx(0.5)
    assert WSD(1.0).factor(0.3, 0.1) == pytest.approx(Linear().factor(0.3, 0.1))


def test_the_cosine_keeps_the_signature_it_had_before_there_were_others() -> None:
    assert "schedule" not in tiny_config(schedule=Cosine()).to_dict()
    assert len({tiny_config(schedule=cls()).signature() for cls in SCHEDULES.values()}) == len(SCHEDULES)


def test_a_product_is_the_nested_loops_first_axis_outermost() -> None:
    base = tiny_config()
    recipes = [forward("float32"), forward("mxfp4_e2m1")]
    loops = [
        replace(base, seed=s, optimizer=replace(base.optimizer, lr=lr), recipe=r)
        for s in range(2)
        for lr in (0.1, 0.2)
        for r in recipes
    ]
    assert product(base, seed=range(2), **{"optimizer.lr": (0.1, 0.2)}, recipe=recipes) == loops
    long = product(
        base,
        lambda c: c.steps > 20,
        size=[{"steps": steps, "seed": 3} for steps in (20, 40)],
        batch_size=lambda c: [c.steps],
    )
    assert [(config.steps, config.seed, config.batch_size) for config in long] == [(40, 3, 40)]


def test_a_product_refuses_what_it_cannot_pair_or_does_not_know() -> None:
    with pytest.raises(ValueError, match="for some seeds and not for others"):
        product(tiny_config(), lambda config: config.seed == 0, seed=range(2))
    with pytest.raises(ValueError, match=r"no field optimizer.lrr; there are: lr, "):
        product(tiny_config(), **{"optimizer.lrr": [1]})
    with pytest.raises(ValueError, match="the axis seed has no values"):
        product(tiny_config(), seed=[])
