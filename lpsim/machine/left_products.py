"""Products that the recipe leaves to torch: runs them so that their backward pass keeps full precision too.

The products that the machine computes itself pin the settings of `precision` in their own backward pass
(`ops.product`). The backward pass of the others is autograd's; its nodes get hooks here that pin the settings.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from lpsim.machine import precision
from lpsim.machine.arguments import floating


def with_pinned_backward(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], on_cpu: bool) -> Any:
    """func(*args, **kwargs) as torch computes it, in a simulation; its backward pass is pinned as well.

    The backward pass may run after the simulation, when the settings are again what they were. So every node that the
    call adds to autograd's graph pins them while it runs. On the CPU they rarely lower the precision, and it does so
    only if they did when the simulation was entered. A second derivative is not pinned.

    on_cpu: whether the operands are on the CPU.
    """
    if (on_cpu and not precision.low_on_cpu()) or not torch.is_grad_enabled():
        return func(*args, **kwargs)
    seen: set[Any] = {x.grad_fn for x in floating((args, kwargs))}  # before the call, which may write to an operand
    result = func(*args, **kwargs)
    found = [x.grad_fn for x in floating(result)]
    while found:
        node: Any = found.pop()
        if node is None or node in seen or hasattr(node, "variable"):  # a leaf's node outlives the graph
            continue
        seen.add(node)
        node.register_prehook(_begin_node)
        node.register_hook(_end_node)
        found.extend(before for before, _ in node.next_functions)
    return result


_node = threading.local()  # pinned: whether a node of `with_pinned_backward` has pinned the settings in this thread


def _begin_node(grads: Any) -> None:
    if not getattr(_node, "pinned", False):  # still true if the last node raised an error: then its pin serves this one
        precision.pinned().__enter__()
        _node.pinned = True


def _end_node(inputs: Any, outputs: Any) -> None:
    if getattr(_node, "pinned", False):
        _node.pinned = False
        precision.pinned().__exit__(None, None, None)
