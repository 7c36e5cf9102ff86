"""Every op does what its table entry says: shown by values, and by the aten products underneath."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpsim import Gemm, Quantizer, Recipe, formats, simulate
from lpsim.machine.ops import WRAPPED, Kind, inplace_argument, op_name
from lpsim.machine.simulate import UnknownOpError

FP4 = Quantizer(formats.get("mxfp4_e2m1"))
BF16 = Quantizer(formats.get("bfloat16"))
MACHINE = Recipe(Gemm(FP4, FP4, out=BF16), Gemm(FP4, FP4), Gemm(FP4, FP4), vector=BF16)

Calls = dict[str, Callable[..., Any]]


def sample(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator)


X, Y, POSITIVE = sample(6, 8), sample(6, 8) + 1, sample(6, 8).abs() + 0.5
IMAGE, VOLUME, SIGNAL = sample(2, 4, 8, 8), sample(2, 4, 4, 4, 4), sample(2, 4, 8)
INDEX = torch.tensor([3, 0, 5])
LABELS = torch.tensor([1, 0, 7, 3, 2, 2])
SIGNS = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0])

PRODUCTS: Calls = {
    "F.linear": lambda: F.linear(X, Y),
    "torch.matmul": lambda: torch.matmul(X, Y.T),
    "Tensor.matmul": lambda: X.matmul(Y.T),
    "@": lambda: X @ Y.T,
    "operator.imatmul": lambda: operator.imatmul(X.clone(), Y.T),
    "Tensor.__rmatmul__": lambda: X.__rmatmul__(Y.T),
    "torch.mm": lambda: torch.mm(X, Y.T),
    "Tensor.mm": lambda: X.mm(Y.T),
    "torch.bmm": lambda: torch.bmm(SIGNAL, SIGNAL.mT),
    "Tensor.bmm": lambda: SIGNAL.bmm(SIGNAL.mT),
    "torch.mv": lambda: torch.mv(X, Y[0]),
    "torch.dot": lambda: torch.dot(X[0], Y[0]),
    "torch.vdot": lambda: torch.vdot(X[0], Y[0]),
    "torch.inner": lambda: torch.inner(X, Y),
    "torch.linalg.vecdot": lambda: torch.linalg.vecdot(X, Y),
    "torch.linalg.multi_dot": lambda: torch.linalg.multi_dot([X, Y.T, X]),
    "torch.linalg.matmul": lambda: torch.linalg.matmul(X, Y.T),
    "torch.addmm": lambda: torch.addmm(X[:, :6], X, Y.T),
    "Tensor.addmm_": lambda: X[:, :6].clone().addmm_(X, Y.T),
    "torch.addmv": lambda: torch.addmv(X[:, 0], X, Y[0]),
    "torch.addbmm": lambda: torch.addbmm(X[:4, :4], SIGNAL, SIGNAL.mT),
    "torch.baddbmm": lambda: torch.baddbmm(SIGNAL[:, :, :4], SIGNAL, SIGNAL.mT),
    "torch.linalg.matrix_power": lambda: torch.linalg.matrix_power(X[:, :6], 3),
    "torch.matrix_power": lambda: torch.matrix_power(input=X[:, :6], n=2),
    "Tensor.matrix_power": lambda: X[:, :6].matrix_power(5),
    "torch.cdist": lambda: torch.cdist(X, Y),
    "torch.cdist use_mm": lambda: torch.cdist(X, Y, 2, compute_mode="use_mm_for_euclid_dist"),
    "torch.ops.aten.cdist": lambda: torch.ops.aten.cdist(X, Y),
    "torch.einsum": lambda: torch.einsum("bij,bkj->bik", SIGNAL, SIGNAL),
    "torch.tensordot": lambda: torch.tensordot(X, Y, dims=([1], [1])),
    "F.bilinear": lambda: F.bilinear(X, Y, sample(5, 8, 8)),
    "F.conv1d": lambda: F.conv1d(SIGNAL, sample(3, 4, 3)),
    "F.conv2d": lambda: F.conv2d(IMAGE, sample(3, 4, 3, 3), padding=1),
    "torch.conv2d": lambda: torch.conv2d(IMAGE, sample(3, 4, 3, 3), stride=2),
    "F.conv3d": lambda: F.conv3d(VOLUME, sample(3, 4, 3, 3, 3)),
    "F.conv_transpose1d": lambda: F.conv_transpose1d(SIGNAL, sample(4, 3, 3)),
    "F.conv_transpose2d": lambda: F.conv_transpose2d(IMAGE, sample(4, 3, 3, 3), stride=2),
    "F.conv_transpose3d": lambda: F.conv_transpose3d(VOLUME, sample(4, 3, 2, 2, 2)),
    "F.scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(IMAGE, IMAGE, IMAGE),
    "nn.Linear": lambda: nn.Linear(8, 5)(X),
    "nn.Bilinear": lambda: nn.Bilinear(8, 8, 5)(X, Y),
    "nn.Conv2d circular": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular")(IMAGE),
    "nn.MultiheadAttention": lambda: nn.MultiheadAttention(8, 2)(SIGNAL, SIGNAL, SIGNAL),
    "nn.MultiheadAttention weights": lambda: nn.MultiheadAttention(8, 2, kdim=8, vdim=8, add_zero_attn=True)(X, X, X),
    "nn.TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)(SIGNAL),
    "nn.TransformerDecoderLayer": lambda: nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0)(SIGNAL, SIGNAL),
    "nn.TransformerEncoder eval": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
    ).eval()(SIGNAL),
    "nn.LSTM": lambda: nn.LSTM(8, 5, 2, bidirectional=True)(SIGNAL),
    "nn.GRU": lambda: nn.GRU(8, 5)(SIGNAL),
    "nn.RNN": lambda: nn.RNN(8, 5, nonlinearity="relu")(SIGNAL),
    "nn.LSTMCell": lambda: nn.LSTMCell(8, 5)(X),
    "nn.GRUCell": lambda: nn.GRUCell(8, 5)(X),
    "torch.ops.aten.mm": lambda: torch.ops.aten.mm(X, Y.T),
    "torch.ops.aten.addmm.default": lambda: torch.ops.aten.addmm.default(X[:, :6], X, Y.T),
}

VECTORS: Calls = {
    "torch.add": lambda: torch.add(X, Y, alpha=0.3),
    "+": lambda: X + Y,
    "1 +": lambda: 1.1 + X,
    "-": lambda: X - Y,
    "1 -": lambda: 1.1 - X,
    "*": lambda: X * Y,
    "2.2 *": lambda: 2.2 * X,
    "/": lambda: X / Y,
    "1 /": lambda: 1 / X,
    "//": lambda: X // 0.3,
    "%": lambda: X % 0.3,
    "**": lambda: POSITIVE**1.7,
    "2 **": lambda: 2**X,
    "unary -": lambda: -X,
    "abs()": lambda: abs(X),
    "operator.iadd": lambda: operator.iadd(X.clone(), Y),
    "operator.isub": lambda: operator.isub(X.clone(), Y),
    "operator.imul": lambda: operator.imul(X.clone(), Y),
    "operator.itruediv": lambda: operator.itruediv(X.clone(), Y),
    "operator.ipow": lambda: operator.ipow(POSITIVE.clone(), 1.7),
    "Tensor.add_": lambda: X.clone().add_(Y),
    "Tensor.mul_": lambda: X.clone().mul_(Y),
    "Tensor.addcmul_": lambda: X.clone().addcmul_(Y, Y),
    "Tensor.exp_": lambda: X.clone().exp_(),
    "torch.add out": lambda: torch.add(X, Y, out=torch.empty(6, 8)),
    "torch.exp": lambda: torch.exp(X),
    "torch.log1p": lambda: torch.log1p(POSITIVE),
    "torch.sqrt": lambda: torch.sqrt(POSITIVE),
    "torch.rsqrt": lambda: POSITIVE.rsqrt(),
    "torch.pow": lambda: torch.pow(POSITIVE, 0.3),
    "torch.sin": lambda: torch.sin(X),
    "torch.tanh": lambda: torch.tanh(X),
    "torch.erf": lambda: torch.erf(X),
    "torch.special.expit": lambda: torch.special.expit(X),
    "torch.lerp": lambda: torch.lerp(X, Y, 0.3),
    "torch.addcdiv": lambda: torch.addcdiv(X, X, Y),
    "torch.cdist p": lambda: torch.cdist(X, Y, 1.0),
    "torch.cdist without mm": lambda: torch.cdist(X, Y, compute_mode="donot_use_mm_for_euclid_dist"),
    "torch.ops.aten.cdist p": lambda: torch.ops.aten.cdist(X, Y, 3.0, 1),
    "torch.outer": lambda: torch.outer(X[0], Y[0]),
    "torch.einsum without a sum": lambda: torch.einsum("i,j->ij", X[0], Y[0]),
    "F.relu": lambda: F.relu(X),
    "F.relu_": lambda: F.relu_(X.clone()),
    "F.relu inplace": lambda: F.relu(X.clone(), inplace=True),
    "F.relu6": lambda: F.relu6(X * 5),
    "F.gelu": lambda: F.gelu(X),
    "F.gelu tanh": lambda: F.gelu(X, approximate="tanh"),
    "F.silu": lambda: F.silu(X),
    "F.silu inplace": lambda: F.silu(X.clone(), True),
    "F.mish": lambda: F.mish(X),
    "F.elu": lambda: F.elu(X),
    "F.selu": lambda: F.selu(X),
    "F.leaky_relu": lambda: F.leaky_relu(X),
    "F.prelu": lambda: F.prelu(X, torch.tensor([0.3])),
    "F.softplus": lambda: F.softplus(X),
    "F.hardswish": lambda: F.hardswish(X),
    "F.hardsigmoid": lambda: F.hardsigmoid(X),
    "F.logsigmoid": lambda: F.logsigmoid(X),
    "F.glu": lambda: F.glu(X),
    "torch.sigmoid": lambda: torch.sigmoid(X),
    "Tensor.sigmoid_": lambda: X.clone().sigmoid_(),
    "F.softmax": lambda: F.softmax(X, -1),
    "Tensor.softmax": lambda: X.softmax(-1),
    "F.log_softmax": lambda: F.log_softmax(X, -1),
    "F.dropout eval": lambda: F.dropout(X, 0.5, training=False),
    "F.layer_norm": lambda: F.layer_norm(X, (8,)),
    "F.rms_norm": lambda: F.rms_norm(X, (8,)),
    "F.group_norm": lambda: F.group_norm(IMAGE, 2),
    "F.batch_norm": lambda: F.batch_norm(IMAGE, torch.zeros(4), torch.ones(4), training=True),
    "F.instance_norm": lambda: F.instance_norm(IMAGE),
    "F.local_response_norm": lambda: F.local_response_norm(IMAGE, 2),
    "F.normalize": lambda: F.normalize(X),
    "nn.BatchNorm2d": lambda: nn.BatchNorm2d(4)(IMAGE),
    "F.interpolate": lambda: F.interpolate(IMAGE, scale_factor=1.5, mode="bilinear"),
    "F.grid_sample": lambda: F.grid_sample(IMAGE, sample(2, 3, 3, 2), align_corners=False),
    "F.avg_pool2d": lambda: F.avg_pool2d(IMAGE, 3),
    "F.adaptive_avg_pool2d": lambda: F.adaptive_avg_pool2d(IMAGE, 3),
    "F.fold": lambda: F.fold(sample(2, 16, 9), (4, 4), 2),
    "torch.index_add": lambda: torch.index_add(X, 0, INDEX, Y[:3]),
    "Tensor.index_add_": lambda: X.clone().index_add_(0, INDEX, Y[:3]),
    "Tensor.scatter_add_": lambda: X.clone().scatter_add_(0, INDEX[:, None].expand(3, 8), Y),
}

REDUCTIONS: Calls = {
    "torch.sum": lambda: torch.sum(X),
    "Tensor.sum": lambda: X.sum(0),
    "torch.mean": lambda: X.mean(-1, keepdim=True),
    "torch.var": lambda: torch.var(X, 0),
    "torch.std_mean": lambda: torch.std_mean(X, 0),
    "torch.norm": lambda: torch.norm(X),
    "torch.linalg.vector_norm": lambda: torch.linalg.vector_norm(X, dim=-1),
    "torch.logsumexp": lambda: torch.logsumexp(X, 0),
    "torch.prod": lambda: X.prod(0),
    "torch.cumsum": lambda: torch.cumsum(X, 0),
    "F.cosine_similarity": lambda: F.cosine_similarity(X, Y),
    "F.pairwise_distance": lambda: F.pairwise_distance(X, Y),
    "F.embedding_bag": lambda: F.embedding_bag(INDEX[None], X),
    "F.cross_entropy": lambda: F.cross_entropy(X, LABELS),
    "F.cross_entropy smooth": lambda: F.cross_entropy(X, LABELS, label_smoothing=0.1),
    "F.nll_loss": lambda: F.nll_loss(X, LABELS),
    "F.mse_loss": lambda: F.mse_loss(X, Y),
    "F.l1_loss": lambda: F.l1_loss(X, Y),
    "F.smooth_l1_loss": lambda: F.smooth_l1_loss(X, Y),
    "F.huber_loss": lambda: F.huber_loss(X, Y),
    "F.kl_div": lambda: F.kl_div(X, POSITIVE, reduction="batchmean"),
    "F.binary_cross_entropy_with_logits": lambda: F.binary_cross_entropy_with_logits(X, POSITIVE.clamp(0, 1)),
    "F.margin_ranking_loss": lambda: F.margin_ranking_loss(X[:, 0], Y[:, 0], SIGNS),
    "F.triplet_margin_loss": lambda: F.triplet_margin_loss(X, Y, POSITIVE),
    "nn.CrossEntropyLoss": lambda: nn.CrossEntropyLoss()(X, LABELS),
}

UNTOUCHED: Calls = {
    "torch.max": lambda: torch.max(X, 0),
    "torch.topk": lambda: X.topk(3),
    "torch.sort": lambda: X.sort(),
    "torch.maximum": lambda: torch.maximum(X, Y),
    "torch.clamp": lambda: X.clamp(-0.5, 0.5),
    "torch.where": lambda: torch.where(X > 0, X, Y),
    "Tensor.masked_fill": lambda: X.masked_fill(X > 0, -torch.inf),
    "Tensor.masked_fill_": lambda: X.clone().masked_fill_(X > 0, 0.1),
    "F.max_pool2d": lambda: F.max_pool2d(IMAGE, 2),
    "F.adaptive_max_pool2d": lambda: F.adaptive_max_pool2d(IMAGE, 2),
    "F.embedding": lambda: F.embedding(INDEX, X),
    "getitem": lambda: X[1:, INDEX],
    "setitem": lambda: operator.setitem(X.clone(), 0, 0.1),
    "Tensor.gather": lambda: X.gather(0, INDEX[:, None]),
    "Tensor.index_select": lambda: X.index_select(0, INDEX),
    "Tensor.scatter": lambda: X.scatter(0, INDEX[:, None], Y),
    "Tensor.view": lambda: X.view(8, 6),
    "Tensor.reshape": lambda: X.T.reshape(-1),
    "Tensor.permute": lambda: IMAGE.permute(0, 2, 3, 1).contiguous(),
    "Tensor.T": lambda: X.T,
    "Tensor.mT": lambda: X.mT,
    "Tensor.expand": lambda: X[None].expand(3, 6, 8),
    "Tensor.repeat": lambda: X.repeat(2, 1),
    "torch.repeat_interleave": lambda: X.repeat_interleave(2, 0),
    "torch.cat": lambda: torch.cat([X, Y]),
    "torch.stack": lambda: torch.stack([X, Y]),
    "torch.split": lambda: X.split(2),
    "Tensor.chunk": lambda: X.chunk(2, -1),
    "Tensor.unbind": lambda: X.unbind(),
    "iteration": lambda: list(X),
    "torch.roll": lambda: X.roll(1, 0),
    "torch.flip": lambda: X.flip(0),
    "torch.tril": lambda: X.tril(),
    "torch.diagonal": lambda: X.diagonal(),
    "F.pad": lambda: F.pad(X, (1, 2)),
    "F.unfold": lambda: F.unfold(IMAGE, 2),
    "F.pixel_shuffle": lambda: F.pixel_shuffle(IMAGE, 2),
    "Tensor.to": lambda: X.to(torch.float64),
    "Tensor.half": lambda: X.half(),
    "Tensor.detach": lambda: X.detach(),
    "torch.sign": lambda: torch.sign(X),
    "torch.round": lambda: torch.round(X),
    "Tensor.clone": lambda: X.clone(),
    "copy_": lambda: torch.empty(6, 8).copy_(X),
    "Tensor.zero_": lambda: X.clone().zero_(),
    "torch.zeros_like": lambda: torch.zeros_like(X),
    "new_full": lambda: X.new_full((2,), 0.1),
    "torch.arange": lambda: torch.arange(5.0),
    "torch.tensor": lambda: torch.tensor([0.1]),
    "torch.eq": lambda: X == Y,
    "argmax": lambda: X.argmax(-1),
    "isnan": lambda: X.isnan(),
    "allclose": lambda: torch.allclose(X, Y),
    "item": lambda: X[0, 0].item(),
    "shape": lambda: X.shape,
    "size": lambda: X.size(0),
    "torch.finfo": lambda: torch.finfo(X.dtype).max,
    "nonzero": lambda: X.nonzero(),
    "numpy": lambda: X.numpy().sum(),
    "integers": lambda: INDEX @ INDEX + INDEX * 2,
    "one_hot": lambda: F.one_hot(INDEX),
    "requires_grad_": lambda: X.clone().requires_grad_().is_leaf,
    "nn.init": lambda: nn.init.ones_(torch.empty(2, 2)),
    "repr": lambda: repr(X),
}

UNKNOWN: Calls = {
    "torch.cumprod": lambda: torch.cumprod(X, 0),
    "torch.linalg.solve": lambda: torch.linalg.solve(X[:, :6], Y),
    "torch.linalg.inv": lambda: torch.linalg.inv(X[:, :6]),
    "torch.matrix_exp": lambda: torch.matrix_exp(X[:, :6]),
    "torch.linalg.svd": lambda: torch.linalg.svd(X),
    "torch.fft.fft": lambda: torch.fft.fft(X),
    "torch.cov": lambda: torch.cov(X),
    "F.affine_grid": lambda: F.affine_grid(sample(2, 2, 3), [2, 1, 4, 4], align_corners=False),
    "torch.ops.aten._cdist_forward": lambda: torch.ops.aten._cdist_forward(X, Y, 2.0, None),
}


def floats(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [t for v in value for t in floats(v)] if isinstance(value, list | tuple) else []


class Runs(nn.Module):
    """A model whose forward is the call."""

    def forward(self, call: Callable[..., Any]) -> Any:
        return call()


def run(call: Callable[..., Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Runs()
    with simulate(model, MACHINE) as sim:
        result = model(call)
    assert sim.audit().escaped == ()
    return result, sim.audit()


def plain(call: Callable[..., Any]) -> Any:
    torch.manual_seed(0)
    return call()


def test_the_calls_are_many() -> None:
    assert sum(map(len, (PRODUCTS, VECTORS, REDUCTIONS, UNTOUCHED, UNKNOWN))) >= 120


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_quantized(name: str) -> None:
    result, audit = run(PRODUCTS[name])
    expected = plain(PRODUCTS[name])
    assert audit.products and {owner for _, _, owner in audit.products} == {"the recipe"}
    for ours, theirs in zip(floats(result), floats(expected), strict=True):
        assert ours.shape == theirs.shape and ours.dtype is theirs.dtype
        assert not torch.equal(ours, theirs)
        assert torch.equal(ours, BF16.quantize(ours))


@pytest.mark.parametrize("name", VECTORS | REDUCTIONS)
def test_vector_ops_and_reductions_are_rounded_once(name: str) -> None:
    call = (VECTORS | REDUCTIONS)[name]
    result, audit = run(call)
    assert not audit.products
    for ours, theirs in zip(floats(result), floats(plain(call)), strict=True):
        assert torch.equal(ours, BF16.quantize(theirs))


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_moves_data_or_is_exempt_is_untouched(name: str) -> None:
    result, audit = run(UNTOUCHED[name])
    expected = plain(UNTOUCHED[name])
    assert not audit.products
    torch.testing.assert_close(floats(result), floats(expected), rtol=0, atol=0)
    assert all(row.reason for row in audit.rows)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_the_table_does_not_know_raises(name: str) -> None:
    model = Runs()
    with simulate(model, MACHINE), pytest.raises(UnknownOpError, match=r"<model>/.* Add it to lpsim\.machine\.ops"):
        model(UNKNOWN[name])


SQUARE = X[:, :6] @ X[:, :6].T + torch.eye(6)
HIDING: Calls = {
    "torch.linalg.solve": lambda: torch.linalg.solve(SQUARE, Y),
    "torch.linalg.inv": lambda: torch.linalg.inv(SQUARE),
    "torch.inverse": lambda: torch.inverse(SQUARE),
    "Tensor.pinverse": lambda: SQUARE.pinverse(),
    "torch.linalg.svd": lambda: torch.linalg.svd(X),
    "torch.linalg.eigh": lambda: torch.linalg.eigh(SQUARE),
    "torch.linalg.qr": lambda: torch.linalg.qr(X),
    "torch.linalg.cholesky": lambda: torch.linalg.cholesky(SQUARE),
    "torch.linalg.det": lambda: torch.linalg.det(SQUARE),
    "torch.matrix_exp": lambda: torch.matrix_exp(SQUARE),
    "torch.cov": lambda: torch.cov(X),
    "torch.corrcoef": lambda: torch.corrcoef(X),
    "torch.linalg.matrix_rank": lambda: torch.linalg.matrix_rank(X),
    "torch.svd_lowrank": lambda: torch.svd_lowrank(X, 2),
    "F.affine_grid": lambda: F.affine_grid(sample(2, 2, 3), [2, 1, 4, 4], align_corners=False),
    "torch.ops.aten._cdist_forward": lambda: torch.ops.aten._cdist_forward(X, Y, 2.0, None),
}


@pytest.mark.parametrize("audit", [True, False])
@pytest.mark.parametrize("name", HIDING)
def test_what_hides_products_raises_outside_the_model_too(name: str, audit: bool) -> None:
    """Where other functions that are not in the table are nobody's arithmetic; and not where it is left out by hand."""
    raises = pytest.raises(UnknownOpError, match=r"^<outside>/\w+: .* multiplies matrices inside")
    with simulate(nn.Linear(2, 2), MACHINE, audit=audit) as sim:
        with sim.suspended():
            HIDING[name]()
        with torch.no_grad(), raises:
            HIDING[name]()


