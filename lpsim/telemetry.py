"""The public name of `lpsim.machine.telemetry`: what rounding did to every tensor of every site."""

from lpsim.machine.telemetry import COSINES, NonFinite, Row, Telemetry

__all__ = ["COSINES", "NonFinite", "Row", "Telemetry"]
