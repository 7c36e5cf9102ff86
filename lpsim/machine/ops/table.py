"""WRAPPED: every op that the simulated machine knows, its class, and the reason for it. Nothing else decides this.

An op has the name of torch's function, without the trailing underscore of the in-place form: torch.add and Tensor.add_
are both "add". To add an op, add one entry here; if it hides matrix products, also write a function that computes it
with Call.gemm and Call.vector.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from lpsim.machine.ops import attention, contraction, convolution, recurrent


class Kind(enum.Enum):
    """How an op's operands and result are treated."""

    PRODUCT = "product"
    """Sums of products: the recipe's three Gemms quantize the operands along the axis summed over."""
    VECTOR = "vector"
    """Elementwise ops and normalizations: computed in the compute dtype, then rounded once to the vector format."""
    REDUCTION = "reduction"
    """Many elements become few: computed in the compute dtype, then rounded once to the vector format."""
    MOVEMENT = "movement"
    """The result's values are values of the operands (or zero): there is nothing to round."""
    EXEMPT = "exempt"
    """Not the machine's arithmetic."""


@dataclass(frozen=True)
class Op:
    """One entry of the table.

    function: computes a product in torch's place; its first argument is a Call, or a Composite if there are `parts`.
    parts: the products that a composite op consists of. vector_parts: the vector ops between them.
    calls: how many products (at most) a call with given arguments makes, if not always one; see Call.at.
    transparent: torch's Python code for the function runs, and the functions it calls are simulated.
    autocasts: autocast runs this op in its lower precision, or, if `widened`, in float32.
    multiplies: whether a call with given arguments makes products, if not all do; the other calls are vector ops.
    inside: a vector part, and its value for a call that the recipe leaves to torch; telemetry looks at it.
    """

    name: str
    kind: Kind
    reason: str
    function: Callable[..., Any] | None = None
    parts: tuple[str, ...] = ()
    vector_parts: tuple[str, ...] = ()
    calls: Callable[..., int] | None = None
    transparent: bool = False
    autocasts: bool = True
    widened: bool = False
    multiplies: Callable[..., bool] | None = None
    inside: tuple[str, Callable[..., torch.Tensor]] | None = None


def _entries(kind: Kind, reason: str, names: str) -> dict[str, Op]:
    return {name: Op(name, kind, reason) for name in names.split()}


def _product(
    name: str, function: Callable[..., Any], calls: Callable[..., int] | None = None, autocasts: bool = True
) -> dict[str, Op]:
    return {name: Op(name, Kind.PRODUCT, "a matrix product", function, calls=calls, autocasts=autocasts)}


def _composite(name: str, function: Callable[..., Any], products: str, vectors: str) -> dict[str, Op]:
    reason = f"hides the products {products.replace(' ', ', ')}"
    return {name: Op(name, Kind.PRODUCT, reason, function, tuple(products.split()), tuple(vectors.split()))}


def _cdist() -> dict[str, Op]:
    (op,) = _composite("cdist", contraction.cdist, "xy", "norms distance").values()
    return {"cdist": replace(op, widened=True, multiplies=contraction.cdist_has_products)}


def _attention() -> dict[str, Op]:
    name = "scaled_dot_product_attention"
    (op,) = _composite(name, attention.scaled_dot_product_attention, "qk pv", "scores softmax").values()
    return {name: replace(op, inside=("scores", attention.logits))}


def _transparent(name: str, kind: Kind, reason: str) -> dict[str, Op]:
    return {name: Op(name, kind, reason, transparent=True)}


