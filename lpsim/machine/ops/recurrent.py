"""LSTM, GRU and plain recurrent layers, written as the matrix products and vector ops that they consist of.

The products are "ih" (input · W_ihᵀ, one for all time steps), "hh" (hidden · W_hhᵀ, one for each time step) and "hr"
(an LSTM's projection). Each wgrad of "hh" sums over the batch; the steps are then added in the compute dtype. The
vector ops are "sum" (pre-activations), "gates" (after activation), "cell" and "hidden". All layers and directions are
calls of the same sites.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lpsim.machine.ops.site import Call, Composite

State = tuple[Tensor, ...]


class _Step:
    """One direction of one layer: its weights, and the calls of its time steps, which begin at `first`."""

    def __init__(self, calls: dict[str, Call], n: int, steps: int, weights: Sequence[Tensor], biased: bool) -> None:
        self.w_ih, self.w_hh, *rest = weights
        self.b_ih = rest[0] if biased else None
        self.b_hh = rest[1] if biased else None
        self.w_hr = rest[-1] if len(rest) % 2 else None
        self.calls, self.layer, self.first = calls, n, n * steps

    def inputs(self, x: Tensor) -> Tensor:
        """What the inputs of all time steps contribute to the pre-activations: x [T * B, I] -> [T * B, gates * H]."""
        return self.calls["ih"].at(self.layer).gemm(x, self.w_ih, self.b_ih, rhs_axis=-1)

    def recurrent(self, t: int, h: Tensor) -> Tensor:
        return self.calls["hh"].at(self.first + t).gemm(h, self.w_hh, self.b_hh, rhs_axis=-1)

    def projected(self, t: int, h: Tensor) -> Tensor:
        return h if self.w_hr is None else self.calls["hr"].at(self.first + t).gemm(h, self.w_hr, rhs_axis=-1)

    def rounded(self, part: str, t: int, x: Tensor) -> Tensor:
        return self.calls[part].at(self.first + t).vector(x)


def _calls(composite: Composite, layers: int, steps: int) -> dict[str, Call]:
    """The first call of each part; as many calls are reserved as all layers and time steps need."""
    calls = {part: composite.part(part, layers * steps) for part in ("hh", "hr", "sum", "gates", "cell", "hidden")}
    return {"ih": composite.part("ih", layers), **calls}


def _lstm_step(step: _Step, t: int, x: Tensor, state: State) -> State:
    h, c = state
    i, f, g, o = step.rounded("sum", t, x + step.recurrent(t, h)).chunk(4, -1)
    gates = torch.cat([torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)], -1)
    i, f, g, o = step.rounded("gates", t, gates).chunk(4, -1)
    c = step.rounded("cell", t, f * c + i * g)
    return step.projected(t, step.rounded("hidden", t, o * torch.tanh(c))), c


def _gru_step(step: _Step, t: int, x: Tensor, state: State) -> State:
    (h,) = state
    x_r, x_z, x_n = x.chunk(3, -1)
    h_r, h_z, h_n = step.recurrent(t, h).chunk(3, -1)
    r, z = step.rounded("gates", t, torch.sigmoid(torch.cat([x_r + h_r, x_z + h_z], -1))).chunk(2, -1)
    n = step.rounded("cell", t, torch.tanh(x_n + r * h_n))
    return (step.rounded("hidden", t, n + z * (h - n)),)


def _simple_step(activation: Callable[[Tensor], Tensor]) -> Callable[[_Step, int, Tensor, State], State]:
    def run(step: _Step, t: int, x: Tensor, state: State) -> State:
        return (step.rounded("hidden", t, activation(x + step.recurrent(t, state[0]))),)

    return run


def _direction(
    run: Callable[[_Step, int, Tensor, State], State],
    step: _Step,
    x: Tensor,
    sizes: Sequence[int],
    initial: State,
    reverse: bool,
) -> tuple[Tensor, State]:
    """One layer in one direction over packed steps x [Σ sizes, I]: outputs and final state. `sizes` never increase."""
    chunks = step.inputs(x).split(list(sizes))
    outputs: list[Tensor] = []
    ended: list[State] = []
    state = tuple(s[: sizes[-1 if reverse else 0]] for s in initial)
    for t in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        active = state[0].shape[0]
        if sizes[t] < active:  # forward: the last sequences have ended
            ended.append(tuple(s[sizes[t] :] for s in state))
            state = tuple(s[: sizes[t]] for s in state)
        elif sizes[t] > active:  # backward: further sequences begin
            state = tuple(torch.cat([s, s0[active : sizes[t]]]) for s, s0 in zip(state, initial, strict=True))
        state = run(step, t, chunks[t], state)
        outputs.append(state[0])
    final = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True)) if ended else state
    return torch.cat(outputs[::-1] if reverse else outputs), final


def _layers(run: Callable[[_Step, int, Tensor, State], State], states: int) -> Callable[..., tuple[Tensor, ...]]:
    """torch.lstm, torch.gru and torch.rnn_*, with both signatures: for padded and for packed sequences."""

    def packed(
        composite: Composite,
        x: Tensor,
        sizes: Sequence[int],
        initial: Sequence[Tensor],
        params: Sequence[Tensor],
        biased: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> tuple[Tensor, ...]:
        directions = 2 if bidirectional else 1
        per_step = len(params) // (num_layers * directions)
        calls = _calls(composite, num_layers * directions, len(sizes))
        finals: list[State] = []
        for layer in range(num_layers):
            outputs = []
            for direction in range(directions):
                n = layer * directions + direction
                step = _Step(calls, n, len(sizes), params[n * per_step : (n + 1) * per_step], biased)
                out, final = _direction(run, step, x, sizes, tuple(s[n] for s in initial), direction == 1)
                outputs.append(out)
                finals.append(final)
            x = torch.cat(outputs, -1) if bidirectional else outputs[0]
            if dropout > 0 and layer < num_layers - 1:
                x = F.dropout(x, dropout, train)
        return (x, *(torch.stack(parts) for parts in zip(*finals, strict=True)))

    def layers(composite: Composite, input: Tensor, second: Any, *args: Any) -> tuple[Tensor, ...]:
        if isinstance(second, Tensor) and not second.is_floating_point():  # data, batch_sizes, hx, params, ...
            initial = args[0] if states == 2 else (args[0],)
            return packed(composite, input, second.tolist(), initial, *args[1:])
        *rest, batch_first = args
        initial = second if states == 2 else (second,)
        x = input.transpose(0, 1) if batch_first else input  # [T, B, I]
        steps, batch = x.shape[:2]
        out, *final = packed(composite, x.reshape(steps * batch, -1), [batch] * steps, initial, *rest)
        out = out.view(steps, batch, -1)
        return (out.transpose(0, 1) if batch_first else out, *final)

    return layers


def _cell(run: Callable[[_Step, int, Tensor, State], State], states: int) -> Callable[..., State | Tensor]:
    """torch.lstm_cell, torch.gru_cell and torch.rnn_*_cell: one step."""

    def cell(
        composite: Composite,
        input: Tensor,
        hx: Sequence[Tensor] | Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> State | Tensor:
        biased = b_ih is not None and b_hh is not None
        weights = [w_ih, w_hh, b_ih, b_hh] if biased else [w_ih, w_hh]
        step = _Step(_calls(composite, 1, 1), 0, 1, weights, biased)  # type: ignore[arg-type]
        state = run(step, 0, step.inputs(input), tuple(hx) if states == 2 else (hx,))  # type: ignore[arg-type]
        return state if states == 2 else state[0]

    return cell


_relu_step, _tanh_step = _simple_step(torch.relu), _simple_step(torch.tanh)
lstm, gru, rnn_tanh, rnn_relu = (
    _layers(run, n) for run, n in ((_lstm_step, 2), (_gru_step, 1), (_tanh_step, 1), (_relu_step, 1))
)
lstm_cell, gru_cell, rnn_tanh_cell, rnn_relu_cell = (
    _cell(run, n) for run, n in ((_lstm_step, 2), (_gru_step, 1), (_tanh_step, 1), (_relu_step, 1))
)
