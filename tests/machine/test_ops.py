"""Products: what is multiplied, along which axis it is quantized, and that decomposing changes nothing else."""

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

FP4 = Quantizer(formats.get("mxfp4_e2m1"))
FP6 = Quantizer(formats.get("mxfp6_e3m2"))
FP8 = Quantizer(formats.get("mxfp8_e5m2"))
BF16 = Quantizer(formats.get("bfloat16"))
THREE = Recipe(Gemm(FP4, FP6), Gemm(FP8, FP4), Gemm(FP6, FP8))


class Wide:
    """An accumulator that does what torch does: operands go through the decomposition, but nothing is rounded."""

    def matmul(self, lhs: Tensor, rhs: Tensor) -> Tensor:
        return torch.matmul(lhs, rhs)


UNROUNDED = Recipe(Gemm(accumulate=Wide()), Gemm(accumulate=Wide()), Gemm(accumulate=Wide()))


def run(recipe: Recipe, function: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The function's result under the recipe, and the gradients of a fixed weighted sum of it."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    with simulate(nn.Identity(), recipe) as sim:
        out = function(*leaves)
        grads = torch.autograd.grad(out, leaves, weighting(out), materialize_grads=True)
    assert not sim.audit().escaped
    return out.detach(), list(grads)


def weighting(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(out.shape, generator=generator, dtype=out.dtype)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def assert_equal(got: tuple[Tensor, list[Tensor]], out: Tensor, *grads: Tensor) -> None:
    assert torch.equal(got[0], out)
    for ours, explicit in zip(got[1], grads, strict=True):
        assert torch.equal(ours, explicit)


# Bit equality with quantize + torch.matmul along the right axes


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


# Decomposition: in float64 and without rounding, every product is what torch computes

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


# Other forms of the same op


class Runs(nn.Module):
    """A model whose forward is a function."""

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


def test_in_place_and_out_forms_of_products() -> None:
    a, b, c = tensors((33, 40), (40, 37), (33, 37))
    expected = FP4.quantize(a, -1) @ FP4.quantize(b, 0)
    with simulate(nn.Identity(), Recipe.forward(FP4.format)):
        out = torch.empty(0)
        assert torch.mm(a, b, out=out) is out and torch.equal(out, expected)
        target = c.clone()
        assert target.addmm_(a, b, beta=0) is target and torch.equal(target, expected)
        leaf = a.clone().requires_grad_()
        with pytest.raises(RuntimeError, match="do not support automatic differentiation"):
            torch.mm(leaf, b, out=out)


def test_in_place_and_out_forms_of_vector_ops() -> None:
    x, y = tensors((3, 4), (3, 4))
    r = BF16.quantize

    def forms() -> None:
        out = torch.empty(3, 4)
        assert torch.add(x, y, out=out) is out and torch.equal(out, r(plain))
        target = x.clone()
        target += y
        assert torch.equal(target, r(plain))
        target = x.clone()
        assert F.dropout(target, 0.0, True, True) is target and torch.equal(target, r(x))
        variance, mean = torch.var_mean(x, 0)
        assert torch.equal(variance, r(moments[0])) and torch.equal(mean, r(moments[1]))
        counter = torch.zeros(3, dtype=torch.long)
        counter += 1
        assert counter.tolist() == [1, 1, 1]

    plain, moments, model = x + y, torch.var_mean(x, 0), Runs()
    with simulate(model, Recipe(vector=BF16)):
        model(forms)


def test_rounding_in_place_keeps_what_the_gradient_needs() -> None:
    """relu_ saves its result and mul_ its operand: rounding in place must not disturb either."""
    x, w = tensors((3, 4), (3, 4))

    def function(x: Tensor, w: Tensor) -> Tensor:
        return (x * 1).mul_(w).relu_().exp_()

    out, (dx, dw) = run(Recipe(vector=BF16), function, x, w)
    r = BF16.quantize
    product = r(r(x) * w)
    assert torch.equal(out, r(product.relu().exp()))
    slope = weighting(out) * product.relu().exp() * (product > 0)
    assert torch.equal(dx, slope * w) and torch.equal(dw, slope * r(x))


def test_complex_results_are_rounded_by_parts() -> None:
    x = torch.view_as_complex(tensors((5, 2))[0])
    model = Runs()
    with simulate(model, Recipe(vector=BF16)):
        y = model(torch.mul, x, x)
    assert torch.equal(torch.view_as_real(y), BF16.quantize(torch.view_as_real(x * x)))


def test_integer_products_are_no_arithmetic_of_the_machine() -> None:
    x = torch.arange(4).reshape(2, 2)
    with simulate(nn.Identity(), Recipe.forward(FP4.format)):
        assert torch.equal(x @ x, torch.tensor([[2, 3], [6, 11]]))


def test_wrong_ranks_are_refused() -> None:
    a = torch.ones(2, 3, 4)
    with (
        simulate(nn.Identity(), Recipe.forward(FP4.format)),
        pytest.raises(ValueError, match="mm multiplies a 2-D by a 2"),
    ):
        torch.mm(a, a)


def test_second_derivatives_are_refused() -> None:
    x, w = tensors((4, 4), (4, 4))
    x.requires_grad_()
    with simulate(nn.Identity(), Recipe.forward(FP4.format)):
        out = F.linear(x, w).square().sum()
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.sum().backward()
        attention = F.scaled_dot_product_attention(x[None], x[None], x[None]).sum()
        (grad,) = torch.autograd.grad(attention, x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.sum().backward()


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