WRAPPED: dict[str, Op] = {
    **_product("linear", contraction.linear),
    **_product("matmul", contraction.matmul),
    **_product("__matmul__", contraction.matmul),
    **_product("__rmatmul__", contraction.rmatmul),
    **_product("linalg_matmul", contraction.matmul),
    **_product("mm", contraction.mm),
    **_product("spmm", contraction.mm),
    **_product("dsmm", contraction.mm),
    **_product("bmm", contraction.bmm),
    **_product("mv", contraction.mv),
    **_product("dot", contraction.dot, autocasts=False),
    **_product("vdot", contraction.vdot, autocasts=False),
    **_product("linalg_vecdot", contraction.vecdot),
    **_product("inner", contraction.inner),
    **_product("addmm", contraction.addmm),
    **_product("addmv", contraction.addmv),
    **_product("addbmm", contraction.addbmm),
    **_product("baddbmm", contraction.baddbmm),
    **_product("chain_matmul", contraction.chain_matmul, contraction.matrices_in),
    **_product("linalg_multi_dot", contraction.chain_matmul, contraction.matrices_in),
    **_product("matrix_power", contraction.matrix_power, contraction.steps_of_power),
    **_product("linalg_matrix_power", contraction.matrix_power, contraction.steps_of_power),
    **_cdist(),
    **_product("tensordot", contraction.tensordot),
    **_product("einsum", contraction.einsum, contraction.steps_in),
    **_product("grouped_mm", contraction.grouped_mm, contraction.groups_in, autocasts=False),
    **_product("_grouped_mm", contraction.grouped_mm, contraction.groups_in, autocasts=False),
    **_product("transformers::grouped_mm_fallback", contraction.grouped_mm, contraction.groups_in, autocasts=False),
    **_product("bilinear", contraction.bilinear, lambda *_, **__: 2, autocasts=False),
    **_product("conv1d", convolution.conv1d),
    **_product("conv2d", convolution.conv2d),
    **_product("conv3d", convolution.conv3d),
    **_product("conv_transpose1d", convolution.conv_transpose1d),
    **_product("conv_transpose2d", convolution.conv_transpose2d),
    **_product("conv_transpose3d", convolution.conv_transpose3d),
    **_attention(),
    **_composite("lstm", recurrent.lstm, "ih hh hr", "sum gates cell hidden"),
    **_composite("gru", recurrent.gru, "ih hh hr", "sum gates cell hidden"),
    **_composite("rnn_tanh", recurrent.rnn_tanh, "ih hh hr", "sum gates cell hidden"),
    **_composite("rnn_relu", recurrent.rnn_relu, "ih hh hr", "sum gates cell hidden"),
    **_composite("lstm_cell", recurrent.lstm_cell, "ih hh hr", "sum gates cell hidden"),
    **_composite("gru_cell", recurrent.gru_cell, "ih hh hr", "sum gates cell hidden"),
    **_composite("rnn_tanh_cell", recurrent.rnn_tanh_cell, "ih hh hr", "sum gates cell hidden"),
    **_composite("rnn_relu_cell", recurrent.rnn_relu_cell, "ih hh hr", "sum gates cell hidden"),
    **_transparent(
        "multi_head_attention_forward", Kind.PRODUCT, "its projections and its attention are ops by themselves"
    ),
    **_transparent("linear_cross_entropy", Kind.PRODUCT, "its linear and its cross_entropy are ops by themselves"),
    **_entries(
        Kind.VECTOR,
        "elementwise arithmetic",
        "add __add__ __radd__ __iadd__ sub subtract __sub__ __isub__ rsub __rsub__ mul multiply __mul__ __rmul__ "
        "__imul__ div divide true_divide __truediv__ __rtruediv__ __div__ __rdiv__ __idiv__ floor_divide __floordiv__ "
        "__rfloordiv__ __ifloordiv__ remainder fmod __mod__ __rmod__ __imod__ neg negative abs absolute pow __pow__ "
        "__rpow__ __ipow__ float_power square sqrt rsqrt reciprocal exp exp2 expm1 log log2 log10 log1p logaddexp "
        "logaddexp2 sin cos tan asin acos atan atan2 arcsin arccos arctan arctan2 sinh cosh tanh asinh acosh atanh "
        "arcsinh arccosh arctanh sinc hypot erf erfc erfinv special_erf special_erfc special_erfinv special_erfcx "
        "special_expit special_exp2 special_expm1 special_log1p special_sinc special_ndtr special_ndtri "
        "special_log_ndtr special_xlogy special_xlog1py special_entr special_logit lgamma digamma special_gammaln "
        "special_digamma special_psi special_i0 special_i0e special_i1 special_i1e i0 xlogy logit lerp addcmul addcdiv "
        "addr outer ger kron cross linalg_cross frac ldexp deg2rad rad2deg polar nan_to_num",
    ),
    **_entries(
        Kind.VECTOR,
        "an activation",
        "relu relu6 gelu silu mish sigmoid hardsigmoid hardswish hardtanh hardshrink tanhshrink softshrink threshold "
        "_threshold elu selu celu leaky_relu prelu rrelu softplus softsign log_sigmoid logsigmoid glu softmax "
        "log_softmax softmin special_softmax special_log_softmax _safe_softmax gumbel_softmax dropout dropout1d "
        "dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout native_dropout",
    ),
    **_entries(
        Kind.VECTOR,
        "a normalization",
        "layer_norm rms_norm group_norm batch_norm instance_norm local_response_norm normalize native_layer_norm "
        "native_group_norm native_batch_norm renorm _weight_norm norm_except_dim",
    ),
    **_entries(
        Kind.VECTOR,
        "resampling: each result mixes a few neighbours",
        "interpolate upsample upsample_nearest upsample_bilinear grid_sample grid_sampler grid_sampler_2d "
        "grid_sampler_3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
        "lp_pool1d lp_pool2d lp_pool3d",
    ),
    **_entries(
        Kind.VECTOR,
        "adds into places, in the order of the indices",
        "index_add scatter_add scatter_reduce index_reduce index_put fold",
    ),
    **_entries(
        Kind.REDUCTION,
        "a sum, mean or norm",
        "sum nansum mean nanmean var std var_mean std_mean norm frobenius_norm linalg_norm "
        "linalg_vector_norm linalg_matrix_norm logsumexp special_logsumexp prod cumsum logcumsumexp trace dist "
        "cosine_similarity pairwise_distance embedding_bag trapezoid trapz diff sum_to_size quantile nanquantile",
    ),
    **_entries(
        Kind.REDUCTION,
        "a loss",
        "cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss huber_loss kl_div binary_cross_entropy "
        "binary_cross_entropy_with_logits poisson_nll_loss gaussian_nll_loss hinge_embedding_loss "
        "cosine_embedding_loss margin_ranking_loss multi_margin_loss multilabel_margin_loss soft_margin_loss "
        "multilabel_soft_margin_loss triplet_margin_loss triplet_margin_with_distance_loss ctc_loss",
    ),
    **_entries(
        Kind.MOVEMENT,
        "selects values: each result is one of the operands' values, or a bound given with the call",
        "max min amax amin aminmax maximum minimum fmax fmin median nanmedian mode kthvalue topk sort msort cummax "
        "cummin clamp clip clamp_min clamp_max where masked_fill masked_scatter masked_select max_pool1d max_pool2d "
        "max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d "
        "adaptive_max_pool2d adaptive_max_pool3d adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices "
        "adaptive_max_pool3d_with_indices fractional_max_pool2d fractional_max_pool3d max_unpool1d max_unpool2d "
        "max_unpool3d unique unique_consecutive",
    ),
    **_entries(
        Kind.MOVEMENT,
        "a sign, an integer or a count: exact in every format wide enough to hold it",
        "histc sign sgn copysign heaviside floor ceil round trunc fix positive one_hot",
    ),
    **_entries(
        Kind.MOVEMENT,
        "moves or copies values",
        "__getitem__ __setitem__ index index_select index_copy index_fill gather scatter take take_along_dim put "
        "embedding select narrow narrow_copy slice_copy select_scatter slice_scatter diagonal_scatter "
        "as_strided_scatter view view_as reshape reshape_as flatten unflatten squeeze unsqueeze transpose t adjoint "
        "swapaxes swapdims permute movedim moveaxis expand expand_as broadcast_to broadcast_tensors contiguous clone "
        "copy alias detach as_strided cat concat concatenate stack hstack vstack dstack row_stack column_stack "
        "chunk split split_with_sizes tensor_split hsplit vsplit dsplit unsafe_chunk unsafe_split "
        "unsafe_split_with_sizes unbind __iter__ __reversed__ flip fliplr flipud roll rot90 repeat repeat_interleave "
        "tile tril triu diag diag_embed diagflat diagonal linalg_diagonal block_diag meshgrid cartesian_prod "
        "combinations ravel atleast_1d atleast_2d atleast_3d pad constant_pad_nd _pad unfold im2col "
        "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle view_as_real view_as_complex real imag "
        "complex conj conj_physical resolve_conj resolve_neg fill zero fill_diagonal set resize resize_as "
        "_pack_padded_sequence _pad_packed_sequence pin_memory to_dense as_subclass _make_subclass data "
        "requires_grad __deepcopy__",
    ),
    **_entries(
        Kind.MOVEMENT,
        "changes the compute dtype or the device: the program's own rounding",
        "to float double half bfloat16 type type_as cpu cuda xpu _to_copy cfloat cdouble chalf "
        "_autocast_to_full_precision _autocast_to_reduced_precision",
    ),
    **_entries(
        Kind.EXEMPT,
        "draws random numbers: data, not arithmetic",
        "normal uniform bernoulli exponential log_normal cauchy geometric random multinomial poisson binomial "
        "rand_like randn_like randint_like kaiming_uniform kaiming_normal xavier_uniform xavier_normal trunc_normal "
        "orthogonal sparse",
    ),
    **_entries(
        Kind.EXEMPT,
        "creates values without reading any",
        "zeros ones eye constant dirac zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty "
        "new_tensor empty_strided new_empty_strided tensor asarray as_tensor",
    ),
    **_entries(
        Kind.EXEMPT,
        "optimizer, clipping and gradient scaling: not the model's ops",
        "_foreach_add _foreach_sub _foreach_mul _foreach_div _foreach_sqrt _foreach_neg _foreach_abs _foreach_sign "
        "_foreach_pow _foreach_lerp _foreach_addcmul _foreach_addcdiv _foreach_norm _foreach_maximum _foreach_minimum "
        "_foreach_zero _foreach_copy _foreach_reciprocal _foreach_exp _foreach_clamp_max _foreach_clamp_min "
        "_foreach_max _fused_adam _fused_adamw _fused_sgd _fused_adagrad "
        "_amp_foreach_non_finite_check_and_unscale _amp_update_scale",
    ),
    **_entries(Kind.EXEMPT, "a hook or a record on the graph", "register_hook retain_grad"),
    **_transparent("backward", Kind.EXEMPT, "runs the backward pass: what it computes is seen op by op"),
    **_transparent("grad", Kind.EXEMPT, "runs the backward pass: what it computes is seen op by op"),
}