class Whitening(torch.optim.Optimizer):
    """As Shampoo and Muon do: an update by an eigenvalue decomposition and by products."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            values, vectors = torch.linalg.eigh(p.grad @ p.grad.T + torch.eye(len(p)))
            p -= 0.1 * (vectors / values.sqrt()) @ vectors.T @ p.grad


def test_products_of_the_optimizer_are_its_own_and_in_the_audit() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 6, bias=False)
    optimizer = Whitening(layer.parameters())
    layer.weight.grad = Y.clone()
    expected = layer.weight.detach().clone()
    values, vectors = torch.linalg.eigh(Y @ Y.T + torch.eye(6))
    expected -= 0.1 * (vectors / values.sqrt()) @ vectors.T @ Y
    with simulate(layer, MACHINE, on_escape="raise") as sim:
        optimizer.step()
    assert torch.equal(layer.weight, expected)
    assert {(row.op, row.kind, row.count) for row in sim.audit().rows if row.reason == "the optimizer"} == {
        ("linalg_eigh", Kind.EXEMPT, 1),
        ("matmul", Kind.EXEMPT, 3),
    }
    assert {owner for _, _, owner in sim.audit().products} == {"the optimizer"}


def test_no_entry_is_out_of_reach() -> None:
    """Each name of the table is some function of torch, and each entry has a reason."""
    import torch.nn.init

    names = {op_name(f) for functions in torch.overrides.get_overridable_functions().values() for f in functions}
    for owner in (
        torch,
        torch.Tensor,
        torch._C._nn,
        torch._C._VariableFunctions,
        F,
        nn.init,
        torch.linalg,
        torch.special,
    ):
        names |= {n if n.endswith("__") else n.removesuffix("_") for n in dir(owner)}
    names |= {f"special_{n}" for n in dir(torch.special)} | {f"linalg_{n}" for n in dir(torch.linalg)}
    names |= {
        "grouped_mm",
        "linear_cross_entropy",  # of torch 2.13
        "transformers::grouped_mm_fallback",
        "grad",
        "data",
        "alias",
        "sparse",
        "_fused_sgd",
        "_fused_adagrad",
        "_to_copy",
        "_pad",
    }
    assert sorted(set(WRAPPED) - names) == []
    assert all(op.reason and op.name == name for name, op in WRAPPED.items())
    assert all((op.kind is Kind.PRODUCT) >= (op.function is not None) for op in WRAPPED.values())


def test_names_and_in_place_forms() -> None:
    assert op_name(torch.Tensor.add_) == op_name(torch.add) == op_name(torch.ops.aten.add_) == "add"
    assert op_name(torch.ops.aten.add.Tensor) == "add"
    assert inplace_argument(torch.Tensor.add_) == inplace_argument(torch.Tensor.__ipow__) == -1
    assert inplace_argument(F.dropout) == 3
    assert inplace_argument(torch.add) is None


def test_what_draws_nothing_is_not_said_to_draw() -> None:
    for name in ("zeros", "ones", "eye", "constant", "dirac", "zeros_like"):
        assert WRAPPED[name].reason == "creates values without reading any"
