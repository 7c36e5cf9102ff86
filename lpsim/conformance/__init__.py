"""The conformance kit: a format and its backends proved, or the first counterexample.

    print(conformance.check(formats.mxfp6_e3m2))

`check` compares every available backend with the oracle, bit for bit, on the inputs that quantizers often get wrong. It
also tests the oracle itself, against the laws that follow from the definitions.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass

from lpsim.conformance import laws, walk
from lpsim.conformance.laws import ConformanceError
from lpsim.formats import BlockFormat, Format
from lpsim.quantization.quantizer import ScaleClipsWarning

__all__ = ["Certificate", "ConformanceError", "check"]


@dataclass(frozen=True)
class Certificate:
    """What was shown for a format.

    compared: the backends that were found equal to the oracle. departing: those that state where they are not, with
    the reasons. cases: law -> the number of results that it was tested on.
    """

    format: Format
    compared: tuple[str, ...]
    departing: dict[str, tuple[str, ...]]
    cases: dict[str, int]
    time_s: float

    def __str__(self) -> str:
        width = max(map(len, self.cases))
        lines = [f"{self.format.name} conforms ({self.time_s:.1f} s)"]
        lines += [f"  {law.ljust(width)}  {count:>13,}" for law, count in self.cases.items()]
        lines.append(f"  equal to the oracle: {', '.join(self.compared) or 'no other backend serves it here'}")
        for name, reasons in self.departing.items():
            lines.append(f"  not compared: {name}, which departs: {'; '.join(reasons)}")
        return "\n".join(lines)


def check(fmt: Format, exhaustive: bool = False, progress: bool = False) -> Certificate:
    """The certificate of a format that conforms.

    exhaustive: also walk all 2^32 float32 inputs of a scalar format of up to 16 bits, in minutes. progress: with a bar.

    Raises ConformanceError with the first counterexample; ValueError for an exhaustive walk of another format.
    """
    if not isinstance(fmt, Format):
        raise TypeError(f"check takes a format, got {type(fmt).__name__}")
    if exhaustive:
        walk.refuse_unless_walkable(fmt)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScaleClipsWarning)  # the oracle clips, too
        compared, departing = laws.backends_for(fmt)
        element = fmt.element if isinstance(fmt, BlockFormat) else fmt
        cases = {
            "codes decode and encode": laws.codes(element),
            "rounding as defined": laws.roundings(element),
            "monotone, idempotent, odd": laws.order(element),
            "agreement on scalars": laws.scalar_agreement(element),
            "stochastic mean and variance": laws.stochastic(element),
        }
        if isinstance(fmt, BlockFormat):
            cases |= {
                "agreement on blocks": laws.block_agreement(fmt),
                "laws of blocks": laws.blocks(fmt),
                "stochastic mean in blocks": laws.stochastic(fmt),
            }
        cases["storage round trip"] = laws.storage_round_trip(fmt)
        if exhaustive:
            cases |= walk.walk(fmt, progress)
    return Certificate(fmt, compared, departing, cases, time.perf_counter() - start)