_HIDING = """
    nuclear_norm linalg_matrix_rank
    linalg_cholesky linalg_cholesky_ex linalg_cond linalg_det linalg_eig linalg_eigh linalg_eigvals linalg_eigvalsh
    linalg_householder_product linalg_inv linalg_inv_ex linalg_ldl_factor linalg_ldl_factor_ex linalg_ldl_solve
    linalg_lstsq linalg_lu linalg_lu_factor linalg_lu_factor_ex linalg_lu_solve linalg_matrix_exp linalg_pinv
    linalg_qr linalg_slogdet linalg_solve linalg_solve_ex linalg_solve_triangular linalg_svd linalg_svdvals
    linalg_tensorinv linalg_tensorsolve cholesky cholesky_inverse cholesky_solve corrcoef cov det geqrf inverse lobpcg
    logdet lu lu_solve lu_unpack matrix_exp orgqr ormqr pca_lowrank pinverse qr slogdet svd svd_lowrank
    triangular_solve affine_grid affine_grid_generator conv_tbc convolution hsmm hspmm saddmm smm sspaddmm
    _cdist_forward _euclidean_dist _trilinear _convolution _linalg_det _linalg_eigh _linalg_slogdet _linalg_solve_ex
    _linalg_svd lu_with_info _scaled_mm _scaled_grouped_mm _sparse_mm _addmm_activation mkldnn_linear
    mkldnn_convolution mkldnn_rnn_layer _scaled_dot_product_attention_math _scaled_dot_product_flash_attention
    _scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention_for_cpu _transformer_encoder_layer_fwd
    _native_multi_head_attention cudnn_convolution cudnn_convolution_transpose cudnn_convolution_relu
    cudnn_convolution_add_relu miopen_convolution miopen_convolution_add_relu miopen_convolution_relu
    miopen_convolution_transpose miopen_depthwise_convolution miopen_rnn _cudnn_rnn fbgemm_linear_fp16_weight
    fbgemm_linear_fp16_weight_fp32_activation fbgemm_linear_int8_weight fbgemm_linear_int8_weight_fp32_activation
    _wrapped_quantized_linear_prepacked quantized_gru_cell quantized_lstm_cell quantized_rnn_relu_cell
    quantized_rnn_tanh_cell
"""
HIDES_PRODUCTS = frozenset(_HIDING.split())
"""Functions that multiply matrices inside and have no entry. Only an optimizer may call them; elsewhere they raise."""


