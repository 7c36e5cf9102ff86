"""What really ran: every function the simulation saw, and every matrix product in the aten ops underneath.

Two counts check each other. The rows are the simulation's own decisions. The matrix products are seen one level lower,
by a TorchDispatchMode, in the forward and the backward pass, and each must belong to one of these decisions. A product
that does not has escaped: it ran in full precision although no rule says so.
"""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lpsim.accumulators import Accumulator
from lpsim.machine.ops import Kind, Op, Product, Site
from lpsim.machine.ops.contraction import cdist_has_products

_PRODUCTS = """
    mm addmm bmm baddbmm addbmm mv addmv dot vdot linear matmul _trilinear
    _euclidean_dist _scaled_mm _scaled_grouped_mm _grouped_mm _int_mm _sparse_mm _sparse_addmm mkldnn_rnn_layer
    mkldnn_rnn_layer_backward _cudnn_rnn _cudnn_rnn_backward miopen_rnn miopen_rnn_backward
    _transformer_encoder_layer_fwd _native_multi_head_attention _triton_multi_head_attention
    linalg_inv_ex _linalg_solve_ex linalg_solve_triangular triangular_solve linalg_pinv linalg_lstsq linalg_matrix_exp
    _linalg_svd _linalg_eigh linalg_eig _linalg_eigvals linalg_eigvals linalg_qr geqrf ormqr linalg_householder_product
    linalg_cholesky_ex cholesky cholesky_solve cholesky_inverse linalg_ldl_factor_ex linalg_ldl_solve
    linalg_lu linalg_lu_factor_ex linalg_lu_solve _linalg_det _linalg_slogdet
"""
_PRODUCT_FAMILIES = ("conv", "_scaled_dot_product_", "_flash_attention", "_efficient_attention", "_cudnn_attention")


@dataclass(frozen=True)
class AuditRow:
    """One op as the simulation treated it: how often, in which formats, and why."""

    op: str
    kind: Kind
    count: int
    formats: str
    reason: str


@dataclass(frozen=True)
class Audit:
    """rows: the functions called. products: {(aten op, "forward" or "backward", owner): count}, the owner being for
    example "the recipe" or "the optimizer". escaped: the products that have no owner. pinned: torch's settings that
    were not at full precision, and what the simulation put in their place.
    """

    rows: tuple[AuditRow, ...]
    products: dict[tuple[str, str, str], int]
    escaped: tuple[str, ...]
    pinned: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = _aligned(
            [("op", "class", "count", "formats", "reason")]
            + [(r.op, r.kind.value, str(r.count), r.formats, r.reason) for r in self.rows]
        )
        lines += ["", "matrix products underneath:"]
        lines += _aligned([(op, where, str(n), whose) for (op, where, whose), n in sorted(self.products.items())])
        lines.append(f"escaped products: {', '.join(self.escaped) or 'none'}")
        lines += ["", "settings pinned to full precision:", *(f"  {setting}" for setting in self.pinned or ("none",))]
        return "\n".join(lines)


def _floating(x: object) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    if not rows:
        return ["  none"]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


class _Made(NamedTuple):
    """Autograd nodes that were made inside an `owned`: their sequence numbers, the owner, and the graph task or -1."""

    start: int
    end: int
    owner: str
    task: int


