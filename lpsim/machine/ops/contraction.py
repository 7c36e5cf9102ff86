"""All of torch's functions that are matrix products, each brought to the form of `Product`.

Here data is only moved (views, permutations); Call.product multiplies and rounds. If an op sums over several axes, they
are flattened into one, in their order in the left operand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lpsim.machine.ops.site import Call, Composite


def linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input [..., K] · weight [N, K]ᵀ + bias [N]: [..., N]. wgrad sums over all of input's leading axes, flattened."""
    if weight.dim() == 1:
        return linear(call, input, weight[None], None if bias is None else bias.reshape(1)).squeeze(-1)
    rows = input.reshape(math.prod(input.shape[:-1]), input.shape[-1])  # [M, K]
    return call.gemm(rows, weight, bias, rhs_axis=-1).view(*input.shape[:-1], weight.shape[0])


def _product(call: Call, lhs: Tensor, rhs: Tensor) -> Tensor:
    """torch.matmul for all its combinations of dimensions, without rounding the result.

    If only one operand has batch dimensions, they are flattened. Then the other operand's gradient, which sums over the
    batch, is one product instead of a sum of many.
    """
    if lhs.dim() == 1:
        return _product(call, lhs[None], rhs).squeeze(-1 if rhs.dim() == 1 else -2)
    if rhs.dim() == 1:
        return _product(call, lhs, rhs[:, None]).squeeze(-1)
    if lhs.dim() > 2 and rhs.dim() == 2:
        rows = lhs.reshape(math.prod(lhs.shape[:-1]), lhs.shape[-1])
        return call.product(rows, rhs).view(*lhs.shape[:-1], rhs.shape[-1])
    if lhs.dim() == 2 and rhs.dim() > 2:
        batch, columns = rhs.shape[:-2], rhs.shape[-1]
        flat = rhs.movedim(-2, 0).reshape(rhs.shape[-2], math.prod(batch) * columns)  # [K, B * N]
        return call.product(lhs, flat).view(lhs.shape[0], *batch, columns).movedim(0, -2)
    return call.product(lhs, rhs)


def matmul(call: Call, input: Tensor, other: Tensor) -> Tensor:
    """torch.matmul and the operator @: the last axis of input with the last but one (or only) axis of other."""
    return call.out(_product(call, input, other))


def rmatmul(call: Call, input: Tensor, other: Tensor) -> Tensor:
    """other @ input."""
    return matmul(call, other, input)


def mm(call: Call, input: Tensor, mat2: Tensor) -> Tensor:
    """[M, K] · [K, N]."""
    return call.out(_product(call, *_of_rank("mm", input, 2, mat2, 2)))


def bmm(call: Call, input: Tensor, mat2: Tensor) -> Tensor:
    """[B, M, K] · [B, K, N]."""
    return call.out(_product(call, *_of_rank("bmm", input, 3, mat2, 3)))


def mv(call: Call, input: Tensor, vec: Tensor) -> Tensor:
    """[M, K] · [K]."""
    return call.out(_product(call, *_of_rank("mv", input, 2, vec, 1)))


def dot(call: Call, input: Tensor, tensor: Tensor) -> Tensor:
    """[K] · [K]."""
    return call.out(_product(call, *_of_rank("dot", input, 1, tensor, 1)))


def vdot(call: Call, input: Tensor, other: Tensor) -> Tensor:
    """[K] · [K] of real vectors."""
    return dot(call, input, other)


