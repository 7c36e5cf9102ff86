"""Parameters that fully_shard has sharded among processes, with gloo, against an unsharded optimizer."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lmd.kernels import TILE
from lmd.random import NoiseKey, normal_pair, words
from lmd.sharded_cpu import pieces

ROOT = Path(__file__).parents[2]
SOURCE = ast.parse((ROOT / "tests" / "lmd" / "sharded_jobs.py").read_text("utf-8"))
PROCESSES = (2, 3)
JOBS = [
    pytest.param(name, count, marks=[pytest.mark.full] if count > 2 else [])
    for node in SOURCE.body
    if isinstance(node, ast.FunctionDef)
    for decorator in node.decorator_list
    if isinstance(decorator, ast.Name) and decorator.id in ("job", "job_of_three")
    for name, count in ((node.name, each) for each in PROCESSES)
    if count == 2 or decorator.id == "job_of_three"
]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, str]]]:
    """What each job of tests/lmd/sharded_jobs.py says in each of so many processes."""

    @cache
    def run(count: int) -> list[dict[str, str]]:
        folder = tmp_path_factory.mktemp("sharded")
        command = [sys.executable, "-W", "error", "-m", "tests.lmd.sharded_jobs"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        running = []
        for rank in range(count):
            with (folder / f"{rank}.txt").open("w") as log:
                arguments = [*command, str(rank), str(count), str(folder)]
                running.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=log, stderr=log))
        for rank, process in enumerate(running):
            assert process.wait(600) == 0, (folder / f"{rank}.txt").read_text()
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(count)]

    return run


@pytest.mark.parametrize(("name", "count"), JOBS)
def test_sharded_parameters(name, count, done):
    """As the name of the job says; a job is missing where one before it failed."""
    for rank, said in enumerate(done(count)):
        assert said.get(name, "not run") == "", f"process {rank}: {said.get(name)}"


@pytest.mark.parametrize("first", [0, 1, 2, 3, 4, 4095, 2**33 + 5])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 9])
def test_the_noise_of_a_part_is_that_of_its_place(first, count):
    key = NoiseKey(2**63 + 5, 3, 2, 1)
    if first < 10_000:
        assert torch.equal(words(key, count, first=first), words(key, first + count)[first:])
    else:
        assert torch.equal(words(key, count, first=first), words(key, count + 1, first=first - 1)[1:])
    like = torch.empty(count)
    whole, part = normal_pair(key, torch.empty(6 + count)), normal_pair(key, like, first=6)
    assert all(torch.equal(x[6:], y) for x, y in zip(whole, part, strict=True))


@pytest.mark.parametrize("count", [0, 1, TILE - 1, TILE, TILE + 1, 5 * TILE, 5 * TILE + 7])
def test_pieces_are_whole_tiles_and_at_most_two_parts_of_some(count):
    starts = sorted({0, count, *(x for x in (1, 3, TILE - 1, TILE, TILE + 1, 3 * TILE, 5 * TILE - 2) if x <= count)})
    for i, first in enumerate(starts):
        for last in starts[i:]:
            cut = pieces(9, first, last, count)
            ends = [first, *(piece.last for piece in cut)]
            assert all(piece.parameter == 9 and piece.first < piece.last for piece in cut)
            assert [piece.first for piece in cut] == ends[:-1] and ends[-1] == last
            assert sum(piece.edge for piece in cut) <= 2
            for piece in cut:
                tiles_end = piece.last % TILE == 0 or piece.last == count
                if piece.edge:
                    assert piece.first // TILE == (piece.last - 1) // TILE
                    assert piece.first % TILE or not tiles_end
                else:
                    assert piece.first % TILE == 0 and tiles_end
    assert sum(len(pieces(0, *span, count)) for span in pairwise(starts)) >= bool(count)
