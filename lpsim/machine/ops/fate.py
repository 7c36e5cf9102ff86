"""How each function of torch that can be overridden is simulated, as a table: docs/reference/operations.md.

The table is built from WRAPPED, op_name and HIDES_PRODUCTS, which the simulation itself uses, so it cannot differ from
what happens. Only the lists of exempt functions below, such as those that return no floating-point tensor, are written
by hand; a test checks them. `python -m lpsim.machine.ops.fate > docs/reference/operations.md` writes the page.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.overrides import get_testing_overrides, resolve_name

from lpsim.machine.ops.table import HIDES_PRODUCTS, WRAPPED, Kind, inplace_argument, op_name

_NO_FLOATS = """
    _clear_non_serializable_cached_data _is_view all allclose any argmax argmin argsort argwhere bool bucketize byte
    char const_data_ptr count_nonzero data_ptr dense_dim dim dim_order element_size eq equal
    fbgemm_linear_quantize_weight fbgemm_pack_gemm_matrix_fp16 ge get_device greater greater_equal gt hash_tensor int
    is_coalesced is_complex is_conj is_contiguous is_distributed is_floating_point is_inference is_neg is_nonzero
    is_pinned is_same_size is_set_to is_shared is_signed isclose isfinite isin isinf isnan isneginf isposinf isreal item
    le less less_equal logical_and logical_not logical_or logical_xor long lt ndimension ne nelement
    nonzero nonzero_static not_equal numel numpy searchsorted short signbit size sparse_dim storage storage_offset
    storage_type tolist untyped_storage record_stream register_post_accumulate_grad_hook
    _assert_async _functional_assert_async _dimI _dimV _indices _indices_copy _nnz _nested_tensor_size
    _nested_tensor_storage_offsets _nested_tensor_strides ccol_indices ccol_indices_copy col_indices col_indices_copy
    crow_indices crow_indices_copy indices indices_copy row_indices row_indices_copy int_repr q_per_channel_axis q_scale
    q_zero_point qscheme sym_float sym_int sym_ite sym_max sym_min sym_not _sym_acos _sym_asin _sym_atan
    _sym_cos _sym_cosh _sym_sin _sym_sinh _sym_sqrt _sym_tan _sym_tanh choose_qparams_optimized
    __array__ __bool__ __complex__ __contains__ __dlpack__ __dlpack_device__ __eq__ __float__ __format__ __ge__ __gt__
    __index__ __int__ __le__ __len__ __long__ __lt__ __ne__ __nonzero__ __reduce_ex__ __repr__ __setstate__
"""
_OF_INTEGERS = """
    bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor bincount gcd lcm unravel_index
    __and__ __iand__ __ior__ __invert__ __ixor__ __or__ __rand__ __ror__ __rxor__ __xor__
"""
_COLLECTIVES = """
    all_gather all_gather_coalesced all_gather_single all_reduce all_reduce_coalesced all_to_all all_to_all_single
    broadcast irecv isend recv reduce reduce_scatter reduce_scatter_single send
"""
_EXEMPT = {
    **dict.fromkeys(_NO_FLOATS.split(), "its result holds no floating-point tensor"),
    **dict.fromkeys(_OF_INTEGERS.split(), "its operands hold no floating-point tensor"),
    **dict.fromkeys(_COLLECTIVES.split(), "moves or adds tensors between processes: not one machine's arithmetic"),
    **dict.fromkeys(("__get__", "__set__", "__delete__"), "an attribute"),
}
_WHAT = {
    Kind.PRODUCT: "product",
    Kind.VECTOR: "vector",
    Kind.REDUCTION: "reduction",
    Kind.MOVEMENT: "moved",
    Kind.EXEMPT: "exempt",
}
_MEANING = {
    "product": "operands and results are rounded by the recipe's three products",
    "vector": "computed in the compute dtype, the result rounded to the recipe's vector format",
    "reduction": "the same, many elements to few",
    "moved": "runs as in torch: nothing to round",
    "exempt": "runs as in torch: not the machine's arithmetic",
    "raises": "`UnknownOpError` where it reads and returns floating-point tensors",
}
_UNKNOWN = "not in the table; outside every module and in no graph it runs as in torch"
_HIDING = "multiplies matrices inside; runs in the optimizer alone"


@dataclass(frozen=True)
class Fate:
    """How one function is simulated.

    name: its full name in torch. op: its name in the table. kind: its class there, None if it has no entry.
    what: product, vector, reduction, moved, exempt or raises. reason: why.
    """

    name: str
    op: str
    kind: Kind | None
    what: str
    reason: str


def fate_of(func: Callable[..., Any]) -> Fate:
    """The fate of one function, method, operator or aten op of torch."""
    op = op_name(func)
    name = _name(func)
    if op in WRAPPED:
        entry = WRAPPED[op]
        return Fate(name, op, entry.kind, _WHAT[entry.kind], entry.reason)
    if op in HIDES_PRODUCTS:
        return Fate(name, op, None, "raises", _HIDING)
    if op in _EXEMPT and (op in _OF_INTEGERS.split() or inplace_argument(func) is None):
        return Fate(name, op, None, "exempt", _EXEMPT[op])
    return Fate(name, op, None, "raises", _UNKNOWN)


def _name(func: Callable[..., Any]) -> str:
    found = resolve_name(func)
    if found is not None:
        return found
    module = getattr(func, "__module__", None) or "torch"
    return f"{module}.{getattr(func, '__name__', func)}"


def fates() -> tuple[Fate, ...]:
    """One Fate for each function of torch.overrides.get_testing_overrides(), by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated functions are functions too
        return tuple(sorted({fate_of(f) for f in get_testing_overrides()}, key=lambda fate: fate.name))


def markdown() -> str:
    """The page: a section for each fate, with a row for each function."""
    every = fates()
    lines = [
        "# What becomes of each operation",
        "",
        f"The {len(every)} functions of torch {torch.__version__.partition('+')[0]} that can be overridden, as "
        "`lpsim.simulate` treats them in a model.",
        "In-place forms have the fate of the function (but x.eq_(y) writes floating-point numbers); what is called",
        "with integers alone runs as in torch.",
        "Written by `python -m lpsim.machine.ops.fate`; do not edit. [Add an op](../howto/add_an_op.md) says how to",
        "change it.",
        "",
        "| fate | means | functions |",
        "|---|---|---|",
    ]
    groups = {what: [fate for fate in every if fate.what == what] for what in _MEANING}
    lines += [f"| [{what}](#{what}) | {_MEANING[what]} | {len(groups[what])} |" for what in groups]
    for what, members in groups.items():
        lines += ["", f"## {what}", "", "| function | class | reason |", "|---|---|---|"]
        for (kind, reason), rows in groupby(sorted(members, key=_group), key=lambda f: (f.kind, f.reason)):
            label = "-" if kind is None else kind.value
            lines += [f"| `{fate.name}` | {label} | {reason} |" for fate in rows]
    return "\n".join(lines) + "\n"


def _group(fate: Fate) -> tuple[str, str, str]:
    return ("" if fate.kind is None else fate.kind.value, fate.reason, fate.name)


if __name__ == "__main__":
    print(markdown(), end="")