def addmm(call: Call, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta·input + alpha·(mat1 · mat2); scaling and adding are in the compute dtype, before the result is rounded."""
    return call.out(_epilogue(_product(call, *_of_rank("addmm", mat1, 2, mat2, 2)), input, beta, alpha))


def addmv(call: Call, input: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta·input + alpha·(mat · vec)."""
    return call.out(_epilogue(_product(call, *_of_rank("addmv", mat, 2, vec, 1)), input, beta, alpha))


def baddbmm(call: Call, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta·input + alpha·(batch1 · batch2), for each matrix of the batch."""
    return call.out(_epilogue(_product(call, *_of_rank("baddbmm", batch1, 3, batch2, 3)), input, beta, alpha))


def _of_rank(op: str, lhs: Tensor, lhs_rank: int, rhs: Tensor, rhs_rank: int) -> tuple[Tensor, Tensor]:
    if lhs.dim() != lhs_rank or rhs.dim() != rhs_rank:
        raise ValueError(
            f"{op} multiplies a {lhs_rank}-D by a {rhs_rank}-D tensor, got {tuple(lhs.shape)} and {tuple(rhs.shape)}"
        )
    return lhs, rhs


def addbmm(call: Call, input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta·input + alpha·Σ_b batch1[b] · batch2[b]: one product that sums over b and K, flattened."""
    lhs = batch1.movedim(0, 1).reshape(batch1.shape[1], -1)  # [M, B * K]
    rhs = batch2.reshape(-1, batch2.shape[-1])  # [B * K, N]
    return call.out(_epilogue(call.product(lhs, rhs), input, beta, alpha))


def _epilogue(product: Tensor, input: Tensor, beta: float, alpha: float) -> Tensor:
    """A factor of zero drops its term, NaN included, as in torch."""
    if alpha != 1:
        product = product * alpha
    if beta == 0:
        return product
    return product + (input if beta == 1 else input * beta)


def vecdot(call: Call, x: Tensor, y: Tensor, *, dim: int = -1) -> Tensor:
    """Σ x·y along dim, of broadcast vectors."""
    x, y = torch.broadcast_tensors(x, y)
    return call.gemm(x.movedim(dim, -1)[..., None, :], y.movedim(dim, -1)[..., None]).squeeze(-1).squeeze(-1)


def inner(call: Call, input: Tensor, other: Tensor) -> Tensor:
    """Σ over both last axes; a scalar operand only multiplies."""
    if input.dim() == 0 or other.dim() == 0:
        return call.vector(input * other)
    return tensordot(call, input, other, ((-1,), (-1,)))


def tensordot(call: Call, a: Tensor, b: Tensor, dims: Any = 2, dims_other: Any = None) -> Tensor:
    """Σ over the paired axes, flattened in the order given; dims_other: b's axes, if aten passes them separately."""
    if dims_other is not None:
        dims = (dims, dims_other)
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        a_dims, b_dims = list(range(a.dim() - dims, a.dim())), list(range(dims))
    else:
        a_dims, b_dims = (list(d) if isinstance(d, Sequence) else [d] for d in dims)
    a_dims, b_dims = [d % a.dim() for d in a_dims], [d % b.dim() for d in b_dims]
    if not a_dims:
        return call.vector(torch.tensordot(a, b, dims=0))
    a_free = [d for d in range(a.dim()) if d not in a_dims]
    b_free = [d for d in range(b.dim()) if d not in b_dims]
    a_shape, b_shape = [a.shape[d] for d in a_free], [b.shape[d] for d in b_free]
    depth = math.prod(a.shape[d] for d in a_dims)
    lhs = a.permute(*a_free, *a_dims).reshape(math.prod(a_shape), depth)
    rhs = b.permute(*b_dims, *b_free).reshape(depth, math.prod(b_shape))
    return call.gemm(lhs, rhs).reshape(a_shape + b_shape)


def matrices_in(*matrices: Any) -> int:
    """The number of matrices in a chain_matmul or multi_dot."""
    return len(matrices) if isinstance(matrices[0], Tensor) else len(matrices[0])


def chain_matmul(call: Call, *matrices: Any) -> Tensor:
    """The product of matrices from left to right, each partial product rounded by fprop.out.

    torch picks the order of products that costs least; here it must not depend on the shapes.
    """
    result, *others = matrices if isinstance(matrices[0], Tensor) else matrices[0]
    for i, matrix in enumerate(others):
        result = matmul(call.at(i), result, matrix)
    return result


def steps_of_power(input: Tensor, n: int) -> int:
    """An upper bound on the number of products of a matrix_power."""
    return max(1, 2 * n.bit_length())


def matrix_power(call: Call, input: Tensor, n: int) -> Tensor:
    """inputⁿ of square matrices by repeated squaring, in torch's order; each product rounded by fprop.out.

    n = 0 gives the identity and n = 1 a copy, without a product. Raises NotImplementedError for a negative n, since an
    inverse is no matrix product, and ValueError for matrices that are not square.
    """
    if n < 0:
        raise NotImplementedError(f"matrix_power with n = {n} needs an inverse, which is not simulated: n must be >= 0")
    if input.dim() < 2 or input.shape[-1] != input.shape[-2]:
        raise ValueError(f"matrix_power multiplies square matrices [..., N, N], got {tuple(input.shape)}")
    if n == 0:
        return torch.eye(input.shape[-1], dtype=input.dtype, device=input.device).expand(input.shape).clone()
    if n == 1:
        return input.clone()
    steps = itertools.count()
    if n == 3:
        return matmul(call.at(next(steps)), matmul(call.at(next(steps)), input, input), input)
    result, power = None, input
    while True:
        n, bit = n >> 1, n & 1
        if bit:
            result = power if result is None else matmul(call.at(next(steps)), result, power)
        if not n:
            assert result is not None
            return result
        power = matmul(call.at(next(steps)), power, power)


def cdist_has_products(
    x1: Any, x2: Any, p: float = 2.0, compute_mode: str | int | None = "use_mm_for_euclid_dist_if_necessary"
) -> bool:
    """Whether torch.cdist may multiply matrices: for Euclidean distances, unless compute_mode forbids it. See cdist."""
    return p == 2 and compute_mode not in ("donot_use_mm_for_euclid_dist", 2)


def cdist(composite: Composite, x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    """Euclidean distances of x1 [..., P, M] and x2 [..., R, M] as √(|x|² + |y|² - 2x·y): [..., P, R].

    x·y is a product, rounded by the recipe. The rest are vector ops on the unrounded operands: "norms" (|x|² and |y|²)
    and "distance". A negative |x|² + |y|² - 2x·y counts as zero, and there the gradient is zero, as in torch; NaN stays
    NaN. torch multiplies matrices only if a side has more than 25 rows; here the rule must not depend on the shapes.
    """
    for x in (x1, x2):
        if x.dim() < 2:
            raise ValueError(f"cdist measures between rows of [..., P, M] and [..., R, M], got {tuple(x.shape)}")
    norms = composite.part("norms", 2)
    rows = norms.vector(x1.square().sum(-1))[..., :, None]
    columns = norms.at(1).vector(x2.square().sum(-1))[..., None, :]
    squares = rows + columns - 2 * composite.part("xy").gemm(x1, x2, rhs_axis=-1)
    none = squares <= 0
    distances = torch.where(
        none, torch.zeros_like(squares), torch.where(none, torch.ones_like(squares), squares).sqrt()
    )
    return composite.part("distance").vector(distances)


def groups_in(mat_a: Tensor, mat_b: Tensor, offs: Tensor | None = None, **_: Any) -> int:
    """The number of products in a grouped_mm."""
    return 1 if offs is None else len(offs)


def grouped_mm(
    call: Call,
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """One product for each group, as a mixture of experts needs them; offs: where each group ends.

    mat_a [S, K], mat_b [G, K, N]: rows are grouped; result [S, N], zeros after the last group. mat_a [G, M, K], mat_b
    [K, S]: columns are grouped; result [M, S]. Both 2-D: the axis summed over is grouped; result [G, M, N]. Both 3-D: a
    batch of products, without offs.
    """
    if bias is not None:
        raise NotImplementedError("grouped_mm with a bias is not simulated; add it to the result")
    if offs is None:
        result = _product(call, *_of_rank("grouped_mm without offs", mat_a, 3, mat_b, 3))
        return call.out(result if out_dtype is None else result.to(out_dtype))
    ends = offs.tolist()
    pairs = list(zip([0, *ends[:-1]], ends, strict=True))
    if mat_a.dim() == 2 and mat_b.dim() == 3:
        parts = [_product(call.at(g), mat_a[start:end], mat_b[g]) for g, (start, end) in enumerate(pairs)]
        result = F.pad(torch.cat(parts), (0, 0, 0, mat_a.shape[0] - ends[-1]))
    elif mat_a.dim() == 3:
        parts = [_product(call.at(g), mat_a[g], mat_b[:, start:end]) for g, (start, end) in enumerate(pairs)]
        result = F.pad(torch.cat(parts, -1), (0, mat_b.shape[1] - ends[-1]))
    else:
        parts = [_product(call.at(g), mat_a[:, start:end], mat_b[start:end]) for g, (start, end) in enumerate(pairs)]
        result = torch.stack(parts)
    return call.out(result if out_dtype is None else result.to(out_dtype))


def bilinear(call: Call, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Σ_ij x_i W_kij y_j + b_k as two products: over i, then over j."""
    outputs, inner1, inner2 = weight.shape
    rows1, rows2 = input1.reshape(-1, inner1), input2.reshape(-1, inner2)
    middle = call.gemm(rows1, weight.movedim(1, 0).reshape(inner1, outputs * inner2))  # [M, outputs * inner2]
    result = call.at(1).product(middle.view(-1, outputs, inner2), rows2[..., None]).squeeze(-1)  # [M, outputs]
    result = result if bias is None else result + bias
    return call.out(result).view(*input1.shape[:-1], outputs)


def steps_in(*args: Any) -> int:
    """The number of calls of an einsum: for each operand at most two sums and a product."""
    return 3 * (1 + max(len(args), len(args[-1]) if isinstance(args[-1], list | tuple) else 0))


def einsum(call: Call, *args: Any) -> Tensor:
    """torch.einsum of any number of operands, contracted pairwise from left to right.

    Axes that both operands of a pair have and nothing later needs are summed in one product. If there are none, the
    pair is multiplied elementwise, as a vector op. Before that, the diagonals of repeated axes are taken, and axes that
    only one operand has and nothing later needs are summed.
    """
    operands, inputs, output = _parse(*args)
    left, axes = _take_diagonals(operands[0], inputs[0])
    for i in range(1, len(operands)):
        step = call.at(3 * i)
        right, right_axes = _take_diagonals(operands[i], inputs[i])
        later = set(output).union(*inputs[i + 1 :])
        left, axes = _sum_unneeded(step, left, axes, later | set(right_axes))
        right, right_axes = _sum_unneeded(step.at(1), right, right_axes, later | set(axes))
        left, axes = _contract(step.at(2), left, axes, right, right_axes, later)
    left, axes = _sum_unneeded(call, left, axes, set(output))
    return left.permute([axes.index(c) for c in output])


def _parse(*args: Any) -> tuple[list[Tensor], list[str], str]:
    """The operands, the axes of each as one character per axis, and the output's axes. An ellipsis is expanded."""
    if isinstance(args[0], str):
        equation, operands = args[0].replace(" ", ""), list(args[1:])
        if len(operands) == 1 and not isinstance(operands[0], Tensor):
            operands = list(operands[0])
        inputs, _, output = equation.partition("->")
        terms = inputs.split(",")
        explicit = "->" in equation
    else:
        operands = list(args[0 : len(args) - len(args) % 2 : 2])
        terms = [_letters(subscripts) for subscripts in args[1::2]]
        explicit = len(args) % 2 == 1
        output = _letters(args[-1]) if explicit else ""
    hidden = max(
        (x.dim() - len(term.replace("...", "")) for x, term in zip(operands, terms, strict=True) if "..." in term),
        default=0,
    )
    ellipsis = [chr(0x100 + i) for i in range(hidden)]
    expanded = []
    for x, term in zip(operands, terms, strict=True):
        own = x.dim() - len(term.replace("...", ""))
        expanded.append(term.replace("...", "".join(ellipsis[hidden - own :])))
    if not explicit:
        counts = "".join(terms).replace(".", "")
        output = "..." * ("..." in "".join(terms)) + "".join(c for c in sorted(set(counts)) if counts.count(c) == 1)
    return operands, expanded, output.replace("...", "".join(ellipsis))


def _letters(subscripts: Sequence[Any]) -> str:
    return "".join("..." if s is Ellipsis else chr(0x10000 + s) for s in subscripts)


def _take_diagonals(x: Tensor, axes: str) -> tuple[Tensor, str]:
    for c in sorted(set(axes)):
        while axes.count(c) > 1:
            first, second = axes.index(c), axes.index(c, axes.index(c) + 1)
            x = torch.diagonal(x, 0, first, second)
            axes = axes[:first] + axes[first + 1 : second] + axes[second + 1 :] + c
    return x, axes


def _sum_unneeded(call: Call, x: Tensor, axes: str, needed: set[str]) -> tuple[Tensor, str]:
    unneeded = [i for i, c in enumerate(axes) if c not in needed]
    if not unneeded:
        return x, axes
    return call.vector(x.sum(unneeded)), "".join(c for c in axes if c in needed)


def _contract(call: Call, a: Tensor, a_axes: str, b: Tensor, b_axes: str, needed: set[str]) -> tuple[Tensor, str]:
    """Multiply a and b, and sum over the axes that both have and nothing needs; axes of length one broadcast."""
    contracted = [c for c in a_axes if c in b_axes and c not in needed]
    for c in list(contracted):
        if a.shape[a_axes.index(c)] != b.shape[b_axes.index(c)]:  # one of them is 1: repeat it
            size = max(a.shape[a_axes.index(c)], b.shape[b_axes.index(c)])
            a = a.expand([size if axis == c else n for axis, n in zip(a_axes, a.shape, strict=True)])
            b = b.expand([size if axis == c else n for axis, n in zip(b_axes, b.shape, strict=True)])
    batch = [c for c in a_axes if c in b_axes and c not in contracted]
    a_free = [c for c in a_axes if c not in b_axes]
    b_free = [c for c in b_axes if c not in a_axes]
    a = a.permute([a_axes.index(c) for c in (*batch, *a_free, *contracted)])
    b = b.permute([b_axes.index(c) for c in (*batch, *contracted, *b_free)])
    n_batch, n_sum = len(batch), len(contracted)
    a_shape, b_shape = a.shape[n_batch : n_batch + len(a_free)], b.shape[n_batch + n_sum :]
    if contracted:
        depth = math.prod(b.shape[n_batch : n_batch + n_sum])
        lhs = a.reshape(*a.shape[:n_batch], math.prod(a_shape), depth)
        rhs = b.reshape(*b.shape[:n_batch], depth, math.prod(b_shape))
        result = call.gemm(lhs, rhs)
    else:
        lhs = a.reshape(*a.shape[:n_batch], math.prod(a_shape), 1)
        rhs = b.reshape(*b.shape[:n_batch], 1, math.prod(b_shape))
        result = call.vector(lhs * rhs)
    return result.reshape(*result.shape[:-2], *a_shape, *b_shape), "".join((*batch, *a_free, *b_free))
