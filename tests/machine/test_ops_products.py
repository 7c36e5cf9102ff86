"""Products: what is multiplied, and along which axis it is quantized, written out with quantize and torch.matmul."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lpsim import Gemm, Key, Quantizer, Recipe, Rounding, formats, simulate
from lpsim.machine.ops import Role
from lpsim.machine.recipes import BackwardOperands
from tests.machine.rounded import BF16, FP4, FP6, FP8, THREE, UNROUNDED, assert_equal, run, tensors, weighting


def test_linear() -> None:
    x, w, b = tensors((3, 10, 70), (50, 70), (50,))
    q4, q6, q8 = FP4.quantize, FP6.quantize, FP8.quantize
    rows = x.reshape(30, 70)
    out = (q4(rows, -1) @ q6(w, -1).T + b).view(3, 10, 50)
    g = weighting(out).reshape(30, 50)
    x_q, w_q = q4(rows, -1), q6(w, -1)
    dx = q8(g, -1) @ q4(w_q, 0)  # sums over the 50 outputs
    dw = q8(g, 0).T @ q6(x_q, 0)  # sums over the 30 positions, batch and sequence flattened
    assert_equal(run(THREE, F.linear, x, w, b), out, dx.view_as(x), dw, g.sum(0))


def test_linear_from_unquantized_operands() -> None:
    x, w = tensors((40, 70), (50, 70))
    recipe = Recipe(THREE.fprop, THREE.dgrad, THREE.wgrad, backward_operands=BackwardOperands.UNQUANTIZED)
    out = FP4.quantize(x, -1) @ FP6.quantize(w, -1).T
    g = weighting(out)
    dx = FP8.quantize(g, -1) @ FP4.quantize(w, 0)
    dw = FP8.quantize(g, 0).T @ FP6.quantize(x, 0)
    assert_equal(run(recipe, F.linear, x, w), out, dx, dw)


def test_the_forward_recipe_differentiates_the_product_it_computed() -> None:
    x, w = tensors((40, 70), (50, 70))
    out = FP6.quantize(x) @ FP6.quantize(w).T
    g = weighting(out)
    got = run(Recipe.forward(FP6.format), F.linear, x, w)
    assert_equal(got, out, g @ FP6.quantize(w), g.T @ FP6.quantize(x))


@pytest.mark.parametrize("multiply", [torch.matmul, torch.bmm, lambda a, b: a @ b, lambda a, b: a.bmm(b)])
def test_matmul(multiply: Callable[[Tensor, Tensor], Tensor]) -> None:
    a, b = tensors((4, 33, 40), (4, 40, 37))
    q4, q6, q8 = FP4.quantize, FP6.quantize, FP8.quantize
    out = q4(a, -1) @ q6(b, -2)
    g = weighting(out)
    da = q8(g, -1) @ q4(q6(b, -2), -1).mT
    db = q6(q4(a, -1), -2).mT @ q8(g, -2)
    assert_equal(run(THREE, multiply, a, b), out, da, db)


def test_a_matrix_against_a_batch_sums_its_gradient_over_the_whole_batch() -> None:
    a, b = tensors((4, 33, 40), (40, 37))
    rows = a.reshape(132, 40)
    out = FP4.quantize(rows, -1) @ FP6.quantize(b, 0)
    g = weighting(out.view(4, 33, 37)).reshape(132, 37)
    da = FP8.quantize(g, -1) @ FP4.quantize(FP6.quantize(b, 0), 1).T
    db = FP6.quantize(FP4.quantize(rows, -1), 0).T @ FP8.quantize(g, 0)
    assert_equal(run(THREE, torch.matmul, a, b), out.view(4, 33, 37), da.view_as(a), db)


@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}, {"stride": (2, 1), "padding": "valid"}]
)
def test_conv2d(options: dict[str, Any]) -> None:
    x, w, b = tensors((2, 5, 9, 8), (7, 5, 3, 3), (7,))
    q4, q6, q8 = FP4.quantize, FP6.quantize, FP8.quantize
    unfold = {k: v for k, v in options.items() if v != "valid"}
    columns = F.unfold(x, 3, **unfold)  # [2, 45, L]
    rows = columns.transpose(1, 2).reshape(-1, 45)
    kernel = w.reshape(7, 45)
    flat = q4(rows, -1) @ q6(kernel, -1).T + b  # channels and kernel positions, flattened
    shape = F.conv2d(x, w, b, **options).shape

    def image(m: Tensor) -> Tensor:
        return m.view(2, -1, 7).transpose(1, 2).reshape(shape)

    out = image(flat)
    g = weighting(out).flatten(2).transpose(1, 2).reshape(-1, 7)
    dcolumns = (q8(g, -1) @ q4(q6(kernel, -1), 0)).view(2, -1, 45).transpose(1, 2)
    dx = F.fold(dcolumns, x.shape[2:], 3, **unfold)
    dw = (q8(g, 0).T @ q6(q4(rows, -1), 0)).view_as(w)  # batch and output positions, flattened
    assert_equal(run(THREE, lambda x, w, b: F.conv2d(x, w, b, **options), x, w, b), out, dx, dw, g.sum(0))


def test_attention_is_two_products_and_the_vector_ops_between() -> None:
    q, k, v = tensors((2, 3, 33, 16), (2, 3, 33, 16), (2, 3, 33, 16))
    recipe = Recipe(Gemm(FP4, FP6, out=BF16), vector=BF16)
    q4, q6, r = FP4.quantize, FP6.quantize, BF16.quantize
    scores = r(q4(q, -1) @ q6(k, -1).mT)
    mask = torch.ones(33, 33, dtype=torch.bool).tril()
    weights = r(torch.softmax(r((scores * 0.25).masked_fill(~mask, -torch.inf)), -1))
    expected = r(q4(weights, -1) @ q6(v, -2))
    assert torch.equal(run(recipe, lambda *t: F.scaled_dot_product_attention(*t, is_causal=True), q, k, v)[0], expected)


def test_stochastic_operands_draw_the_bits_of_their_role() -> None:
    """The documented key: the site's CRC-32, the step, and (call, role) in the offset."""
    import zlib

    x, w = tensors((40, 70), (50, 70))
    sr = Quantizer(formats.get("mxfp4_e2m1"), rounding=Rounding.STOCHASTIC)

    def key(call: int, role: Role) -> Key:
        return Key(11, zlib.crc32(b"<outside>/linear"), 5, (call << 4 | role) << 38)

    with simulate(nn.Identity(), Recipe(Gemm(sr, sr)), seed=11) as sim:
        sim.step = 5
        for call in range(2):
            lhs, rhs = sr.quantize(x, -1, key(call, Role.FPROP_LHS)), sr.quantize(w, -1, key(call, Role.FPROP_RHS))
            assert torch.equal(F.linear(x, w), lhs @ rhs.T)


