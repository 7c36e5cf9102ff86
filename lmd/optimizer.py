"""LMD as a torch.optim.Optimizer: groups, state, samples in place, step. The mathematics is in lmd/update.py."""

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lmd import plain, update
from lmd.plain import MASTER_DTYPE
from lmd.settings import (
    PARAMETERIZATIONS,
    Group,
    check_dtypes,
    check_settings,
    check_shapes,
    check_state,
    check_whole,
    in_numbers,
)

NONFINITE = ("raise", "skip")
LR, WEIGHT_DECAY, NOISE_SCALE = 0.01, 0.5, 0.05  # defaults, here and in lmd.for_model
POSTERIOR_DRAW = 1 << 31  # draws of posterior_samples start here, draws of training at 0

# A TorchFunctionMode (a simulated machine, a default device) is for the model: the optimizer's own calls pass it by.
OUTSIDE_MODES: Any = torch._C.DisableTorchFunction
OUTSIDE_COMPILER: Any = torch._disable_dynamo  # torch.compile would trace Numba's compiler; as torch does, loaded late

Values = Callable[[Group, plain.Plan], list[Tensor]]  # what to put in place of a plan's parameters


class LMD(Optimizer):
    """Log-Normal Multiplicative Dynamics (after Nishida et al., arXiv:2506.17768; derived in lmd/README.md).

    The parameter tensors hold the posterior means E[w]. A training step draws weights, takes the gradient there and
    steps the means:

        with optimizer.sampled_params():
            loss = model(x, y)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    A gradient taken outside `sampled_params` (or with noise_scale 0) is taken at the mean, and `step` treats it so.

    Arguments (all but mc_samples, nonfinite, fused and foreach may be set per group):
        lr: alpha in [0, 1], in units of log-weight per step: a median moves by at most the factor exp(+-lr), decay
            apart. 0.005 to 0.03.
        betas: (beta1 for the step's direction, beta2 for the momentum kept), each in [0, 1).
        weight_decay: delta >= 0, the strength of the prior relative to the unit step; lr * weight_decay < 1. Under
            the log-normal prior |log(m / m0)| stays below 1 / weight_decay. 0.3 to 0.6; the larger, the larger kappa.
        noise_scale: sigma in [0, 4], the standard deviation of log theta; 0 draws nothing. 0 to 0.1. For a schedule
            assign group["noise_scale"] between steps; the means stay what they are.
        prior: "log-normal", "half-normal", "exponential", "flat" or "constant" (lmd/priors.py). The shared
            parameterization takes "log-normal" and "flat".
        entropy: whether the half-normal and exponential priors keep the entropy's -1 (the exact KL).
        weight_scaling: whether gradients are scaled by the weights, G+- = +-g theta+-, as the posterior's objective
            has it; False takes G+- = +-g, for ablations.
        saturation: >= 0; the size of u, in root mean squares of its tensor, from which a step has full length. Below,
            it is proportional to u, so that a weight whose gradient is next to nothing keeps still. 0: the bare sign.
        kappa: > 0; m0 = kappa times the standard deviation of the initial weights (lmd/update.py: start).
            Small is the sparse regime, large is close to an additive update. Read at a parameter's first step or
            sample, not again.
        parameterization: "shared" (m+ m- fixed; one state vector) or "split" (m+ and m- free; three).
        mc_samples: how many times `sampled_params` is entered per step; > 1 needs the shared parameterization.
        nonfinite: what `step` does when a gradient holds NaN or an infinity: "raise" FloatingPointError before
            anything changes, or "skip" the step and count it in `skipped_steps`.
        fused: take the fused backend where there is one (lmd/cpu.py on CPU; lmd/gpu.py on GPU, with Triton).
        foreach: elsewhere take a group's parameters as one vector (lmd/foreach.py); False: one by one (lmd/plain.py).
        seed: 64 bits; equal seeds and gradients give equal trajectories, bit for bit.

    Parameters of bfloat16 and float16 get a float32 master copy in the state. A sparse gradient is the dense one that
    it stands for. Parameters of other dtypes (complex, integer, 8-bit) are refused (TypeError); parameters without a
    gradient are left alone.
    """

    beside: Sequence[Optimizer] = ()  # what else steps with this one: a step needs a gradient of any

    def __init__(
        self,
        params: Any,
        lr: float = LR,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = WEIGHT_DECAY,
        noise_scale: float = NOISE_SCALE,
        *,
        prior: str = "log-normal",
        entropy: bool = True,
        weight_scaling: bool = True,
        saturation: float = 0.1,
        kappa: float = 3.0,
        parameterization: str = "shared",
        mc_samples: int = 1,
        nonfinite: str = "raise",
        fused: bool = True,
        foreach: bool = False,
        seed: int = 0,
    ) -> None:
        if not isinstance(mc_samples, int) or mc_samples < 1:
            raise ValueError(f"mc_samples must be a positive integer, not {mc_samples!r}")
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {NONFINITE}, not {nonfinite!r}")
        self.mc_samples = mc_samples
        self.nonfinite = nonfinite
        self.fused = fused
        self.foreach = foreach
        self._sampling = False  # a sample or the median is in place of the means
        self._sharded = False  # whether some parameter is a DTensor, as after fully_shard
        self._draws = 0  # samples taken since the last step
        self._plans: list[tuple[int, plain.Plan]] = []  # with the numbers of their groups
        self._signature: list[Any] = []  # of the parameters and states that the plans were made for
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "noise_scale": noise_scale,
            "prior": prior,
            "entropy": entropy,
            "weight_scaling": weight_scaling,
            "saturation": saturation,
            "kappa": kappa,
            "parameterization": parameterization,
            "seed": seed,
            "step": 0,
            "skipped_steps": 0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group, as torch does.

        Raises ValueError for a setting out of range or of the whole optimizer, and for a parameter that is sharded in
        another way than fully_shard's, TypeError for a parameter of another dtype than real ones of 16, 32 or 64 bits.
        """
        super().add_param_group(param_group)
        try:
            check_whole(self.param_groups[-1])
            check_dtypes(self.param_groups[-1])
            check_settings(self.param_groups[-1], self.mc_samples)
            for p in filter(_is_sharded, self.param_groups[-1]["params"]):
                from lmd import sharded

                sharded.check(p)
                self._sharded = True
        except Exception:
            self.param_groups.pop()
            raise

    # --- samples in place of the means ---

    @contextmanager
    def sampled_params(self) -> Iterator[None]:
        """Within the block the parameters hold a posterior sample; afterwards the means, also after an exception.

        The memory of the means is left alone: `data` points elsewhere within the block, and what is written there is
        dropped. backward() belongs inside; called later it raises, as after any change in place.

        The sample is a function of the seed and the step: entered again before `step`, the block gives the same
        sample, so gradients may be accumulated over several blocks. With mc_samples = S > 1 the blocks go through S
        samples in turn and each exit leaves in `grad` the running average of the weight-scaled gradients, expressed
        at the mean (without weight_scaling of the gradients themselves); enter S times (or a multiple) a step; a block
        that ends in an exception counts for nothing. Free where noise_scale is 0. Raises RuntimeError when nested.
        """
        draw = self._draws % self.mc_samples
        earlier: dict[Tensor, Tensor] = {}
        with self._replaced(_sample(draw)):
            self._draws += 1
            if self.mc_samples > 1:
                with OUTSIDE_MODES():
                    earlier = self._set_gradients_aside()
            try:
                yield
            except BaseException:
                if self.mc_samples > 1:  # as if the block had not been entered
                    self._draws -= 1
                    for p in chain.from_iterable(group["params"] for group in self.param_groups):
                        p.grad = earlier.get(p)
                raise
        if self.mc_samples > 1:
            with torch.no_grad(), OUTSIDE_MODES():
                self._average_gradients(earlier, draw)

    @contextmanager
    def median_params(self) -> Iterator[None]:
        """Within the block the parameters hold the posterior medians m+ - m-; afterwards the means."""

        def medians(group: Group, plan: plain.Plan) -> list[Tensor]:
            return [mean * math.exp(-0.5 * group["noise_scale"] ** 2) for mean in plan.means]

        with self._replaced(medians):
            yield

    def posterior_samples(self, count: int) -> Iterator[AbstractContextManager[None]]:
        """`count` blocks, each with its own posterior sample in place, for averaging predictions:

            for sample in optimizer.posterior_samples(8):
                with sample:
                    probability += model(x).softmax(-1) / 8

        The samples depend on the seed and the step, differ from those of training and do not change it.
        """
        for draw in range(POSTERIOR_DRAW, POSTERIOR_DRAW + count):
            yield self._replaced(_sample(draw))

    @contextmanager
    def _replaced(self, values: Values) -> Iterator[None]:
        """Puts values(group, plan) in place of the parameters that have noise, and the means back on the way out."""
        if self._sampling:
            raise RuntimeError("a posterior sample is already in place: leave that block first")
        self._sampling = True
        changed: list[plain.Plan] = []
        try:
            self._replace(values, changed)
            yield
        finally:
            self._restore(changed)
            self._sampling = False

    @OUTSIDE_COMPILER
    def _replace(self, values: Values, changed: list[plain.Plan]) -> None:
        with torch.inference_mode(False), torch.no_grad(), OUTSIDE_MODES():  # the state is for training, too
            for group, plan in self._planned() if any(group["noise_scale"] for group in self.param_groups) else ():
                if group["noise_scale"] > 0.0:
                    found = plan.rounded(values(group, plan))
                    changed.append(plan)
                    plan.replace(found)
        if changed:
            torch.clear_autocast_cache()  # casts of the means, which autocast would take for the sample's

    @OUTSIDE_COMPILER
    def _restore(self, changed: list[plain.Plan]) -> None:
        with OUTSIDE_MODES():
            for plan in changed:
                plan.restore()
        if changed:
            torch.clear_autocast_cache()

    def _set_gradients_aside(self) -> dict[Tensor, Tensor]:
        """Takes the gradients of earlier samples away, so that backward starts from none."""
        earlier = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    earlier[p], p.grad = p.grad, None
        return earlier

    @OUTSIDE_COMPILER
    def _average_gradients(self, earlier: dict[Tensor, Tensor], draw: int) -> None:
        """grad <- earlier + g (theta+ + theta-) / (S E[theta+ + theta-]); `step` multiplies by the expectation."""
        for group, plan in self._planned():
            sigma = group["noise_scale"]
            totals = plan.total(group, draw) if group["weight_scaling"] else [None] * len(plan.params)
            for i, (p, total) in enumerate(zip(plan.params, totals, strict=True)):
                if p.grad is not None:
                    ratio = 1.0 if total is None else total / update.total(plan.means[i], plan.center(i), sigma, None)
                    if plan.shards is not None and isinstance(ratio, Tensor):
                        ratio = plan.shards.joined(i, ratio)
                    gradient = p.grad.to_dense() if p.grad.is_sparse else p.grad
                    p.grad = (gradient * (ratio / self.mc_samples)).to(p.dtype)
        for p, gradient in earlier.items():
            p.grad = gradient if p.grad is None else p.grad + gradient

    # --- state ---

    def _planned(self) -> list[tuple[Group, plain.Plan]]:
        """Every group with each of its plans; they are made anew when a parameter or its state is not what it was."""
        if self._sign() != self._signature:
            self._plans, first = [], 0
            for i, group in enumerate(self.param_groups):
                self._plans += [(i, plan) for plan in self._make_plans(group, first)]
                first += len(group["params"])
            self._signature = self._sign()
        groups = [*map(in_numbers, self.param_groups)]
        return [(groups[i], plan) for i, plan in self._plans]

    def _sign(self) -> list[Any]:
        lists = [group["params"] for group in self.param_groups]
        params, states = [*chain.from_iterable(lists)], map(dict.values, self.state.values())
        where = map(Tensor.data_ptr, map(_local, params) if self._sharded else params)
        looks = map(attrgetter("requires_grad", "shape"), params)
        return [*map(len, lists), *where, *looks, *map(id, chain.from_iterable(states))]

    def _make_plans(self, group: Group, first: int) -> list[plain.Plan]:
        """The group's parameters that are not frozen, numbered from `first` on, divided among the backends."""
        chosen: dict[tuple[type[plain.Plan], torch.dtype, torch.device, Any], list[tuple[int, Tensor]]] = {}
        for number, p in enumerate(group["params"], first):
            if p.requires_grad:
                self._prepare(p, group)
                dtype, layout = MASTER_DTYPE.get(p.dtype, p.dtype), _layout(p) if self._sharded else None
                chosen.setdefault((self._backend(p), dtype, p.device, layout), []).append((number, p))
        plans = []
        for (backend, _, _, layout), taken in chosen.items():
            numbers, params = map(list, zip(*taken, strict=True))
            states = [self.state[p] for p in params]
            if layout is None:
                plans.append(backend(numbers, params, states))
            else:
                from lmd.sharded import Shards

                plans.append(backend(numbers, params, states, Shards(params)))
        return plans

    def _backend(self, p: Tensor) -> type[plain.Plan]:
        """The fused backend that serves p, loaded when it is first needed, or the readable one."""
        mean = _local(self.state[p].get("master", p))
        if self.fused and mean.is_cpu:
            from lmd import cpu

            if cpu.Plan.serves(mean) and _is_sharded(p):
                from lmd import sharded_cpu

                return sharded_cpu.Plan
            if cpu.Plan.serves(mean):
                return cpu.Plan
        elif self.fused and mean.is_cuda and importlib.util.find_spec("triton"):
            from lmd import gpu

            if gpu.Plan.serves(mean):
                return gpu.Plan
        if self.foreach:
            from lmd import foreach

            return foreach.Plan
        return plain.Plan

    def _prepare(self, p: Tensor, group: Group) -> None:
        """Makes the state of a parameter from its present value, the first time; later it follows the parameter to its
        device, dtype and layout, which kernels rely on, and gets a master when the parameter has become narrow."""
        if p.is_meta:
            raise ValueError(
                "a parameter has no values yet, it is on the meta device: give it some before the first step"
            )
        state, dtype = self.state[p], MASTER_DTYPE.get(p.dtype, p.dtype)
        if not state:
            weights: Any = p.detach()
            weights = weights.full_tensor() if _is_sharded(p) else weights
            state["m0"], state["prior_a"] = update.start(weights, group["kappa"])
            shared = group["parameterization"] == "shared"
            for name in ("v",) if shared else ("v_plus", "v_minus", "log_center"):
                state[name] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
        check_shapes(state, p)
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = value = value.to(p.device, dtype)
                if value.ndim and value.stride() != p.stride():
                    state[name] = torch.empty_like(p, dtype=dtype).copy_(value)
        if dtype != p.dtype and "master" not in state:
            state["master"] = p.detach().to(dtype)
        if "rms" not in state:  # new, or saved by a version before it
            state["rms"] = torch.full((), math.nan, dtype=dtype, device=p.device)
            state.setdefault("prior_a", 0.0)

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because a gradient was not finite."""
        return max(group["skipped_steps"] for group in self.param_groups)

    def state_dict(self) -> dict[str, Any]:
        """As torch's; holds everything that a bit-equal continuation needs.

        Raises RuntimeError while a sample is in place.
        """
        if self._sampling:
            raise RuntimeError("state_dict inside sampled_params would go with sampled weights: leave the block first")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, except that state keeps its dtype (torch would take the parameter's) and is copied, not aliased.
        A setting that the state was saved without, by an earlier version, stays this optimizer's.

        Raises ValueError for a state of parameters of other shapes, and for the other parameterization's state: split
        has a free sqrt(m+ m-) for every weight and two momenta, shared has neither, so no conversion continues the same
        trajectory. The weights themselves carry over: load them into the model and start a fresh optimizer.
        """
        check_state(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            theirs, ours = saved.get("parameterization"), group["parameterization"]
            if theirs not in PARAMETERIZATIONS:
                raise ValueError("this is not a state of LMD: its groups have no parameterization")
            if theirs != ours:
                raise ValueError(
                    f"this state was saved with parameterization={theirs!r}, the optimizer has {ours!r}; build "
                    f"LMD(..., parameterization={theirs!r}) to continue it, or start afresh from the model's weights"
                )
        names, params = ([g["params"] for g in groups] for groups in (state_dict["param_groups"], self.param_groups))
        if [*map(len, names)] == [*map(len, params)]:  # if not, torch says so
            for saved_id, p in zip(chain.from_iterable(names), chain.from_iterable(params), strict=True):
                check_shapes(state_dict["state"].get(saved_id, {}), p)
        before = self.param_groups
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, before, strict=True):
            group.update({name: own[name] for name in self.defaults if name in own and name not in group})
        for saved_id, p in zip(chain.from_iterable(names), chain.from_iterable(params), strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    if _is_sharded(p) and value.ndim:
                        from lmd import sharded

                        value = sharded.laid_out(value, p)
                    self.state[p][name] = value.detach().to(p.device, copy=True)
        self._draws = 0

    def __getstate__(self) -> dict[str, Any]:
        if self._sampling:
            raise RuntimeError("a copy made inside sampled_params would keep the sample: leave the block first")
        names = ("mc_samples", "nonfinite", "fused", "foreach", "_sampling", "_sharded", "_draws")
        own = {name: self.__dict__[name] for name in names}
        return {**super().__getstate__(), **own, "_plans": [], "_signature": []}

    # --- step ---

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the means. Gradients are read, never changed.

        With a closure (which clears the gradients, computes the loss, calls backward and returns the loss) it is
        evaluated under mc_samples samples, and the mean of the losses is returned. Raises RuntimeError inside
        `sampled_params`, without any gradient, or when the number of samples taken is no multiple of mc_samples;
        FloatingPointError for a NaN or infinite gradient where nonfinite is "raise".
        """
        if self._sampling:
            raise RuntimeError("step inside sampled_params would update a sample: leave the block first")
        loss = None if closure is None else self._evaluate(closure)
        if self._draws % self.mc_samples:
            raise RuntimeError(
                f"sampled_params ran {self._draws} times since the last step, mc_samples is {self.mc_samples}"
            )
        with torch.no_grad(), OUTSIDE_MODES():
            self._update(at_sample=self._draws > 0 and self.mc_samples == 1)
        self._draws = 0
        return loss

    def _evaluate(self, closure: Callable[[], Any]) -> Any:
        self._draws = 0
        if self.mc_samples > 1:
            self.zero_grad()
        losses = []
        for _ in range(self.mc_samples):
            with self.sampled_params(), torch.enable_grad():
                losses.append(closure())
        return losses[0] if len(losses) == 1 or any(loss is None for loss in losses) else sum(losses) / len(losses)

    @OUTSIDE_COMPILER
    def _update(self, at_sample: bool) -> None:
        for group in self.param_groups:
            check_settings(group, self.mc_samples)
        work = [(group, plan, plan.gradients()) for group, plan in self._planned()]
        others = (p.grad for other in self.beside for group in other.param_groups for p in group["params"])
        if all(gradient is None for gradient in chain(*(gradients for _, _, gradients in work), others)):
            raise RuntimeError("no parameter has a gradient: call backward() before step()")
        # all plans are asked, whatever the first says: processes that share parameters wait for each other
        finite = all([plan.agreed(plan.finite(gradients)) for _, plan, gradients in work])
        if not finite and self.nonfinite == "raise":
            pairs = [pair for _, plan, gradients in work for pair in zip(plan.params, gradients, strict=True)]
            bad = [tuple(p.shape) for p, gradient in pairs if gradient is not None and not gradient.isfinite().all()]
            raise FloatingPointError(
                f"a gradient holds NaN or an infinity ({len(bad)} of {len(pairs)} parameters, of shapes {bad[:3]}); "
                "nonfinite='skip' would skip such a step"
            )
        if finite:
            for group, plan, gradients in work:
                still = [mean.clone() for mean in plan.means] if group["lr"] == 0.0 else []
                plan.step(group, gradients, at_sample)
                if still:  # a mean that is computed anew is rounded anew
                    torch._foreach_copy_(plan.means, still)
                plan.publish(gradients)
        for group in self.param_groups:
            group["step"] += 1
            group["skipped_steps"] += not finite


def _sample(draw: int) -> Values:
    return lambda group, plan: plan.sample(group, draw)


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, whose class need not be imported for this."""
    return hasattr(tensor, "device_mesh")


def _local(tensor: Any) -> Tensor:
    """What this process has of a tensor."""
    return tensor._local_tensor if _is_sharded(tensor) else tensor


def _layout(tensor: Any) -> Any:
    """How a tensor is sharded; None where it is not."""
    return (tensor.device_mesh, tensor.placements) if _is_sharded(tensor) else None
