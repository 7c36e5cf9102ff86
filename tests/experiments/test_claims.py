"""Laws of claims in a grid file: they name runs of the grid, or are refused; grid.json holds them before a run ends."""

import json
from pathlib import Path

import pytest

from experiments.command import cli
from experiments.grids import load_claims, load_grid
from experiments.grids.claims import Claim, Contrast, resolve
from experiments.grids.source_files import GridError, SourceError
from experiments.training.optimizers import SGD
from tests.experiments.test_grid import tiny_config

GRID = '''"""Does a smaller rate train worse?

Twelve lines."""
from experiments.grids.claims import Claim, Contrast
from experiments.training.optimizers import SGD
from tests.experiments.test_grid import tiny_config

def arm(lr, seed=0):
    return tiny_config(optimizer=SGD(lr=lr), seed=seed)

def grid():
    for seed in range(3):
        yield arm(0.1, seed)
        yield arm(0.001, seed)

def claims():
    yield Claim("rate", "A larger rate ends lower.", [Contrast("0.1 − 0.001", [arm(0.1)], [arm(0.001)])], [arm(0.1)])
'''


def test_a_claim_names_the_runs_of_its_arms_by_seed() -> None:
    arms = {seed: [tiny_config(seed=seed), tiny_config(seed=seed, optimizer=SGD(lr=0.5))] for seed in (3, 4)}
    runs = {config.signature(): config for both in arms.values() for config in both}
    made = Claim("a", "text", [Contrast("c", [tiny_config(seed=9)], [arms[3][1]], below=0.5)], [tiny_config()])
    (claim,) = resolve([made], runs, Path("g.py"))
    (contrast,) = claim["contrasts"]
    assert [term["weight"] for term in contrast["terms"]] == [1, -1]
    for place, term in enumerate(contrast["terms"]):
        assert term["runs"] == {seed: both[place].signature() for seed, both in arms.items()}
    assert claim["steady"] == [both[0].signature() for both in arms.values()]


def test_what_is_no_claim_about_the_grid_is_refused() -> None:
    arm, other = tiny_config(), tiny_config(optimizer=SGD(lr=0.5))
    runs = {arm.signature(): arm}
    with pytest.raises(ValueError, match="need equally many arms, have 2, 1"):
        Contrast("c", [arm, arm], [other])
    with pytest.raises(ValueError, match=r"metric must be one of validation_loss, .* is 'loss'"):
        Contrast("c", [arm], [other], metric="loss")
    with pytest.raises(ValueError, match="claim 'a' predicts nothing"):
        Claim("a", "text")
    steady = Claim("a", "text", steady=[arm])
    with pytest.raises(GridError, match=r"claim 'b' is about an arm of which the grid has no run: .*lr=0\.5"):
        resolve([steady, Claim("b", "text", steady=[other])], runs, Path("g.py"))
    with pytest.raises(GridError, match="two claims of one name: a, a"):
        resolve([steady, steady], runs, Path("g.py"))
    with pytest.raises(GridError, match="must return Claim objects, it returned 3"):
        resolve([3], runs, Path("g.py"))  # type: ignore[list-item]


def test_a_grid_with_claims_is_reported_with_its_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rates.py").write_text(GRID)
    arguments = ["run", str(tmp_path / "rates.py"), "--jobs", "1", "--runs", str(tmp_path), "--report"]
    assert cli.main(arguments) == 0
    document = json.loads((tmp_path / "rates" / "grid.json").read_text())
    (claim,) = document["claims"]
    named = [signature for term in claim["contrasts"][0]["terms"] for signature in term["runs"].values()]
    assert set(named) == set(document["signatures"])
    text = (tmp_path / "rates" / "report.html").read_text()
    assert text.index("Does a smaller rate train worse?") < text.index("A larger rate ends lower.")
    capsys.readouterr()


def test_claims_are_left_out_where_other_formats_are_chosen_and_absent_where_none_are_made(tmp_path: Path) -> None:
    (tmp_path / "rates.py").write_text(GRID)
    assert len(load_claims(str(tmp_path / "rates.py"))) == 1
    assert load_claims(str(tmp_path / "rates.py"), formats=()) == []
    assert load_claims("quickstart") == []
    (tmp_path / "rates.py").write_text(GRID + "    raise KeyError('x')\n")
    with pytest.raises(SourceError, match=r"rates\.py:\d+: KeyError"):
        load_claims(str(tmp_path / "rates.py"))


@pytest.mark.parametrize("name", ["lmd_claims", "lmd_outsiders"])
def test_the_shipped_claims_are_about_arms_of_their_grids(name: str) -> None:
    if name == "lmd_outsiders":
        pytest.importorskip("transformers")
    path, configs = load_grid(name)
    assert isinstance(configs, list)
    runs = {config.signature(): config for config in configs}
    assert len(runs) == len(configs)
    for claim in resolve(load_claims(name), runs, path):
        for contrast in claim["contrasts"]:
            seeds = [set(term["runs"]) for term in contrast["terms"]]
            assert all(each == seeds[0] == {config.seed for config in configs} for each in seeds)


def test_the_seeds_of_the_claims_about_lmd_tuned_nothing() -> None:
    from experiments.grids import lmd_claims
    from experiments.grids.lmd_claims_arms import GPT2, VIT, tuning

    used = {seed for task in (GPT2, VIT) for seed in tuning(task).all_seeds}
    assert not used & set(lmd_claims.SEEDS) and not {0, 1, 2, 100} & set(lmd_claims.SEEDS)
