"""lmd/cpu.py's Plan for sharded parameters (lmd/sharded.py), equal bit for bit to that of the whole tensors.

The squares of u are summed by tiles of the whole tensor. A process sums those that it has all of; of the others, at
most two for each parameter, it sends u itself, and every process sums them.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from lmd import cpu, kernels
from lmd.kernels import BLOCK, COLUMNS, COUNT, EDGE, FIRST, NUMBER, TILE, f32


class Piece(NamedTuple):
    """A row of the table: elements first .. last - 1 of a parameter, whole tiles or a part of one."""

    parameter: int
    first: int
    last: int
    edge: bool


def pieces(parameter: int, first: int, last: int, count: int) -> list[Piece]:
    """Those of the elements first .. last - 1 of `count`: a part of a tile, whole tiles, a part of a tile."""
    begin = min(last, -(-first // TILE) * TILE)
    end = max(begin, last if last == count else last // TILE * TILE)
    cut = [(first, begin, True), (begin, end, False), (end, last, True)]
    return [Piece(parameter, *piece) for piece in cut if piece[1] > piece[0]]


class Plan(cpu.Plan):
    """For DTensors of contiguous float32 rows."""

    def _rows(self) -> np.ndarray:
        shards = self.shards
        assert shards is not None
        every = list(enumerate(zip(shards.spans, shards.counts, strict=True)))
        processes = range(len(shards.spans[0]))
        self.pieces = [  # of every process
            [piece for i, (spans, count) in every for piece in pieces(i, *spans[rank], count)] for rank in processes
        ]
        self.counts = np.array(shards.counts, np.int64)
        self.tiles = np.concatenate(
            ([0], np.cumsum(-(-self.counts // TILE)))
        )  # the first of each parameter, and the end
        own = self.pieces[shards.rank] or [Piece(0, 0, 0, False)]
        table = np.zeros((len(own), len(COLUMNS)), np.int64)
        self.owners = np.array([piece.parameter for piece in own])
        table[:, FIRST] = [piece.first for piece in own]
        table[:, COUNT] = [piece.last - piece.first for piece in own]
        table[:, NUMBER] = np.array(self.numbers)[self.owners]
        self.offsets = 4 * (table[:, FIRST] - np.array(self.firsts)[self.owners])
        sides = 2 if "log_center" in self.states[0] else 1
        self.edges = np.zeros((len(own), sides, TILE), f32)
        edges = self.edges.ctypes.data + self.edges.strides[0] * np.arange(len(own))
        table[:, EDGE] = np.where([piece.edge for piece in own], edges, 0)
        return table

    def _place(self, column: int, tensors: Any) -> None:
        addresses = np.array([0 if tensor is None else tensor.data_ptr() for tensor in tensors])[self.owners]
        self.table[:, column] = np.where(addresses == 0, 0, addresses + self.offsets)

    def _scales(self, group: dict[str, Any]) -> np.ndarray:
        return super()._scales(group)[self.owners]

    def _full(self, group: dict[str, Any]) -> np.ndarray:
        return super()._full(group)[self.owners]

    def _measured(self, group: dict[str, Any], squares: np.ndarray, moved: list[bool]) -> None:
        assert self.shards is not None
        sides = self.edges.shape[1]
        sent = np.zeros(max(sum(words(piece, sides) for piece in every) for every in self.pieces), f32)
        at = 0
        for row, piece in enumerate(self.pieces[self.shards.rank]):
            count, first_tile = piece.last - piece.first, self.table[row, kernels.FIRST_TILE]
            one = self.edges[row, :, :count] if piece.edge else squares[first_tile:][: -(-count // TILE)].view(f32)
            sent[at : at + one.size] = one.reshape(-1)
            at += one.size
        received = self.shards.gathered(torch.from_numpy(sent))
        self._keep(group, self._assembled([each.numpy() for each in received]), self.tiles[:-1], self.counts, moved)

    def _assembled(self, received: list[np.ndarray]) -> np.ndarray:
        """The sums of squares of all tiles of the whole tensors, from what all processes sent."""
        sides, squares = self.edges.shape[1], np.zeros(self.tiles[-1])
        shared: dict[int, np.ndarray] = {}  # u of the tiles that no process has all of
        for every, numbers in zip(self.pieces, received, strict=True):
            at = 0
            for piece in every:
                tile, count = self.tiles[piece.parameter] + piece.first // TILE, piece.last - piece.first
                one = numbers[at : at + words(piece, sides)]
                at += one.size
                if piece.edge:
                    begin = piece.first % TILE
                    u = shared.setdefault(tile, np.zeros((sides, TILE), f32))
                    u[:, begin : begin + count] = one.reshape(sides, count)
                else:
                    squares[tile : tile + -(-count // TILE)] = one.copy().view(np.float64)
        scratch = np.empty(BLOCK, f32)
        for tile, u in shared.items():
            squares[tile] = kernels.sum_of_squares(u, scratch)
        return squares


def words(piece: Piece, sides: int) -> int:
    """How many float32 a process sends of a piece: u, or sums in float64."""
    count = piece.last - piece.first
    return sides * count if piece.edge else 2 * -(-count // TILE)
