"""Parameters that torch.distributed.fsdp.fully_shard has sharded: every process has some rows of each and their state.

An element's noise is a function of its place in the whole tensor, so a process draws that of its rows. What a step
needs of the whole is the root mean square of u and whether gradients are finite; what the state begins with is gathered
once, one tensor at a time. Given equal gradients the result is that of the unsharded optimizer:

    with lmd/cpu.py, bit for bit, whatever the number of processes: its sums have the order of the whole tensor;
    with lmd/gpu.py, plain.py and foreach.py the root mean square to a relative 1e-6, a weight after a step to 1e-5,
        since the order of their sums, and where torch's sinh takes another path, is not ours. All processes have the
        same sums, and the same processes the same bits.

A sample is written over the rows, not put beside them, because fully_shard gathers weights from memory of its own.
"""

import gc
import sys
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

WANTED = (
    "LMD takes parameters whose dimension 0 is sharded over one dimension of a mesh and which are replicated over the "
    "others, as fully_shard(model) makes them"
)


def check(p: Any) -> None:
    """Raises ValueError for a DTensor that is laid out otherwise than fully_shard does by default."""
    if p.device_mesh.get_coordinate() is None:
        raise ValueError(
            f"this process is not in the mesh of a parameter, {p.device_mesh}: make the optimizer in those"
        )
    others = [placement for placement in p.placements if not isinstance(placement, Replicate)]
    if len(others) > 1 or any(type(other) is not Shard or other.dim != 0 for other in others):
        raise ValueError(
            f"{WANTED}; this one, of shape {tuple(p.shape)}, has {p.placements}. shard_placement_fn must give "
            "Shard(0), and tensor parallelism does not go with it"
        )
    first, last = _spans(p)[_rank(p)]
    if p._local_tensor.numel() != last - first:
        raise ValueError(
            f"{WANTED}, in equal parts but the last; this one, of shape {tuple(p.shape)}, has {p._local_tensor.shape} "
            f"in process {_rank(p)} of {len(_spans(p))}"
        )


def laid_out(value: Tensor, p: Any) -> Tensor:
    """A tensor of p's shape, whole or sharded, laid out as p is; a whole one without communication."""
    if isinstance(value, DTensor):
        return value if value.placements == p.placements else value.redistribute(p.device_mesh, p.placements)
    first, last = _spans(p)[_rank(p)]
    local = p._local_tensor
    own = value.reshape(-1)[first:last].view(local.shape).to(local.device)
    return _joined(own, p)


class Shards:
    """How the parameters of a plan, of one layout, lie on their mesh. All its processes call what gathers, alike."""

    def __init__(self, params: list[Any]) -> None:
        self.params = params
        self.memory: list[Tensor] = [p._local_tensor for p in params]
        self.saved: list[Tensor] = []  # the means, while a sample is in their place
        dimension = _dimension(params[0])
        self.group = None if dimension is None else params[0].device_mesh.get_group(dimension)
        self.rank = _rank(params[0])
        self.spans = [_spans(p) for p in params]  # by parameter and process
        self.firsts = [spans[self.rank][0] for spans in self.spans]
        self.counts = [p.numel() for p in params]
        self.modules = _sharded_modules()

    def rows_of(self, state: dict[str, Any]) -> dict[str, Any]:
        """A parameter's state, of its tensors this process's rows."""
        return {name: value._local_tensor if isinstance(value, DTensor) else value for name, value in state.items()}

    def rows(self, gradient: Tensor) -> Tensor:
        """This process's rows of a gradient."""
        if not isinstance(gradient, DTensor):
            raise TypeError("the gradient of a sharded parameter must be a DTensor, as backward leaves it")
        p = self.params[0]
        if gradient.placements != p.placements:
            gradient = gradient.redistribute(p.device_mesh, p.placements)
        local: Tensor = gradient._local_tensor
        return local

    def joined(self, i: int, rows: Tensor) -> DTensor:
        """The rows of all processes as one tensor, sharded as parameter i is."""
        return _joined(rows, self.params[i])

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """Every process's tensor, of one shape and dtype, in their order."""
        if self.group is None:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.group.size())]
        dist.all_gather(found, tensor, self.group)
        return found

    def sum(self, numbers: Tensor) -> Tensor:
        """Every process's numbers, each added up in their order."""
        return torch.stack(self.gathered(numbers)).sum(0)

    def all(self, flag: bool) -> bool:
        """Whether the flag of every process is set."""
        return all(bool(other) for other in self.gathered(torch.tensor([flag], device=self.memory[0].device)))

    def replace(self, values: list[Tensor]) -> None:
        """Writes values over the means, which `restore` puts back."""
        self.saved = [own.clone() for own in self.memory]
        self._write(values)

    def restore(self) -> None:
        if self.saved:
            self._write(self.saved)
            self.saved = []

    def _write(self, values: list[Tensor]) -> None:
        for own, value in zip(self.memory, values, strict=True):
            own.copy_(value)
        for module in self.modules:  # weights that a forward without a backward has left gathered are old now
            module.reshard()


def _dimension(p: Any) -> int | None:
    """The dimension of the mesh over which p is sharded; None if it is replicated."""
    return next((i for i, placement in enumerate(p.placements) if isinstance(placement, Shard)), None)


def _rank(p: Any) -> int:
    dimension = _dimension(p)
    rank: int = 0 if dimension is None else p.device_mesh.get_local_rank(dimension)
    return rank


def _spans(p: Any) -> list[tuple[int, int]]:
    """The first element of each process and the one behind its last: torch.chunk of the rows."""
    dimension = _dimension(p)
    if dimension is None:
        return [(0, p.numel())]
    rows, processes = p.shape[0], p.device_mesh.size(dimension)
    part, size = -(-rows // processes), p.numel() // max(rows, 1)
    return [(min(i * part, rows) * size, min((i + 1) * part, rows) * size) for i in range(processes)]


def _joined(rows: Tensor, p: Any) -> DTensor:
    return DTensor.from_local(rows, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def _sharded_modules() -> "WeakSet[Any]":
    """All modules that fully_shard was called for: parameters do not know theirs."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return WeakSet()
    return WeakSet(found for found in gc.get_objects() if issubclass(type(found), fsdp.FSDPModule))
