"""torch's settings that let a product run in a lower precision than it says; `pinned` keeps them out of a simulation.

TF32 and bfloat16 in place of float32 (cuBLAS, cuDNN, oneDNN; `torch.set_float32_matmul_precision`), and sums of float16
and bfloat16 products that are reduced in these types. They hold for the whole process, so they are pinned as long as
any simulation is entered, and are exactly what they were when the last one is left. A backward pass may come after
that; each of its products then pins them again for as long as it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

_FULL = ("ieee", "none")  # none: nobody has set it, and then it is IEEE
_PARENTS = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))  # what a product without its own setting takes
_PRODUCTS = tuple((backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn"))
_get: Callable[[str, str], str] = torch._C._get_fp32_precision_getter
_set: Callable[[str, str, str], Any] = torch._C._set_fp32_precision_setter


class ChangedPrecisionError(RuntimeError):
    """A setting that a simulation pins was changed inside it: later products ran in a lower precision."""


class _Setting(NamedTuple):
    """A setting with its own value (`read`, RuntimeError where torch will not say) and the value it is pinned to."""

    name: str
    read: Callable[[], Any]
    write: Callable[[Any], Any]
    pin: Callable[[Any], Any]  # of the value it has


def _float32(backend: str, op: str) -> _Setting:
    where = {"generic": "", "cuda": "cudnn." if op in ("conv", "rnn") else "cuda."}.get(backend, f"{backend}.")
    name = f"torch.backends.{where}{'' if op == 'all' else f'{op}.'}fp32_precision"
    return _Setting(
        name,
        lambda: _get(backend, op),
        lambda value: _set(backend, op, value),
        lambda value: value if value in _FULL else "ieee",
    )


def _reduction(dtype: str) -> _Setting:
    name = f"allow_{dtype}_reduced_precision_reduction"
    matmul: Any = torch.backends.cuda.matmul

    def read() -> tuple[bool, ...]:
        split = getattr(matmul, f"{name}_split_k", None)
        return (getattr(matmul, name),) if split is None else (getattr(matmul, name), split)

    def write(value: tuple[bool, ...]) -> None:
        setattr(matmul, name, value if len(value) > 1 else value[0])

    return _Setting(f"torch.backends.cuda.matmul.{name}", read, write, lambda value: (False, *value[1:]))


def _flag(name: str, read: Callable[[], bool], write: Callable[[bool], Any]) -> _Setting:
    return _Setting(name, read, write, lambda value: False)


def _half_accumulation() -> _Setting:
    matmul: Any = torch.backends.cuda.matmul
    return _flag(
        "torch.backends.cuda.matmul.allow_fp16_accumulation",
        lambda: matmul.allow_fp16_accumulation,
        lambda value: setattr(matmul, "allow_fp16_accumulation", value),
    )


_OLD = (  # each writes some of _FLOAT32 too
    _Setting(
        "torch.set_float32_matmul_precision",
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
        lambda value: "highest",
    ),
    _flag("torch.backends.cudnn.allow_tf32", torch._C._get_cudnn_allow_tf32, torch._C._set_cudnn_allow_tf32),
)
_PLACES = (*_PARENTS, *_PRODUCTS)
_FLOAT32 = tuple(_float32(*where) for where in _PLACES)
_OF_CPU = tuple(setting for setting, (where, _) in zip(_FLOAT32, _PLACES, strict=True) if where != "cuda")
_SUMS = (
    _reduction("fp16"),
    _reduction("bf16"),
    _half_accumulation(),
    _flag(
        "torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp",
        torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed,
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp,
    ),
)

Values = dict[_Setting, Any]


def values() -> Values:
    """The own value of every setting; without those of old that contradict newer ones, which torch refuses to say."""
    found = {setting: value for setting in _OLD if (value := _said(setting)) is not None}
    parents = {}
    try:
        for where in _PARENTS:  # a setting that nobody made shows its parent's value: so ask without the parents
            parents[where] = _get(*where)
            _set(*where, "none")
        own = [_get(*where) for where in _PRODUCTS]
    finally:
        for where, value in parents.items():
            _set(*where, value)
    found.update(zip(_FLOAT32, (*parents.values(), *own), strict=True))
    found.update({setting: setting.read() for setting in _SUMS})
    return found


def _said(setting: _Setting) -> Any:
    try:
        return setting.read()
    except RuntimeError:
        return None


def put_back(wanted: Values) -> None:
    """Write `values` of earlier."""
    for setting in (*_OLD, *_SUMS):
        if setting in wanted and _said(setting) != wanted[setting]:
            setting.write(wanted[setting])
    for setting in _FLOAT32:
        setting.write(wanted[setting])


_lock = threading.Lock()
_entered = 0
_before: Values = {}
_low_on_cpu = False  # whether `_before` lets a CPU multiply in less than float32


class _Pinned(AbstractContextManager[None]):
    """See `pinned`. It has no state of its own, so that one object serves all."""

    def __enter__(self) -> None:
        global _entered, _low_on_cpu
        with _lock:
            if _entered == 0:
                _before.clear()
                _before.update(values())
                for setting, value in _before.items():
                    if setting.pin(value) != value:
                        setting.write(setting.pin(value))
                _low_on_cpu = any(_before[setting] not in _FULL for setting in _OF_CPU)
            _entered += 1

    def __exit__(self, *_: object) -> None:
        global _entered
        with _lock:
            _entered -= 1
            if _entered == 0:
                put_back(_before)


_PINNED = _Pinned()


def pinned() -> AbstractContextManager[None]:
    """A context in which float32 products are IEEE float32 and narrow ones are summed in float32.

    May be entered inside itself and in several threads; the last to leave puts the settings back. To enter it inside
    itself costs next to nothing.
    """
    return _PINNED


def low_on_cpu() -> bool:
    """Whether the settings that are pinned at the moment would let a CPU multiply in less than float32."""
    return _low_on_cpu


def changes() -> tuple[str, ...]:
    """What `pinned` had to change, as "NAME: PINNED (was BEFORE)"; nothing while it is not entered."""
    if _entered == 0:
        return ()
    named = [(setting.name, setting.pin(value), value) for setting, value in _before.items()]
    return tuple(f"{name}: {_shown(pin)} (was {_shown(value)})" for name, pin, value in named if pin != value)


def _shown(value: Any) -> str:
    return str(value[0] if isinstance(value, tuple) else value)


def check() -> None:
    """Raises ChangedPrecisionError where a pinned setting is no longer what it was pinned to.

    Looks only while one simulation is entered: another thread's product may have put a setting aside for its duration.
    """
    if _entered != 1:
        return
    for setting in (*_FLOAT32[len(_PARENTS) :], *_SUMS):
        value = setting.read()
        if value != setting.pin(value):
            raise ChangedPrecisionError(
                f"{setting.name} was set to {_shown(value)} inside a simulation, where it is pinned to "
                f"{_shown(setting.pin(value))}: products since then ran in a lower precision than the recipe says. "
                "Set it outside of the `with`; a simulated machine computes narrow products by its recipe"
            )
