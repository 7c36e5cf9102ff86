"""What a simulation refuses, because it cannot see it or would round the wrong values. Each error says what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lpsim.formats.rounding import Key
from lpsim.machine.frames import BACKWARD, ROOT, Frame
from lpsim.machine.recipes import Recipe, check_recipe


class UnknownOpError(NotImplementedError):
    """The model called a floating-point function that the table does not list. It would have run in full precision."""


class EscapedProductError(RuntimeError):
    """Matrix products ran in full precision where the simulation cannot see them, such as in a compiled extension."""


class EscapedProductWarning(UserWarning):
    """The same as a warning, for simulations with on_escape="warn"."""


def check_arguments(model: nn.Module, recipe: Recipe, seed: int, audit: bool, on_escape: str) -> None:
    """Raises ValueError or TypeError for arguments that `simulate` cannot make a simulation of."""
    if on_escape not in ("warn", "raise"):
        raise ValueError(f'on_escape must be "warn" or "raise", got {on_escape!r}')
    if on_escape == "raise" and not audit:
        raise ValueError('on_escape="raise" needs audit=True: only the audit sees products that escape')
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"simulate takes an nn.Module, got {type(model).__name__}; call a function from a module's forward"
        )
    check_recipe(recipe)
    Key(seed)  # raises for a seed that random bits cannot be keyed by
    for path, module in model.named_modules():
        _check_module(path or ROOT, module)


def _check_module(path: str, module: nn.Module) -> None:
    """Raises TypeError for a module whose ops a TorchFunctionMode does not see."""
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"{path} is a scripted module: its ops cannot be seen. Simulate the model before torch.jit")
    if getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule":
        raise TypeError(f"{path} is compiled: its ops cannot be seen. Simulate the model before torch.compile")
    if isinstance(module, nn.DataParallel):
        raise TypeError(f"{path} is DataParallel, whose threads cannot be seen; use DistributedDataParallel")


def run_uncompiled(stack: ExitStack) -> None:
    """Until `stack` ends, compiled functions run as ordinary Python: compiled code calls no torch function to be seen.

    Raises RuntimeError inside a compiled function.
    """
    refusal = "a simulation cannot be entered inside a compiled function: enter it around the call"
    if torch.compiler.is_dynamo_compiling():
        raise RuntimeError(refusal)
    try:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
    except RuntimeError as error:
        raise RuntimeError(refusal) from error


NORMS = ("norm", "linalg_norm", "linalg_matrix_norm")


def refuse_singular_values(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises NotImplementedError for norms of a matrix's singular values: their SVD multiplies matrices inside."""
    order = args[1] if len(args) > 1 else kwargs.get("p" if name == "norm" else "ord")
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    of_matrices = len(dim) == 2 if isinstance(dim, tuple | list) else dim is None and args and args[0].dim() > 1
    if order == "nuc" or (name != "norm" and order in (2, -2) and (name == "linalg_matrix_norm" or of_matrices)):
        raise NotImplementedError(
            f"{name} with the order {order!r} is a norm of a matrix's singular values; computing them takes matrix "
            "products that the recipe does not reach. Take the Frobenius norm, or, if the machine is not to simulate "
            "it, call it inside `simulation.suspended()`"
        )


def refuse_strange(x: Tensor) -> None:
    """Raises NotImplementedError for an operand that is complex, or that only stands for the numbers multiplied in the
    end (tensors of torch.func or a trace, nested and meta tensors).
    """
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            "the transforms of torch.func (vmap, grad, jvp) are not simulated: batch by a leading axis, and take "
            "gradients by backward or torch.autograd.grad"
        )
    if x.is_complex():
        raise NotImplementedError("complex products are not simulated: multiply real and imaginary parts")
    if torch.jit.is_tracing():
        raise NotImplementedError("a simulation cannot be traced: call torch.jit.trace outside of it")
    if x.is_nested:
        raise NotImplementedError("nested tensors are not simulated: pad them, and mask the padding")
    if x.device.type == "meta":
        raise NotImplementedError("meta tensors have no values to quantize: simulate on a device that holds them")


def unknown_op(frame: Frame | None, name: str) -> UnknownOpError:
    """The error for a function that no rule exempts, called in `frame`."""
    return UnknownOpError(
        f"{_path(frame)}/{name}: the simulated machine does not know the op {name!r}, so its operands would silently "
        "stay in full precision. Add it to lpsim.machine.ops.WRAPPED: one entry with its class and reason in "
        "lpsim/machine/ops/table.py, and one function if it hides matrix products. If the machine is not to simulate "
        "it, call it inside `simulation.suspended()`"
    )


def hidden_products(frame: Frame | None, name: str) -> UnknownOpError:
    """The error for a function that multiplies matrices, called in `frame`, where other functions are exempt."""
    return UnknownOpError(
        f"{_path(frame)}/{name}: {name!r} multiplies matrices inside, where the recipe does not reach, so "
        "they would silently stay in full precision. If the machine is not to simulate it, call it "
        "inside `simulation.suspended()`; otherwise write it as matrix products, or add it to "
        "lpsim.machine.ops.WRAPPED"
    )


def escaped_products(escaped: Sequence[str]) -> str:
    """What to say of products that the audit saw and the simulation did not."""
    return (
        f"matrix products ran outside the recipe, in full precision: {'; '.join(escaped)}. They were not "
        "called by a Python function of torch, but for example by a compiled extension. Call torch's "
        "function instead; or, if the machine is not to simulate them, call them inside "
        "`simulation.suspended()`"
    )


def left_in_backward(ops: Sequence[str]) -> str:
    """What to say of products that ran in the backward pass outside every module, while the recipe rounds gradients."""
    return (
        f"matrix products ran in full precision in a backward pass of your own ({', '.join(ops)}), in an "
        "autograd.Function or a hook: whether they are dgrad or wgrad cannot be known. To round their operands, add an "
        'override: overrides={"<backward>": Recipe(fprop=...)}, or "<backward>/matmul" for one op; '
        '{"<backward>": Recipe()} leaves them as they are'
    )


class Escapes:
    """Tells of products that ran outside the recipe, each once: by a warning, or an error if on_escape is "raise"."""

    def __init__(self, on_escape: str) -> None:
        self._on_escape = on_escape
        self._told: set[str] = set()

    def tell(self, products: Sequence[str], text: Callable[[Sequence[str]], str]) -> None:
        """Of those that were not told of before, `text`. To be called where a simulation ends."""
        untold = [product for product in products if product not in self._told]
        self._told.update(untold)
        if untold and self._on_escape == "raise":
            raise EscapedProductError(text(untold))
        if untold:
            warnings.warn(text(untold), EscapedProductWarning, stacklevel=3)


def _path(frame: Frame | None) -> str:
    return BACKWARD if frame is None else frame.path