def op_name(func: Callable[..., Any]) -> str:
    """The name of `func` in the table: its own, without the underscore of the in-place form and without "aten::"."""
    if isinstance(func, torch._ops.OpOverload):
        func = func.overloadpacket
    if isinstance(func, torch._ops.OpOverloadPacket):
        namespace, _, name = func._qualified_op_name.partition("::")
        name = name if namespace == "aten" else f"{namespace}::{name}"
    else:
        name = getattr(func, "__name__", None) or str(func)
    return name if name.endswith("__") else name.removesuffix("_")


@cache
def inplace_argument(func: Callable[..., Any]) -> int | None:
    """The position of a Python function's parameter `inplace`; -1 for a function that is in-place by its name.

    None: the function does not change its first argument.
    """
    name = getattr(func.overloadpacket if isinstance(func, torch._ops.OpOverload) else func, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return -1
    if name.startswith("__i") and hasattr(torch.Tensor, f"__{name[3:]}"):  # __iadd__, but not __int__
        return -1
    try:
        return list(inspect.signature(func).parameters).index("inplace")
    except (ValueError, TypeError):
        return None


@cache
def body(func: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of torch's Python function `func` in which its check for overrides always answers no.

    So, called under a TorchFunctionMode, it runs its body and the mode sees the functions that the body calls, instead
    of `func` once more. The code is torch's; only the names has_torch_function* are replaced.
    """
    import types

    def no(*_: Any) -> bool:
        return False

    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope = {**func.__globals__, **dict.fromkeys(names, no)}
    copy = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
