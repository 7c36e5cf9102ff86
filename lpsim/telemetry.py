"""What rounding did to every tensor of every site: sampled steps, one row a step, site and role.

    with simulate(model, recipe) as sim:
        telemetry = Telemetry(sim, every=100)
        for step in range(steps):
            sim.step = step
            ...
    telemetry.write("telemetry.parquet")

Between sampled steps nothing is observed and nothing is paid. A run that diverges is looked into by resuming it, bit
for bit, with every=1. Sums run in the order of the elements, in float64, so that they do not depend on the number of
threads. Only a model in training mode is observed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lpsim import storage
from lpsim.formats import BlockFormat
from lpsim.ops import Call, Role
from lpsim.quantizer import Quantizer

if TYPE_CHECKING:
    import pandas

    from lpsim.simulate import Simulation


@dataclass
class Row:
    """One role of one site in one step, all its calls together. Fractions are of `elements`, NaN and Inf included.

    format: of the quantizer, "" for a result that nothing rounds. sqnr_db: 10·log10(Σx² / Σ(q − x)²), over the finite
    elements. bias: Σ(q − x) / Σ|x|. clipped: |x| above the largest magnitude of its block or format. underflowed: q is
    0 and x is not. nan, inf: counts in x. scale_log2_*: of the block scales, NaN without blocks; those with the
    smallest scale, which blocks of zeros have, are left out.
    swallowed: of the weights that changed until the next step, the fraction whose rounded value did not.
    """

    step: int
    site: str
    role: str
    format: str
    calls: int = 0
    elements: int = 0
    sqnr_db: float = math.nan
    bias: float = math.nan
    clipped: float = 0.0
    underflowed: float = 0.0
    nan: int = 0
    inf: int = 0
    amax: float = 0.0
    scale_log2_mean: float = math.nan
    scale_log2_std: float = math.nan
    scale_log2_min: float = math.nan
    scale_log2_max: float = math.nan
    swallowed: float = math.nan


@dataclass
class _Sums:
    """What a Row is computed from."""

    row: Row
    signal: float = 0.0
    noise: float = 0.0
    error: float = 0.0
    magnitude: float = 0.0
    clipped: int = 0
    underflowed: int = 0
    scales: list[Tensor] = field(default_factory=list)

    def finished(self) -> Row:
        row, n = self.row, max(self.row.elements, 1)
        if row.format:
            row.sqnr_db = 10 * math.log10(self.signal / self.noise) if self.signal and self.noise else math.inf
            row.bias = self.error / self.magnitude if self.magnitude else 0.0
        row.clipped, row.underflowed = self.clipped / n, self.underflowed / n
        if self.scales:
            exponents = torch.cat(self.scales).double().log2()
            if len(exponents):
                row.scale_log2_mean, row.scale_log2_std = exponents.mean().item(), exponents.std(correction=0).item()
                row.scale_log2_min, row.scale_log2_max = exponents.min().item(), exponents.max().item()
        return row


@dataclass(frozen=True)
class NonFinite:
    """The first NaN or Inf that was seen: in an operand before it was rounded, or in a result.

    -Inf in the result of a vector op does not count: attention masks are made of it.
    """

    step: int
    site: str
    role: str
    kind: str  # "nan" or "inf"


class Telemetry:
    """Observes a simulation every `every` steps, and keeps the rows.

    first_nonfinite: where and when the first NaN or Inf appeared among what was observed; None while there is none.
    """

    def __init__(self, simulation: Simulation, every: int = 100) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a number of steps, at least 1, got {every!r}")
        self.simulation = simulation
        self.every = every
        self.first_nonfinite: NonFinite | None = None
        self._rows: list[Row] = []
        self._cosines: list[dict[str, Any]] = []
        self._sums: dict[tuple[str, Role], _Sums] = {}
        self._weights: dict[tuple[str, Role], tuple[Row, Tensor, Tensor]] = {}
        self._parameters = {p.untyped_storage().data_ptr() for p in simulation.model.parameters()}
        simulation.sampler = self._observer_at

    def rows(self) -> list[Row]:
        """One a sampled step, site and role, in the order of their first call."""
        with self.simulation.suspended():
            return [*self._rows, *(sums.finished() for sums in self._sums.values())]

    def table(self) -> pandas.DataFrame:
        """The rows as a frame."""
        import pandas

        return pandas.DataFrame([asdict(row) for row in self.rows()], columns=list(Row.__dataclass_fields__))

    def cosines(self) -> pandas.DataFrame:
        """What compare_gradients measured: step, parameter, cosine, norm_ratio."""
        import pandas

        return pandas.DataFrame(self._cosines, columns=["step", "parameter", "cosine", "norm_ratio"])

    def write(self, path: str | Path) -> None:
        """The table as Parquet, written to another name first; cosines, if any, beside it as NAME_cosines.parquet."""
        path = Path(path)
        tables = {path: self.table()}
        if self._cosines:
            tables[path.with_name(f"{path.stem}_cosines.parquet")] = self.cosines()
        for target, table in tables.items():
            partial = target.with_name(f".{target.name}.partial")
            table.to_parquet(partial, index=False)
            partial.replace(target)

    @property
    def sampling(self) -> bool:
        """Whether the current step is observed."""
        return self.simulation.step % self.every == 0

    def compare_gradients(self, loss: Callable[[], Tensor]) -> None:
        """Compare the gradients in .grad with those that `loss()` has in full precision, parameter by parameter.

        loss: computes the loss of the same batch; it runs outside the simulation, with the random state of now.
        cosine is NaN where a gradient is zero; norm_ratio is |simulated| / |full precision|.
        """
        named = [(name, p) for name, p in self.simulation.model.named_parameters() if p.grad is not None]
        with self.simulation.suspended(), torch.random.fork_rng(devices=[]), torch.enable_grad():
            exact = torch.autograd.grad(loss(), [p for _, p in named], allow_unused=True)
            for (name, p), full in zip(named, exact, strict=True):
                if full is None or p.grad is None:
                    continue
                a, b = p.grad.double().flatten(), full.double().flatten()
                norms = a.norm().item(), b.norm().item()
                cosine = (a @ b).item() / (norms[0] * norms[1]) if norms[0] and norms[1] else math.nan
                ratio = norms[0] / norms[1] if norms[1] else math.nan
                row = {"step": self.simulation.step, "parameter": name, "cosine": cosine, "norm_ratio": ratio}
                self._cosines.append(row)

    def _observer_at(self, step: int) -> Callable[..., None] | None:
        """What observes the step that begins: everything, the weights after a sampled step, or nothing."""
        self._rows = self.rows()
        self._sums.clear()
        if step % self.every == 0:
            return self._observe
        if self._weights and step == next(iter(self._weights.values()))[0].step + 1:
            return self._observe_weight
        self._weights.clear()
        return None

    def _observe(
        self, call: Call, role: Role, quantizer: Quantizer | None, axis: int, x: Tensor, result: Tensor
    ) -> None:
        if not self.simulation.model.training:
            return
        self._observe_weight(call, role, quantizer, axis, x, result)
        key = (call.site.name, role)
        sums = self._sums.get(key)
        if sums is None:
            name = "" if quantizer is None else quantizer.format.name
            sums = self._sums[key] = _Sums(Row(call.step, call.site.name, role.label, name))
        x = x.detach()
        signal, noise, error, magnitude, underflowed, nan, inf, minus, amax = _moments(x, result.detach())
        row = sums.row
        row.calls += 1
        row.elements += x.numel()
        row.nan += nan
        row.inf += inf + minus
        row.amax = max(row.amax, amax)
        sums.signal += signal
        sums.noise += noise
        sums.error += error
        sums.magnitude += magnitude
        sums.underflowed += underflowed
        if quantizer is not None:
            self._note_limits(sums, quantizer, axis, x)
            if role is Role.FPROP_RHS and x.untyped_storage().data_ptr() in self._parameters:
                self._weights[key] = (row, x.clone(), result.detach())
        if self.first_nonfinite is None and (nan or inf or (minus and role is not Role.VECTOR)):
            self.first_nonfinite = NonFinite(call.step, call.site.name, role.label, "nan" if nan else "inf")

    def _note_limits(self, sums: _Sums, quantizer: Quantizer, axis: int, x: Tensor) -> None:
        fmt = quantizer.format
        if not isinstance(fmt, BlockFormat):
            sums.clipped += int((x.abs() > fmt.max).sum())
            return
        wide = x if x.dtype is torch.float64 else x.float()
        axis %= max(x.dim(), 1)
        scale, outer = storage.block_scales(wide, fmt, axis)
        limit = storage.expanded(scale * outer * fmt.element.max, tuple(x.shape), fmt, axis)
        sums.clipped += int((wide.abs() > limit).sum())
        used = torch.isfinite(scale) & (scale > fmt.scale.min_normal)
        sums.scales.append((scale * outer)[used].flatten())

    def _observe_weight(
        self, call: Call, role: Role, quantizer: Quantizer | None, axis: int, x: Tensor, result: Tensor
    ) -> None:
        """A weight a step after it was sampled: did rounding swallow its update?"""
        previous = self._weights.get((call.site.name, role))
        if previous is None or previous[0].step + 1 != call.step or previous[1].shape != x.shape:
            return
        row, before, rounded = previous
        changed = x.detach() != before
        n = int(changed.sum())
        row.swallowed = int((changed & (result.detach() == rounded)).sum()) / n if n else math.nan


def _moments(x: Tensor, q: Tensor) -> tuple[Any, ...]:
    """(Σx², Σ(q − x)², Σ(q − x), Σ|x|, underflowed, NaN, +Inf, −Inf, max |x|); sums over the finite elements."""
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    arrays = (t.to("cpu", dtype).contiguous().view(-1).numpy() for t in (x, q))
    return _kernel()(*arrays)


@functools.cache
def _kernel() -> Callable[..., tuple[Any, ...]]:
    import numba

    @numba.njit(cache=True, nogil=True)
    def moments(x, q):  # type: ignore[no-untyped-def]
        signal = noise = error = magnitude = amax = 0.0
        underflowed = nan = inf = minus = 0
        for i in range(x.size):
            a, b = numba.float64(x[i]), numba.float64(q[i])
            if math.isfinite(a) and math.isfinite(b):
                e, size = b - a, abs(a)
                signal += a * a
                noise += e * e
                error += e
                magnitude += size
                underflowed += b == 0 and a != 0
                amax = max(amax, size)
            else:
                nan += math.isnan(a)
                inf += a == math.inf
                minus += a == -math.inf
        return signal, noise, error, magnitude, underflowed, nan, inf, minus, amax

    return moments
