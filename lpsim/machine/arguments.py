"""The tensors in the arguments and results of a torch function: their dtype, which is written to or a parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lpsim.machine.ops import inplace_argument

__all__ = ["autocast", "floating", "inplace_target", "lies_in", "written"]


def inplace_target(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that a call overwrites with its result, as relu_ and relu(inplace=True) do; None if there is none."""
    position = inplace_argument(func)
    if position is None:
        return None
    if position >= 0 and not kwargs.get("inplace", len(args) > position and args[position]):
        return None
    return args[0] if args else kwargs["input"]


def written(out: Tensor, result: Tensor) -> Tensor:
    """`out`, holding the result. Raises RuntimeError where it requires a gradient, as torch does."""
    if result.requires_grad:
        raise RuntimeError("functions with out=... do not support automatic differentiation")
    if out.shape != result.shape:
        out.resize_(result.shape)
    return out.copy_(result)


def floating(value: Any) -> Iterator[Tensor]:
    """The floating-point and complex tensors in a value."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif isinstance(value, dict):
        yield from floating(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for v in value:
            yield from floating(v)


def autocast(value: Any, dtype: torch.dtype) -> Any:
    """The floating-point tensors in `value`, float64 excepted, in the dtype that autocast gives to a product."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype is not torch.float64 else value
    if isinstance(value, dict):
        return {key: autocast(v, dtype) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(autocast(v, dtype) for v in value)
    return value


def lies_in(x: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Whether x is taken for one of the parameters: it lies in the memory of one, as a view or a detached alias does.

    Objects cannot be compared, because an op gets a parameter as a view of it (transposed, a part of it, detached). A
    copy is no parameter, however equal. Memory is looked up anew in each call, because it changes: optimizers that
    sample weights exchange it, and freed memory is given to other tensors.
    """
    place = x.untyped_storage().data_ptr()
    return any(p.untyped_storage().data_ptr() == place for p in parameters)
