"""What a setting may be while it is tuned, and how a value is put into a config."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.training.config import Config
from experiments.training.settings import names_near

DIGITS = 4  # significant ones of a value that is tried: a rate is to be read and typed
EDGE = 0.1  # a value in the outer tenth of its range lies at its edge
NOT_TUNED = ("seed", "grid", "device")


@dataclass(frozen=True)
class Uniform:
    """Every number from low to high alike. Raises ValueError unless both are finite and low < high."""

    low: float
    high: float

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{type(self).__name__}.{name} must be a finite number, is {value!r}")
        if not self.low < self.high:
            raise ValueError(f"{type(self).__name__}: low must be below high, got {self.low:g} and {self.high:g}")

    def at(self, share: float) -> float:
        """The value at that share of the way from low to high, to 4 digits; share in [0, 1]."""
        value = float(f"{self._value(share):.{DIGITS}g}")
        return float(min(max(value, self.low), self.high))

    def share(self, value: float) -> float:
        """Where in the range a value lies, in [0, 1]."""
        return (value - self.low) / (self.high - self.low)

    def edge(self, value: float) -> str | None:
        """ "lower" or "upper" where the value lies in the outer tenth of the range."""
        share = self.share(value)
        return "lower" if share < EDGE else "upper" if share > 1 - EDGE else None

    def to_dict(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "log": isinstance(self, LogUniform)}

    def _value(self, share: float) -> float:
        return self.low + share * (self.high - self.low)


@dataclass(frozen=True)
class LogUniform(Uniform):
    """Every factor from low to high alike: right for rates. Raises ValueError unless 0 < low < high."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low <= 0:
            raise ValueError(f"LogUniform: low must be positive, is {self.low:g}; Uniform may begin at 0")

    def share(self, value: float) -> float:
        return math.log(value / self.low) / math.log(self.high / self.low)

    def _value(self, share: float) -> float:
        return self.low * (self.high / self.low) ** share


@dataclass(frozen=True)
class Choice:
    """One of the values, which have no order.

    Raises: ValueError for fewer than two values, for equal ones, and for what JSON cannot hold.
    """

    values: Sequence[Any]

    def __post_init__(self) -> None:
        try:
            texts = [json.dumps(value, allow_nan=False) for value in self.values]
        except (TypeError, ValueError) as error:
            raise ValueError(f"Choice: values must be texts, numbers, None or tuples of them ({error})") from None
        if len(texts) < 2 or len(set(texts)) < len(texts):
            raise ValueError(f"Choice: needs two or more different values, got {', '.join(texts) or 'none'}")

    def at(self, share: float) -> Any:
        return self.values[min(int(share * len(self.values)), len(self.values) - 1)]

    def edge(self, value: Any) -> None:
        """A choice has no edge."""

    def to_dict(self) -> dict[str, Any]:
        return {"values": list(self.values)}


Range = Uniform | LogUniform | Choice


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with other settings, named by their place: {"optimizer.lr": 0.01, "clip_norm": 2.0}.

    Raises: ValueError for a setting that there is not, naming close ones, and for a value that it cannot have.
    """
    for path, value in values.items():
        if path in NOT_TUNED:
            raise ValueError(f"{path} is no setting to tune")
        config = _replaced(config, path.split("."), value, path)
    return config


def _replaced(part: Any, names: Sequence[str], value: Any, path: str) -> Any:
    known = [field.name for field in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else []
    if names[0] not in known:
        there = f"; there are: {names_near(names[0], known)}" if known else ""
        raise ValueError(f"{path}: {type(part).__name__} has no field {names[0]!r}{there}")
    inner = value if len(names) == 1 else _replaced(getattr(part, names[0]), names[1:], value, path)
    return dataclasses.replace(part, **{names[0]: inner})
