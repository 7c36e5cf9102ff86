"""What rounding did to every tensor of every site: one row for each sampled step, site and role.

    with simulate(model, recipe) as sim:
        telemetry = Telemetry(sim, every=100)
        train(model)  # any training loop; its step follows the optimizer
    telemetry.write("telemetry.parquet")

In the two steps after a sampled one, only rounded weights are looked at; in all others nothing is observed, and it
costs nothing. To examine a run that diverged, repeat its last step, which gives the same bits, with every=1; the
training loop does so. Sums are computed in float64 by one thread, so that they do not depend on the number of threads.
Only a model in training mode is observed.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lpsim.formats import BlockFormat, Format
from lpsim.machine import measured
from lpsim.machine.arguments import lies_in
from lpsim.machine.ops import Call, Role
from lpsim.machine.simulate import Simulation
from lpsim.machine.weight_watch import WeightWatch
from lpsim.quantization import storage
from lpsim.quantization.quantizer import Quantizer

if TYPE_CHECKING:
    import pandas

__all__ = ["COSINES", "NonFinite", "Row", "Telemetry"]


@dataclass
class Row:
    """What rounding x to q did, for one role of one site in one step, over all its calls.

    clipped and underflowed are fractions of `elements`, the number of all elements, NaN and Inf included.

    format: the quantizer's; "" for a result that is not rounded. sqnr_db: signal to quantization noise ratio,
    10·log10(Σx² / Σ(q − x)²), over the finite elements. bias: Σ(q − x) / Σ|x|. clipped: |x| is above the largest
    magnitude that its block or format holds. underflowed: q is 0 and x is not. nan, inf: counts in x. amax: the largest
    finite |x|; at attention's site `.scores` that of the scaled and masked logits, also where nothing is rounded.
    scale_log2_*: of the block scales, NaN without blocks; the smallest possible scale, which blocks of zeros get, is
    left out.
    swallowed: of the weights that the optimizer changed between this step and the next, the fraction whose rounded
    value stayed the same. oscillated: of all weights, the fraction that flipped to a neighbouring value in that update
    and back in the next. If the optimizer samples weights, the samples are compared. Only a step's first call counts.
    origin: "nan" or "inf" in the row where the first NaN or Inf was seen (see NonFinite), "" in all others.
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
    oscillated: float = math.nan
    origin: str = ""


COSINES = {"step": "int", "parameter": "str", "cosine": "float", "norm_ratio": "float"}  # columns and their types


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
            row.sqnr_db = measured.decibel(self.signal, self.noise)
            row.bias = self.error / self.magnitude if self.magnitude else 0.0
        row.clipped, row.underflowed = self.clipped / n, self.underflowed / n
        if self.scales:
            exponents = np.log2(torch.cat(self.scales).cpu().numpy().astype(np.float64))  # numpy sums on one thread
            if exponents.size:
                row.scale_log2_mean, row.scale_log2_std = float(exponents.mean()), float(exponents.std())
                row.scale_log2_min, row.scale_log2_max = float(exponents.min()), float(exponents.max())
        return row


@dataclass(frozen=True)
class NonFinite:
    """The first NaN or Inf that was seen: in an operand before it was rounded, or in a result.

    -Inf in the result of a vector op does not count, since attention masks contain it.
    """

    step: int
    site: str
    role: str
    kind: str  # "nan" or "inf"


