"""Other libraries as backends, each with a list of where its results differ from our definition.

An adapter translates a Quantizer into the library's own settings and calls it; it corrects nothing. It is used only if
a Quantizer names it. In: a tensor and a Quantizer. Out: the library's result. It imports formats and
quantization; conformance uses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from lpsim.quantization.quantizer import Quantizer


@runtime_checkable
class Adapter(Protocol):
    """What an adapter adds to `quantizer.Backend`."""

    def departures(self, quantizer: Quantizer) -> tuple[str, ...]:
        """Where results differ from the oracle's for a supported quantizer, one reason each; empty: nowhere."""
        ...
