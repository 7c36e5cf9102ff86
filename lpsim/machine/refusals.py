"""What a simulation refuses, as it could not see it or would quantize something else: each with what to do instead."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn


def check_module(path: str, module: nn.Module) -> None:
    """Raises TypeError for a module whose ops torch functions do not show."""
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(f"{path} is a scripted module: its ops cannot be seen. Simulate the model before torch.jit")
    if getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule":
        raise TypeError(f"{path} is compiled: its ops cannot be seen. Simulate the model before torch.compile")
    if isinstance(module, nn.DataParallel):
        raise TypeError(f"{path} is DataParallel, whose threads cannot be seen; use DistributedDataParallel")


def run_uncompiled(stack: ExitStack) -> None:
    """Until `stack` ends, what torch.compile compiled runs as it was written: compiled code calls no torch function.

    Raises RuntimeError inside a compiled function.
    """
    refusal = "a simulation cannot be entered inside a compiled function: enter it around the call"
    if torch.compiler.is_dynamo_compiling():
        raise RuntimeError(refusal)
    try:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
    except RuntimeError as error:
        raise RuntimeError(refusal) from error


def refuse_strange(x: Tensor) -> None:
    """Raises NotImplementedError for an operand of a product that is complex, or stands for others: what would be
    quantized is not what is multiplied.
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