class Telemetry:
    """Observes every `every`-th step of a simulation, and keeps the rows. A simulation has one at a time.

    first_nonfinite: where and when the first NaN or Inf appeared among what was observed; None while there is none.
    """

    def __init__(self, simulation: Simulation, every: int = 100) -> None:
        if not isinstance(simulation, Simulation):
            raise TypeError(
                f"Telemetry takes the Simulation that `with simulate(model, recipe) as simulation` gives, "
                f"got {type(simulation).__name__}"
            )
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a number of steps, at least 1, got {every!r}")
        if simulation.sampler is not None:
            raise ValueError(
                "this simulation already has a Telemetry or another sampler, which a second would replace; "
                "detach it before, by simulation.sampler = None"
            )
        self.simulation = simulation
        self.every = every
        self.first_nonfinite: NonFinite | None = None
        self._rows: list[Row] = []
        self._cosines: list[tuple[Any, ...]] = []
        self._sums: dict[tuple[str, str], _Sums] = {}
        self._weights = WeightWatch()
        self._parameters = list(simulation.model.parameters())
        simulation.sampler = self._observer_at

    def rows(self) -> list[Row]:
        """One row for each sampled step, site and role, in the order of their first calls."""
        with self.simulation.suspended():
            return [*self._rows, *(sums.finished() for sums in self._sums.values())]

    def table(self) -> pandas.DataFrame:
        """The rows as a frame."""
        return self._tables()["telemetry"].to_pandas()

    def cosines(self) -> pandas.DataFrame:
        """What compare_gradients measured: step, parameter, cosine, norm_ratio."""
        return self._tables()["telemetry_cosines"].to_pandas()

    def _tables(self) -> dict[str, Any]:
        """The two as Arrow tables."""
        import pyarrow

        rows = self.rows()
        observed = {field.name: (str(field.type), [getattr(row, field.name) for row in rows]) for field in fields(Row)}
        columns = list(zip(*self._cosines, strict=True)) or [()] * len(COSINES)
        cosines = {name: (kind, values) for (name, kind), values in zip(COSINES.items(), columns, strict=True)}
        types = {"int": pyarrow.int64(), "float": pyarrow.float64(), "str": pyarrow.string()}
        return {
            name: pyarrow.table({column: pyarrow.array(v, types[kind]) for column, (kind, v) in table.items()})
            for name, table in (("telemetry", observed), ("telemetry_cosines", cosines))
        }

    def parquet(self) -> dict[str, bytes]:
        """Both tables as Parquet files, by name: telemetry, and telemetry_cosines where gradients were compared."""
        from pyarrow.parquet import write_table

        files = {}
        for name, table in self._tables().items():
            if name == "telemetry" or len(table):
                write_table(table, file := io.BytesIO())
                files[name] = file.getvalue()
        return files

    def write(self, path: str | Path) -> None:
        """Write the table as Parquet, and cosines, if there are any, beside it as NAME_cosines.parquet.

        Each file is written under another name and then renamed, so that it is never seen half-written.
        """
        path = Path(path)
        for name, content in self.parquet().items():
            target = path.with_name(name.replace("telemetry", path.stem, 1) + ".parquet")
            partial = target.with_name(f".{target.name}.partial")
            partial.write_bytes(content)
            partial.replace(target)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs to continue the tables as if it had not stopped; torch.save can store it.

        tables: the bytes of the Parquet files. watched: the weights of the last sampled steps that are still looked at.
        """
        tables = {name: torch.frombuffer(bytearray(file), dtype=torch.uint8) for name, file in self.parquet().items()}
        return {"tables": tables, "watched": self._weights.state(self.simulation.step)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; all rows so far are dropped."""
        from pyarrow.parquet import read_table

        tables = {
            name: read_table(io.BytesIO(file.cpu().numpy())).to_pylist() for name, file in state["tables"].items()
        }
        self._sums.clear()
        self._rows = [Row(**values) for values in tables["telemetry"]]
        self._cosines = [tuple(values.values()) for values in tables.get("telemetry_cosines", [])]
        origins = [NonFinite(row.step, row.site, row.role, row.origin) for row in self._rows if row.origin]
        self.first_nonfinite = origins[0] if origins else None
        # a checkpoint of an earlier version has no weights that could be looked at two steps later
        self._weights.load(state.get("watched", []), {(row.step, row.site, row.role): row for row in self._rows})

    @property
    def sampling(self) -> bool:
        """Whether the current step is observed."""
        return self.simulation.step % self.every == 0

    def compare_gradients(self, loss: Callable[[], Tensor]) -> None:
        """Compare the gradients in .grad with the full-precision gradients of `loss()`, parameter by parameter.

        loss: computes the loss of the same batch; it runs outside the simulation, from a copy of the current random
        state.
        cosine is NaN where a gradient is zero; norm_ratio is |simulated| / |full precision|. Raises RuntimeError where
        no parameter has a gradient.
        """
        named = [(name, p) for name, p in self.simulation.model.named_parameters() if p.grad is not None]
        if not named:
            raise RuntimeError("no parameter has a gradient to compare: call backward() first")
        gpus = {p.device for _, p in named if p.is_cuda}  # whose random state a dropout would use
        with self.simulation.suspended(), torch.random.fork_rng(devices=gpus), torch.enable_grad():
            exact = torch.autograd.grad(loss(), [p for _, p in named], allow_unused=True)
            for (name, p), full in zip(named, exact, strict=True):
                if full is None or p.grad is None:
                    continue
                own, theirs, product = _kernels().products(*(_array(t) for t in (p.grad, full)))
                norms = math.sqrt(own), math.sqrt(theirs)
                cosine = product / (norms[0] * norms[1]) if norms[0] and norms[1] else math.nan
                ratio = norms[0] / norms[1] if norms[1] else math.nan
                self._cosines.append((self.simulation.step, name, cosine, ratio))

    def _observer_at(self, step: int) -> Callable[..., None] | None:
        """The observer of a step: of all tensors in a sampled step, of the weights in the two after one, else None."""
        self._rows = self.rows()
        self._sums.clear()
        due = self._weights.due(step)
        return self._observe if step % self.every == 0 else self._observe_weight if due else None

    def _observe(
        self, call: Call, role: Role, quantizer: Quantizer | None, axis: int, x: Tensor, result: Tensor
    ) -> None:
        if not self.simulation.model.training:
            return
        self._observe_weight(call, role, quantizer, axis, x, result)
        key = (call.site.name, role.label)
        sums = self._sums.get(key)
        if sums is None:
            name = "" if quantizer is None else quantizer.format.name
            sums = self._sums[key] = _Sums(Row(call.step, *key, name))
        x, result = x.detach(), result.detach()
        row = sums.row
        row.calls += 1
        row.elements += x.numel()
        nan, inf, minus, amax = _census(x)
        row.nan += nan
        row.inf += inf + minus
        row.amax = max(row.amax, amax)
        if quantizer is not None:
            self._note_rounding(sums, quantizer, axis, x, result)
            if role is Role.FPROP_RHS and row.calls == 1 and lies_in(x, self._parameters):
                self._weights.note(key, row, x, result)
        if self.first_nonfinite is None and (nan or inf or (minus and role is not Role.VECTOR)):
            row.origin = "nan" if nan else "inf"
            self.first_nonfinite = NonFinite(call.step, *key, row.origin)

    def _note_rounding(self, sums: _Sums, quantizer: Quantizer, axis: int, x: Tensor, result: Tensor) -> None:
        signal, noise, error, magnitude, underflowed = rounding_sums(x, result)
        sums.signal += signal
        sums.noise += noise
        sums.error += error
        sums.magnitude += magnitude
        sums.underflowed += underflowed
        clipped, scales = clipping(x, quantizer.format, axis)
        sums.clipped += clipped
        if scales is not None:
            sums.scales.append(scales)

    def _observe_weight(
        self, call: Call, role: Role, quantizer: Quantizer | None, axis: int, x: Tensor, result: Tensor
    ) -> None:
        """Look at a weight in the steps after a sampled one."""
        if quantizer is not None and role is Role.FPROP_RHS and self.simulation.model.training:
            self._weights.look((call.site.name, role.label), call.step, quantizer.format, axis, x, result)