class Auditor(TorchDispatchMode):
    """Counts aten matrix products while it is active, and finds the owner of each.

    module: a function that gives the path of the running module; None outside the model.
    """

    def __init__(self, module: Callable[[], str | None]) -> None:
        super().__init__()
        self._module = module
        self._names = frozenset(_PRODUCTS.split())
        self.rows: Counter[tuple[Kind, str, str, str]] = Counter()
        self.products: Counter[tuple[str, str, str]] = Counter()
        self.escaped: list[str] = []
        self.finished = False
        self.pinned: tuple[str, ...] = ()
        self._result: Audit | None = None
        self._owner: str | None = None
        self._made: dict[tuple[int, bool], list[_Made]] = {}  # by thread, and whether in a backward pass; ascending

    def count(self, op: str, kind: Kind, formats: str, reason: str) -> None:
        """Count one call of an op in the rows."""
        self.rows[kind, op, formats, reason] += 1

    def count_product(self, op: Op, sites: list[Site], reason: str) -> None:
        """Count one call of a product; a composite is counted part by part."""
        vectors = [f"{op.name}.{part}" for part in op.vector_parts]
        for site in sites:
            if site.op in vectors:
                vector = site.recipe.vector
                formats = "-" if vector is None else vector.format.name
                self.count(site.op, Kind.VECTOR, formats, f"between the products of {op.name}")
            else:
                self.count(site.op, Kind.PRODUCT, formats_of(site), reason)

    @contextmanager
    def owned(self, owner: str) -> Iterator[None]:
        """A context whose products belong to `owner`, those in the backward pass of what runs inside included."""
        before, self._owner = self._owner, owner
        start = torch._C._autograd._get_sequence_nr()
        try:
            yield
        finally:
            self._owner = before
            end = torch._C._autograd._get_sequence_nr()
            if before is None and end > start:
                task = torch._C._current_graph_task_id()
                self._made.setdefault((threading.get_ident(), task != -1), []).append(_Made(start, end, owner, task))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_product = name in self._names or any(family in name for family in _PRODUCT_FAMILIES)
        if name == "_cdist_forward":  # (x1, x2, p, compute_mode); it may multiply, as torch.cdist may
            is_product = cdist_has_products(*args)
        if is_product and any(map(_floating, pytree.tree_leaves((args, kwargs)))):
            self._attribute(name)
        with torch._C.DisableTorchFunction():  # an OpOverload called from here would reach the simulation's mode
            return func(*args, **(kwargs or {}))

    def _attribute(self, name: str) -> None:
        node = torch._C._current_autograd_node()
        owner: str | None
        if self._owner is not None or node is None:
            by_hand = node is not None and self._module() is None  # in a user's autograd.Function, or a hook
            where, owner = "backward" if by_hand else "forward", self._owner
        elif isinstance(node, Product._backward_cls):
            where, owner = "backward", "the recipe"
        else:
            where, owner = "backward", self._owner_of(node._sequence_nr())
        if owner is None:
            module = self._module() if node is None else None
            shown = f"aten.{name}, {where}"
            shown += f" of {node.name()}" if node is not None else f" of {module}" if module is not None else ""
            if shown not in self.escaped:
                self.escaped.append(shown)
        self.products[f"aten.{name}", where, owner or "escaped"] += 1

    def _owner_of(self, number: int) -> str | None:
        """The owner of the running node with that sequence number.

        Each thread numbers its nodes on its own, and a GPU's backward pass has a thread of its own. Nodes that were
        made in it, by a recomputation, run in a backward pass within this one (a reentrant checkpoint) or in a later
        one; all others were made in a forward pass.
        """
        here, task = threading.get_ident(), torch._C._current_graph_task_id()
        first = [made for made in self._made.get((here, True), ()) if made.task != task]
        rest = [ranges for (_, backward), ranges in self._made.items() if not backward]
        for ranges in (first, *rest):
            i = bisect.bisect_right(ranges, number, key=lambda made: made.start) - 1
            if i >= 0 and number < ranges[i].end:
                return ranges[i].owner
        return None

    def finish(self) -> None:
        """End counting; the result stays as it is."""
        self._result = self.result()
        self.finished = True

    def result(self) -> Audit:
        """The audit so far; its rows are sorted by class (products first) and op."""
        if self._result is not None:
            return self._result
        order = list(Kind)
        rows = sorted(self.rows.items(), key=lambda item: (order.index(item[0][0]), item[0][1:]))
        return Audit(
            tuple(AuditRow(op, kind, n, formats, reason) for (kind, op, formats, reason), n in rows),
            dict(self.products),
            tuple(self.escaped),
            self.pinned,
        )


def formats_of(site: Site) -> str:
    """The formats of a product, for each of its Gemms that is not plain: "fprop lhs · rhs", with all it may have
    "fprop lhs · rhs, summed in float16 by 32 -> out".
    """
    shown = []
    for name in ("fprop", "dgrad", "wgrad"):
        gemm = getattr(site.recipe, name)
        if not gemm.plain:
            lhs, rhs, out = (q.format.name if q is not None else "-" for q in (gemm.lhs, gemm.rhs, gemm.out))
            unit = gemm.accumulate
            summed = "" if unit is None else f", summed {_unit(unit)}"
            shown.append(f"{name} {lhs} · {rhs}{summed}" + (f" -> {out}" if gemm.out is not None else ""))
    return ", ".join(shown) or "-"


def _unit(unit: Any) -> str:
    """What sums: `in float16 by 32` for an Accumulator, the class of another."""
    if not isinstance(unit, Accumulator):
        return f"by {type(unit).__name__}"
    return f"in {unit.format.name}" + (f" by {unit.chunk}" if unit.chunk > 1 else "")
