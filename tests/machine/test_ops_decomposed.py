"""Products without rounding, in float64: decomposing them changes nothing but the last bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpsim import simulate
from tests.machine.rounded import UNROUNDED, run, tensors, weighting

MASK = torch.rand(5, 6, generator=torch.Generator().manual_seed(1)) > 0.3
PRODUCTS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "linear": (F.linear, ((2, 3, 4), (5, 4), (5,))),
    "linear vector": (F.linear, ((3, 4), (4,))),
    "linear one row": (F.linear, ((4,), (5, 4), (5,))),
    "linear empty": (F.linear, ((0, 4), (5, 4), (5,))),
    "matmul 1 1": (torch.matmul, ((4,), (4,))),
    "matmul 1 2": (torch.matmul, ((4,), (4, 3))),
    "matmul 2 1": (torch.matmul, ((3, 4), (4,))),
    "matmul 1 3": (torch.matmul, ((4,), (2, 4, 3))),
    "matmul 3 1": (torch.matmul, ((2, 3, 4), (4,))),
    "matmul 2 3": (torch.matmul, ((5, 4), (2, 4, 3))),
    "matmul 4 2": (torch.matmul, ((2, 3, 5, 4), (4, 3))),
    "matmul broadcast": (torch.matmul, ((2, 1, 5, 4), (3, 4, 3))),
    "matmul broadcast left": (torch.matmul, ((3, 5, 4), (2, 1, 4, 3))),
    "@": (lambda a, b: a @ b, ((3, 4), (4, 5))),
    "__rmatmul__": (lambda a, b: b.__rmatmul__(a), ((3, 4), (4, 5))),
    "mm": (torch.mm, ((3, 4), (4, 5))),
    "Tensor.mm": (lambda a, b: a.mm(mat2=b), ((3, 4), (4, 5))),
    "bmm": (torch.bmm, ((2, 3, 4), (2, 4, 5))),
    "mv": (torch.mv, ((3, 4), (4,))),
    "dot": (torch.dot, ((4,), (4,))),
    "vdot": (torch.vdot, ((4,), (4,))),
    "inner": (torch.inner, ((2, 3, 4), (5, 4))),
    "inner scalar": (torch.inner, ((2, 3), ())),
    "vecdot": (lambda a, b: torch.linalg.vecdot(a, b, dim=0), ((4, 3), (4, 1))),
    "addmm": (lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2.0), ((5,), (3, 4), (4, 5))),
    "addmm beta 0": (lambda c, a, b: torch.addmm(c, a, b, beta=0), ((5,), (3, 4), (4, 5))),
    "addmv": (torch.addmv, ((3,), (3, 4), (4,))),
    "baddbmm": (lambda c, a, b: torch.baddbmm(c, a, b, alpha=0.5), ((2, 3, 5), (2, 3, 4), (2, 4, 5))),
    "addbmm": (lambda c, a, b: torch.addbmm(c, a, b, beta=2), ((3, 5), (2, 3, 4), (2, 4, 5))),
    "chain_matmul": (torch.chain_matmul, ((3, 4), (4, 5), (5, 2))),
    "multi_dot": (lambda *m: torch.linalg.multi_dot(m), ((3, 4), (4, 5), (5, 2))),
    "matrix_power 0": (lambda a: torch.matrix_power(a, 0) + 0 * a, ((2, 3, 3),)),
    "matrix_power 1": (lambda a: torch.linalg.matrix_power(a, 1), ((3, 3),)),
    "matrix_power 3": (lambda a: torch.linalg.matrix_power(input=a, n=3), ((2, 3, 3),)),
    "matrix_power 7": (lambda a: a.matrix_power(7), ((3, 3),)),
    "matrix_power 12": (lambda a: torch.linalg.matrix_power(a, 12), ((3, 3),)),
    "cdist": (torch.cdist, ((3, 4), (5, 4))),
    "cdist batch": (lambda a, b: torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist"), ((2, 1, 3, 4), (6, 5, 4))),
    "cdist p": (lambda a, b: torch.cdist(a, b, p=1.5), ((3, 4), (5, 4))),
    "tensordot": (lambda a, b: torch.tensordot(a, b, dims=2), ((3, 4, 5), (4, 5, 2))),
    "tensordot all": (lambda a, b: torch.tensordot(a, b, dims=2), ((3, 4), (3, 4))),
    "tensordot axes": (lambda a, b: torch.tensordot(a, b, dims=([0, -1], [1, 0])), ((4, 3, 5), (5, 4, 2))),
    "tensordot 0": (lambda a, b: torch.tensordot(a, b, dims=0), ((2,), (3,))),
    "bilinear": (F.bilinear, ((2, 3, 4), (2, 3, 5), (6, 4, 5), (6,))),
    "einsum mm": (lambda a, b: torch.einsum("ij,jk->ik", a, b), ((3, 4), (4, 5))),
    "einsum implicit": (lambda a, b: torch.einsum("bj, ja", a, b), ((3, 4), (4, 5))),
    "einsum batch": (lambda a, b: torch.einsum("bhid,bhjd->bhij", a, b), ((2, 3, 4, 5), (2, 3, 6, 5))),
    "einsum two axes": (lambda a, b: torch.einsum("ijk,kjl->il", a, b), ((2, 3, 4), (4, 3, 5))),
    "einsum ellipsis": (lambda a, b: torch.einsum("...ij,...jk->...ik", a, b), ((2, 3, 4), (3, 2, 4, 5))),
    "einsum ellipsis implicit": (lambda a, b: torch.einsum("...ij,jk", a, b), ((6, 3, 4), (4, 5))),
    "einsum diagonal": (lambda a, b: torch.einsum("iij,jk->ik", a, b), ((3, 3, 4), (4, 2))),
    "einsum sum": (lambda a, b: torch.einsum("ijx,jky->ik", a, b), ((3, 4, 2), (4, 5, 3))),
    "einsum three": (lambda a, b, c: torch.einsum("ij,jk,kl->li", a, b, c), ((2, 3), (3, 4), (4, 5))),
    "einsum three shared": (lambda a, b, c: torch.einsum("bi,bj,bk->ijk", a, b, c), ((5, 2), (5, 3), (5, 4))),
    "einsum one": (lambda a: torch.einsum("iji->j", a), ((3, 4, 3),)),
    "einsum outer": (lambda a, b: torch.einsum("i,j->ji", a, b), ((3,), (4,))),
    "einsum elementwise": (lambda a, b: torch.einsum("ij,ij->ij", a, b), ((3, 4), (3, 4))),
    "einsum broadcast": (lambda a, b: torch.einsum("bij,bjk->bik", a, b), ((1, 3, 4), (2, 4, 5))),
    "einsum contracted broadcast": (lambda a, b: torch.einsum("ij,jk->ik", a, b), ((3, 1), (4, 5))),
    "einsum sublists": (lambda a, b: torch.einsum(a, [0, 1], b, [1, 2], [2, 0]), ((3, 4), (4, 5))),
    "einsum sublists ellipsis": (lambda a, b: torch.einsum(a, [..., 1], b, [1, 2]), ((2, 3, 4), (4, 5))),
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1, dilation=2), ((2, 3, 9), (4, 3, 2), (4,))),
    "conv1d same": (lambda x, w: F.conv1d(x, w, padding="same"), ((2, 3, 9), (4, 3, 4))),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1), ((2, 3, 6, 7), (4, 3, 3, 3), (4,))),
    "conv2d groups": (lambda x, w, b: F.conv2d(x, w, b, groups=2, dilation=2), ((2, 4, 6, 7), (6, 2, 3, 2), (6,))),
    "conv2d depthwise": (lambda x, w: F.conv2d(x, w, groups=4, padding="same"), ((2, 4, 6, 7), (4, 1, 3, 3))),
    "conv2d patches": (lambda x, w, b: F.conv2d(x, w, b, stride=3), ((2, 3, 6, 9), (4, 3, 3, 3), (4,))),
    "conv2d unbatched": (F.conv2d, ((3, 6, 7), (4, 3, 3, 3), (4,))),
    "conv3d": (
        lambda x, w, b: F.conv3d(x, w, b, stride=(2, 1, 2), padding=(1, 0, 1), dilation=(2, 1, 1)),
        ((2, 3, 7, 5, 6), (4, 3, 3, 2, 3), (4,)),
    ),
    "conv3d groups": (lambda x, w: F.conv3d(x, w, groups=2), ((2, 4, 4, 5, 6), (6, 2, 2, 3, 3))),
    "conv_transpose1d": (
        lambda x, w, b: F.conv_transpose1d(x, w, b, stride=3, padding=1, output_padding=2, dilation=2),
        ((2, 3, 5), (3, 4, 3), (4,)),
    ),
    "conv_transpose2d": (
        lambda x, w, b: F.conv_transpose2d(x, w, b, stride=2, padding=1, output_padding=1, groups=2),
        ((2, 4, 5, 3), (4, 3, 3, 3), (6,)),
    ),
    "conv_transpose2d unbatched": (F.conv_transpose2d, ((4, 5, 3), (4, 3, 3, 2))),
    "conv_transpose3d": (
        lambda x, w, b: F.conv_transpose3d(x, w, b, stride=(2, 1, 2), padding=(1, 0, 1), dilation=(1, 2, 1)),
        ((2, 3, 4, 3, 3), (3, 4, 3, 2, 3), (4,)),
    ),
    "attention": (F.scaled_dot_product_attention, ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7))),
    "attention 2d": (F.scaled_dot_product_attention, ((5, 4), (6, 4), (6, 7))),
    "attention causal": (
        lambda *t: F.scaled_dot_product_attention(*t, is_causal=True, scale=0.3),
        ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7)),
    ),
    "attention mask": (
        lambda *t: F.scaled_dot_product_attention(*t, attn_mask=MASK),
        ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7)),
    ),
    "attention bias": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
        ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7), (2, 1, 5, 6)),
    ),
    "attention masked row": (
        lambda *t: F.scaled_dot_product_attention(*t, attn_mask=MASK & (torch.arange(5) != 2)[:, None]),
        ((2, 5, 4), (2, 6, 4), (2, 6, 7)),
    ),
    "attention grouped": (
        lambda *t: F.scaled_dot_product_attention(*t, is_causal=True, enable_gqa=True),
        ((2, 6, 5, 4), (2, 3, 5, 4), (2, 3, 5, 7)),
    ),
    "attention grouped mask": (
        lambda *t: F.scaled_dot_product_attention(*t, attn_mask=MASK, enable_gqa=True),
        ((2, 6, 5, 4), (2, 2, 6, 4), (2, 2, 6, 7)),
    ),
}


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated", "ignore:Using padding='same' with even")
@pytest.mark.parametrize("name", PRODUCTS)
def test_decomposed_is_what_torch_computes(name: str) -> None:
    function, shapes = PRODUCTS[name]
    inputs = tensors(*shapes, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = function(*leaves)
    out, grads = run(UNROUNDED, function, *inputs)
    assert out.shape == expected.shape and out.dtype is torch.float64
    torch.testing.assert_close(out, expected.detach(), rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, leaves, weighting(expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_dropout_in_attention_keeps_its_probability() -> None:
    q, k, v = torch.zeros(1, 4, 64, 8), torch.zeros(1, 4, 64, 8), torch.ones(1, 4, 64, 8)
    torch.manual_seed(0)
    with simulate(nn.Identity(), UNROUNDED):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.25)
    kept = out * 0.75 * 64  # every kept weight is 1/64 / 0.75, so these are counts of a binomial(64, 0.75)
    assert torch.allclose(kept, kept.round(), atol=1e-3)
    assert abs(float(kept[..., 0].mean()) - 48) < 5 * (64 * 0.25 * 0.75 / 256) ** 0.5


@pytest.mark.parametrize("module", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda m: m.__name__)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"bias": False, "bidirectional": True, "packed": True},
        {"num_layers": 2, "proj_size": 3, "packed": True},
    ],
    ids=["plain", "bidirectional", "packed", "projected"],
)
def test_recurrent_layers_are_what_torch_computes(module: type[nn.RNNBase], options: dict[str, Any]) -> None:
    options = dict(options)
    packed = options.pop("packed", False)
    if module is not nn.LSTM:
        options.pop("proj_size", None)
    torch.manual_seed(0)
    layer = module(5, 4, dtype=torch.float64, **options)
    x = torch.randn(3, 6, 5, dtype=torch.float64, requires_grad=True)

    def outputs() -> list[Tensor]:
        data = x
        if packed:
            lengths = torch.tensor([4, 6, 2])
            data = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            layer.batch_first = True
        out, state = layer(data)
        flat = [out.data if packed else out, *(state if isinstance(state, tuple) else (state,))]
        return [*flat, *torch.autograd.grad(sum(t.sin().sum() for t in flat), [x, *layer.parameters()])]

    expected = outputs()
    with simulate(layer, UNROUNDED) as sim:
        ours = outputs()
    assert not sim.audit().escaped
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell], ids=lambda c: c.__name__)
@pytest.mark.parametrize("bias", [True, False])
def test_recurrent_cells_are_what_torch_computes(cell: type[nn.RNNCellBase], bias: bool) -> None:
    torch.manual_seed(0)
    layer = cell(5, 4, bias=bias, dtype=torch.float64)  # type: ignore[call-arg]
    x = torch.randn(3, 5, dtype=torch.float64)
    with simulate(layer, UNROUNDED):
        ours = layer(x)
    torch.testing.assert_close(ours, layer(x), rtol=1e-12, atol=1e-12)
