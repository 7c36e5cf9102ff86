"""The public name of `lpsim.machine.compare`: formats compared on tensors, before anything is trained."""

from lpsim.machine.compare import compare, pareto_front, product_counts

__all__ = ["compare", "pareto_front", "product_counts"]
