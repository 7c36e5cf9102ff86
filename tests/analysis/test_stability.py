"""Laws of the stability measures: exact on exact series, equivariant in units, within a computed band on noise."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import load
from analysis.statistics import stability
from tests.analysis import run_folders as made


def test_weight_growth_is_the_exponent() -> None:
    step = np.arange(0, 2000, 50)
    for rate in (-0.3, 0.0, 0.69, 4.0):
        norm = 7.0 * np.exp(rate * step / 1000)
        assert stability.weight_growth(step, norm) == pytest.approx(rate, abs=1e-12)
        assert stability.weight_growth(step, 1e6 * norm) == pytest.approx(rate, abs=1e-12)
    broken = np.append(norm, [math.inf, math.nan, 0.0])
    assert stability.weight_growth(np.append(step, [1, 2, 3]), broken) == pytest.approx(4.0, abs=1e-12)
    assert math.isnan(stability.weight_growth(step[:1], norm[:1]))
    assert math.isnan(stability.weight_growth(step[:0], norm[:0]))


def descent(seed: int, n: int = 600, noise: float = 0.03) -> np.ndarray:
    return 2.0 + 3.5 * np.exp(-np.arange(n) / 80) + noise * np.random.default_rng(seed).normal(size=n)


def test_noise_is_hardly_ever_a_spike() -> None:
    # 6 robust sd of 50 values behave like 6 of a t with 18 degrees of freedom: 6e-6 a step, so 0.4 in 66 000 steps; the
    # 2% floor only lowers that. A Poisson count of mean 0.4 is above 4 with probability 6e-5.
    assert sum(stability.loss_spikes(descent(seed))[0] for seed in range(120)) <= 4


def test_spikes_are_counted_once_each() -> None:
    loss = descent(0)
    for at, width in ((370, 1), (450, 4), (530, 2)):
        loss[at : at + width] += 1.0
    loss[451] += 0.5
    count, largest = stability.loss_spikes(loss)
    assert count == 3
    assert largest == pytest.approx(loss[451] - np.median(loss[401:451]), rel=1e-12)
    assert stability.loss_spikes(4 * loss) == (count, pytest.approx(4 * largest, rel=1e-12))
    loss[410] = math.nan  # divergence, not a spike
    assert stability.loss_spikes(loss)[0] == 3
    assert stability.loss_spikes(loss[: stability.SPIKE_WINDOW]) == (0, 0.0)


def test_a_flat_loss_needs_two_per_cent() -> None:
    loss = np.full(100, 5.0)
    loss[80] = 5.09
    assert stability.loss_spikes(loss) == (0, 0.0)
    loss[80] = 5.11
    assert stability.loss_spikes(loss) == (1, pytest.approx(0.11))


def test_gradient_noise_is_the_sd_of_the_logarithm() -> None:
    # the scaled median absolute deviation of n normal values has standard deviation 1.17 σ / sqrt(n); 5 of them
    n, sd = 8000, 0.3
    drift = np.linspace(3, -1, 2 * n)
    norm = np.exp(drift + sd * np.random.default_rng(1).normal(size=2 * n))
    assert stability.gradient_noise(norm) == pytest.approx(sd, abs=5 * 1.17 * sd / math.sqrt(n))
    assert stability.gradient_noise(1000 * norm) == pytest.approx(stability.gradient_noise(norm), rel=1e-9)
    assert stability.gradient_noise(np.exp(drift)) == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(stability.gradient_noise(norm[:14]))


def test_wilson_interval() -> None:
    z = 1.959963984540054
    for n in (1, 5, 40):
        assert stability.wilson_interval(0, n) == (0.0, pytest.approx(z * z / (n + z * z), rel=1e-12))
        for k in range(n + 1):
            low, high = stability.wilson_interval(k, n)
            mirrored = stability.wilson_interval(n - k, n)
            assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]), abs=1e-12)
            assert 0 <= low <= k / n <= high <= 1
    assert all(math.isnan(bound) for bound in stability.wilson_interval(0, 0))


def test_divergence_is_counted_over_decided_runs(tmp_path: Path) -> None:
    outcomes = {
        0: ("finished", None),
        1: ("diverged", 90),
        2: ("diverged", 90),
        3: ("failed", 20),
        4: ("unfinished", 20),
    }
    configs = [made.config("gpt2-micro", "lmd", "mxfp4_e2m1", seed) for seed in range(5)]
    made.write_runs(tmp_path, configs, lambda config: outcomes[config["seed"]])
    results = load.read(tmp_path)
    per_run = stability.by_run(results.metrics)
    row = stability.by_arm(results.runs, per_run).iloc[0]
    assert (row["runs"], row["diverged"], row["rate"]) == (3, 2, 2 / 3)
    finished = per_run[per_run["signature"] == made.signature(configs[0])].iloc[0]
    for name in stability.PER_RUN:
        assert row[name] == finished[name]
    growth = 0.9 * (1 + 2 * made.LOST["mxfp4_e2m1"])
    assert row["weight_growth"] == pytest.approx(growth, rel=1e-9)


RATES = (0.01, 0.03, 0.1, 0.3)


@pytest.mark.parametrize(
    ("diverges", "largest", "smallest"),
    [((), 0.3, math.nan), ((0.3,), 0.1, 0.3), ((0.03, 0.3), 0.01, 0.03), ((0.01,), math.nan, 0.01)],
)
def test_the_largest_stable_rate_lies_below_every_unstable_one(
    tmp_path: Path, diverges: tuple[float, ...], largest: float, smallest: float
) -> None:
    configs = [made.config("gpt2-micro", "lmd", "float32", seed, lr=lr) for lr in RATES for seed in (0, 1)]
    made.write_runs(
        tmp_path,
        configs,
        lambda config: (
            ("diverged", 60) if config["seed"] and config["optimizer"]["lr"] in diverges else ("finished", None)
        ),
    )
    table = stability.largest_stable_learning_rate(load.runs(tmp_path))
    assert list(table["tried"]) == ["0.01, 0.03, 0.1, 0.3"]
    np.testing.assert_equal(table[["largest_stable", "smallest_unstable"]].to_numpy(), [[largest, smallest]])


def test_failed_runs_decide_no_rate(tmp_path: Path) -> None:
    configs = [made.config("gpt2-micro", "lmd", "float32", 0, lr=lr) for lr in RATES]
    made.write_runs(tmp_path, configs, lambda c: ("failed", 20) if c["optimizer"]["lr"] == 0.3 else ("finished", None))
    table = stability.largest_stable_learning_rate(load.runs(tmp_path))
    assert list(table["largest_stable"]) == [0.1]
    assert table["smallest_unstable"].isna().all()


def test_a_grid_of_one_rate_has_no_table_of_rates(tmp_path: Path) -> None:
    made.write_runs(tmp_path, made.quickstart(1))
    assert stability.largest_stable_learning_rate(load.runs(tmp_path)).empty
    assert isinstance(stability.by_run(load.metrics(tmp_path).iloc[:0]), pd.DataFrame)
