"""FIELD=VALUE: which rows it means, and what a typing error is told."""

import math

import pytest

from experiments.command.where import meets

ROWS = [
    {"optimizer": "adamw", "seed": 0, "optimizer.lr": 0.01, "clip": None, "final.loss": 2.0, "nested": True},
    {"optimizer": "adamw", "seed": 1, "optimizer.lr": 0.02, "clip": 1.0, "final.loss": math.nan, "nested": False},
    {"optimizer": "lmd", "seed": 0, "optimizer.lr": 0.02, "clip": 1.0, "final.loss": math.inf, "nested": True},
    {"optimizer": "lmd", "seed": 1, "clip": 1.0, "final.loss": 3.0, "nested": True},
]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["optimizer=adamw"], [0, 1]),
        (["optimizer=adamw", "seed=1"], [1]),
        (["seed=0", "seed=1"], [0, 1, 2, 3]),  # alternatives
        (["seed=0", "seed=1", "optimizer=lmd"], [2, 3]),
        (["optimizer!=adamw"], [2, 3]),
        (["optimizer.lr=1e-2"], [0]),
        (["optimizer.lr=0.020"], [1, 2]),
        (["optimizer.lr=none"], [3]),
        (["clip=none"], [0]),
        (["clip=1"], [1, 2, 3]),
        (["nested=false"], [1]),
        (["final.loss<3"], [0]),
        (["final.loss>=3"], [2, 3]),
        (["final.loss>2", "final.loss<=3"], [3]),
        (["final.loss=inf"], [2]),
    ],
)
def test_conditions_choose_rows(conditions: list[str], expected: list[int]) -> None:
    assert [place for place, met in enumerate(meets(ROWS, conditions, "--only")) if met] == expected


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        (["adamw"], "--only adamw: expected FIELD=VALUE, such as optimizer=adamw"),
        (["optimiser=adamw"], "--only optimiser=adamw: no field 'optimiser'; there are: optimizer, "),
        (["optimizer=adam"], "--only optimizer=adam: no run has that value; there are: adamw, lmd"),
        (["optimizer!=adam"], "--only optimizer!=adam: no run has that value; there are: adamw, lmd"),
        (["seed=2"], "--only seed=2: no run has that value; there are: 0, 1"),
        (["seed<two"], "--only seed<two: < compares with a number, not with 'two'"),
        (["optimizer=lmd", "optimizer.lr=0.01"], "no run meets --only optimizer=lmd and --only optimizer.lr=0.01"),
    ],
)
def test_what_means_no_run_is_told_what_there_is(conditions: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        meets(ROWS, conditions, "--only")
    assert str(caught.value).startswith(message)


def test_many_values_are_named_in_part() -> None:
    with pytest.raises(ValueError, match=r"there are: 77, .*, \.\.\. \(100 values\)$") as caught:
        meets([{"seed": seed} for seed in range(100)], ["seed=777"], "--where")
    assert str(caught.value).count(",") == 12
