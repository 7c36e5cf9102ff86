"""The public name of `lpsim.machine.attribution`: which rounding costs what."""

from lpsim.machine.attribution import BY, attribute, interactions, parts

__all__ = ["BY", "attribute", "interactions", "parts"]
