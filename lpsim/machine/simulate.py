"""`with simulate(model, recipe)`: every floating-point function called inside runs as the recipe's machine runs it.

A TorchFunctionMode sees each call of a torch function, method or operator, and the table `ops.WRAPPED` says how to
simulate it. Nothing in torch is patched and no module is replaced: forward hooks, registered while the context is
entered, tell which module is running. Calls in other threads are not seen. Code compiled by torch.compile runs as
ordinary Python.

Some calls are exempt by rule, because they are not the model's arithmetic:
- functions that take no floating-point tensor or return none (shapes, comparisons, indices), and attribute access;
- everything in Optimizer.step under no_grad; the audit still lists its matrix products;
- calls outside every module that autograd does not record: clipping, weight averages, metrics, data preparation.
  Matrix products there still follow the recipe, and functions that hide products (torch.linalg.solve, torch.cov) raise;
- what hooks or a user's autograd.Function run in the backward pass: `vector` rounds forward results only, and a product
  there may be dgrad or wgrad (see `places.Places`). If the recipe rounds such, it is told of them at the end.

In evaluation, nn.TransformerEncoder and nn.MultiheadAttention use fused kernels, but not while a mode sees their calls.
So where the recipe and all its overrides round nothing, these modules run unseen, and give exactly torch's result.

torch's settings that let products run in a lower precision (TF32, reductions in float16) are pinned inside, for the
whole process and in `suspended` too, and in a backward pass after it; the audit says which were set otherwise. To set
one inside is an error, at the next step or at the end. See `precision`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from lpsim.machine import precision
from lpsim.machine.arguments import autocast, floating, inplace_target, written
from lpsim.machine.audit import Audit, Auditor
from lpsim.machine.frames import BACKWARD, OUTSIDE, Frame
from lpsim.machine.left_products import with_pinned_backward
from lpsim.machine.module_paths import ModulePaths
from lpsim.machine.ops import (
    HIDES_PRODUCTS,
    WRAPPED,
    Call,
    Composite,
    Kind,
    Observer,
    Op,
    Site,
    body,
    inplace_argument,
    op_name,
)
from lpsim.machine.places import Place, Places
from lpsim.machine.recipes import BackwardOperands, Gemm, Recipe
from lpsim.machine.refusals import (
    NORMS,
    EscapedProductError,
    EscapedProductWarning,
    Escapes,
    UnknownOpError,
    check_arguments,
    escaped_products,
    hidden_products,
    left_in_backward,
    refuse_singular_values,
    refuse_strange,
    run_uncompiled,
    unknown_op,
)
from lpsim.machine.steps import OptimizerSteps, RunningSteps

__all__ = [
    "BackwardOperands",
    "EscapedProductError",
    "EscapedProductWarning",
    "Gemm",
    "Recipe",
    "Simulation",
    "UnknownOpError",
    "simulate",
]

Sampler = Callable[[int], Observer | None]
Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_ATTRIBUTE = ("__get__", "__set__", "__delete__")
_NOWHERE = Frame(None, BACKWARD)
_UNCOUNTED: AbstractContextManager[None] = nullcontext()
_FUSED_IN_EVALUATION = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)


def simulate(
    model: nn.Module, recipe: Recipe, seed: int = 0, *, audit: bool = True, on_escape: str = "warn"
) -> Simulation:
    """A context in which `model` runs on the machine that `recipe` describes.

    seed: of all stochastic rounding, an int in [0, 2**64). audit: count what runs in the first step (see
    Simulation.audit); this costs some microseconds per aten op, until `step` first changes. on_escape: what to do at
    the end of the `with` if the audit found matrix products that ran outside the recipe: "warn" gives an
    EscapedProductWarning, "raise" raises an EscapedProductError. Both name the aten op and the module it ran in.

    Raises ValueError for on_escape="raise" without an audit (only the audit sees such products) and for an override
    whose module path matches no module; TypeError for a model that cannot be simulated (compiled, scripted,
    DataParallel).
    """
    return Simulation(model, recipe, seed, audit, on_escape)


class _Mode(TorchFunctionMode):
    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self.simulation = simulation

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handlers = self.simulation._handlers
        handler = handlers.get(func)
        if handler is None:
            handler = handlers[func] = self.simulation._handler(func)
        return handler(func, args, kwargs or {})


class Simulation:
    """The simulated machine; `simulate` makes it. It can be entered with `with` many times, but not inside another one.

    step: the training step. Random bits are keyed by (seed, site, step, call within the step), so that a resumed run
    draws the same bits as an uninterrupted one. By default the step follows the model's optimizers (the module `steps`
    says how, and which optimizers a new process can resume). Once you set it, you must set it in every step.

    While the step follows the optimizers, evaluations (calls that begin with gradients disabled) are numbered apart, so
    they do not change the bits of training. When you set the step yourself, they are numbered together with training:
    then evaluate after the update and before you set the next step.

    part: which of several equal parts of the batch the model gets, from 0, where processes share a batch (data
    parallel). Element i of a part's tensor then draws the random bits that it draws in the tensor of the whole batch,
    of which the part is a contiguous piece (the batch is its first axis); parameters draw the same in every part. That
    holds for operands and results of products, not for vector operations: round those to nearest.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, seed: int = 0, audit: bool = True, on_escape: str = "warn"
    ) -> None:
        check_arguments(model, recipe, seed, audit, on_escape)
        self.model = model
        self.recipe = recipe
        self.seed = seed
        self._observer: Observer | None = None
        self._sampler: Sampler | None = None
        self.part = 0
        self._step = 0
        self._steps: OptimizerSteps | None = OptimizerSteps(model)  # None: the loop sets the step
        self._resumed = False  # whether the step was looked up in the optimizers' states
        self._paths = ModulePaths(model, self._fused if recipe.plain else None)
        self._places = Places(recipe, (path for path, _ in model.named_modules(remove_duplicate=False)))
        self._rounds_vectors = any(r.vector is not None for r in (recipe, *recipe.overrides.values()))
        self._handlers: dict[Any, Handler] = {}
        self._mode = _Mode(self)
        self._stepping = RunningSteps(self._mode, self._paths, lambda: self._counting is None, self._after_step)
        self._auditor: Auditor | None = Auditor(self._running_module) if audit else None
        self._escapes = Escapes(on_escape)
        self._counting: Auditor | None = None  # the auditor, as long as it counts
        self._stack: ExitStack | None = None

    def __enter__(self) -> Simulation:
        if any(isinstance(mode, _Mode) for mode in torch.overrides._get_current_function_mode_stack()):
            raise RuntimeError("a simulation is already running here; its ops would be simulated twice")
        with ExitStack() as stack:
            run_uncompiled(stack)
            stack.enter_context(precision.pinned())
            self._paths.follow(stack)
            self._stepping.follow(stack)
            if self._auditor is not None and not self._auditor.finished:
                self._auditor.pinned = precision.changes()
                stack.callback(self._stop_audit)
                self._auditor.__enter__()
                self._counting = self._auditor
                self._handlers.clear()
            stack.enter_context(self._mode)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, exc_type: Any, exc: Any, traceback: Any) -> None:
        stack, self._stack = self._stack, None
        assert stack is not None
        self._stepping.resume()
        if exc_type is not None:
            self._handlers.clear()  # an op that was missing in the table may be there when this is entered again
            stack.__exit__(exc_type, exc, traceback)
            return
        with stack:
            precision.check()
        if (unmatched := self._places.unmatched()) is not None:
            warnings.warn(unmatched, stacklevel=2)
        known = () if self._auditor is None else self._auditor.escaped
        self._escapes.tell(known, escaped_products)
        self._escapes.tell(self._places.left_in_backward, left_in_backward)

    def _running_module(self) -> str | None:
        frame = self._paths.current()
        return None if frame is None or frame.module is None else frame.path

    @property
    def step(self) -> int:
        """The training step that random bits are keyed by."""
        return self._step

    @step.setter
    def step(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 32:
            raise ValueError(f"step must be an int in [0, 2**32), got {value!r}")
        self._steps = None
        self._begin(value)

    def _begin(self, value: int) -> None:
        """Begin the step `value`."""
        precision.check()
        if value != self._step and self._counting is not None and self._counting.rows:
            self._counting.finish()
            self._stop_audit()
        self._step = value
        if self._sampler is not None:
            self.observer = self._sampler(value)

    @property
    def observer(self) -> Observer | None:
        """A function that is called with every tensor that is rounded and every result; None costs nothing."""
        return self._observer

    @observer.setter
    def observer(self, value: Observer | None) -> None:
        if (value is None) != (self._observer is None):
            self._handlers.clear()
        self._observer = value

    @property
    def sampler(self) -> Sampler | None:
        """A function step -> observer: called with the current step when it is set, then with each new step."""
        return self._sampler

    @sampler.setter
    def sampler(self, value: Sampler | None) -> None:
        self._sampler = value
        self.observer = None if value is None else value(self._step)

    def advance(self) -> None:
        """Go to the next step."""
        self.step += 1

    def audit(self) -> Audit:
        """What ran in the first step: op, class, count, formats and reason; and which matrix products escaped.

        Raises RuntimeError where the simulation was made with audit=False.
        """
        if self._auditor is None:
            raise RuntimeError("this simulation counts nothing: it was made with audit=False")
        return self._auditor.result()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside, torch runs unsimulated; the audit counts the matrix products there as "outside the simulation"."""
        with torch._C.DisableTorchFunction(), self._owned("outside the simulation"):
            yield

    @contextmanager
    def _as_torch_does(self, name: str) -> Iterator[None]:
        """A context in which a module runs unseen, because the recipe rounds nothing."""
        if self._counting is not None:
            self._counting.count(name, Kind.PRODUCT, "-", "left by the recipe, with torch's fused evaluation")
        with torch._C.DisableTorchFunction(), self._owned("left by the recipe"):
            yield

    def _fused(self, module: nn.Module, path: str) -> AbstractContextManager[None] | None:
        """The context for a module that has a fused kernel for evaluation, which it uses only while unseen; or None."""
        if module.training or not isinstance(module, _FUSED_IN_EVALUATION):
            return None
        return self._as_torch_does(type(module).__name__)

    def _stop_audit(self) -> None:
        """End counting, so that later steps cost nothing. Not possible while another dispatch mode is on top."""
        if self._counting is not None and _get_current_dispatch_mode() is self._counting:
            self._counting.__exit__(None, None, None)
            self._counting = None
            self._handlers.clear()

    # What becomes of a function

    def _handler(self, func: Callable[..., Any]) -> Handler:
        name = op_name(func)
        if name in _ATTRIBUTE:
            return _run
        if (op := WRAPPED.get(name)) is None:
            return partial(self._unlisted, name)
        if op.transparent:
            return self._through
        if op.function is not None:
            return partial(self._product, op, op.function)
        handler = self._elementwise(op)
        return partial(self._norm, op.name, handler) if op.name in NORMS else handler

    def _elementwise(self, op: Op) -> Handler:
        if op.kind in (Kind.VECTOR, Kind.REDUCTION) and (self._rounds_vectors or self._observer is not None):
            return partial(self._vector, op)
        if self._counting is None:
            return _run
        reason = "the recipe has no vector format" if op.kind in (Kind.VECTOR, Kind.REDUCTION) else op.reason
        return partial(self._counted, op, reason)

    def _counted(
        self, op: Op, reason: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self._counting is not None:
            self._counting.count(op.name, op.kind, "-", reason)
        return func(*args, **kwargs)

    def _norm(
        self, name: str, handler: Handler, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not self._optimizing():
            refuse_singular_values(name, args, kwargs)
        return handler(func, args, kwargs)

    def _through(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._mode:
            return body(func)(*args, **kwargs)

    def _unlisted(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function that is not in the table, if a rule exempts it or the recipe rounds nothing anywhere."""
        if self.recipe.plain:
            with self._owned("left by the recipe"):
                return func(*args, **kwargs)
        hides_products = name in HIDES_PRODUCTS
        if self._optimizing():
            return self._optimizers(name, hides_products, func, args, kwargs)
        if hides_products and next(floating((args, kwargs)), None) is not None:
            frame = self._paths.current()
            if self._bookkeeping(frame, args, kwargs):
                raise hidden_products(frame, name)
            raise unknown_op(frame, name)
        result = func(*args, **kwargs)
        if next(floating(result), None) is None or next(floating((args, kwargs)), None) is None:
            return result
        frame = self._paths.current()
        if self._bookkeeping(frame, args, kwargs):
            return result
        raise unknown_op(frame, name)

    def _optimizers(
        self, name: str, product: bool, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run an op of the optimizer in full precision; the audit gets a row if it multiplies matrices."""
        if product and self._counting is not None:
            self._counting.count(name, Kind.EXEMPT, "-", "the optimizer")
        with self._owned("the optimizer"):
            return func(*args, **kwargs)

    def _vector(self, op: Op, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        frame = self._paths.current()
        if frame is None or self._bookkeeping(frame, args, kwargs):
            return self._counted(op, "outside the model, and no part of a graph", func, args, kwargs)
        site = self._places.of_op(frame, op.name)
        quantizer = site.recipe.vector
        if quantizer is None:
            result = self._counted(op, "the recipe has no vector format", func, args, kwargs)
            return result if self._observer is None else self._rounded(site, result)
        if self._counting is not None:
            self._counting.count(op.name, op.kind, quantizer.format.name, op.reason)
        target = inplace_target(func, args, kwargs)
        if target is not None and next(floating(target), None) is not None:
            # On a copy: what the op saves for its backward pass must not be rounded afterwards.
            copy = target.clone()
            result = func(copy, *args[1:], **kwargs) if args else func(**{**kwargs, "input": copy})
            return target.copy_(self._call(site).vector(result)) if isinstance(result, Tensor) else result
        result = func(*args, **kwargs)
        if kwargs.get("out") is not None:
            for t in (result,) if isinstance(result, Tensor) else result:
                t.copy_(self._call(site).vector(t))
            return result
        return self._rounded(site, result)

    def _rounded(self, site: Site, result: Any) -> Any:
        if isinstance(result, Tensor):
            return self._call(site).vector(result)
        if isinstance(result, list | tuple):
            call = self._call(site, len(result))
            parts = [call.at(i).vector(x) if isinstance(x, Tensor) else x for i, x in enumerate(result)]
            if isinstance(result, list):
                return parts
            return type(result)(*parts) if hasattr(result, "_fields") else type(result)(parts)
        return result

    def _product(
        self,
        op: Op,
        function: Callable[..., Any],
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        first = next(floating((args, kwargs)), None)
        if first is None:
            return func(*args, **kwargs)
        if op.multiplies is not None and not op.multiplies(*args, **kwargs):
            vector = replace(op, kind=Kind.VECTOR, reason="without a product, as it is called here")
            return self._vector(vector, func, args, kwargs)
        if self._optimizing():
            return self._optimizers(op.name, True, func, args, kwargs)
        place = self._places.of_product(self._paths.current() or _NOWHERE, op)
        if place.left:
            with self._owned("left by the recipe", op, place):
                result = with_pinned_backward(func, args, kwargs, first.is_cpu)
            if self._observer is not None:
                for t in floating(result):
                    self._call(place.first).out(t)
                self._observe_inside(op, place, args, kwargs)
            return result
        refuse_strange(first)
        target = args[0] if inplace_argument(func) == -1 else None
        out = kwargs.pop("out", None) if "out" in kwargs else None
        device = first.device.type
        with self._owned("the recipe", op, place):
            if op.autocasts and torch.is_autocast_enabled(device):
                dtype = torch.float32 if op.widened else torch.get_autocast_dtype(device)
                args, kwargs = autocast(args, dtype), autocast(kwargs, dtype)
                with torch.autocast(device, enabled=False):
                    result = function(self._execution(op, place, args, kwargs), *args, **kwargs)
            elif op.autocasts or not torch.is_autocast_enabled(device):
                result = function(self._execution(op, place, args, kwargs), *args, **kwargs)
            else:
                with torch.autocast(device, enabled=False):  # its products must not be cast one by one
                    result = function(self._execution(op, place, args, kwargs), *args, **kwargs)
        if target is not None:
            return target.copy_(result)
        return result if out is None else written(out, result)

    def _observe_inside(self, op: Op, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Show the observer what torch computed inside a call that was left to it, such as attention's logits."""
        if op.inside is not None:
            part, compute = op.inside
            with self.suspended(), torch.no_grad():
                value = compute(*args, **kwargs)
            self._call(place.sites[part]).vector(value)

    def _execution(self, op: Op, place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | Composite:
        if op.parts:
            return Composite(lambda part, calls: self._call(place.sites[part], calls))
        return self._call(place.sites[op.name], 1 if op.calls is None else op.calls(*args, **kwargs))

    # Steps

    def _call(self, site: Site, calls: int = 1) -> Call:
        evaluation = False
        if self._steps is not None:
            evaluation = not self._paths.training()
            if not (self._resumed or evaluation) and (site.stochastic or self._sampler is not None):
                self._catch_up(self._steps)
        if not site.stochastic:
            return Call(site, self.seed, self._step, 0, self._observer, self.part)
        step, occurrence = self._paths.regions.draw(site, self._step, calls, evaluation)
        return Call(site, self.seed, step, occurrence, self._observer, self.part)

    def _catch_up(self, steps: OptimizerSteps) -> None:
        """Before the step is first used in training, take it from the optimizers' states, as in a resumed run."""
        self._resumed = True
        recorded = steps.recorded()
        if recorded > self._step:
            self._step = recorded  # not by _begin, which would end the audit: it is still the first step
            if self._sampler is not None:
                self.observer = self._sampler(recorded)

    def _bookkeeping(self, frame: Frame | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether an op is not the model's: run by the backward pass, or outside every module and not recorded."""
        if frame is None:
            return True
        if frame.path != OUTSIDE:
            return False
        return not (torch.is_grad_enabled() and any(t.requires_grad for t in floating((args, kwargs))))

    def _optimizing(self) -> bool:
        """Whether Optimizer.step is running, but not a closure that it calls."""
        return self._stepping.any() and not self._paths.inside() and not torch.is_grad_enabled()

    def _after_step(self, optimizer: Any) -> None:
        if self._steps is not None and self._steps.ended(optimizer):
            self._begin(self._step + 1)

    def _owned(self, owner: str, op: Op | None = None, place: Place | None = None) -> AbstractContextManager[None]:
        """A context whose products the audit counts as `owner`'s; with `op`, the call too is counted, at its sites."""
        if self._counting is None:
            return _UNCOUNTED
        if op is not None and place is not None:
            reason = "left by the recipe" if place.left else op.reason
            self._counting.count_product(op, list(place.sites.values()), reason)
        return self._counting.owned(owner)


def _run(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)
