"""Signs of instability: each equals its definition on hand-made numbers; and the picture of frontiers."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.figures.frontier import frontier as picture
from analysis.statistics import instability
from analysis.statistics.stability import loss_spikes, recoveries

QUIET = [2.0, 2.02] * 30  # 60 losses with a median of 2.01


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (QUIET, []),
        ([*QUIET, 5.0, 4.0, 3.0, 2.0, 2.0], [3]),  # back at 2.0, three losses later
        ([*QUIET, 5.0, 4.0, 3.0], [math.nan]),  # never back
        ([*QUIET, 5.0, 2.0, *QUIET, 6.0, 5.0, 2.0], [1, 2]),
        ([*QUIET, 5.0, math.nan, 2.0], [2]),  # a loss that is not finite is left out, its step counts
        ([2.0] * 10 + [9.0], []),  # too short a series for a spike
    ],
)
def test_how_long_the_loss_takes_to_come_back(loss: list[float], expected: list[float]) -> None:
    values = np.array(loss)
    steps = 5.0 * np.arange(values.size)  # logged every 5 steps
    found = recoveries(steps, values)
    np.testing.assert_array_equal(found, 5 * np.array(expected))
    assert loss_spikes(values)[0] == len(expected)


def metrics(signature: str, loss: list[float]) -> list[tuple[Any, ...]]:
    rows = [(signature, step, "train", "loss", value) for step, value in enumerate(loss)]
    return [*rows, (signature, 0, "weights", "norm", 1.0), (signature, 1000, "weights", "norm", math.e)]


def telemetry(signature: str) -> list[tuple[Any, ...]]:
    """Logits of two sites at two steps, and other vector results that are larger; weights of two sites."""
    scores = [(0, "a/attention.scores", 2.0), (0, "b/attention.scores", 4.0)]
    scores += [(50, "a/attention.scores", 12.0), (50, "b/attention.scores", 6.0), (50, "b/gelu", 99.0)]
    rows = [(signature, step, site, "vector", amax, math.nan, math.nan) for step, site, amax in scores]
    shares = [("a/linear", 0.1, 0.0), ("b/linear", 0.2, 0.02), ("c/linear", 0.6, 0.01)]
    rows += [(signature, 0, site, "fprop.rhs", 9.0, swallowed, flips) for site, swallowed, flips in shares]
    return [*rows, (signature, 0, "a/linear", "fprop.lhs", 9.0, 0.9, 0.9)]


def tables() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    numbers = metrics("s0", [*QUIET, 5.0, 4.0, 2.0]) + metrics("s1", [*QUIET, 7.0])
    observed = pd.DataFrame(
        telemetry("s0"), columns=["signature", "step", "site", "role", "amax", "swallowed", "oscillated"]
    )
    cosines = pd.DataFrame({"signature": "s0", "step": 0, "parameter": ["a", "b", "c"], "cosine": [0.5, 0.9, 0.8]})
    long = pd.DataFrame(numbers, columns=["signature", "step", "split", "metric", "value"])
    return long, observed, cosines


def test_the_signs_of_each_run() -> None:
    first, second = instability.by_run(*tables()).to_dict("records")
    assert (first["spikes"], first["unrecovered"], first["recovery"]) == (1, 0, 2.0)
    assert (second["spikes"], second["unrecovered"]) == (1, 1) and math.isnan(second["recovery"])
    assert first["weight_growth"] == pytest.approx(1.0)
    assert (first["largest_logit"], first["logit_growth"]) == (12.0, 3.0)
    assert (first["swallowed"], first["oscillated"], first["cosine"]) == (0.2, 0.01, 0.8)
    assert all(math.isnan(second[sign]) for sign in instability.FROM_TELEMETRY)


def test_without_telemetry_the_rest_is_there() -> None:
    nothing = pd.DataFrame(columns=["signature"])
    frame = instability.by_run(tables()[0], nothing, nothing)
    assert frame["spikes"].tolist() == [1, 1] and frame[list(instability.FROM_TELEMETRY)].isna().all(axis=None)


def run(arm: str, rate: float, signature: str, place: str, loss: float) -> dict[str, Any]:
    status = "finished" if math.isfinite(loss) else "diverged"
    return {"arm": arm, "rate": rate, "signature": signature, "place": place, "loss": loss, "status": status}


def test_the_signs_at_the_best_rate_the_frontier_and_just_above() -> None:
    runs = pd.DataFrame(
        [
            run("a", 0.1, "s0", "best", 2.0),
            run("a", 0.2, "s1", "frontier", 2.0),
            run("a", 0.3, "s0", "breaks", math.nan),
            run("a", 0.3, "s1", "breaks", 3.0),
            run("a", 0.4, "s1", "", 3.0),
            run("b", 0.1, "s0", "best, frontier", 2.0),
        ]
    )
    table = instability.by_place(runs, instability.by_run(*tables()))
    assert list(zip(table["arm"], table["place"], table["rate"], table["runs"], table["diverged"], strict=True)) == [
        ("a", "best", 0.1, 1, 0),
        ("a", "frontier", 0.2, 1, 0),
        ("a", "just above", 0.3, 2, 1),
        ("b", "best", 0.1, 1, 0),
    ]
    assert table["unrecovered"].tolist() == [0, 1, 0.5, 0] and table["largest_logit"].iloc[2] == 12.0


def test_the_picture_says_in_words_what_it_shows() -> None:
    """Two panels; an arm whose runs all diverge, one that never breaks, one with a bracket."""

    def arm(name: str, optimizer: str, format: str, status: str, frontier: float, breaks: float) -> dict[str, Any]:
        task = {"model": "m", "data": "d", "optimizer": optimizer, "format": format, "noise": math.nan}
        rounding = "" if format == "float32" else "stochastic"
        found = {"status": status, "frontier": frontier, "breaks": breaks}
        return {"arm": name, "rounding": rounding} | task | found

    arms = [
        arm("a", "adamw", "float32", "bracketed", 0.1, 0.2),
        arm("b", "adamw", "mxfp4_e2m1", "none", math.nan, math.nan),
        arm("c", "lmd", "float32", "open", 0.2, math.nan),
    ]
    runs = [run("a", rate, f"{rate}", "", loss) for rate, loss in ((0.01, 2.0), (0.1, 1.9), (0.2, 20.0))]
    runs += [run("b", rate, f"{rate}", "", math.nan) for rate in (0.01, 0.2)]
    runs += [run("c", rate, f"{rate}", "", 2.0) for rate in (0.01, 0.2)]
    drawing = picture(pd.DataFrame(arms), pd.DataFrame(runs))
    assert drawing.caption.endswith("Frontiers: a: 0.1; b: none; c: at least 0.2.")
    assert drawing.svg == picture(pd.DataFrame(arms), pd.DataFrame(runs)).svg