def test_results_and_gradients_are_rounded_by_out() -> None:
    x, w, b = tensors((40, 70), (50, 70), (50,))
    recipe = Recipe(Gemm(out=BF16), Gemm(out=FP8), Gemm(out=FP6))
    out = BF16.quantize(x @ w.T + b)  # the bias belongs to the accumulator
    g = weighting(out)
    expected = (FP8.quantize(g @ w), FP6.quantize(g.T @ x), g.sum(0))
    assert_equal(run(recipe, F.linear, x, w, b), out, *expected)


def test_a_matrix_power_is_repeated_products() -> None:
    (a,) = tensors((40, 40))
    q4, q6, q8, bf16 = FP4.quantize, FP6.quantize, FP8.quantize, BF16.quantize
    recipe = Recipe(Gemm(FP4, FP6, out=BF16), Gemm(FP8, FP4), Gemm(FP6, FP8))

    def product(x: Tensor, y: Tensor) -> Tensor:
        return bf16(q4(x, -1) @ q6(y, -2))

    def gradients(x: Tensor, y: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return q8(g, -1) @ q4(q6(y, -2), -1).T, q6(q4(x, -1), -2).T @ q8(g, -2)

    square = product(a, a)
    g = weighting(a)
    d_square, d_a = gradients(square, a, g)
    d_left, d_right = gradients(a, a, d_square)
    got, (grad,) = run(recipe, lambda x: torch.linalg.matrix_power(x, 3), a)
    assert torch.equal(got, product(square, a))
    torch.testing.assert_close(grad, d_a + d_left + d_right)  # autograd adds the three in an order of its own
    with simulate(nn.Identity(), recipe):
        fourth, fifth = torch.matrix_power(a, 4), torch.matrix_power(a, 5)
        assert torch.equal(fourth, product(square, square))
        assert torch.equal(fifth, product(a, product(square, square)))
        assert torch.equal(torch.linalg.matrix_power(a, 0), torch.eye(40))
        assert torch.equal(torch.linalg.matrix_power(a, 1), a)
        with pytest.raises(NotImplementedError, match="n = -1 needs an inverse"):
            torch.linalg.matrix_power(a, -1)
        with pytest.raises(ValueError, match=r"square matrices .*, got \(2, 3\)"):
            torch.linalg.matrix_power(torch.ones(2, 3), 2)


def test_euclidean_distances_are_a_product_and_the_vector_ops_around() -> None:
    x, y = tensors((30, 40), (50, 40))
    q4, q6, q8, bf16 = FP4.quantize, FP6.quantize, FP8.quantize, BF16.quantize
    recipe = Recipe(Gemm(FP4, FP6, out=FP8), Gemm(FP8, FP4), Gemm(FP6, FP8), vector=BF16)
    rows, columns = bf16(x.square().sum(-1)), bf16(y.square().sum(-1))
    out = (rows[:, None] + columns - 2 * q8(q4(x, -1) @ q6(y, -1).T)).sqrt()
    g = weighting(out) / (2 * out)  # of the squares
    dx = (2 * g.sum(1))[:, None] * x + q8(-2 * g, -1) @ q4(q6(y, -1), 0)
    dy = (2 * g.sum(0))[:, None] * y + q8(-2 * g, 0).T @ q6(q4(x, -1), 0)
    got, grads = run(recipe, torch.cdist, x, y)
    assert torch.equal(got, bf16(out))
    torch.testing.assert_close(grads, [dx, dy])
    vectors = run(recipe, lambda a, b: torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist"), x, y)
    assert torch.equal(vectors[0], bf16(torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")))


def test_distances_of_zero_have_no_gradient_and_nan_stays() -> None:
    x = torch.tensor([[1.0, 2.0], [0.0, torch.nan]])
    out, (grad, _) = run(UNROUNDED, torch.cdist, x, x[:1])
    assert out[0] == 0 and out[1].isnan() and torch.equal(grad[0], torch.zeros(2))


@pytest.mark.parametrize("cast", [Tensor.float, Tensor.bfloat16])
def test_autocast_gives_the_dtypes_that_torch_gives(cast: Callable[[Tensor], Tensor]) -> None:
    a, b = map(cast, tensors((4, 4), (4, 4)))
    calls: list[Callable[[], Tensor]] = [
        lambda: torch.cdist(a, b),
        lambda: torch.linalg.matrix_power(a, 3),
        lambda: torch.dot(a[0], b[0]),
        lambda: torch.linalg.vecdot(a, b),
        lambda: F.bilinear(a, b, a[:, None] * b),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        expected = [call().dtype for call in calls]
        with simulate(nn.Identity(), THREE):
            assert [call().dtype for call in calls] == expected


def test_lstm_operands_are_quantized() -> None:
    """One step of an LSTM, written out."""
    torch.manual_seed(0)
    layer = nn.LSTM(40, 33)
    x = torch.randn(1, 6, 40)
    h = c = torch.zeros(6, 33)
    q, r = FP4.quantize, BF16.quantize
    w_ih, w_hh = q(layer.weight_ih_l0), q(layer.weight_hh_l0)
    sums = r(r(q(x[0]) @ w_ih.T + layer.bias_ih_l0) + r(q(h) @ w_hh.T + layer.bias_hh_l0))
    i, f, g, o = sums.chunk(4, -1)
    i, f, g, o = r(i.sigmoid()), r(f.sigmoid()), r(g.tanh()), r(o.sigmoid())
    c = r(f * c + i * g)
    h = r(o * c.tanh())
    with simulate(layer, Recipe.forward(FP4.format, vector=BF16.format)) as sim:
        out, (h_n, c_n) = layer(x)
    assert torch.equal(out[0], h) and torch.equal(h_n[0], h) and torch.equal(c_n[0], c)
    assert not sim.audit().escaped


def test_grouped_products_are_products_of_their_groups() -> None:
    a, b, columns = tensors((10, 40), (3, 40, 5), (40, 10))
    ends = torch.tensor([4, 4, 9], dtype=torch.int32)
    q = FP4.quantize
    with simulate(nn.Identity(), Recipe.forward(FP4.format)):
        rows = F.grouped_mm(a, b, offs=ends)
        batch = F.grouped_mm(b.mT, b)
        across = F.grouped_mm(b.mT, columns, offs=ends)
        deep = F.grouped_mm(columns[:4], a, offs=ends)
    assert torch.equal(rows[:4], q(a[:4]) @ q(b[0], 0)) and torch.equal(rows[4:9], q(a[4:9]) @ q(b[2], 0))
    assert rows.shape == (10, 5) and not rows[9:].any()
    assert torch.equal(batch, q(b.mT) @ q(b, 1))
    assert torch.equal(across[:, 4:9], q(b[2].mT) @ q(columns[:, 4:9], 0)) and not across[:, 9:].any()
    assert torch.equal(deep[2], q(columns[:4, 4:9]) @ q(a[4:9], 0)) and not deep[1].any()


def test_the_products_of_one_op_draw_different_bits() -> None:
    """A chain of equal matrices, groups of equal rows: equal bits would round them alike."""
    sr = Quantizer(formats.get("mxfp4_e2m1"), rounding=Rounding.STOCHASTIC)
    x = tensors((32, 32))[0]
    with simulate(nn.Identity(), Recipe(Gemm(lhs=sr))):
        rows = F.grouped_mm(torch.cat([x, x]), torch.stack([x, x]), offs=torch.tensor([32, 64], dtype=torch.int32))
    assert not torch.equal(rows[:32], rows[32:])


def test_a_checkpointed_lstm_recomputes_with_the_same_bits() -> None:
    from torch.utils.checkpoint import checkpoint

    sr = Quantizer(formats.get("mxfp4_e2m1"), rounding=Rounding.STOCHASTIC)
    torch.manual_seed(0)
    layer, x = nn.LSTM(8, 8, 2, bidirectional=True), torch.randn(5, 3, 8, requires_grad=True)

    def gradients(active: bool) -> list[Tensor]:
        with simulate(layer, Recipe(Gemm(sr, sr), vector=BF16)):
            out = checkpoint(layer, x, use_reentrant=False)[0] if active else layer(x)[0]
            return list(torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))

    assert all(map(torch.equal, gradients(False), gradients(True)))
