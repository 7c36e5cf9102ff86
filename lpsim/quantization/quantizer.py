"""Quantizer: a format together with how to round into it; and which backend serves which tensor.

Backends are tried in the order of the table BACKENDS; the reference serves what no other does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import warnings
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch

from lpsim.formats import BlockFormat, Format
from lpsim.formats.named import check_format
from lpsim.formats.rounding import Key, Overflow, Rounding, ScaleRule
from lpsim.quantization import plan

_FLOAT32, _FLOAT64 = torch.float32, torch.float64
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class ScaleClipsWarning(UserWarning):
    """Stochastic rounding into a block format whose scale rule clips: the result is biased toward zero."""


class Backend(Protocol):
    """What can quantize a tensor. Where it agrees to serve, its result equals `reference.quantize` bit for bit."""

    name: str

    def supports(self, quantizer: Quantizer, device: torch.device) -> bool:
        """Whether it serves this quantizer's tensors on such a device."""
        ...

    def quantize(
        self, x: torch.Tensor, quantizer: Quantizer, axis: int, key: Key | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        """The quantized tensor, in `out` if given. x is a detached float tensor of any layout; axis is valid."""
        ...


@dataclass(frozen=True)
class Quantizer:
    """A format, a rounding and an overflow policy: a function from tensors to tensors of representable values.

    random_bits: how many bits of its random word an element's stochastic rounding uses (1 to 32; None: all).
    backend: the name of a backend, or None for the fastest that serves the tensor.

    Raises TypeError or ValueError for a combination that has no meaning. Warns (ScaleClipsWarning) where stochastic
    rounding meets a scale rule that clips: see `clipping_ratio`.
    """

    format: Format
    rounding: Rounding = Rounding.TIES_TO_EVEN
    overflow: Overflow = Overflow.SATURATE
    random_bits: int | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        check_format("format", self.format)
        if not isinstance(self.rounding, Rounding):
            raise TypeError(f"rounding must be a Rounding, one of {[r.name for r in Rounding]}, got {self.rounding!r}")
        if not isinstance(self.overflow, Overflow):
            raise TypeError(f"overflow must be Overflow.SATURATE or Overflow.SPECIAL, got {self.overflow!r}")
        if self.random_bits is not None:
            if self.rounding is not Rounding.STOCHASTIC:
                raise ValueError(f"random_bits is for Rounding.STOCHASTIC; the rounding is {self.rounding.name}")
            if isinstance(self.random_bits, bool) or not isinstance(self.random_bits, int):
                raise TypeError(f"random_bits must be an int or None, got {self.random_bits!r}")
            if not 1 <= self.random_bits <= 32:
                raise ValueError(f"random_bits must lie in [1, 32], got {self.random_bits}")
        if self.overflow is Overflow.SPECIAL:
            if isinstance(self.format, BlockFormat):
                raise ValueError(f"{self.format.name}: the elements of a block saturate; use Overflow.SATURATE")
            if not (self.format.has_inf or self.format.has_nan):
                raise ValueError(f"{self.format.name} has neither Inf nor NaN; use Overflow.SATURATE")
        if self.backend is not None and self.backend not in BACKENDS:
            raise ValueError(f"unknown backend {self.backend!r}; known: {', '.join(BACKENDS)}")
        if self.rounding is Rounding.STOCHASTIC and isinstance(self.format, BlockFormat):
            ratio = clipping_ratio(self.format)
            if ratio > 1:
                rule = self.format.scale_rule
                warnings.warn(
                    f"{self.format.name}: the scale rule {rule.name if isinstance(rule, ScaleRule) else rule} lets a "
                    f"block's largest magnitude reach {ratio:.4g} times what the scaled element holds. It is clipped, "
                    "so stochastic rounding is biased there. ScaleRule.CEIL and ScaleRule.RCEIL never clip, nor does "
                    "a rule of your own that rounds the scale up",
                    ScaleClipsWarning,
                    stacklevel=3,
                )

    def __call__(self, x: torch.Tensor, axis: int = -1, key: Key | None = None) -> torch.Tensor:
        """x quantized; the gradient passes straight through. Arguments and errors as for `quantize`."""
        if isinstance(x, torch.Tensor) and x.requires_grad and torch.is_grad_enabled():
            return _StraightThrough.apply(x, self, axis, key)
        return self.quantize(x, axis, key)

    def quantize(
        self, x: torch.Tensor, axis: int = -1, key: Key | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """A tensor of x's shape, dtype and device with values of the format; no gradient.

        NaN stays NaN; what becomes of Inf, overflow and -0 is stated in `reference.round_value` and, for blocks, in
        `reference.quantize`. A value of the format that x's dtype does not hold is cast as torch casts: 65536 is Inf in
        float16, even where `overflow` is SATURATE.

        x: float32, bfloat16, float16 or float64, any shape and layout. axis: the axis that blocks lie along (unused by
        formats without 1-d blocks). key: the random bits' key, required by STOCHASTIC. out: receives the result; x
        itself is allowed.

        Raises TypeError for another dtype, a sparse, nested or meta tensor, an axis that is no int and a key that is no
        Key; ValueError for an axis out of range, a missing key or an unfit `out`.
        """
        axis = self._check(x, axis, key)
        if x.requires_grad:
            x = x.detach()
        if x.is_neg():  # a view that stands for the negative of its memory
            x = x.resolve_neg()
        if out is not None and (out.shape != x.shape or out.dtype != x.dtype or out.device != x.device):
            raise ValueError(
                f"out must be {tuple(x.shape)} {x.dtype} on {x.device}, got {tuple(out.shape)} {out.dtype}"
            )
        device = "cpu" if x.is_cpu else x.device.type
        serving = self._backends.get(device) or self._backends.setdefault(device, _serving(self, device))
        try:
            return serving.quantize(x, self, axis, key, out)
        except (RuntimeError, TypeError):
            check_memory(x)  # only here, so that calls that succeed do not pay for it
            raise

    # What calls have found out, kept here because hashing a format takes longer than quantizing a small tensor.

    @functools.cached_property
    def _backends(self) -> dict[str, Backend]:
        """The backend that serves a type of device."""
        return {}

    @functools.cached_property
    def plans(self) -> dict[bool, plan.Plan]:
        """The kernels' arguments for float64 tensors (True) and all others (False)."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def _check(self, x: torch.Tensor, axis: int, key: Key | None) -> int:
        """The axis counted from the front (0 for 0-d tensors)."""
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"a tensor is quantized, got {type(x).__name__}")
        if x.dtype not in FLOATING:
            raise TypeError(f"a float32, bfloat16, float16 or float64 tensor is quantized, got {x.dtype}")
        if key is None:
            if self.rounding is Rounding.STOCHASTIC:
                raise ValueError("stochastic rounding needs a key: pass key=Key(seed=...)")
        elif not isinstance(key, Key):
            raise TypeError(f"key must be a Key, such as Key(seed=3), got {key!r}")
        if type(axis) is not int:
            axis = _as_int(axis)
        dim = x.dim() or 1
        if not -dim <= axis < dim:
            raise ValueError(f"axis must lie in [{-dim}, {dim}) for a tensor of shape {tuple(x.shape)}, got {axis}")
        return axis % dim


def _as_int(axis: Any) -> int:
    """An axis that is an int of another type, such as NumPy's. Raises TypeError for anything else."""
    if not isinstance(axis, bool):
        with contextlib.suppress(TypeError):
            return operator.index(axis)
    raise TypeError(f"axis must be an int, got {axis!r}")


def check_memory(x: torch.Tensor) -> None:
    """Raises TypeError for a tensor whose elements do not lie in memory one beside the other."""
    kind = "nested" if x.is_nested else "meta" if x.is_meta else str(x.layout) if x.layout is not torch.strided else ""
    if kind:
        taken = "dense tensors with values (torch.strided, on a CPU or GPU) are quantized"
        raise TypeError(f"{taken}, got a {kind} tensor") from None


def clipping_ratio(fmt: BlockFormat) -> float:
    """The least upper bound of amax / (scale · element.max) over the float32 block maxima amax; above 1 the rule clips.

    For a rule of the user, the largest ratio at 256 magnitudes from 1/2 to 2. Maxima too large for the scale's format
    are not considered.
    """
    element, rule = fmt.element, fmt.scale_rule
    top = 2.0**element.emax
    if rule is ScaleRule.FLOOR:
        bound = 2 * top
    elif rule is ScaleRule.EVEN:
        bound = top * (2 - 2.0 ** -(element.mantissa_bits + 1))  # from there on amax rounds up to the next binade
    elif rule is ScaleRule.ROUND:
        bound = element.max * (1 + 2.0 ** -(fmt.scale.mantissa_bits + 1))  # just below a midpoint of scales
    elif isinstance(rule, ScaleRule):
        return 1.0
    else:
        from lpsim.formats import reference

        maxima = [n / 256 for n in (*range(128, 256), *range(256, 512, 2))]
        bound = max(amax / reference.block_scale(amax, fmt) for amax in maxima)
    # the largest float32 below the bound
    return bound / element.max if bound * (1 - 2.0**-24) > element.max else 1.0


class _StraightThrough(torch.autograd.Function):
    """Quantization whose derivative is taken to be 1 (Bengio, Léonard, Courville 2013)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, quantizer: Quantizer, axis: int, key: Key | None) -> torch.Tensor:
        return quantizer.quantize(x, axis, key)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return grad, None, None, None


class ReferenceBackend:
    """The oracle on tensors: any format, any device, thousands of times slower than a kernel."""

    name = "reference"

    def supports(self, quantizer: Quantizer, device: torch.device) -> bool:
        return True

    def quantize(
        self, x: torch.Tensor, quantizer: Quantizer, axis: int, key: Key | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        from lpsim.formats import reference

        q = quantizer
        array = x.to("cpu", torch.float32 if x.dtype is not torch.float64 else torch.float64).numpy()
        result = torch.from_numpy(
            reference.quantize(array, q.format, axis, q.rounding, q.overflow, q.random_bits, key)
        ).to(x)
        return result if out is None else out.copy_(result)


class NumbaBackend:
    """Numba kernels for CPU tensors (module `cpu`)."""

    name = "numba"

    def __init__(self) -> None:
        from lpsim.quantization import cpu  # loads Numba

        self._kernels = cpu

    def supports(self, quantizer: Quantizer, device: torch.device) -> bool:
        return device.type == "cpu" and plan.exact(quantizer.format, quantizer.overflow)

    def quantize(
        self, x: torch.Tensor, quantizer: Quantizer, axis: int, key: Key | None, out: torch.Tensor | None
    ) -> torch.Tensor:
        double = x.dtype is _FLOAT64
        p = quantizer.plans.get(double)
        if p is None:
            q = quantizer
            p = q.plans[double] = plan.plan(q.format, q.rounding, q.overflow, q.random_bits, double)
        plain = out is None or (out.is_contiguous() and not out.is_neg())
        if plain and (double or x.dtype is _FLOAT32) and x.is_contiguous():
            target = torch.empty_like(x) if out is None else out
            self._kernels.quantize(x, quantizer.format, axis, p, key, target)
            return target
        source = x if double else x.float()
        order = None
        if not source.is_contiguous():
            order = plan.memory_order(source, quantizer.format, quantizer.rounding)
            source = source.contiguous() if order is None else source
        target = torch.empty_like(source)
        if order is None:
            self._kernels.quantize(source, quantizer.format, axis, p, key, target)
        else:  # dense in another order of axes, and so is the result
            within = source.permute(order), target.permute(order)
            self._kernels.quantize(within[0], quantizer.format, order.index(axis), p, key, within[1])
        return target.to(x.dtype) if out is None else out.copy_(target)


def _load(name: str) -> Backend:
    module, _, attribute = BACKENDS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()


# name -> where its class stands
BACKENDS: dict[str, str] = {
    "numba": "lpsim.quantization.quantizer:NumbaBackend",
    "triton": "lpsim.quantization.gpu:TritonBackend",
    "reference": "lpsim.quantization.quantizer:ReferenceBackend",
    "microxcaling": "lpsim.adapters.microxcaling:MicroxcalingBackend",
    "qtorch": "lpsim.adapters.qtorch:QtorchBackend",
}

_instances: dict[str, Backend] = {}


def backend(name: str) -> Backend:
    """The backend of that name. Raises ValueError for an unknown one, ImportError (how to install it) if absent."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    if name not in _instances:
        _instances[name] = _load(name)
    return _instances[name]


def available_backends() -> list[str]:
    """The names of the backends whose libraries are installed."""
    names = []
    for name in BACKENDS:
        try:
            backend(name)
        except ImportError:
            continue
        names.append(name)
    return names


def _serving(quantizer: Quantizer, device_type: str) -> Backend:
    device = torch.device(device_type)
    if quantizer.backend is not None:
        chosen = backend(quantizer.backend)
        if not chosen.supports(quantizer, device):
            raise ValueError(f"the backend {chosen.name} does not serve {quantizer} on {device_type}; use backend=None")
        return chosen
    for name in ("triton" if device_type == "cuda" else "numba", "reference"):
        candidate = backend(name)
        if candidate.supports(quantizer, device):
            return candidate
    raise AssertionError("the reference serves everything")
