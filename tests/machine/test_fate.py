"""The page docs/reference/operations.md: complete, up to date, and true of each function that can be called simply."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode, get_overridable_functions, get_testing_overrides

from lpsim import simulate
from lpsim.machine.ops import HIDES_PRODUCTS, WRAPPED, Kind
from lpsim.machine.ops.fate import fate_of, fates, markdown
from lpsim.machine.simulate import UnknownOpError
from tests.machine import test_ops_coverage as coverage
from tests.machine.test_ops_coverage import BF16, MACHINE, Runs, floats, sample

ROOT = Path(__file__).parents[2]
PINNED = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text("utf-8"), re.M)[1]  # type: ignore[index]


@pytest.mark.skipif(torch.__version__.partition("+")[0] != PINNED, reason=f"the page is of torch {PINNED}")
def test_the_page_is_up_to_date() -> None:
    page = ROOT / "docs" / "reference" / "operations.md"
    assert page.read_text("utf-8") == markdown(), (
        "write it: python -m lpsim.machine.ops.fate > docs/reference/operations.md"
    )


def overridable() -> list[Callable[..., Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        every = {*get_testing_overrides(), *(f for fs in get_overridable_functions().values() for f in fs)}
    return sorted(every, key=lambda f: fate_of(f).name)


def test_no_function_is_missing() -> None:
    names = {fate.name for fate in fates()}
    page = markdown()
    missing = [f for f in get_testing_overrides() if fate_of(f).name not in names]
    assert missing == []
    assert all(f"\n| `{fate.name}` | " in page and fate.reason for fate in fates())
    assert len(re.findall(r"^\| `", page, re.M)) == len(fates())


def test_no_function_has_two_fates() -> None:
    """One that has an entry hides nothing; and linear algebra has an entry, or hides products, or is known not to."""
    assert sorted(HIDES_PRODUCTS & set(WRAPPED)) == []
    algebra = {fate.op for fate in fates() if fate.op.startswith("linalg_")}
    assert sorted(algebra - HIDES_PRODUCTS - set(WRAPPED)) == ["linalg_vander"]


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Callable[..., Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


CALLS = [
    *((name, call, {"product"}) for name, call in coverage.PRODUCTS.items() if not name.startswith("nn.")),
    *((name, call, {"vector"}) for name, call in coverage.VECTORS.items() if not name.startswith("nn.")),
    *((name, call, {"reduction"}) for name, call in coverage.REDUCTIONS.items() if not name.startswith("nn.")),
    *((name, call, {"moved", "exempt"}) for name, call in coverage.UNTOUCHED.items()),
    *((name, call, {"raises"}) for name, call in coverage.UNKNOWN.items()),
    *((name, call, {"raises"}) for name, call in coverage.HIDING.items()),
]
OF_THE_ARGUMENTS = (
    "without a sum",
    "cdist p",
    "cdist without mm",
    "integers",
    "arange",
)  # where they decide, and not the name


@pytest.mark.parametrize(("name", "call", "expected"), CALLS)
def test_the_calls_of_the_coverage_tests_have_the_fate_that_is_stated(
    name: str, call: Callable[..., Any], expected: set[str]
) -> None:
    with Seen() as seen:
        call()
    stated = [fate_of(f).what for f in seen.functions]
    assert not stated or expected & set(stated) or name.endswith(OF_THE_ARGUMENTS)


SQUARE = sample(6, 6).abs() + torch.eye(6)
ARGUMENTS: list[Callable[[], tuple[Any, ...]]] = [
    lambda: (SQUARE.clone(),),
    lambda: (SQUARE.clone(), SQUARE.clone()),
    lambda: (SQUARE.clone(), 1),
    lambda: (SQUARE.clone(), 0, 1),
    lambda: (SQUARE.clone(), SQUARE.clone(), SQUARE.clone()),
    lambda: (SQUARE[0].clone(),),
    lambda: (SQUARE[0].clone(), SQUARE[1].clone()),
    lambda: (SQUARE.clone(), SQUARE[0].clone()),
    lambda: ([SQUARE.clone(), SQUARE.clone()],),
    lambda: (SQUARE.clone(), (6,)),
    lambda: (sample(2, 4, 8),),
    lambda: (sample(2, 4, 8), 2),
    lambda: (sample(2, 4, 8), sample(2, 8, 4)),
    lambda: (sample(2, 4, 8, 8), sample(3, 4, 3, 3)),
    lambda: (sample(2, 4, 8, 8), 2),
    lambda: (SQUARE[0, 0].clone(),),
]
NOT_CALLED = {"set", "__setstate__", "backward", "share_memory", "pin_memory", "as_subclass"}
NOT_CALLED |= {"matrix_power", "linalg_matrix_power", "chain_matmul"}  # which make no product of one factor


def called(f: Callable[..., Any]) -> Iterator[tuple[Callable[..., Any], Any]]:
    """The first of the arguments that the function takes, as a call; and its plain result."""
    for arguments in ARGUMENTS:
        torch.manual_seed(0)
        try:
            result = f(*arguments())
        except Exception:
            continue
        if result is NotImplemented:
            continue
        yield lambda arguments=arguments: f(*arguments()), result
        return


def what_happened(call: Callable[..., Any], op: str, expected: Any) -> str:
    """The fate that one call in a model had."""
    model = Runs()
    torch.manual_seed(0)
    with simulate(model, MACHINE) as sim, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            result = model(call)
        except UnknownOpError:
            return "raises"
    audit = sim.audit()
    kinds = {row.kind for row in audit.rows}
    rounded = all(torch.equal(t.nan_to_num(), BF16.quantize(t).nan_to_num()) for t in floats(result))
    if audit.escaped:
        return f"escaped {audit.escaped}"
    if Kind.PRODUCT in kinds:
        owners = {owner for _, _, owner in audit.products}
        return "product" if rounded and owners <= {"the recipe"} else "a product that is not rounded"
    for kind in (Kind.VECTOR, Kind.REDUCTION):
        if kind in kinds:
            return kind.value if rounded else f"a {kind.value} that is not rounded"
    mine = [row.kind for row in audit.rows if row.op == op]
    if "empty" not in op and op not in ("resize", "resize_as"):  # which show memory as it was
        try:
            torch.testing.assert_close(floats(result), floats(expected), rtol=0, atol=0, equal_nan=True)
        except AssertionError:
            return "another result than torch's"
    return "moved" if Kind.MOVEMENT in mine else "exempt"


@pytest.mark.filterwarnings("ignore")
def test_each_fate_stated_is_what_happens() -> None:
    wrong, n = [], 0
    for f in overridable():
        fate = fate_of(f)
        if fate.op in NOT_CALLED or "distributed" in fate.name:
            continue
        for call, expected in called(f):
            n += 1
            try:
                happened = what_happened(call, fate.op, expected)
            except Exception as error:
                happened = repr(error)
            if happened != fate.what:
                wrong.append((fate.name, fate.what, happened))
    assert wrong == []
    assert n > 800


A, B, C = sample(6, 8), sample(8, 6), sample(6, 6)
BATCH, IMAGE, KERNEL = sample(2, 4, 8), sample(2, 4, 8, 8), sample(3, 4, 3, 3)
aten = torch.ops.aten
ATEN: dict[str, Callable[[], Any]] = {
    "mm": lambda: aten.mm.default(A, B),
    "mm out": lambda: aten.mm.out(A, B, out=torch.empty(6, 6)),
    "bmm": lambda: aten.bmm.default(BATCH, BATCH.mT),
    "addmm": lambda: aten.addmm.default(C, A, B),
    "addmm_": lambda: aten.addmm_.default(C.clone(), A, B),
    "baddbmm": lambda: aten.baddbmm(sample(2, 4, 4), BATCH, BATCH.mT),
    "addbmm": lambda: aten.addbmm(sample(4, 4), BATCH, BATCH.mT),
    "mv": lambda: aten.mv.default(A, B[:, 0]),
    "addmv": lambda: aten.addmv(C[0], A, B[:, 0]),
    "dot": lambda: aten.dot.default(A[0], A[1]),
    "vdot": lambda: aten.vdot(A[0], A[1]),
    "inner": lambda: aten.inner(A, A),
    "matmul": lambda: aten.matmul.default(A, B),
    "linear": lambda: aten.linear.default(A, A),
    "einsum": lambda: aten.einsum("ij,kj->ik", [A, A]),
    "tensordot": lambda: aten.tensordot(A, B, [1], [0]),
    "linalg_multi_dot": lambda: aten.linalg_multi_dot([A, B, A]),
    "linalg_matrix_power": lambda: aten.linalg_matrix_power.default(C, 3),
    "linalg_vecdot": lambda: aten.linalg_vecdot(A, A),
    "bilinear": lambda: aten.bilinear(A, A, sample(3, 8, 8)),
    "_trilinear": lambda: aten._trilinear(A, sample(3, 8, 8), A, [1, 3], [0], [1, 2], [2, 3], 1),
    "cdist": lambda: aten.cdist.default(A, A),
    "_cdist_forward": lambda: aten._cdist_forward.default(A, A, 2.0, 1),
    "_euclidean_dist": lambda: aten._euclidean_dist(A, A),
    "_addmm_activation": lambda: aten._addmm_activation(C[0], A, B),
    "conv2d": lambda: aten.conv2d.default(IMAGE, KERNEL),
    "convolution": lambda: aten.convolution(IMAGE, KERNEL, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
    "_scaled_dot_product_attention_math": lambda: aten._scaled_dot_product_attention_math(IMAGE, IMAGE, IMAGE),
    "_scaled_dot_product_flash_attention_for_cpu": lambda: aten._scaled_dot_product_flash_attention_for_cpu(
        IMAGE, IMAGE, IMAGE
    ),
    "scaled_dot_product_attention": lambda: aten.scaled_dot_product_attention(IMAGE, IMAGE, IMAGE),
    "linalg_solve_ex": lambda: aten.linalg_solve_ex(C, A),
    "_linalg_svd": lambda: aten._linalg_svd(A),
    "cov": lambda: aten.cov(A),
    "matrix_exp": lambda: aten.matrix_exp.default(C),
}
REFUSED = (
    *("_trilinear", "_cdist_forward", "_euclidean_dist", "_addmm_activation", "convolution", "linalg_solve_ex"),
    *("_scaled_dot_product_attention_math", "_scaled_dot_product_flash_attention_for_cpu", "_linalg_svd", "cov"),
    "matrix_exp",
)


@pytest.mark.parametrize("where", ["the model", "outside"])
@pytest.mark.parametrize("name", ATEN)
def test_aten_products_called_directly_are_quantized_or_raise(name: str, where: str) -> None:
    model = Runs()
    plain = ATEN[name]()
    with simulate(model, MACHINE, on_escape="raise") as sim:
        if name in REFUSED:
            with pytest.raises(UnknownOpError, match=f"/{name}: "):
                model(ATEN[name]) if where == "the model" else ATEN[name]()
            return
        result = model(ATEN[name]) if where == "the model" else ATEN[name]()
    assert {owner for _, _, owner in sim.audit().products} == {"the recipe"}
    assert result.shape == plain.shape and torch.equal(result, BF16.quantize(result))


def test_in_place_aten_ops_write_where_they_should() -> None:
    for call in (lambda t: aten.addmm_.default(t, A, B), lambda t: aten.mul_.Tensor(t, C)):
        target = C.clone()
        with simulate(Runs(), MACHINE) as sim, torch.enable_grad():
            result = sim.model(lambda call=call, target=target: call(target))
        assert result.data_ptr() == target.data_ptr() and torch.equal(result, BF16.quantize(target))
        assert not torch.equal(target, C)
