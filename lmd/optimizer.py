"""LMD as a torch.optim.Optimizer: groups, state, samples in place, step. The mathematics is in lmd/update.py."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import zip_longest
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lmd import plain, update
from lmd.plain import Weight
from lmd.priors import PRIORS

PARAMETERIZATIONS = ("shared", "split")
NONFINITE = ("raise", "skip")
POSTERIOR_DRAW = 1 << 31  # draws of posterior_samples start here, draws of training at 0
MASTER_DTYPE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
Replacement = Callable[[dict[str, Any], list[Weight]], list[Tensor]]


class LMD(Optimizer):
    """Log-Normal Multiplicative Dynamics (after Nishida et al., arXiv:2506.17768; the update is derived in
    lmd/README.md).

    The parameter tensors hold the posterior means E[w]. A training step draws weights, takes the gradient there and
    steps the means:

        with optimizer.sampled_params():
            loss = model(x, y)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    A gradient taken outside `sampled_params` (or with noise_scale 0) is taken at the mean, and `step` treats it so.

    Arguments (all but mc_samples, nonfinite and fused may be set per group): lr: alpha in [0, 1], in units of
        log-weight per step: a median moves by at most the factor exp(+-lr), decay apart. 0.01 to 0.05. betas: (beta1
        for the step's direction, beta2 for the momentum kept), each in [0, 1). weight_decay: delta >= 0, the strength
        of the prior relative to the unit step; lr * weight_decay < 1. Under the log-normal prior |log(m / m0)| stays
        below 1 / weight_decay. 0.05 to 0.3. noise_scale: sigma in [0, 4], the standard deviation of log theta; 0
        draws nothing. 0 to 0.1. For a schedule assign group["noise_scale"] between steps; the means stay what they
        are. prior: "log-normal", "half-normal", "exponential", "flat" or "constant" (lmd/priors.py). The shared
        parameterization takes "log-normal" and "flat". entropy: whether the half-normal and exponential priors keep
        the entropy's -1 (the exact KL). kappa: > 0; m0 = kappa times the standard deviation of the initial weights
        (lmd/update.py: initial_center). Small is the sparse regime, large is close to an additive update. Read at a
        parameter's first step or sample, not again. parameterization: "shared" (m+ m- fixed; one state vector) or
        "split" (m+ and m- free; three). mc_samples: how many times `sampled_params` is entered per step; > 1 needs
        the shared parameterization. nonfinite: what `step` does when a gradient holds NaN or an infinity: "raise"
        FloatingPointError before anything changes, or "skip" the step and count it in `skipped_steps`. fused: take
        the fused backend where there is one (lmd/kernels.py on CPU); False: lmd/plain.py everywhere. seed: 64 bits;
        equal seeds and gradients give equal trajectories, bit for bit.

    Parameters of bfloat16 and float16 get a float32 master copy in the state. Sparse gradients are refused
    (RuntimeError), complex and integer parameters too (TypeError); parameters without a gradient are left alone.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.03,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.1,
        noise_scale: float = 0.05,
        *,
        prior: str = "log-normal",
        entropy: bool = True,
        kappa: float = 1.0,
        parameterization: str = "shared",
        mc_samples: int = 1,
        nonfinite: str = "raise",
        fused: bool = True,
        seed: int = 0,
    ) -> None:
        if not isinstance(mc_samples, int) or mc_samples < 1:
            raise ValueError(f"mc_samples must be a positive integer, not {mc_samples!r}")
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be one of {NONFINITE}, not {nonfinite!r}")
        self.mc_samples = mc_samples
        self.nonfinite = nonfinite
        self.fused = fused
        self._sampling = False  # a sample or the median is in place of the means
        self._draws = 0  # samples taken since the last step
        defaults = {
            "lr": lr,
            "betas": betas,
            "weight_decay": weight_decay,
            "noise_scale": noise_scale,
            "prior": prior,
            "entropy": entropy,
            "kappa": kappa,
            "parameterization": parameterization,
            "seed": seed,
            "step": 0,
            "skipped_steps": 0,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as torch does.

        Raises ValueError for a setting out of range, TypeError for a parameter of an integer or complex dtype.
        """
        super().add_param_group(param_group)
        try:
            _check_dtypes(self.param_groups[-1])
            _check_settings(self.param_groups[-1], self.mc_samples)
        except Exception:
            self.param_groups.pop()
            raise

    # --- samples in place of the means ---

    @contextmanager
    def sampled_params(self) -> Iterator[None]:
        """Within the block the parameters hold a sample of the posterior; afterwards the means, also after an
        exception.

        The memory of the means is left alone: `data` points elsewhere within the block, and what is written there is
        dropped. backward() belongs inside; called later it raises, as after any change in place.

        The sample is a function of the seed and the step: entered again before `step`, the block gives the same
        sample, so gradients may be accumulated over several blocks. With mc_samples = S > 1 the blocks go through S
        samples in turn and each exit leaves in `grad` the running average of the weight-scaled gradients, expressed
        at the mean; enter S times (or a multiple) a step. Free where noise_scale is 0. Raises RuntimeError when
        nested.
        """
        draw = self._draws % self.mc_samples
        earlier: dict[Tensor, Tensor] = {}
        with self._replaced(partial(self._drawn, draw=draw, what="sample")):
            self._draws += 1
            if self.mc_samples > 1:
                earlier = self._set_gradients_aside()
            try:
                yield
            except BaseException:
                for p, gradient in earlier.items():
                    p.grad = gradient
                raise
        if self.mc_samples > 1:
            self._average_gradients(earlier, draw)

    @contextmanager
    def median_params(self) -> Iterator[None]:
        """Within the block the parameters hold the posterior medians m+ - m-; afterwards the means."""

        def medians(group: dict[str, Any], weights: list[Weight]) -> list[Tensor]:
            return [weight.mean * math.exp(-0.5 * group["noise_scale"] ** 2) for weight in weights]

        with self._replaced(medians):
            yield

    def posterior_samples(self, count: int) -> Iterator[AbstractContextManager[None]]:
        """`count` blocks, each with its own posterior sample in place, for averaging predictions:

            for sample in optimizer.posterior_samples(8):
                with sample:
                    probability += model(x).softmax(-1) / 8

        The samples depend on the seed and the step, differ from those of training and do not change it.
        """
        for index in range(count):
            yield self._replaced(partial(self._drawn, draw=POSTERIOR_DRAW + index, what="sample"))

    @contextmanager
    def _replaced(self, values: Replacement) -> Iterator[None]:
        """Puts values(group, weights) in place of the parameters that have noise, and those back on the way out."""
        if self._sampling:
            raise RuntimeError("a posterior sample is already in place: leave that block first")
        self._sampling = True
        means: list[tuple[Tensor, Tensor]] = []
        try:
            with torch.no_grad():
                for group, numbered in self._numbered_params():
                    if group["noise_scale"] > 0.0:
                        noisy = [(i, p) for i, p in numbered if p.requires_grad]
                        found = values(group, self._weights(group, noisy)) if noisy else []
                        means += [(p, p.data) for _, p in noisy]
                        _point((p for _, p in noisy), found)
            yield
        finally:
            _point((p for p, _ in means), [mean for _, mean in means])
            self._sampling = False

    def _drawn(self, group: dict[str, Any], weights: list[Weight], draw: int, what: str) -> list[Tensor]:
        """`what` of each weight, "sample" (theta+ - theta-) or "total" (theta+ + theta-), from the backend that
        serves it.
        """
        values = [weight.mean for weight in weights]
        for backend, places in self._backends(values):
            drawn = getattr(backend, what)(group, [weights[i] for i in places], draw)
            for i, value in zip(places, drawn, strict=True):
                values[i] = value
        return values

    def _set_gradients_aside(self) -> dict[Tensor, Tensor]:
        """Takes the gradients of earlier samples away, so that backward starts from none."""
        earlier = {}
        for _, numbered in self._numbered_params():
            for _, p in numbered:
                if p.grad is not None:
                    earlier[p], p.grad = p.grad, None
        return earlier

    @torch.no_grad()
    def _average_gradients(self, earlier: dict[Tensor, Tensor], draw: int) -> None:
        """grad <- earlier + g (theta+ + theta-) / (S E[theta+ + theta-]); `step` multiplies by the expectation."""
        for group, numbered in self._numbered_params():
            present = [(i, p) for i, p in numbered if p.grad is not None]
            weights = self._weights(group, present)
            noisy = weights and group["noise_scale"] > 0.0
            totals = self._drawn(group, weights, draw, "total") if noisy else []
            for (_, p), weight, total in zip_longest(present, weights, totals):
                gradient: Tensor = p.grad / self.mc_samples  # type: ignore[operator, assignment]
                if total is not None:
                    gradient = gradient * (total / update.total(weight.mean, weight.center, group["noise_scale"], None))
                p.grad = gradient.to(p.dtype)
        for p, gradient in earlier.items():
            p.grad = gradient if p.grad is None else p.grad + gradient

    # --- state ---

    def _numbered_params(self) -> Iterator[tuple[dict[str, Any], list[tuple[int, Tensor]]]]:
        """Every group with its parameters, numbered through all groups; the number keys a parameter's noise."""
        first = 0
        for group in self.param_groups:
            yield group, list(enumerate(group["params"], first))
            first += len(group["params"])

    def _weights(self, group: dict[str, Any], numbered: list[tuple[int, Tensor]]) -> list[Weight]:
        """The numbered parameters with their state, which is made from their present values the first time."""
        weights = []
        for index, p in numbered:
            state = self.state[p]
            if not state:
                dtype = MASTER_DTYPE.get(p.dtype, p.dtype)
                state["m0"] = update.initial_center(p, group["kappa"])
                shared = group["parameterization"] == "shared"
                for name in ("v",) if shared else ("v_plus", "v_minus", "log_center"):
                    state[name] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
                if dtype != p.dtype:
                    state["master"] = p.detach().to(dtype)
            weights.append(Weight(index, state.get("master", p), state))
        return weights

    def _backends(self, tensors: list[Tensor]) -> Iterator[tuple[ModuleType, list[int]]]:
        """The backends that serve the tensors, each with the places of its tensors in the list."""
        fused = [i for i, tensor in enumerate(tensors) if _is_fusible(tensor)] if self.fused else []
        if fused:
            from lmd import kernels  # not before it is needed: it loads Numba

            yield kernels, fused
        if len(fused) < len(tensors):
            yield plain, sorted(set(range(len(tensors))) - set(fused))

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
        """As torch's, except that state keeps its dtype (torch would cast it to the parameter's) and is copied, not
        aliased.

        Raises ValueError for the other parameterization's state: split has a free sqrt(m+ m-) for every weight and
        two momenta, shared has neither, so no conversion continues the same trajectory. The weights themselves carry
        over: load them into the model and start a fresh optimizer.
        """
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            theirs, ours = saved.get("parameterization"), group["parameterization"]
            if theirs not in PARAMETERIZATIONS:
                raise ValueError("this is not a state of LMD: its groups have no parameterization")
            if theirs != ours:
                raise ValueError(
                    f"this state was saved with parameterization={theirs!r}, the optimizer has {ours!r}; build "
                    f"LMD(..., parameterization={theirs!r}) to continue it, or start afresh from the model's weights"
                )
        super().load_state_dict(state_dict)
        saved_ids = [i for saved in state_dict["param_groups"] for i in saved["params"]]
        ours_in_order = [p for group in self.param_groups for p in group["params"]]
        for saved_id, p in zip(saved_ids, ours_in_order, strict=True):
            for name, value in state_dict["state"].get(saved_id, {}).items():
                if isinstance(value, Tensor):
                    self.state[p][name] = value.detach().to(p.device, copy=True)
        self._draws = 0

    def __getstate__(self) -> dict[str, Any]:
        own = {name: self.__dict__[name] for name in ("mc_samples", "nonfinite", "fused", "_sampling", "_draws")}
        return {**super().__getstate__(), **own}

    # --- step ---

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the means. Gradients are read, never changed.

        With a closure (which clears the gradients, computes the loss, calls backward and returns the loss) it is
        evaluated under mc_samples samples, and the mean of the losses is returned. Raises RuntimeError inside
        `sampled_params`, without any gradient, with a sparse gradient, or when the number of samples taken is no
        multiple of mc_samples; FloatingPointError for a NaN or infinite gradient where nonfinite is "raise".
        """
        if self._sampling:
            raise RuntimeError("step inside sampled_params would update a sample: leave the block first")
        loss = None if closure is None else self._evaluate(closure)
        if self._draws % self.mc_samples:
            raise RuntimeError(
                f"sampled_params ran {self._draws} times since the last step, mc_samples is {self.mc_samples}"
            )
        with torch.no_grad():
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
        return losses[0] if len(losses) == 1 else sum(losses) / len(losses)

    def _update(self, at_sample: bool) -> None:
        for group in self.param_groups:
            _check_settings(group, self.mc_samples)
        gradients = self._gradients()
        found = list(gradients.values())
        finite = all(backend.finite([found[i] for i in places]) for backend, places in self._backends(found))
        if not finite and self.nonfinite == "raise":
            raise FloatingPointError("a gradient holds NaN or an infinity; nonfinite='skip' would skip such a step")
        for group, numbered in self._numbered_params():
            if finite:
                present = [(i, p) for i, p in numbered if i in gradients]
                weights = self._weights(group, present)
                for backend, places in self._backends([weight.mean for weight in weights]):
                    chosen = [weights[i] for i in places]
                    backend.step(group, chosen, [gradients[weight.number] for weight in chosen], at_sample)
                for _, p in present:
                    if "master" in self.state[p]:
                        p.copy_(self.state[p]["master"])
            group["step"] += 1
            group["skipped_steps"] += not finite

    def _gradients(self) -> dict[int, Tensor]:
        """The gradients there are, by the number of their parameter, in the dtype and the layout of the mean."""
        gradients = {}
        for _, numbered in self._numbered_params():
            for index, p in numbered:
                gradient = p.grad
                if gradient is None:
                    continue
                if gradient.is_sparse:
                    raise RuntimeError("LMD needs dense gradients: build the embedding with sparse=False")
                if gradient.dtype in MASTER_DTYPE:
                    gradient = gradient.to(MASTER_DTYPE[gradient.dtype])
                gradients[index] = gradient.contiguous() if p.is_contiguous() else gradient
        if not gradients:
            raise RuntimeError("no parameter has a gradient: call backward() before step()")
        return gradients


def _point(params: Iterable[Tensor], values: list[Tensor]) -> None:
    """Points parameters at other memory; a graph that has saved one of them is told, so that its backward raises."""
    changed = []
    for p, value in zip(params, values, strict=True):
        p.data = value if value.dtype == p.dtype else value.to(p.dtype)
        changed.append(p)
    torch.autograd.graph.increment_version(changed)


def _is_fusible(tensor: Tensor) -> bool:
    """Whether lmd/kernels.py serves a tensor of this device, dtype and layout."""
    return tensor.is_cpu and tensor.dtype == torch.float32 and tensor.is_contiguous()


def _check_dtypes(group: dict[str, Any]) -> None:
    """Raises TypeError for a parameter of an integer or complex dtype."""
    for p in group["params"]:
        if not p.is_floating_point():
            raise TypeError(f"LMD optimizes real floating-point parameters, not {p.dtype}")


def _check_settings(group: dict[str, Any], mc_samples: int) -> None:
    """Raises ValueError for a setting out of range; called in every step, since schedules change them."""

    def require(condition: bool, name: str, what: str) -> None:
        if not condition:
            raise ValueError(f"{name} must be {what}, not {group[name]!r}")

    betas, prior, parameterization = group["betas"], group["prior"], group["parameterization"]
    for name in ("lr", "weight_decay", "noise_scale"):
        require(math.isfinite(group[name]) and group[name] >= 0.0, name, "finite and at least 0")
    require(group["lr"] <= 1.0, "lr", "at most 1, a factor of e a step")
    require(group["noise_scale"] <= 4.0, "noise_scale", "at most 4, a factor of 50 a standard deviation")
    require(math.isfinite(group["kappa"]) and group["kappa"] > 0.0, "kappa", "finite and above 0")
    require(len(betas) == 2 and all(0.0 <= beta < 1.0 for beta in betas), "betas", "two numbers in [0, 1)")
    require(group["lr"] * group["weight_decay"] < 1.0, "weight_decay", "below 1 / lr")
    require(prior in PRIORS, "prior", f"one of {tuple(PRIORS)}")
    require(parameterization in PARAMETERIZATIONS, "parameterization", f"one of {PARAMETERIZATIONS}")
    require(isinstance(group["seed"], int) and 0 <= group["seed"] < 2**64, "seed", "an integer of 64 bits")
    if parameterization == "shared" and not PRIORS[prior].keeps_product:
        raise ValueError(
            f"prior {prior!r} moves the product m+ m-, which the shared parameterization holds fixed: "
            "use parameterization='split', or prior='log-normal' or 'flat'"
        )
    if parameterization == "split" and mc_samples > 1:
        raise ValueError(
            "mc_samples > 1 needs parameterization='shared': the averages of g theta+ and g theta- do not both fit "
            "into the one gradient that clipping and GradScaler act on"
        )