def rounding_sums(x: Tensor, q: Tensor) -> tuple[float, float, float, float, int]:
    """(Σx², Σ(q − x)², Σ(q − x), Σ|x|, how many q are 0 where x is not), over the places where both are finite."""
    sums: tuple[float, float, float, float, int] = _kernels().rounding(_array(x), _array(q))
    return sums


def clipping(x: Tensor, fmt: Format, axis: int) -> tuple[int, Tensor | None]:
    """How many |x| are above the largest magnitude that their block or format holds; and the block scales.

    The scales are None without blocks. The smallest possible scale, which blocks of zeros get, is left out.
    """
    array = _array(x)
    if not isinstance(fmt, BlockFormat):
        return _kernels().above(array, np.broadcast_to(array.dtype.type(fmt.max), array.shape)), None
    wide = x if x.dtype is torch.float64 else x.float()
    axis %= max(x.dim(), 1)
    scale, outer = storage.block_scales(wide, fmt, axis)
    limit = storage.element_scales(wide, scale, fmt, axis) * outer * fmt.element.max
    used = torch.isfinite(scale) & (scale > fmt.scale.min_normal)
    return _kernels().above(array, _array(limit)), (scale * outer)[used].flatten()


def _array(x: Tensor) -> np.ndarray[Any, Any]:
    """The elements in order, as float32 or float64; of a sparse tensor those of the dense one."""
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    dense = x.detach().to_dense() if x.layout is not torch.strided else x.detach()
    array: np.ndarray[Any, Any] = dense.to("cpu", dtype).contiguous().view(-1).numpy()
    return array


def _census(x: Tensor) -> tuple[int, int, int, float]:
    """How many NaN, +Inf and −Inf, and the largest finite magnitude."""
    if not x.numel():
        return 0, 0, 0, 0.0
    low, high = (bound.item() for bound in torch.aminmax(x.view(-1) if x.is_contiguous() else x.flatten()))
    if math.isfinite(low) and math.isfinite(high):
        return 0, 0, 0, max(abs(low), abs(high))
    return _kernels().census(_array(x))


@functools.cache
def _kernels() -> Any:
    from lpsim.machine import telemetry_kernels

    return telemetry_kernels
